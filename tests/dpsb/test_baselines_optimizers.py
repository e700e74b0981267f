"""Switches of the optimization: what is post-processing costs nothing, what is a release is in the plan's event."""

import math

import pytest
import torch
import workbench
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsb import run
from dpsb.checkpoint import saved_clip_norm
from dpsb.config import ConfigError
from dpsb.losses import classification_loss
from dpsb.mechanism import AdaptiveClip, Mechanism, centred_count, clip_and_sum
from dpsb.optimizers import NoiseCorrectedAdam, make_optimizer
from dpsb.plan import make_plan
from dpsb.randomness import SeededRandomness, SystemRandomness
from dpsb.train import Knobs, fit
from dpsb_accounting import Ledger, epsilon, verify

PLAN = {"num_examples": 24, "expected_batch_size": 8, "steps": 3, "delta": 1e-3, "epsilon": 99.0}


def adaptive_plan(**changes):
    return make_plan(**{**PLAN, "noise_multiplier": 0.7, "clipping": "adaptive", **changes})


# --- adaptive clipping


def test_sum_and_count_together_are_the_release_that_the_plan_accounts_for():
    """In units of the noise, one row moves the released vector by exactly 1 / (the event's noise multiplier)."""
    plan = adaptive_plan(l2_clip_norm=0.5)
    mechanism = Mechanism.from_plan(plan)
    count_noise_std = plan.details["adaptive_clip"]["count_noise_std"]
    z = mechanism.noise_multiplier
    assert z > plan.noise_multiplier
    assert (z**-2 + (2 * count_noise_std) ** -2) ** -0.5 == pytest.approx(plan.noise_multiplier, rel=1e-12)
    one = mechanism.clip_and_sum(torch.full((1, 9), 100.0))
    assert one.shape == (10,)
    assert float(one.norm()) / mechanism.noise_std == pytest.approx(1 / plan.noise_multiplier, rel=1e-6)
    assert float(one[:9].norm()) == pytest.approx(0.5)


def test_the_count_has_the_noise_that_the_plan_states():
    plan = adaptive_plan(l2_clip_norm=2.0)
    mechanism, randomness = Mechanism.from_plan(plan), SystemRandomness()
    draws = torch.stack([mechanism.release(mechanism.zeros(3), randomness) for _ in range(4000)])
    std = draws.std(dim=0)
    torch.testing.assert_close(std[:3], torch.full((3,), mechanism.noise_std, dtype=torch.float64), rtol=0.05, atol=0)
    counts = draws[:, 3] * plan.details["adaptive_clip"]["count_noise_std"] / mechanism.noise_std
    assert float(counts.std()) == pytest.approx(plan.details["adaptive_clip"]["count_noise_std"], rel=0.05)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 6),
    norm=st.floats(1e-3, 1e3),
    size=st.floats(1e-3, 1e3),
    noise_multiplier=st.floats(0.3, 20),
    batch=st.integers(1, 24),
)
def test_sensitivity_of_sum_and_count(seed, count, norm, size, noise_multiplier, batch):
    plan = adaptive_plan(l2_clip_norm=norm, noise_multiplier=noise_multiplier, expected_batch_size=batch)
    mechanism = Mechanism.from_plan(plan)
    rows = size * torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    rows[0, 0] = float("nan") if seed % 5 == 0 else rows[0, 0]
    moved = mechanism.clip_and_sum(rows) - mechanism.clip_and_sum(rows[:-1])
    assert float(moved.norm()) <= mechanism.noise_std / plan.noise_multiplier * (1 + 1e-9)


def test_the_claim_is_the_same_as_without_adapting():
    flat, adaptive = make_plan(**{**PLAN, "noise_multiplier": 0.7}), adaptive_plan()
    assert epsilon(flat).upper == epsilon(adaptive).upper
    assert adaptive.train.event == flat.train.event
    assert "count" in adaptive.details["adaptive_clip"]["event"]


def test_the_count_is_centred_and_leaves_out_what_is_not_finite():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("nan"), 1.0], [0.0, 0.0], [math.inf, 0.0]])
    assert centred_count(rows, 1.0).tolist() == [0.0], "a row of zeros is what zero_out leaves of one"
    assert centred_count(rows, 10.0).tolist() == [1.0]
    assert centred_count(rows[:0], 1.0).tolist() == [0.0]


