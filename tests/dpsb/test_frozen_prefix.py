"""Frozen blocks that run once per example: the same rows, with every kind of model and checkpointing."""

from contextlib import nullcontext

import pytest
import torch
import workbench
from safetensors.torch import load_file
from transformers import (
    ElectraConfig,
    ElectraForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
)

from dpsb.adapter import attach
from dpsb.basis import random
from dpsb.capture import adapter_train_mode
from dpsb.config import ConfigError
from dpsb.data import Collator, synthetic_examples
from dpsb.frozen_prefix import FrozenOutputs, PrefixError, remember_frozen_prefix
from dpsb.losses import classification_loss
from dpsb.models import HEAD_NAMES, add_lora
from dpsb.modes import training_mode
from dpsb.probe import ProbeError, _perturb
from dpsb.run import fine_tune
from dpsb.sampling import length_buckets
from dpsb.train import probe_every_bucket

UPPER = {"bert": r".*layer\.1\..*(query|key|value|dense)", "llama": r".*layers\.1\..*_proj", "gpt2": r".*h\.1\..*c_.*"}
UPPER["gemma2"] = UPPER["llama"]


def adapter_on_top(tiny, kind, checkpointing="none", **options):
    base = tiny.base(kind, **options)
    if checkpointing != "none":
        base.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        base.enable_input_require_grads()
    return tiny.adapter(base, target_modules=UPPER[kind], task_type=None)


