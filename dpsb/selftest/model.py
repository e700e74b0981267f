"""The self-test of ``fit`` with a user's own model, collator and loss, on synthetic examples."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpsb.adapter import Adapter
from dpsb.losses import LossFn
from dpsb.models import peft_part
from dpsb.modes import training_mode
from dpsb.plan import make_plan
from dpsb.probe import Collate, without_dropout
from dpsb.randomness import Randomness
from dpsb.sampling import length_buckets
from dpsb.selftest.ours import own_step
from dpsb.selftest.replay import Loop, check_replay
from dpsb.selftest.result import Check, SelfTest, at_most, not_tested
from dpsb.selftest.run import run_selftest
from dpsb.selftest.start import tolerance_for
from dpsb.train import Knobs, fit, probe_every_bucket
from dpsb_accounting import Ledger, Plan
from dpsb_accounting.ledger import LEDGER_NAME

_STEPS, _DIVISOR = 4, 3
_STRIDE = 0.1  # how far a sum of length C moves theta
_RELOADED = 1e-3


def selftest_model(
    adapter: Adapter,
    loss_fn: LossFn,
    collate: Collate,
    synthetic: Sequence[Mapping[str, Any]],
    max_length: int,
    *,
    token_budget: int = 4096,
    full: bool = False,
    make_base: Callable[[], nn.Module] | None = None,
    private: Sequence[Mapping[str, Any]] | None = None,
) -> SelfTest:
    """Tests what ``fit`` would do with this model; theta and the model are left as they were.

    The short form probes the model, and tests one step's sum, noise and draws. The full one also trains on neighbouring
    data with equal randomness, resumes a run that was cut off, and looks at what else moved.

    Args:
      adapter: What will be trained.
      loss_fn: Per-example loss.
      collate: Examples to model inputs.
      synthetic: Synthetic or public examples, at least 6 of one length bucket; the first 6 are used for the sums.
      max_length: Largest number of tokens.
      token_budget: Tokens per microbatch.
      full: Whether to run the long form.
      make_base: Makes the base model anew, as users of the saved adapter would load it; without it, the adapter's files
        are not tested.
      private: At least 6 private examples to make sums and train on instead of the synthetic ones, which the probe
        still reads: for a local debug run only. Figures and messages of what is returned are then sensitive.
    """
    dataset = synthetic if private is None else private
    few = list(dataset[:6])
    tolerance = tolerance_for(adapter.model)
    subject = f"dpsb.fit on {type(adapter.model).__name__}"
    checks = [*_probe(adapter, loss_fn, collate, synthetic, max_length, token_budget)]
    try:
        with own_step(adapter, loss_fn, collate, few, max_length, token_budget=token_budget) as step:
            checks += run_selftest(step, few, tolerance=tolerance).checks
            clip = step.l2_clip_norm
        if full:
            checks += _loop_checks(adapter, loss_fn, collate, synthetic, max_length, token_budget, clip, few)
            checks += _reload_checks(adapter, collate, few, max_length, make_base)
    except (ValueError, RuntimeError) as error:
        checks.append(Check(name="runs", passed=False, figure=None, limit="", detail=str(error)))
    return SelfTest(subject, tuple(checks), tainted=private is not None)


def _probe(
    adapter: Adapter,
    loss_fn: LossFn,
    collate: Collate,
    synthetic: Sequence[Mapping[str, Any]],
    max_length: int,
    token_budget: int,
) -> Iterator[Check]:
    """What ``fit`` itself does before every run."""
    try:
        adapter.check_nothing_else_is_trained()
        yield Check(name="nothing_else", passed=True, figure=0, limit="= 0", detail="nothing but theta is trainable")
    except ValueError as error:
        yield Check(name="nothing_else", passed=False, figure=None, limit="= 0", detail=str(error))
    try:
        with training_mode(adapter.model), without_dropout(adapter.model):
            for module in adapter.trained_modules():
                module.train()
            probe_every_bucket(adapter, loss_fn, collate, synthetic, length_buckets(max_length), token_budget)
        detail = "per-example losses; no coupling; rows finite, not zero and equal to one-by-one autograd"
        yield Check(name="probe", passed=True, figure=None, limit="", detail=detail)
    except (ValueError, RuntimeError) as error:
        yield Check(name="probe", passed=False, figure=None, limit="", detail=str(error))


def _loop_checks(
    adapter: Adapter,
    loss_fn: LossFn,
    collate: Collate,
    synthetic: Sequence[Mapping[str, Any]],
    max_length: int,
    token_budget: int,
    clip: float,
    few: Sequence[Mapping[str, Any]],
) -> Iterator[Check]:
    plan = make_plan(
        epsilon=1e6,
        delta=1e-3,
        num_examples=2 * _DIVISOR,
        expected_batch_size=_DIVISOR,
        steps=_STEPS,
        noise_multiplier=0.01,
        l2_clip_norm=clip,
        basis=adapter.provenance.to_json(),
    )
    saved = adapter.state()
    frozen = _others(adapter)
    loop = fit_loop(adapter, loss_fn, collate, synthetic, max_length, token_budget, plan)
    try:
        with tempfile.TemporaryDirectory(prefix="dpsb-selftest-") as scratch:
            yield from check_replay(
                loop,
                Path(scratch),
                few[:5],
                few[5],
                plan=plan,
                learning_rate=_rate(plan),
                start=torch.cat([value.flatten().cpu() for value in saved.values()]),
            )
    finally:
        adapter.load_state(saved)
    moved = sum(not torch.equal(value, frozen[name]) for name, value in _others(adapter).items())
    yield at_most("frozen", moved, 0, "no tensor outside theta was changed by training")


def fit_loop(
    adapter: Adapter,
    loss_fn: LossFn,
    collate: Collate,
    synthetic: Sequence[Mapping[str, Any]],
    max_length: int,
    token_budget: int,
    plan: Plan,
) -> Loop:
    """``fit`` as the loop that :func:`dpsb.selftest.replay.check_replay` drives."""
    start = adapter.state()

    def loop(
        folder: Path, dataset: Sequence[Any], randomness: Randomness, on_step: Callable[[], None]
    ) -> Mapping[str, torch.Tensor]:
        adapter.load_state(start)
        path = folder / LEDGER_NAME
        with Ledger.open(path) if path.exists() else Ledger.create(path, plan) as ledger:
            fit(
                adapter,
                dataset,
                ledger=ledger,
                optimizer=torch.optim.SGD(adapter.parameters(), lr=_rate(plan)),
                loss_fn=loss_fn,
                collate=collate,
                synthetic=synthetic,
                max_length=max_length,
                knobs=Knobs(token_budget=token_budget, checkpoint_every=1),
                randomness=randomness,
                on_step=lambda _progress: on_step(),
            )
        return {name: value.cpu() for name, value in adapter.state().items()}

    return loop


def _rate(plan: Plan) -> float:
    """A learning rate with which sums of length C move theta visibly, whatever C is."""
    return _STRIDE * plan.expected_batch_size / plan.l2_clip_norm


def _others(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Every tensor of the model that is not part of theta, by name."""
    mine = {id(parameter) for parameter in adapter.parameters()}
    named = (*adapter.model.named_parameters(), *adapter.model.named_buffers())
    return {name: value.detach().clone() for name, value in named if id(value) not in mine}