def test_the_clip_norm_finds_the_quantile():
    norms = torch.linspace(0.1, 10, 1001, dtype=torch.float64)
    rows = torch.stack([norms, torch.zeros_like(norms)], dim=1)
    plan = adaptive_plan(
        num_examples=5000, expected_batch_size=1001, delta=1e-5, l2_clip_norm=100.0, adaptive_quantile=0.7
    )
    mechanism, randomness = Mechanism.from_plan(plan), SeededRandomness(3)
    seen = []
    for _ in range(120):
        _, mechanism = mechanism.read(mechanism.release(mechanism.clip_and_sum(rows), randomness))
        seen.append(mechanism.l2_clip_norm)
    assert sum(seen[-40:]) / 40 == pytest.approx(float(norms.quantile(0.7)), rel=0.1)


def test_the_clip_norm_stays_a_number():
    rule = AdaptiveClip(quantile=0.5, learning_rate=0.2, count_noise_std=1.0, expected_batch_size=1)
    assert rule.next_clip_norm(1e12, -1e9) == 1e12
    assert rule.next_clip_norm(1e-12, 1e9) == 1e-12


def test_flat_sum_and_adaptive_sum_agree():
    rows = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    mechanism = Mechanism.from_plan(adaptive_plan(l2_clip_norm=0.8))
    assert torch.equal(mechanism.clip_and_sum(rows)[:4], clip_and_sum(rows, 0.8))


@pytest.mark.parametrize(
    "details", [{}, {"adaptive_clip": {"quantile": 0.5}}, {"adaptive_clip": 3}, {"adaptive_clip": {"quantile": "x"}}]
)
def test_a_plan_that_does_not_say_how_it_adapts(details):
    from dataclasses import replace

    with pytest.raises(ValueError, match="clipping='adaptive' to hold adaptive_clip"):
        Mechanism.from_plan(replace(adaptive_plan(), details=details))


def test_too_little_noise_on_the_count_is_refused():
    from dataclasses import replace

    plan = adaptive_plan()
    facts = {**plan.details["adaptive_clip"], "count_noise_std": 0.3}
    with pytest.raises(ValueError, match=r"count_noise_std=0.3 to exceed half the noise multiplier 0.7"):
        Mechanism.from_plan(replace(plan, details={"adaptive_clip": facts}))


@pytest.mark.parametrize("quantile", [0.0, 1.0, -1.0, math.nan])
def test_a_quantile_out_of_range(quantile, tmp_path):
    with pytest.raises(ValueError, match="adaptive_quantile="):
        adaptive_plan(adaptive_quantile=quantile)
    with pytest.raises(ConfigError, match="adaptive_clip="):
        workbench.run_config(tmp_path, adaptive_clip=quantile)


@pytest.mark.parametrize("changes", [{"auto_clip": True}, {"optimizer": "adam-corrected"}])
def test_adaptive_clipping_goes_with_one_rule_only(tmp_path, changes):
    with pytest.raises(ConfigError, match=r"adaptive_clip=0.5 goes neither with auto_clip"):
        workbench.run_config(tmp_path, adaptive_clip=0.5, **changes)


def test_a_resumed_run_goes_on_with_its_clip_norm(tiny, tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.step == 2:
            raise Stop

    def one(ledger, on_step=lambda _: None):
        adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",), scatter=0.0)
        changes = {"loss_fn": classification_loss, "knobs": Knobs(checkpoint_every=1), "on_step": on_step}
        positional, named = workbench.fit_arguments(adapter, workbench.examples(), ledger, **changes)
        fit(*positional, **named)

    # little noise on the count: with much of it two steps may go to and fro by the most that a step may go
    quiet = {"noise_multiplier": 0.05, "l2_clip_norm": 50.0}
    plan = adaptive_plan(basis={"kind": "random", "access": "data_free"}, **quiet)
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, plan) as ledger, pytest.raises(Stop):
        one(ledger, stop)
    held = saved_clip_norm(tmp_path)
    assert held is not None
    assert held != 50.0
    with Ledger.open(path) as ledger:
        one(ledger)
    after = saved_clip_norm(tmp_path)
    assert 0 < abs(math.log(after / held)) <= 0.2 * 0.5 + 1e-12, "one further step from where it stood"


