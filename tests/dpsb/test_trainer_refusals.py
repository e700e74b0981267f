"""Every argument that private training refuses or ignores: its message, and that no data was read for it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trainers
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from dpsb import DPTrainer, DPTrainerMixin, PrivacyArguments
from dpsb.trainer import refusals
from dpsb.trainer.refusals import ALWAYS, IGNORED, REFUSED, TrainerArgumentError

pytestmark = [pytest.mark.filterwarnings(line) for line in trainers.IGNORED_WARNINGS]


class Untouchable:
    """A data set that may not be looked at."""

    def __getattr__(self, name):
        raise AssertionError(f"the data set was asked for {name}")

    def __getitem__(self, index):
        raise AssertionError("a row was read")

    def __len__(self):
        raise AssertionError("the number of rows was read")


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        raise AssertionError("a row was read")


class OwnLoss(Trainer):
    def compute_loss(self, *args, **kwargs):
        raise AssertionError


class OwnStep(Trainer):
    def training_step(self, *args, **kwargs):
        raise AssertionError

    optimizer_step = get_batch_samples = training_step


class Weighted(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.WeightedRandomSampler([1.0], 1)

    get_train_dataloader = get_train_sampler = _get_train_sampler


BAD = {
    "packing": True,
    "padding_free": True,
    "eval_packing": True,
    "loss_type": "dft",
    "label_smoothing_factor": 0.1,
    "router_aux_loss_coef": 0.001,
    "use_liger_kernel": True,
    "group_by_length": True,
    "train_sampling_strategy": "group_by_length",
    "auto_find_batch_size": True,
    "neftune_noise_alpha": 5.0,
    "max_grad_norm": 0.3,
    "fp16": True,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "deepspeed": "zero3.json",
    "fsdp": "full_shard",
    "parallelism_config": SimpleNamespace(),
    "n_gpu": 2,
    "torch_compile": True,
    "optim": OptimizerNames.GALORE_ADAMW_LAYERWISE,
    "optim_target_modules": ["attn"],
    "lr_scheduler_type": SchedulerType.REDUCE_ON_PLATEAU,
    "include_num_input_tokens_seen": "all",
    "skip_memory_metrics": False,
    "debug": ["underflow_overflow"],
    "enable_jit_checkpoint": True,
    "label_names": ["start_positions"],
    "max_length": None,
    "train_dataset": Stream(),
    "data_collator": lambda features: features,
    "compute_loss_func": print,
    "model_init": print,
    "optimizers": (torch.optim.SGD([torch.zeros(1)], lr=1.0), None),
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "bf16": True,
    "dataloader_num_workers": 2,
    "dataloader_drop_last": True,
    "data_seed": 1,
    "activation_offloading": True,
    "torch_empty_cache_steps": 3,
    "save_only_model": True,
    "overwrite_output_dir": True,
    "push_to_hub": True,
}
CLASSES = {
    "compute_loss": OwnLoss,
    **dict.fromkeys(("training_step", "optimizer_step", "get_batch_samples"), OwnStep),
    **dict.fromkeys(("get_train_dataloader", "_get_train_sampler", "get_train_sampler"), Weighted),
}


def attempt(rule, monkeypatch):
    """Asks the table about one bad value and nothing else."""
    monkeypatch.setattr(refusals, "REFUSED", tuple(r for r in REFUSED if r is rule))
    monkeypatch.setattr(refusals, "IGNORED", tuple(r for r in IGNORED if r is rule))
    args = SimpleNamespace(packing=False)
    given = {"args": args, "train_dataset": Untouchable()}
    kind = CLASSES.get(rule.name, Trainer)
    if rule.place in ("args", "sft"):
        setattr(args, rule.name, BAD[rule.name])
    elif rule.place == "trainer":
        given[rule.name] = BAD[rule.name]
    elif rule.place == "environment":
        monkeypatch.setenv(rule.name, "gradients")
    refusals.check(kind, given)


@pytest.mark.parametrize("rule", REFUSED, ids=lambda rule: rule.name)
def test_what_is_refused_says_why(rule, monkeypatch):
    with pytest.raises(TrainerArgumentError) as caught:
        attempt(rule, monkeypatch)
    message = str(caught.value)
    assert message.startswith(f"{rule.name}=")
    assert message.endswith(f"is refused in private training: {rule.reason}.")
    assert message.count("\n") == 0


@pytest.mark.parametrize("rule", IGNORED, ids=lambda rule: rule.name)
def test_what_is_ignored_says_why(rule, monkeypatch, caplog):
    attempt(rule, monkeypatch)
    assert f"{rule.name}={BAD[rule.name]!r} is ignored in private training: {rule.reason}." in caplog.text


@pytest.mark.parametrize("make", [TrainingArguments, SFTConfig])
def test_the_defaults_are_fine(tmp_path, make, caplog):
    args = make(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    kind = Trainer if make is TrainingArguments else SFTTrainer
    refusals.check(kind, {"args": args, "train_dataset": Untouchable(), "optimizers": (None, None)})
    assert "gradient_accumulation_steps" not in caplog.text


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_a_trl_script_with_packing_is_refused_before_any_data_is_read(tmp_path, option):
    with pytest.raises(TrainerArgumentError, match=f"^{option}=True is refused"):
        trainers.build_sft(tmp_path, args={option: True}, train_dataset=Untouchable())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ({"max_grad_norm": 0.5}, "max_grad_norm"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
        ({"optim": "adalomo"}, "optim"),
    ],
)
def test_a_trainer_is_refused_before_any_data_is_read(tmp_path, args, name):
    with pytest.raises(TrainerArgumentError, match=f"^{name}="):
        trainers.build(tmp_path, args=args, train_dataset=Untouchable(), model=torch.nn.Linear(1, 1))


@pytest.mark.parametrize("base", [OwnLoss, Weighted])
def test_a_subclass_with_its_own_loss_or_sampler_is_refused(tmp_path, base):
    kind = type("Mine", (DPTrainerMixin, base), {})
    with pytest.raises(TrainerArgumentError, match=f"={base.__name__} is refused"):
        trainers.build(tmp_path, kind=kind, train_dataset=Untouchable())


def test_an_override_below_the_mixin_is_refused_too(tmp_path):
    class Mine(DPTrainer):
        def compute_loss(self, *args, **kwargs):
            raise AssertionError

    with pytest.raises(TrainerArgumentError, match=r"^compute_loss=.*Mine is refused"):
        trainers.build(tmp_path, kind=Mine, train_dataset=Untouchable())


def test_the_wrong_order_of_base_classes_is_an_error_not_a_public_run():
    with pytest.raises(TypeError, match="Wrong would train without privacy: Trainer"):
        type("Wrong", (Trainer, DPTrainerMixin), {})
    with pytest.raises(TypeError, match="would train without privacy"):
        type("Own", (DPTrainer,), {"_inner_training_loop": lambda self: None})


def test_what_is_not_private_arguments(tmp_path):
    with pytest.raises(TypeError, match="privacy"):
        DPTrainer(model=trainers.classifier())
    with pytest.raises(TrainerArgumentError, match="Expected privacy to be PrivacyArguments, got dict"):
        DPTrainer(model=None, privacy={"epsilon": 8})
    with pytest.raises(TrainerArgumentError, match="Expected args to be given"):
        DPTrainer(model=trainers.classifier(), train_dataset=Untouchable(), privacy=trainers.privacy())


def test_evaluating_on_the_training_data(tmp_path):
    data = trainers.labelled()
    with pytest.raises(TrainerArgumentError, match="evaluate on is the training data"):
        trainers.build(tmp_path, train_dataset=data, eval_dataset=data)
    with pytest.raises(TrainerArgumentError, match="evaluate on is the training data"):
        trainers.build(tmp_path, train_dataset=data, eval_dataset={"again": data})
    raw = Dataset.from_list(trainers.rows("pairs"))
    trainer = trainers.build_sft(tmp_path, train_dataset=raw)
    trainer.eval_dataset = trainer.train_dataset
    with pytest.raises(TrainerArgumentError, match="evaluate on is the training data"):
        trainer.evaluate()
    for again in (raw, trainer.train_dataset, {"again": raw}):
        for method in (trainer.evaluate, trainer.predict):
            with pytest.raises(TrainerArgumentError, match="evaluate on is the training data"):
                method(again)


def test_collators(tmp_path):
    encode = trainers.tokenizer()
    trainers.build(tmp_path, data_collator=DataCollatorWithPadding(encode))
    with pytest.raises(TrainerArgumentError, match=r"^data_collator=DataCollatorForSeq2Seq is refused"):
        trainers.build(tmp_path, data_collator=DataCollatorForSeq2Seq(encode))


def test_hyperparameter_search(tmp_path):
    with pytest.raises(TrainerArgumentError, match="hyperparameter_search is refused"):
        trainers.build(tmp_path).hyperparameter_search(n_trials=2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lora_dropout": 0.1}, "set lora_dropout=0"),
        ({"lora_alpha": 8}, "set lora_alpha equal to r"),
        ({"use_dora": True}, "use_dora=False"),
        ({"bias": "all"}, "would be trained besides the cores"),
    ],
)
def test_adapters_that_are_not_plain(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        trainers.build(tmp_path, model=trainers.classifier(**options))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epsilon": float("inf")}, "epsilon=inf to be positive and finite"),
        ({"epsilon": True}, "epsilon=True"),
        ({"delta": 0}, "delta=0 between 0 and 1"),
        ({"num_examples": 5}, "expected_batch_size=12 of at most num_examples=5"),
        ({"expected_batch_size": 1.5}, "expected_batch_size=1.5 to be a whole number"),
        ({"rank": 0}, "rank=0"),
        ({"basis": "private"}, "basis='private' to be one of weight, random"),
        ({"auto_clip": True, "adaptive_clip": 0.5}, "adaptive_clip=0.5"),
    ],
)
def test_privacy_arguments_out_of_range(changes, match):
    with pytest.raises(ValueError, match=match):
        trainers.privacy(**changes)


def test_the_documentation_has_every_row():
    page = " ".join((Path(__file__).parents[2] / "docs" / "trainer.md").read_text().split())
    for rule in (*REFUSED, *IGNORED):
        assert f"| `{rule.name}` | {rule.reason} |" in page, rule.name
    for name, reason in ALWAYS:
        assert f"| {name} | {reason} |" in page


def test_names_are_lazy():
    import subprocess
    import sys

    code = (
        "import sys, dpsb; dpsb.PrivacyArguments(epsilon=1, delta=1e-6, num_examples=9, expected_batch_size=3);"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert PrivacyArguments.__module__ == "dpsb.trainer.arguments"
