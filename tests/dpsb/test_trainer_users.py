"""Users' pains with private training under Trainers, each named by the thread that it answers."""

import numpy as np
import pytest
import torch
import trainers
import workbench
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments

from dpsb import clipped_sums, train
from dpsb.randomness import SeededRandomness
from dpsb.trainer.hf import DPTrainer
from dpsb.trainer.refusals import TrainerArgumentError
from dpsb_accounting import Ledger

pytestmark = [
    pytest.mark.usefixtures("quick_calibration"),
    *(pytest.mark.filterwarnings(line) for line in trainers.IGNORED_WARNINGS),
]
RARE = {"num_examples": 10**6, "expected_batch_size": 1, "delta": 1e-8}


class TorchData(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def as_kind(kind):
    data = trainers.labelled()
    return {
        "hub": data,
        "tensors": data.with_format("torch"),
        "dicts": [dict(row) for row in data],
        "torch": TorchData([dict(row) for row in data]),
    }[kind]


@pytest.fixture
def sizes(monkeypatch):
    """The size of every draw, and that no example is in it twice (test only)."""
    found, poisson = [], clipped_sums.poisson_draw

    def noted(*arguments):
        draw = poisson(*arguments)
        assert len(np.unique(draw)) == len(draw)
        found.append(len(draw))
        return draw

    monkeypatch.setattr(clipped_sums, "poisson_draw", noted)
    return found


def test_training_that_does_nothing_is_found(tmp_path):
    """opacus#820, peft#3409: six runs and 45 GPU-hours with a fine epsilon and weights that never moved.

    Every core moves, the optimizer holds the live tensors, and the saved adapter changes the outputs of a model that
    has never seen dpsb. (What is found when it is otherwise: test_trainer_guard.)
    """
    trainer = trainers.build_sft(tmp_path)
    before = {name: value.clone() for name, value in trainer.adapter.state().items()}
    trainer.train()
    trainer.save_model()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trainer.adapter.parameters()} <= held
    assert all(not torch.equal(value, before[name]) for name, value in trainer.adapter.state().items())
    ids = torch.tensor([[8, 9, 10, 11]])
    with torch.no_grad():
        bare = trainers.language_model().eval()(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(trainers.language_model(), str(tmp_path)).eval()(input_ids=ids).logits
        live = trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded, live, atol=1e-5, rtol=1e-4)
    assert float((loaded - bare).abs().max()) > 1e-3


def test_gpt2_with_broadcast_positions(tmp_path):
    """opacus#841, #505, #666; private-transformers#14: position ids of batch 1 crash per-example gradients."""
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 100}
    base = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=4, eos_token_id=5, pad_token_id=0))
    trainer = trainers.build_sft(tmp_path, model=base, peft_config=trainers.lora(fan_in_fan_out=True))
    trainer.train()
    assert Ledger.read(tmp_path / "ledger.jsonl").charged("train") == 3


@pytest.mark.parametrize("kind", ["hub", "tensors", "dicts", "torch"])
def test_empty_draws_of_every_kind_of_data_set(tmp_path, kind, sizes):
    """opacus#743, #676: an empty Poisson draw of a data set of dicts raised TypeError."""
    trainer = trainers.build(tmp_path, train_dataset=as_kind(kind), privacy_changes=RARE)
    trainer.train()
    assert sizes == [0, 0, 0]
    assert float(trainers.theta(trainer.adapter).norm()) > 0, "noise is released all the same"


def test_empty_draws_under_tiny_microbatches(tmp_path, sizes):
    """opacus#522, #358, #161: splitters and memory managers failed on empty batches."""
    trainers.build(tmp_path, privacy_changes={**RARE, "token_budget": 1}).train()
    assert sizes == [0, 0, 0]