# --- optimizers


def test_the_noise_is_taken_out_of_the_second_moment():
    """With gradients that are all noise Adam's steps are as long as with signal; the corrected ones by 1/sqrt(f)."""
    noise, generator = 0.5, torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(2000))
    optimizer = NoiseCorrectedAdam([weight], lr=1.0, noise_variance=noise**2, betas=(0.0, 0.99), floor=0.25)
    for _ in range(300):
        weight.grad = noise * torch.randn(2000, generator=generator) + 2.0
        before = weight.detach().clone()
        optimizer.step()
    moved = before - weight.detach()
    assert float((moved / weight.grad).mean()) == pytest.approx(1 / 2.0, rel=0.02), "divided by the signal's size, 2"
    with torch.no_grad():
        weight.zero_()
    still = NoiseCorrectedAdam([weight], lr=1.0, noise_variance=noise**2, betas=(0.0, 0.99), floor=0.25)
    weight.grad = torch.zeros(2000)
    weight.grad[0] = 1e-3
    still.step()
    assert float(-weight.detach()[0]) == pytest.approx(1e-3 / (0.5 * noise), rel=1e-5), "the floor"


def test_with_little_noise_the_corrected_adam_is_adam():
    weights = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizers = [
        NoiseCorrectedAdam([weights[0]], lr=0.1, noise_variance=1e-12),
        torch.optim.Adam([weights[1]], lr=0.1),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gradient = torch.randn(5, generator=generator)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"noise_variance": 0.0}, {"noise_variance": math.nan}, {"floor": 0.0}])
def test_a_correction_that_makes_no_sense(changes):
    with pytest.raises(ValueError, match="noise_variance="):
        NoiseCorrectedAdam([torch.nn.Parameter(torch.ones(1))], **{"lr": 0.1, "noise_variance": 1.0, **changes})


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", "Adam"), ("adamw", "AdamW"), ("adam-corrected", "NoiseCorrectedAdam"), ("sgd", "SGD")],
)
def test_the_optimizer_by_name(tiny, tmp_path, name, kind):
    adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",))
    config = workbench.run_config(tmp_path, optimizer=name, weight_decay=0.1 if name == "adamw" else 0.0, momentum=0.5)
    plan = workbench.fit_plan(l2_clip_norm=2.0)
    optimizer, _ = make_optimizer(config, adapter, plan)
    assert type(optimizer).__name__ == kind
    group = optimizer.param_groups[0]
    assert group.get("momentum", 0.5) == 0.5
    assert group.get("weight_decay", 0.0) == (0.1 if name == "adamw" else 0.0)
    if name == "adam-corrected":
        assert group["noise_variance"] == pytest.approx((0.7 * 2.0 / 8) ** 2)


@pytest.mark.parametrize(("name", "halfway"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_schedules(tiny, tmp_path, name, halfway):
    adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",))
    _, schedule = make_optimizer(workbench.run_config(tmp_path, schedule=name), adapter, workbench.fit_plan())
    assert schedule(0.0) == 1.0
    assert schedule(0.5) == pytest.approx(halfway)


@pytest.mark.usefixtures("quick_calibration")
@pytest.mark.parametrize(
    "changes",
    [{"optimizer": "adam-corrected"}, {"adaptive_clip": 0.5}, {"optimizer": "sgd", "momentum": 0.0, "auto_clip": True}],
)
def test_no_switch_changes_what_is_spent(tmp_path, changes):
    finished = run.fine_tune(workbench.run_config(tmp_path / "run", **changes))
    plan = Ledger.read(finished.out / "ledger.jsonl").plan
    assert plan.train.event == plan.phases[0].event
    assert epsilon(plan).upper <= 8
    outcome = verify(finished.out / "ledger.jsonl")
    assert outcome.ok, outcome.failures
    said = "The clip norm moves" in "".join(finished.report.to_json()["assumptions"])
    assert said == ("adaptive_clip" in changes)
    assert plan.clipping == (
        "adaptive" if "adaptive_clip" in changes else "automatic" if "auto_clip" in changes else "flat"
    )
