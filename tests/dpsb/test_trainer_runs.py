"""What a private Trainer does between its steps, what it writes, and what it never says."""

import json
import math

import numpy as np
import pytest
import torch
import trainers
import workbench
from datasets import Dataset
from peft import PeftModel
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from trl import SFTTrainer

from dpsb import DPTrainerMixin, PrivacyArguments, clipped_sums
from dpsb.adapter import Basis, Provenance
from dpsb.basis import random as random_basis
from dpsb.mechanism import Mechanism
from dpsb.randomness import SeededRandomness
from dpsb.trainer.refusals import TrainerArgumentError
from dpsb_accounting import Ledger, make_report, verify

pytestmark = [
    pytest.mark.usefixtures("quick_calibration"),
    *(pytest.mark.filterwarnings(line) for line in trainers.IGNORED_WARNINGS),
]
FORBIDDEN_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin")
FORBIDDEN_KEYS = ("loss", "train_loss", "grad_norm", "num_tokens", "mean_token_accuracy", "entropy", "total_flos")
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


class Notes(TrainerCallback):
    """Notes every event."""

    def __init__(self):
        self.events, self.logs = [], []

    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        if name.startswith("on_") and name != "on_log":
            object.__getattribute__(self, "events").append(name)
        return found

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def everything_written(path):
    return {name: content for name, content in workbench.written(path).items()}


def check_files(out, capfd=None):
    """No pickle, no random state, no loss, and none of the planted texts in any file or on the screen."""
    contents = everything_written(out)
    assert not any(name.endswith(FORBIDDEN_FILES) or name.endswith((".pt", ".pth", ".bin")) for name in contents)
    streams = [] if capfd is None else [stream.encode() for stream in capfd.readouterr()]
    for content in [*contents.values(), *streams]:
        for canary in workbench.CANARIES:
            assert canary.encode() not in content
            assert canary.split("-")[0].encode() not in content
    for name, content in contents.items():
        if name.endswith("trainer_state.json"):
            for entry in json.loads(content)["log_history"]:
                assert set(entry) <= {"epsilon", "delta", "learning_rate", "epoch", "step"}
    return contents


@pytest.mark.parametrize("build", [trainers.build, trainers.build_sft])
def test_a_run_writes_what_it_may_and_claims_what_it_can(tmp_path, build, capfd):
    notes = Notes()
    trainer = build(tmp_path, args={"save_strategy": "steps", "save_steps": 2}, callbacks=[notes])
    result = trainer.train()
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    contents = check_files(tmp_path, capfd)
    assert {"ledger.jsonl", "report.json", "adapter_model.safetensors", "dpsb_core.safetensors"} <= set(contents)
    assert {name.split("/")[0] for name in contents if name.startswith("checkpoint-")} == {
        "checkpoint-2",
        "checkpoint-3",
    }
    assert verify(tmp_path / "ledger.jsonl").ok
    assert b"## Privacy" in contents["README.md"]
    report = json.loads(contents["report.json"])
    assert report["claim"] is True
    assert "held_out" not in report
    assert result.global_step == 3
    assert math.isnan(result.training_loss)
    assert 0 < result.metrics["epsilon"] <= 8
    assert len(notes.logs) == 3
    assert all(set(log) == {"epsilon", "delta", "learning_rate", "epoch"} for log in notes.logs)
    spent = [log["epsilon"] for log in notes.logs]
    assert spent == sorted(spent)
    assert [name for name in notes.events if name in ("on_step_begin", "on_step_end")] == [
        "on_step_begin",
        "on_step_end",
    ] * 3
    assert notes.events.count("on_train_begin") == notes.events.count("on_train_end") == 1
    assert notes.events.count("on_save") == 2


def test_one_noise_draw_and_one_release_per_step(tmp_path, monkeypatch):
    drawn, released = [], []
    release, poisson = Mechanism.release, clipped_sums.poisson_draw

    def noted_release(self, total, randomness):
        released.append(total.numel())
        return release(self, total, randomness)

    def noted_draw(*arguments):
        drawn.append(poisson(*arguments))
        return drawn[-1]

    monkeypatch.setattr(Mechanism, "release", noted_release)
    monkeypatch.setattr(clipped_sums, "poisson_draw", noted_draw)
    args = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 9, "num_train_epochs": 1, "max_steps": -1}
    trainer = trainers.build(tmp_path, args=args, privacy_changes={"token_budget": 32})
    trainer.train()
    assert len(released) == len(drawn) == 5, "60 examples, 12 expected in a step, one epoch"
    assert set(released) == {trainer.adapter.dimension}
    plan = Ledger.read(tmp_path / "ledger.jsonl").plan
    assert (plan.steps, plan.sampling_prob, plan.expected_batch_size) == (5, 12 / 60, 12)


def test_the_declared_number_is_not_compared_with_the_data(tmp_path):
    trainers.build(tmp_path / "a", privacy_changes={"num_examples": 5000, "delta": 1e-5}).train()
    plan = Ledger.read(tmp_path / "a" / "ledger.jsonl").plan
    assert (plan.num_examples, plan.neighboring) == (5000, "add_or_remove_one")
    trainers.build(tmp_path / "b", privacy_changes={"num_examples": None}).train()
    plan = Ledger.read(tmp_path / "b" / "ledger.jsonl").plan
    assert (plan.num_examples, plan.num_examples_declared, plan.neighboring) == (60, False, "zero_out")


