"""What the tests of training, runs and the command line share: models as folders on disk, data files, plans."""

import gc
import json
import random
import signal
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from dpsb.adapter import attach
from dpsb.baselines.build import adapt, add_method, lora_xs
from dpsb.baselines.methods import method_named
from dpsb.basis import weight_svd
from dpsb.capture import adapter_train_mode
from dpsb.config import RunConfig
from dpsb.data import Collator, synthetic_examples
from dpsb.losses import IGNORED
from dpsb.models import HEAD_NAMES, add_lora
from dpsb.plan import make_plan, noise_multiplier_for
from dpsb.sampling import bucket_of, length_buckets
from dpsb_accounting import Ledger, LedgerError

PADDED = 16
_WORDS = (
    "the a we you they see buy sell now noon offer cheap free money win prize click here dear friend meeting report "
    "week plan team thanks regards please send file draft review lunch today tomorrow monday friday price deal order "
    "account bank card number call me us ok yes no good bad great late early new old big small first last . , ! ?"
)
WORDS = list(dict.fromkeys(_WORDS.split()))
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>"]
PIECES = ["z", "##an", "##zi", "##bar", "##s", "##ing", "k", "##a", "##b", "##e"]
CANARIES = ("zanzibar-4711", "kilimanjaro-0815")
"""Planted in the texts and labels of every data file; they may turn up nowhere else."""

_home = None


def folder(name):
    """A new folder that lives as long as the test session."""
    global _home
    _home = _home or tempfile.TemporaryDirectory(prefix="dpsb-tests-")
    path = Path(_home.name) / name
    path.mkdir(parents=True, exist_ok=True)
    return path


# --- models as folders

LLAMA_3_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
"""For shapes on the meta device; nothing of that size is made."""


def _settings(**further):
    return {
        "vocab_size": len(SPECIAL + WORDS + PIECES),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        **further,
    }


def _save(model, path):
    for parameter in model.parameters():  # larger than the usual 0.02, so that every layer matters
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    model.save_pretrained(path)


@cache
def bert_folder(pooled=False, id2label=()):
    """A tiny BERT with a WordPiece tokenizer; ``pooled`` says that it averages its tokens, as sentence encoders do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

    path = folder(f"bert-{pooled}-{'-'.join(id2label)}")
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS + PIECES)}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **names).save_pretrained(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if id2label:
            config = BertConfig(**_settings(id2label=dict(enumerate(id2label))))
            _save(BertForSequenceClassification(config), path)
        else:
            _save(BertModel(BertConfig(**_settings())), path)
    if pooled:
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return path


@cache
def llama_folder():
    """A tiny Llama with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    path = folder("llama")
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS + PIECES)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    inputs = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **names).save_pretrained(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = {"bos_token_id": 4, "eos_token_id": 5, "tie_word_embeddings": False, "num_key_value_heads": 2}
        _save(LlamaForCausalLM(LlamaConfig(**_settings(**ids))), path)
    return path


# --- data files


def sentences(count, seed):
    """Sentences of 0 to 12 words; two of them hold a canary, and the last is empty."""
    source = random.Random(seed)
    texts = [" ".join(source.choices(WORDS, k=source.randint(1, 12))) for _ in range(count)]
    texts[1] += f" {CANARIES[0]}"
    texts[2] = f"{CANARIES[0]} {texts[2]}"
    texts[-1] = ""
    return texts


def rows(count=60, seed=0, task="classification"):
    """Rows of a data file. One row has a label that nobody declared: a canary."""
    texts = sentences(count, seed)
    if task == "classification":
        labels = ["spam" if "free" in text or i % 3 == 0 else "ham" for i, text in enumerate(texts)]
        labels[3] = CANARIES[1]
        return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    if task == "pairs":
        return [{"prompt": a, "completion": b} for a, b in zip(texts, sentences(count, seed + 1), strict=True)]
    return [{"text": text} for text in texts]


@cache
def data_file(task="classification", seed=0, count=60):
    """A JSON-lines file of :func:`rows`."""
    path = folder(f"data-{task}-{seed}-{count}") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed, task)))
    return path