class Counter:
    """Counts the rows that pass through the lowest block."""

    def __init__(self, adapter):
        lists = [m for m in adapter.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
        self.rows = 0
        lists[0][0].register_forward_hook(self._count, with_kwargs=True)

    def _count(self, _module, args, kwargs, _output):
        self.rows += len(args[0] if args else kwargs["hidden_states"])


@pytest.mark.parametrize("kind", list(UPPER))
def test_the_next_run_goes_on_from_what_the_same_blocks_computed(tiny, kind):
    batch, outputs = tiny.batch(kind), FrozenOutputs()
    first = adapter_on_top(tiny, kind)
    with remember_frozen_prefix(first.model, outputs):
        tiny.rows(first, tiny.loss[kind], batch)
    second = adapter_on_top(tiny, kind)
    expected = tiny.rows(second, tiny.loss[kind], batch)
    counter = Counter(second)
    with remember_frozen_prefix(second.model, outputs):
        again = tiny.rows(second, tiny.loss[kind], batch)
    assert counter.rows == 0
    assert tiny.distance(again, expected) < 1e-5


def test_the_next_run_of_a_model_whose_blocks_return_tuples(tiny):
    """Nothing is computed there, so nothing says anew how blocks return."""
    config = MPNetConfig(
        **{"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 24, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )
    torch.manual_seed(0)
    state = MPNetForSequenceClassification(config).state_dict()
    batch, outputs, rows = tiny.batch("bert"), FrozenOutputs(), []
    batch = {name: value for name, value in batch.items() if name != "token_type_ids"}
    for _ in range(2):
        model = MPNetForSequenceClassification(config)
        model.load_state_dict(state)
        adapter = tiny.adapter(model, target_modules=r".*layer\.1\..*(q|k|v|dense)", task_type=None)
        with remember_frozen_prefix(adapter.model, outputs):
            rows.append(tiny.rows(adapter, classification_loss, batch))
    assert tiny.distance(rows[0], rows[1]) < 1e-6


@pytest.mark.parametrize("change", ["an embedding", "order", "a frozen block", "another dtype", "the number of blocks"])
def test_what_other_blocks_computed_is_dropped(tiny, change):
    batch, outputs = tiny.batch("bert"), FrozenOutputs()
    first = adapter_on_top(tiny, "bert")
    with remember_frozen_prefix(first.model, outputs):
        tiny.rows(first, tiny.loss["bert"], batch)
    assert len(outputs.kept) == len(batch["input_ids"])
    other = adapter_on_top(tiny, "bert")
    if change == "another dtype":
        other.model.bfloat16()
    elif change == "the number of blocks":
        lists = [m for m in other.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
        lists[0].insert(0, lists[0][0])
    elif change == "order":
        weight = next(p for name, p in other.model.named_parameters() if "word_embeddings" in name)
        weight.data = weight.data.roll(1, 0)
    else:
        part = "word_embeddings" if change == "an embedding" else "layer.0.attention.self.query.weight"
        weight = next(p for name, p in other.model.named_parameters() if part in name)
        weight.data.view(-1)[0] += 1.0
    with remember_frozen_prefix(other.model, outputs):
        assert not outputs.kept
    assert not outputs.kept


def test_a_weight_that_an_upper_block_shares_is_looked_at_too(tiny):
    batch, outputs = tiny.batch("bert"), FrozenOutputs()
    for change in (0.0, 1.0):
        adapter = adapter_on_top(tiny, "bert")
        modules = dict(adapter.model.named_modules())
        shared = next(m for name, m in modules.items() if name.endswith("layer.0.attention.self.query")).weight
        upper = next(m for name, m in modules.items() if name.endswith("layer.1.attention.self.query.base_layer"))
        upper.weight = shared
        shared.data += change
        with remember_frozen_prefix(adapter.model, outputs):
            assert not outputs.kept
            tiny.rows(adapter, tiny.loss["bert"], batch)
            assert len(outputs.kept) == len(batch["input_ids"])


@pytest.mark.parametrize("kind", list(UPPER))
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non-reentrant"])
def test_rows_are_the_same(tiny, kind, checkpointing):
    adapter = adapter_on_top(tiny, kind, checkpointing)
    batch = tiny.batch(kind)
    expected = tiny.rows(adapter, tiny.loss[kind], batch)
    before = [name for name, _ in adapter.model.named_modules()]
    with remember_frozen_prefix(adapter.model) as count:
        first = tiny.rows(adapter, tiny.loss[kind], batch)
        second = tiny.rows(adapter, tiny.loss[kind], batch)
        assert [name for name, _ in adapter.model.named_modules()] == before
    assert count == 1
    assert tiny.distance(first, expected) < 1e-5
    assert tiny.distance(second, expected) < 1e-5
    assert torch.equal(tiny.rows(adapter, tiny.loss[kind], batch), expected)


def test_an_example_passes_the_frozen_blocks_once_in_whatever_batch_it_comes(tiny):
    adapter = adapter_on_top(tiny, "bert")
    batch = tiny.batch("bert")
    expected = tiny.rows(adapter, tiny.loss["bert"], batch)
    counter = Counter(adapter)
    with remember_frozen_prefix(adapter.model):
        tiny.rows(adapter, tiny.loss["bert"], tiny.take(batch, [0, 1]))
        assert counter.rows == 2
        again = tiny.rows(adapter, tiny.loss["bert"], tiny.take(batch, [4, 1, 0, 2]))
        assert counter.rows == 4
        wider = {name: torch.nn.functional.pad(v, (0, 4)) if v.dim() == 2 else v for name, v in batch.items()}
        padded = tiny.rows(adapter, tiny.loss["bert"], wider)
        assert counter.rows == 5
    assert tiny.distance(again, expected[[4, 1, 0, 2]]) < 1e-5
    assert tiny.distance(padded, expected) < 1e-5
    tiny.rows(adapter, tiny.loss["bert"], batch)
    assert counter.rows == 10


def couple(_module, _args, output):
    """What batch statistics or batch-wide quantization in a block do."""
    return output - 0.5 * output.mean(dim=(0, 1), keepdim=True)


def probed(adapter):
    synthetic, buckets = synthetic_examples("classification", 61, 3, workbench.PADDED), length_buckets(workbench.PADDED)
    return probe_every_bucket(adapter, classification_loss, Collator(0), synthetic, buckets, 512)


def test_a_frozen_block_that_couples_examples_is_refused_although_it_would_run_once_for_each(tiny):
    adapter = adapter_on_top(tiny, "bert")
    with remember_frozen_prefix(adapter.model):
        probed(adapter)
    adapter.model.get_submodule("base_model.model.bert.encoder.layer.0.output").register_forward_hook(couple)
    with remember_frozen_prefix(adapter.model), pytest.raises(ProbeError, match="the examples are coupled"):
        probed(adapter)


def test_blocks_that_hand_on_more_than_hidden_states_are_refused(tiny):
    """Such as a bias that the lowest block computes and the others take from it."""
    adapter = adapter_on_top(tiny, "bert")
    layers, seen = adapter.model.get_submodule("base_model.model.bert.encoder.layer"), []
    layers[0].register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    layers[1].register_forward_pre_hook(lambda _module, args: (args[0] + seen.pop() if seen else args[0], *args[1:]))
    with remember_frozen_prefix(adapter.model), pytest.raises(ProbeError, match="frozen blocks are remembered"):
        probed(adapter)


def test_what_is_trained_below_the_frozen_blocks_would_be_remembered_too_and_is_refused():
    """A projection of the embeddings: its rows would be zero, and its update would reach no remembered example."""
    projection, upper = r".*embeddings_project", r".*layer\.1\..*dense"
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ElectraConfig(vocab_size=61, intermediate_size=48, num_labels=3, **sizes, **dropout)
    for targets, refused in ((upper, False), (f"({projection}|{upper})", True), (projection, True)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = add_lora(ElectraForSequenceClassification(config), "classification", 4, targets)
        adapter = attach(model, random(model), allow=HEAD_NAMES)
        start = adapter.state()
        refusal = pytest.raises(PrefixError, match=r"embeddings_project.* is trained") if refused else nullcontext()
        with refusal, remember_frozen_prefix(model), training_mode(model):
            adapter_train_mode(adapter)
            probed(adapter)
        assert all(torch.equal(value, start[name]) for name, value in adapter.state().items())


def test_token_types_tell_examples_apart(tiny):
    adapter = adapter_on_top(tiny, "bert")
    batch = tiny.batch("bert")
    typed = {**batch, "token_type_ids": (batch["input_ids"] % 2) * batch["attention_mask"]}
    with remember_frozen_prefix(adapter.model):
        plain = tiny.rows(adapter, tiny.loss["bert"], {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])})
        other = tiny.rows(adapter, tiny.loss["bert"], typed)
    assert tiny.distance(plain, other) > 1e-3
    assert tiny.distance(other, tiny.rows(adapter, tiny.loss["bert"], typed)) < 1e-5


def test_with_a_trained_head_alone_an_example_passes_all_blocks_once(tiny):
    """In all runs together: neither a step nor another head changes what the blocks return."""
    batch, outputs = tiny.batch("bert"), FrozenOutputs()
    for run in range(2):
        adapter = workbench.method_adapter(tiny.base("bert"), "head-only")
        _perturb(adapter)
        expected = tiny.rows(adapter, classification_loss, batch)
        counter = Counter(adapter)
        with remember_frozen_prefix(adapter.model, outputs) as count:
            first = tiny.rows(adapter, classification_loss, batch)
            again = tiny.rows(adapter, classification_loss, batch)
        assert count == 2
        assert counter.rows == (0 if run else 5)
        assert tiny.distance(first, expected) < 1e-5
        assert tiny.distance(again, expected) < 1e-5


def test_padding_on_the_left_runs_the_whole_model(tiny):
    adapter = adapter_on_top(tiny, "llama")
    batch = {name: value.flip(1) for name, value in tiny.batch("llama").items()}
    expected = tiny.rows(adapter, tiny.loss["llama"], batch)
    counter = Counter(adapter)
    with remember_frozen_prefix(adapter.model):
        for _ in range(2):
            assert torch.equal(tiny.rows(adapter, tiny.loss["llama"], batch), expected)
    assert counter.rows == 10


def test_an_error_inside_leaves_the_model_whole(tiny):
    adapter = adapter_on_top(tiny, "bert")
    batch = tiny.batch("bert")
    expected = tiny.rows(adapter, tiny.loss["bert"], batch)
    names = [name for name, _ in adapter.model.named_modules()]
    with remember_frozen_prefix(adapter.model):
        handle = adapter.cores[0].up.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.rows(adapter, tiny.loss["bert"], batch)
        handle.remove()
        assert [name for name, _ in adapter.model.named_modules()] == names
        assert tiny.distance(tiny.rows(adapter, tiny.loss["bert"], batch), expected) < 1e-5


def test_nothing_frozen_below_is_refused(tiny):
    adapter = tiny.adapter(tiny.base("bert"))
    with pytest.raises(PrefixError, match="lowest block is trained"), remember_frozen_prefix(adapter.model):
        pass
    with pytest.raises(PrefixError, match="no list of blocks"), remember_frozen_prefix(torch.nn.Linear(2, 2)):
        pass
    thawed = adapter_on_top(tiny, "bert").model
    thawed.get_submodule("base_model.model.bert.embeddings.position_embeddings").requires_grad_(True)
    with pytest.raises(PrefixError, match="position_embeddings is trained"), remember_frozen_prefix(thawed):
        pass
    untrained = tiny.base("bert").requires_grad_(False)
    with pytest.raises(PrefixError, match="no list of blocks"), remember_frozen_prefix(untrained):
        pass


TOP = r"re:.*layer\.1\..*(query|key|value|dense)"


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": TOP},
        {"targets": TOP, "basis": "private"},
        {"targets": TOP, "method": "lora"},
        {"method": "head-only"},
        {"targets": r"re:.*layers\.1\..*_proj", "kind": "causal-lm"},
    ],
    ids=["cores", "private basis", "lora", "head", "causal"],
)
def test_a_run_with_it_gives_the_adapter_of_a_run_without(tmp_path, changes):
    changes = dict(changes)
    kind = changes.pop("kind", "classification")
    for name, remember in (("with", True), ("without", False)):
        settings = {"insecure_seed": 3, "remember_frozen_blocks": remember, **changes}
        fine_tune(workbench.run_config(tmp_path / name, kind, **settings))
    files = {file.name for name in ("with", "without") for file in (tmp_path / name).glob("*.safetensors")}
    assert files
    for file in files:
        one, other = (load_file(tmp_path / name / file) for name in ("with", "without"))
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], atol=1e-5, rtol=1e-4)


def test_a_run_with_every_block_trained_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(PrefixError, match="lowest block is trained"):
        fine_tune(workbench.run_config(tmp_path / "run", remember_frozen_blocks=True))
    assert not (tmp_path / "run").exists()


def test_dropout_masks_are_not_remembered(tmp_path):
    with pytest.raises(ConfigError, match="would remember a mask"):
        workbench.run_config(tmp_path, remember_frozen_blocks=True, allow_dropout=True)