def test_an_undeclared_number_counts_the_rows_that_trl_drops(tmp_path):
    """Which rows these are depends on what they hold, and N is public."""
    rows = trainers.rows("pairs")
    rows[3] = {**rows[3], "prompt": "word " * 60}
    given = {"train_dataset": Dataset.from_list(rows), "privacy_changes": {"num_examples": None}}
    trainer = trainers.build_sft(tmp_path, **given)
    assert len(trainer.train_dataset) == 59
    trainer.train()
    assert Ledger.read(tmp_path / "ledger.jsonl").plan.num_examples == 60


def test_training_losses_are_not_logged_whoever_brings_them(tmp_path):
    trainer = trainers.build(tmp_path)
    trainer.log(dict.fromkeys(FORBIDDEN_KEYS, 1.0) | {"mine": 2.0})
    assert [set(entry) - {"epoch", "step"} for entry in trainer.state.log_history] == [{"mine"}]


def test_a_seeded_run_shows_no_epsilon(tmp_path):
    trainer = trainers.build(tmp_path, randomness=SeededRandomness(1))
    result = trainer.train()
    assert "epsilon" not in result.metrics
    assert not any("epsilon" in entry for entry in trainer.state.log_history)
    assert make_report(Ledger.read(tmp_path / "ledger.jsonl")).claim is False


def test_runs_with_equal_seeds_differ(tmp_path):
    found = []
    for name in ("one", "two"):
        trainer = trainers.build(tmp_path / name, args={"seed": 7, "data_seed": 7, "optim": "sgd"})
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002
        trainer.train()
        found.append(trainers.theta(trainer.adapter))
    plan = Ledger.read(tmp_path / "one" / "ledger.jsonl").plan
    moved = (found[0] - found[1]) / (0.05 * plan.noise_multiplier / 12)
    assert float(moved.std()) > 0.7, "every coordinate has noise of its own"


# --- evaluation


@pytest.mark.parametrize("build", [trainers.build, trainers.build_sft])
def test_evaluation_is_outside_the_guarantee_and_says_so(tmp_path, build, capfd):
    sft = build is trainers.build_sft
    held_out = (
        Dataset.from_list(trainers.rows("pairs", seed=5)) if sft else trainers.labelled(seed=5, padding="max_length")
    )
    trainer = build(
        tmp_path,
        eval_dataset=held_out,
        args={**EVALUATED, "save_strategy": "steps", "save_steps": 1, "eval_on_start": True},
    )
    trainer.train()
    contents = check_files(tmp_path, capfd)
    report = json.loads(contents["report.json"])
    assert "eval_loss" in report["held_out"]["metrics"]
    assert "outside" in report["held_out"]["note"]
    assert not any("second" in name or "runtime" in name for name in report["held_out"]["metrics"])
    assert b"eval_loss" not in contents["checkpoint-3/README.md"]
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 4, "in memory they stay"
    assert Ledger.read(tmp_path / "ledger.jsonl").charged("train") == 3


def test_the_best_checkpoint_is_loaded_exactly(tmp_path):
    metrics = iter([1.0, 3.0, 2.0])
    trainer = trainers.build(
        tmp_path,
        eval_dataset=trainers.labelled(seed=5, padding="max_length"),
        compute_metrics=lambda _: {"score": next(metrics)},
        args={
            **EVALUATED,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
            "greater_is_better": True,
        },
    )
    seen = []

    class Keep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(trainers.theta(trainer.adapter))

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert torch.equal(trainers.theta(trainer.adapter), seen[1])
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_early_stopping_spends_what_it_spent_and_claims_the_plan(tmp_path):
    trainer = trainers.build(
        tmp_path,
        eval_dataset=trainers.labelled(seed=5, padding="max_length"),
        compute_metrics=lambda _: {"score": 1.0},
        callbacks=[EarlyStoppingCallback(1)],
        args={
            **EVALUATED,
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
            "greater_is_better": True,
        },
    )
    trainer.train()
    ledger = Ledger.read(tmp_path / "ledger.jsonl")
    assert ledger.charged("train") == 2
    report = make_report(ledger)
    assert report.spent.upper < report.epsilon.upper <= 8


def test_epoch_strategies(tmp_path):
    trainer = trainers.build(
        tmp_path,
        eval_dataset=trainers.labelled(seed=5, padding="max_length"),
        privacy_changes={"expected_batch_size": 30},
        args={
            "max_steps": -1,
            "num_train_epochs": 2,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "logging_strategy": "epoch",
        },
    )
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2, 4]


# --- the model stays what it was