def _reload_checks(
    adapter: Adapter,
    collate: Collate,
    examples: Sequence[Mapping[str, Any]],
    max_length: int,
    make_base: Callable[[], nn.Module] | None,
) -> Iterator[Check]:
    """Saves the adapter with theta moved at random, loads it with PEFT alone, and compares the outputs."""
    if make_base is None:
        yield not_tested("reload", "there is no way to make the base model anew")
        return
    from peft import PeftModel

    batch = {k: v for k, v in collate(examples[:3], length_buckets(max_length)[-1]).items() if k != "labels"}
    saved, part = adapter.state(), peft_part(adapter.model)
    was_training = part.training
    generator = torch.Generator().manual_seed(1)
    try:
        adapter.load_state({n: v + 0.1 * torch.randn(v.shape, generator=generator).to(v) for n, v in saved.items()})
        with tempfile.TemporaryDirectory(prefix="dpsb-selftest-") as folder, torch.no_grad():
            part.eval().save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
            with warnings.catch_warnings():  # PEFT asks transformers for an attribute by its old name
                warnings.simplefilter("ignore", FutureWarning)
                again = PeftModel.from_pretrained(make_base(), folder).eval().to(next(part.parameters()).device)
            here, there = (one(**batch)[0].float() for one in (part, again))
    finally:
        part.train(was_training)
        adapter.load_state(saved)
    figure = float((here - there).abs().max() / here.abs().max())
    yield at_most("reload", figure, _RELOADED, "the saved adapter, loaded by PEFT alone, gives the same outputs")
