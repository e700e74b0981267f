"""Training that silently does nothing, or more than it should, stops and says which."""

from types import SimpleNamespace

import pytest
import torch
import trainers
from torch import nn
from transformers import TrainerCallback

from dpsb.adapter import attach
from dpsb.basis import weight_svd
from dpsb.capture import CaptureError
from dpsb.fingerprint import bits_of, fingerprint
from dpsb.probe import ProbeError
from dpsb.trainer.building import with_own_arithmetic
from dpsb.trainer.guard import check_no_listeners, check_reload, check_unchanged
from dpsb.trainer.refusals import TrainerArgumentError
from dpsb_accounting import Ledger

pytestmark = [
    pytest.mark.usefixtures("quick_calibration"),
    *(pytest.mark.filterwarnings(line) for line in trainers.IGNORED_WARNINGS),
]


class Does(TrainerCallback):
    """A callback of the user's that does something at an event."""

    def __init__(self, event, action):
        setattr(self, event, lambda args, state, control, **kwargs: action(**kwargs))


def charged(out):
    ledger = out / "ledger.jsonl"
    return Ledger.read(ledger).charged("train") if ledger.exists() else 0


def refused(out, error, match, **given):
    with pytest.raises(error, match=match):
        trainers.build(out, **given).train()
    assert not (out / "report.json").exists()
    return charged(out)


# --- before the first charge


def test_a_head_that_peft_would_not_save_is_found_before_a_charge(tmp_path):
    """The classifier is trained but not in modules_to_save: the saved adapter would lack it."""
    model = trainers.classifier(task_type=None)
    for parameter in model.get_base_model().classifier.parameters():
        parameter.requires_grad_(True)
    assert refused(tmp_path, ProbeError, "saved adapter gives other outputs", model=model) == 0
    assert not (tmp_path / "ledger.jsonl").exists()


def test_something_else_that_is_trainable(tmp_path):
    model = trainers.classifier()
    model.get_base_model().bert.embeddings.LayerNorm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="would be trained besides the cores"):
        trainers.build(tmp_path, model=model)


def test_made_trainable_after_the_trainer_was_built(tmp_path):
    trainer = trainers.build(tmp_path)
    trainer.model.get_base_model().bert.embeddings.LayerNorm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="requires a gradient but is no part"):
        trainer.train()
    assert charged(tmp_path) == 0


def test_an_optimizer_of_other_tensors(tmp_path):
    """opacus#432: the optimizer held other parameters than the model."""

    class Stale(trainers.DPTrainer):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
            return self.optimizer

    assert refused(tmp_path, ValueError, "does not hold .* as it is now", kind=Stale) == 0


def test_hooks_that_are_gone(tmp_path, monkeypatch):
    from dpsb.capture import _CheckpointSafeHooks

    start = _CheckpointSafeHooks.__init__

    def detached(self, *args, **kwargs):
        start(self, *args, **kwargs)
        for hook in self.autograd_grad_sample_hooks:
            hook.remove()

    monkeypatch.setattr(_CheckpointSafeHooks, "__init__", detached)
    assert refused(tmp_path, CaptureError, "got no per-example gradient") == 0


# --- while training


def test_a_learning_rate_of_zero_stops_at_the_first_step(tmp_path):
    assert refused(tmp_path, ProbeError, "left every trained tensor where it was", args={"learning_rate": 0.0}) <= 1


def test_a_parameter_that_was_replaced_behind_ones_back(tmp_path):
    def replace(model, **_):
        core = next(m for m in model.modules() if type(m).__name__ == "CoreUp").core
        core.weight = nn.Parameter(core.weight.detach().clone())

    given = {"callbacks": [Does("on_step_end", replace)]}
    assert refused(tmp_path, ValueError, "does not hold .* as it is now", **given) == 2


def test_a_callback_that_thaws_a_weight(tmp_path):
    """Its gradient would be raw; nothing is charged and no example read once it can get one."""

    def thaw(model, **_):
        model.get_base_model().bert.embeddings.LayerNorm.weight.requires_grad_(True)

    given = {"callbacks": [Does("on_step_end", thaw)]}
    assert refused(tmp_path, ValueError, "LayerNorm.weight .* requires a gradient but is no part", **given) == 1


def test_a_callback_that_writes_to_a_frozen_weight(tmp_path):
    def meddle(model, **_):
        with torch.no_grad():
            model.get_base_model().bert.embeddings.word_embeddings.weight[3, 2] += 0.5

    given = {"callbacks": [Does("on_step_end", meddle)]}
    match = "embeddings.weight changed while training, and it is no part of what is clipped and noised"
    assert refused(tmp_path, ProbeError, match, **given) == 3