# --- plans and runs

calibrated = cache(noise_multiplier_for)
"""The same numbers, computed once a session. Put it in the place of ``dpsb.plan.noise_multiplier_for``."""

RUN = {
    "epsilon": 8.0,
    "steps": 3,
    "expected_batch_size": 12,
    "max_length": PADDED,
    "rank": 4,
    "checkpoint_every": 1,
}


def run_settings(out, kind="classification", /, **changes):
    """Settings of a run that takes about a second."""
    causal = kind == "causal-lm"
    usual = {"task": "causal-lm"} if causal else {"labels": "ham,spam"}
    model, data = llama_folder() if causal else bert_folder(), data_file(kind)
    return {"model": str(model), "data": str(data), "out": str(out), **usual, **RUN, **changes}


def run_config(out, kind="classification", /, **changes):
    return RunConfig(**run_settings(out, kind, **changes))


def options(settings):
    """Settings as command-line arguments."""
    names = {"learning_rate": "lr", "head_learning_rate": "head-lr"}
    given = []
    for name, value in settings.items():
        option = "--" + names.get(name, name).replace("_", "-")
        given += [option] if value is True else [option, str(value)]
    return given


def written(path):
    """Every file below a folder, as bytes by relative name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def fit_plan(**changes):
    """A plan for ``fit``, without calibration."""
    fields = {"num_examples": 24, "expected_batch_size": 8, "steps": 3, "noise_multiplier": 0.7, "delta": 1e-3}
    basis = {"kind": "random", "access": "data_free"}  # that of the conftest's adapters
    return make_plan(**{"epsilon": 99.0, "basis": basis, **fields, **changes})


def examples(count=24, seed=1, vocab=61, kind="bert"):
    """Examples of 1 to 16 random tokens for the models of the conftest."""
    source, found = random.Random(seed), []
    for index in range(count):
        ids = [source.randrange(3, vocab) for _ in range(source.randint(2, PADDED))]
        found.append({"input_ids": ids, "labels": index % 3 if kind == "bert" else [IGNORED, *ids[1:]]})
    return found


def fit_arguments(adapter, data, ledger, *, loss_fn, kind="bert", lr=0.1, optimizer=torch.optim.SGD, **changes):
    """Arguments of ``fit`` for an adapter of the conftest."""
    task = "classification" if kind == "bert" else "causal-lm"
    arguments = {
        "ledger": ledger,
        "optimizer": optimizer(adapter.parameters(), lr=lr),
        "loss_fn": loss_fn,
        "collate": Collator(0),
        "synthetic": synthetic_examples(task, 61, 3, PADDED),
        "max_length": PADDED,
    }
    return (adapter, data), {**arguments, **changes}


def new_ledger(path, **changes):
    path.mkdir(parents=True, exist_ok=True)
    return Ledger.create(path / "ledger.jsonl", fit_plan(**changes))


def charged(path):
    """Training steps that a running process has charged; 0 while its ledger is not there or has no plan yet."""
    try:
        return Ledger.read(path).charged("train")
    except LedgerError:
        return 0


def method_adapter(base, name, rank=4):
    """A training method of ``dpsb.baselines`` on a model of the conftest, in train mode."""
    task = "classification" if hasattr(base, "classifier") else "causal-lm"
    method = method_named(name)
    if method.kind == "cores":
        model = add_lora(base, task, rank)
        adapter = attach(model, (lora_xs if name == "lora-xs" else weight_svd)(model), allow=HEAD_NAMES)
    else:
        adapter = adapt(add_method(base, method, task, rank, "all-linear"), method)
    adapter.model.train()
    adapter_train_mode(adapter)
    return adapter


def bucket(example):
    return bucket_of(len(example["input_ids"]), length_buckets(PADDED))


def ignore_file_size_signal():
    """A write beyond RLIMIT_FSIZE then fails like one on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


# --- memory


def peak_bytes(work):
    """The most that torch's allocator holds at any moment of ``work``, from every single allocation.

    What earlier tests left in cycles must not be freed meanwhile: it would count against what ``work`` holds.
    """
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
    finally:
        gc.enable()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