def test_the_divisor_is_public(tmp_path, monkeypatch):
    """opacus#571, #819: dividing by int(N*q) of the data makes the released gradient depend on N."""
    asked = []
    set_gradient = train.set_gradient
    released = train.Mechanism.release

    def noted(adapter, gradient):
        asked.append(gradient.clone())
        set_gradient(adapter, gradient)

    totals = []
    monkeypatch.setattr(train.Mechanism, "release", lambda *a: totals.append(released(*a)) or totals[-1])
    monkeypatch.setattr(train, "set_gradient", noted)
    trainers.build(tmp_path, train_dataset=trainers.labelled().select(range(7))).train()
    for gradient, total in zip(asked, totals, strict=True):
        torch.testing.assert_close(gradient * 12, total)


def test_the_plan_says_what_the_divisor_is(tmp_path):
    """opacus#420, #514: dividing by the expected batch size looks like a bug; the model card says that it is none."""
    trainer = trainers.build(tmp_path)
    trainer.train()
    trainer.save_model()
    assert '"expected_batch_size":12' in (tmp_path / "ledger.jsonl").read_text()
    assert "expected batch" in (tmp_path / "README.md").read_text().lower()


def test_a_base_in_bfloat16(tmp_path):
    """opacus#740, #377: dtype crashes. The base computes in bfloat16; cores, rows, sums and noise do not."""
    trainer = trainers.build_sft(tmp_path, model=trainers.language_model().to(torch.bfloat16))
    trainer.train()
    assert {p.dtype for p in trainer.adapter.parameters()} == {torch.float32}
    assert Ledger.read(tmp_path / "ledger.jsonl").plan.details["dtype"] == "bfloat16"


def test_padding_in_the_data_set_changes_nothing(tmp_path):
    """opacus#792: the loss ignored ignore_index and averaged over padding."""
    found = []
    for name, options in (("own", {}), ("padded", {"padding": "max_length"})):
        data = trainers.labelled(**options)
        trainer = trainers.build(tmp_path / name, train_dataset=data, randomness=SeededRandomness(6))
        trainer.train()
        found.append(trainers.theta(trainer.adapter))
    assert torch.equal(*found)


def test_accumulation_is_a_knob(tmp_path, sizes):
    """opacus#320, #459: 'Poisson sampling is not compatible with grad accumulation'."""
    trainers.build(tmp_path, args={"gradient_accumulation_steps": 8, "per_device_train_batch_size": 2}).train()
    assert len(sizes) == Ledger.read(tmp_path / "ledger.jsonl").charged("train") == 3


def test_several_processes_that_cannot_talk_are_refused(tmp_path, monkeypatch):
    """opacus#444: under DDP every process drew, and an example was seen twice. Here one draws, or nothing starts."""
    trainer = trainers.build(tmp_path)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(TrainerArgumentError, match=r"^world_size=2 is refused"):
        trainer.train()
    assert not (tmp_path / "ledger.jsonl").exists()


def test_callbacks_are_called(tmp_path):
    """opacus#371, #524, transformers#12920: callbacks instead of a second framework; they see released state only."""
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, train_dataloader, **kwargs):
            trained = [p for p in model.parameters() if p.requires_grad]
            assert all(p.grad is None and not hasattr(p, "grad_sample") for p in trained)
            assert train_dataloader is None
            seen.append((state.global_step, state.epoch, optimizer.param_groups[0]["lr"]))

    trainers.build(tmp_path, callbacks=[Look()]).train()
    assert [step for step, _, _ in seen] == [1, 2, 3]
    assert [epoch for _, epoch, _ in seen] == pytest.approx([0.2, 0.4, 0.6])