def test_a_checkpoint_of_a_model_that_was_meddled_with_is_not_written(tmp_path):
    def meddle(model, **_):
        next(m for m in model.modules() if type(m).__name__ == "CoreUp").up.mul_(1.5)

    given = {"callbacks": [Does("on_step_begin", meddle)], "args": {"save_strategy": "steps", "save_steps": 1}}
    assert refused(tmp_path, ProbeError, "up changed while training", **given) == 1
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_schedule_that_is_no_function_of_the_step(tmp_path):
    class Two(trainers.DPTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            rules = [lambda step: 1.0, lambda step: 0.5]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rules)
            return self.lr_scheduler

    class Cyclic(trainers.DPTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return self.lr_scheduler

    for kind in (Two, Cyclic):
        assert refused(tmp_path, TrainerArgumentError, "lr_scheduler=.* is refused", kind=kind) == 0


@pytest.mark.parametrize("optim", ["adafactor", "adagrad", "rmsprop"])
def test_other_optimizers(tmp_path, optim):
    trainer = trainers.build(tmp_path, args={"optim": optim})
    trainer.train()
    assert float(trainers.theta(trainer.adapter).norm()) > 0


def test_a_listener_on_raw_gradients(tmp_path):
    heard = []

    def listen(model, **_):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: heard.append(gradient))

    given = {"callbacks": [Does("on_train_begin", listen)]}
    assert refused(tmp_path, ProbeError, "would see raw gradients of private examples", **given) == 0
    assert heard == []


def test_a_layerwise_optimizer_is_a_listener(tmp_path):
    trainer = trainers.build(tmp_path)
    parameter = trainer.adapter.parameters()[0]
    handle = parameter.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ProbeError, match="Something has put a hook"):
        check_no_listeners(trainer.adapter)
    handle.remove()
    check_no_listeners(trainer.adapter)


def test_an_evaluation_between_steps_does_no_harm(tmp_path):
    def evaluate(model, **_):
        model.eval()

    trainer = trainers.build(tmp_path, callbacks=[Does("on_step_end", evaluate)])
    trainer.train()
    assert charged(tmp_path) == 3


# --- the checks themselves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprints_see_one_bit(dtype):
    model = trainers.classifier().to(dtype)
    adapter = attach(model, weight_svd(model), allow=("classifier",))
    before = fingerprint(adapter)
    check_unchanged(adapter, before)
    with torch.no_grad():
        adapter.parameters()[0].add_(1.0)
    check_unchanged(adapter, before)
    buffer = adapter.cores[1].up.up
    buffer[0, 0] = torch.nextafter(buffer[0, 0], torch.tensor(9.0, dtype=dtype))
    with pytest.raises(ProbeError, match="up changed while training"):
        check_unchanged(adapter, before)


def test_a_reload_leaves_everything_as_it_was():
    model = trainers.classifier()
    adapter = attach(model, weight_svd(model), allow=("classifier",))
    model.train()
    before, theta = fingerprint(adapter), adapter.state()
    modes = [module.training for module in model.modules()]
    batch = {"input_ids": torch.tensor([[8, 9, 10]]), "labels": torch.tensor([1])}

    def losses(model, batch):
        model.eval()
        return model(**batch).loss[None]

    check_reload(adapter, lambda folder: model.save_pretrained(folder), losses, batch)
    model.train()
    check_unchanged(adapter, before)
    assert all(torch.equal(adapter.state()[name], theta[name]) for name in theta)
    assert [module.training for module in model.modules()] == modes
    assert list(model.peft_config) == ["default"]
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_the_fingerprint_of_a_quantized_weight_is_that_of_its_parts():
    parts = {"data": torch.arange(4, dtype=torch.uint8), "scale": torch.ones(2)}

    class Quantized:
        def __tensor_flatten__(self):
            return list(parts), None

    quantized = Quantized()
    vars(quantized).update(parts)
    assert bits_of(quantized) == sum(bits_of(part) for part in parts.values())


def test_no_process_of_its_own_tokenizes_texts():
    """One that is spawned has none of this process's filters, and TRL quotes a prompt in a warning."""
    given = SimpleNamespace(bf16=True, average_tokens_across_devices=True, dataset_num_proc=4)
    assert with_own_arithmetic(given).dataset_num_proc is None
    assert given.dataset_num_proc == 4, "the user's own arguments stay as they are"