@pytest.mark.parametrize("build", [trainers.build, trainers.build_sft])
def test_the_saved_adapter_loads_without_dpsb_to_equal_logits(tmp_path, build):
    trainer = build(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    torch.manual_seed(0)
    sft = build is trainers.build_sft
    base = trainers.language_model() if sft else trainers.classifier(adapted=False)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "model")).eval()
    batch = dict(trainer.per_example_batch(trainer.form.synthetic()[:6], 16))
    batch.pop("labels")
    trainer.model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(
            trainer.model(**batch).logits.numpy(), plain(**batch).logits.numpy(), atol=1e-5, rtol=1e-4
        )


def test_generate_and_type_checks_work_after_training(tmp_path):
    trainer = trainers.build_sft(tmp_path)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert isinstance(trainer, Trainer)
    assert isinstance(trainer, SFTTrainer)
    ids = torch.tensor([[8, 9, 10]])
    assert trainer.model.eval().generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape[1] > 3


def test_a_mixin_of_ones_own(tmp_path):
    class Mine(DPTrainerMixin, Trainer):
        def per_example_loss(self, model, batch):
            return 2 * super().per_example_loss(model, batch)

    trainer = trainers.build(tmp_path, kind=Mine)
    trainer.train()
    assert float(trainers.theta(trainer.adapter).norm()) > 0


def test_a_loss_of_ones_own_that_couples_examples_is_refused_before_a_charge(tmp_path):
    class Mine(DPTrainerMixin, Trainer):
        def per_example_loss(self, model, batch):
            losses = super().per_example_loss(model, batch)
            return losses - 0.5 * losses.mean()

    with pytest.raises(ValueError, match="coupled"):
        trainers.build(tmp_path, kind=Mine).train()
    assert not (tmp_path / "ledger.jsonl").exists(), "nothing was charged, so the folder may be used again"


@pytest.mark.parametrize("access", ["public", "released"])
def test_a_basis_of_ones_own(tmp_path, access):
    model = trainers.classifier()
    found = random_basis(model)
    provenance = Provenance(kind="random", access=access, detail={"source": "news.jsonl"})
    basis = Basis(factors=found.factors, provenance=provenance)
    if access == "released":
        with pytest.raises(TrainerArgumentError, match="got 'released': `dpsb train` charges"):
            trainers.build(tmp_path, model=model, basis=basis)
        return
    trainers.build(tmp_path, model=model, basis=basis).train()
    stated = dict(Ledger.read(tmp_path / "ledger.jsonl").plan.basis)
    assert stated == {"kind": "random", "access": "public", "source": "news.jsonl"}


def test_the_arguments_can_be_parsed_from_a_command_line():
    from transformers import HfArgumentParser

    given = ["--epsilon", "3", "--delta", "1e-5", "--num_examples", "400", "--expected_batch_size", "20"]
    (parsed,) = HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses([*given, "--rank", "8"])
    assert parsed == PrivacyArguments(epsilon=3, delta=1e-5, num_examples=400, expected_batch_size=20, rank=8)


def test_rank_adds_an_adapter(tmp_path):
    model = trainers.classifier(adapted=False)
    trainer = trainers.build(tmp_path, model=model, privacy_changes={"rank": 2, "basis": "random"})
    trainer.train()
    plan = Ledger.read(tmp_path / "ledger.jsonl").plan
    assert plan.details["rank"] == 2
    assert dict(plan.basis) == {"kind": "random", "access": "data_free"}


def test_rank_adds_an_adapter_to_an_sft_trainer(tmp_path):
    trainer = trainers.build_sft(tmp_path, peft_config=None, privacy_changes={"rank": 2, "auto_clip": True})
    trainer.train()
    plan = Ledger.read(tmp_path / "ledger.jsonl").plan
    assert (plan.details["rank"], plan.clipping) == (2, "automatic")


def test_the_self_test_runs_before_the_first_charge(tmp_path, monkeypatch):
    charged = []
    monkeypatch.setattr(
        "dpsb.trainer.mixin.check_before_run",
        lambda *_: charged.append(Ledger.read(tmp_path / "ledger.jsonl").charged("train")),
    )
    trainers.build(tmp_path, privacy_changes={"self_test": True}).train()
    assert charged == [0]


def two_kinds(count, seed):
    """Rows of five tokens of the one half of the words or of the other."""
    source = np.random.default_rng(seed)
    labels = source.integers(0, 2, count)
    ids = [[2, *(source.integers(8, 28, 5) + 20 * label).tolist(), 3] for label in labels]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 7] * count, "labels": labels.tolist()})


def test_training_learns_where_there_is_hardly_any_noise(tmp_path, monkeypatch):
    """A sanity check of the whole way: with noise that protects nobody, the held-out loss falls as it should."""
    monkeypatch.setattr("dpsb.plan.noise_multiplier_for", lambda **_: 0.05)
    trainer = trainers.build(
        tmp_path,
        model=trainers.classifier(target_modules="all-linear"),
        train_dataset=two_kinds(200, 1),
        eval_dataset=two_kinds(100, 2),
        randomness=SeededRandomness(1),
        args={"max_steps": 40, "learning_rate": 0.03, "lr_scheduler_type": "constant", "logging_strategy": "no"},
        privacy_changes={"num_examples": 200, "expected_batch_size": 200, "l2_clip_norm": 3.0},
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.6 * before