def test_a_weighted_sampler_is_refused(tmp_path):
    """opacus#600: a WeightedRandomSampler was silently replaced."""

    class Mine(DPTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.WeightedRandomSampler([1.0] * 60, 60)

    with pytest.raises(TrainerArgumentError, match=r"^_get_train_sampler=.* no sampler or loader of one's own"):
        trainers.build(tmp_path, kind=Mine)


def test_batches_are_poisson_draws(tmp_path, sizes):
    """private-transformers#7, #11; dp-transformers#41; opacus#80, #461: shuffled batches accounted as Poisson.

    The sizes vary as a binomial's do, and no example is drawn twice in a step.
    """
    changes = {"expected_batch_size": 30}
    trainers.build(tmp_path, args={"max_steps": 12}, privacy_changes=changes).train()
    assert len(sizes) == 12
    assert len(set(sizes)) > 2
    assert abs(sum(sizes) / 12 - 30) < 6 * (60 * 0.25 / 12) ** 0.5


def test_llama_under_peft(tmp_path):
    """fast-differential-privacy#36, #28: RMSNorm was not supported; 'so I cannot just use get_peft_model?'"""
    model = get_peft_model(trainers.language_model(), trainers.lora())
    trainer = trainers.build_sft(tmp_path, model=model, peft_config=None)
    trainer.train()
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.endswith("core.weight") for name in trained)


@pytest.mark.parametrize("remove", [True, False])
def test_further_columns_are_no_trap(tmp_path, remove):
    """dp-transformers#34: remove_unused_columns took away what the sampler needed."""
    found = []
    for name, data in (
        ("bare", trainers.labelled()),
        ("more", trainers.labelled().add_column("text", ["secret"] * 60)),
    ):
        trainer = trainers.build(
            tmp_path / name,
            train_dataset=data,
            randomness=SeededRandomness(6),
            args={"remove_unused_columns": remove},
        )
        trainer.train()
        found.append(trainers.theta(trainer.adapter))
    assert torch.equal(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_both_kinds(tmp_path, reentrant):
    """Non-reentrant checkpointing, the default of transformers 5 and TRL, breaks the hooks of other libraries."""
    found = []
    for name, on in (("off", False), ("on", True)):
        options = {"gradient_checkpointing": on}
        if on:
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        trainer = trainers.build_sft(tmp_path / name, randomness=SeededRandomness(6), args=options)
        trainer.train()
        found.append(trainers.theta(trainer.adapter))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-5


def test_errors_quote_no_row(tmp_path, capfd):
    """An error while data are in use tells its kind and place, never its message."""

    class Broken(TorchData):
        def __getitem__(self, index):
            raise KeyError(workbench.CANARIES[0])

    with pytest.raises(RuntimeError, match=r"Step 0 failed .* The message is withheld") as caught:
        trainers.build(tmp_path, train_dataset=Broken([0] * 60)).train()
    out, err = capfd.readouterr()
    for text in (str(caught.value), out, err):
        assert workbench.CANARIES[0] not in text


def test_tokenization_errors_quote_no_row(tmp_path, capfd):
    """TRL's data set maps raise errors that may quote rows; and its warning decodes a piece of a prompt."""
    rows = [{"prompt": workbench.CANARIES[0], "completion": workbench.CANARIES[1]}] * 3
    with pytest.raises(ValueError, match=r"cannot be tokenized .* Nothing was charged") as caught:
        trainers.build_sft(
            tmp_path, train_dataset=Dataset.from_list(rows).map(lambda row: {"prompt": [[row["prompt"]]]})
        )
    trainers.build_sft(tmp_path, train_dataset=Dataset.from_list(rows))
    out, err = capfd.readouterr()
    for text in (str(caught.value), out, err):
        for canary in workbench.CANARIES:
            assert canary not in text


def test_tokenization_tells_no_length(tmp_path, capfd):
    """A tokenizer warns of a row that is longer than the model allows, and says how long it is."""
    rows, tokenizer = trainers.rows("pairs"), trainers.tokenizer("llama")
    tokenizer.model_max_length = 32
    rows[3] = {**rows[3], "completion": "word " * 60}
    trainers.build_sft(tmp_path, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    assert "longer than the specified maximum" not in "".join(capfd.readouterr())
