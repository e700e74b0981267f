"""The self-test of a training step: a correct one passes, and each seeded fault is found by the check that is named."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpsb.mechanism import clip_and_sum
from dpsb.randomness import SystemRandomness
from dpsb.sampling import poisson_draw
from dpsb.selftest import ERROR_RATE, Step, run_selftest

C, STD, Q, D = 0.5, 0.65, 0.1, 60
LAYERS = (20, 20, 20)  # the last one is the head


def rows(count=6, seed=0):
    """Gradients of different lengths, most of them longer than C in every layer."""
    source = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(0.3, 8.0, count, dtype=torch.float64)[:, None]
    found = torch.randn(count, D, generator=source, dtype=torch.float64)
    return list(found / found.norm(dim=1, keepdim=True) * lengths)


def stack(chosen):
    return torch.stack(list(chosen)) if len(chosen) else torch.zeros(0, D, dtype=torch.float64)


def clipped(chosen, c=C):
    return clip_and_sum(stack(chosen), c)


def system_release():
    randomness = SystemRandomness()
    return lambda total: total + STD * randomness.normal(total.numel())


def system_draw():
    randomness = SystemRandomness()
    return lambda n: poisson_draw(n, Q, randomness).tolist()


HONEST = Step(
    name="honest",
    l2_clip_norm=C,
    clipped_sum=clipped,
    unclipped=lambda chosen: clipped(chosen, 1e6),
    otherwise=lambda chosen: sum((clipped(chosen[i : i + 2]) for i in range(0, len(chosen), 2)), torch.zeros(D)),
    poisoned=lambda row: row * float("nan"),
    noise_multiplier=STD / C,
    release=system_release(),
    fresh_release=system_release,
    sampling_prob=Q,
    draw=system_draw(),
    fresh_draw=system_draw,
)


def failures(step):
    return {check.name for check in run_selftest(step, rows()).failures}


def test_a_correct_step_passes_every_check():
    found = run_selftest(HONEST, rows())
    assert found.ok, found.failures
    assert all(check.passed for check in found.checks)
    assert found["noise_scale"].figure == pytest.approx(1, abs=0.0135)
    content = found.to_json()
    assert json.loads(json.dumps(content)) == content
    assert content["false_alarm_rate"] == pytest.approx(ERROR_RATE * len(found.checks))


def test_what_a_step_does_not_give_is_not_tested():
    found = run_selftest(Step(name="bare", l2_clip_norm=C, clipped_sum=clipped), rows())
    assert found.ok
    untested = {check.name for check in found.checks if check.passed is None}
    assert {"microbatches", "nan_example", "coupling_unclipped", "noise_scale", "draw_rate", "draw_rerun"} <= untested


def test_examples_that_never_reach_c_are_no_test():
    assert failures(replace(HONEST, l2_clip_norm=100.0, clipped_sum=lambda chosen: clipped(chosen, 100.0))) >= {
        "clip_reached"
    }
    with pytest.raises(ValueError, match="at least 4"):
        run_selftest(HONEST, rows(3))


# --- the sum


def per_layer(chosen):
    """Every layer clipped to C, accounted as one clip to C."""
    return torch.cat([clip_and_sum(part, C) for part in stack(chosen).split(LAYERS, dim=1)])


def head_not_clipped(chosen):
    body, head = stack(chosen).split((40, 20), dim=1)
    return torch.cat([clip_and_sum(body, C), head.sum(dim=0)])


def sum_clipped(chosen):
    """The sum is clipped instead of each row."""
    return clip_and_sum(stack(chosen).sum(dim=0, keepdim=True), C * max(1, len(chosen)))


def drawn_size_divides(chosen):
    return clipped(chosen) / max(1, len(chosen))


def mean_in_microbatches(chosen):
    """Rows are averaged in microbatches of two before they are clipped."""
    pairs = [stack(chosen[i : i + 2]).mean(dim=0) * 2 for i in range(0, len(chosen), 2)]
    return clipped(pairs)


def last_one_twice(chosen):
    return clipped([*chosen, *chosen[-1:]])


def nan_passes(chosen):
    found = stack(chosen)
    return (found * (C / found.norm(dim=1, keepdim=True)).clamp(max=1)).sum(dim=0)


def nan_raises(chosen):
    if any(bool(row.isnan().any()) for row in chosen):
        raise RuntimeError("anomaly")
    return clipped(chosen)


def empty_draw_raises(chosen):
    return clip_and_sum(torch.stack(list(chosen)), C)


def invented_example(chosen):
    """As Opacus' ``rand_on_empty``."""
    return clipped(chosen or [torch.ones(D, dtype=torch.float64)])


def noise_in_the_sum(chosen):
    """Noise once for every microbatch, so that its scale depends on how memory is used."""
    parts = [clipped(chosen[i : i + 2]) for i in range(0, len(chosen), 2)]
    return sum((part + STD * torch.randn(D, dtype=torch.float64) for part in parts), torch.zeros(D).double())


def weighted_by_place(chosen):
    return clipped([row / (1 + i) for i, row in enumerate(chosen)])


def normalized_over_the_batch(chosen):
    found = stack(chosen)
    return clip_and_sum(found - found.mean(dim=0), C) if len(chosen) else clipped(chosen)


class Stale:
    """What was summed before is never cleared."""

    def __init__(self):
        self.total = torch.zeros(D).double()

    def __call__(self, chosen):
        self.total = self.total + clipped(chosen)
        return self.total


def token_mean(chosen, c=1e6):
    found = stack(chosen)
    return clip_and_sum(found / max(1, len(chosen)), c)


SUMS = {
    "no clipping": ({"clipped_sum": lambda chosen: clipped(chosen, 1e6)}, "row_bound"),
    "clip per layer, accounted as flat": ({"clipped_sum": per_layer}, "row_bound"),
    "head not clipped": ({"clipped_sum": head_not_clipped}, "row_bound"),
    "clip norm twice as large": ({"clipped_sum": lambda chosen: clipped(chosen, 2 * C)}, "remove_one"),
    "sum clipped instead of rows": ({"clipped_sum": sum_clipped}, "coupling"),
    "drawn size divides": ({"clipped_sum": drawn_size_divides}, "coupling"),
    "mean of a microbatch clipped": ({"clipped_sum": mean_in_microbatches}, "coupling"),
    "loss averaged over the batch": ({"unclipped": token_mean}, "coupling_unclipped"),
    "normalized over the batch": ({"clipped_sum": normalized_over_the_batch}, "coupling"),
    "one example counted twice": ({"clipped_sum": last_one_twice}, "row_bound"),
    "weighted by place": ({"clipped_sum": weighted_by_place}, "order"),
    "NaN passes": ({"clipped_sum": nan_passes}, "nan_example"),
    "NaN raises": ({"clipped_sum": nan_raises}, "nan_example"),
    "empty draw raises": ({"clipped_sum": empty_draw_raises}, "empty_step"),
    "an example invented for an empty draw": ({"clipped_sum": invented_example}, "empty_step"),
    "noise in every microbatch": ({"clipped_sum": noise_in_the_sum}, "deterministic"),
    "sum never cleared": ({"clipped_sum": Stale()}, "deterministic"),
    "microbatches change the sum": ({"otherwise": mean_in_microbatches}, "microbatches"),
}


@pytest.mark.parametrize("fault", SUMS)
def test_faults_of_the_sum_are_found(fault):
    changes, named = SUMS[fault]
    only_sum = replace(HONEST, release=None, draw=None)
    assert named in failures(replace(only_sum, **changes))


# --- the noise


def reused():
    """One noise vector for all steps of a run."""
    kept = {}
    release = system_release()

    def again(total):
        noise = kept.setdefault(total.numel(), release(torch.zeros_like(total)))
        return total + noise

    return again


def from_global_seed():
    return lambda total: total + STD * torch.randn(total.shape, dtype=torch.float64)


def fixed_seed():
    source = np.random.default_rng(42)
    return lambda total: total + STD * torch.from_numpy(source.standard_normal(total.numel()))


def carried_into_children():
    source = np.random.default_rng()
    return lambda total: total + STD * torch.from_numpy(source.standard_normal(total.numel()))


def scaled(factor):
    def make():
        release = system_release()
        return lambda total: total + factor * (release(total) - total)

    return make


def before_the_clip():
    """Noise is added, and then the noisy sum is clipped."""
    release = system_release()
    return lambda total: clip_and_sum(release(total)[None], 4 * C)


def ten_numbers_reused():
    """The first ten coordinates, a bias perhaps, keep their noise for the whole run."""
    release, kept = system_release(), {}

    def again(total):
        noise = release(torch.zeros_like(total))
        noise[:10] = kept.setdefault("noise", noise[:10].clone())
        return total + noise

    return again


def same_for_every_layer():
    release = system_release()

    def repeated(total):
        noise = release(torch.zeros(total.numel() // 4, dtype=torch.float64)).repeat(4)
        return total + noise

    return repeated


def mirrored():
    """Every other step takes its noise back."""
    release, kept = system_release(), []

    def alternating(total):
        if kept:
            return total - kept.pop()
        kept.append(release(torch.zeros_like(total)))
        return total + kept[0]

    return alternating


def uniform():
    randomness = SystemRandomness()

    def release(total):
        words = randomness.words(total.numel()).astype(np.float64) / 2**64
        return total + STD * torch.from_numpy((words - 0.5) * 12**0.5)

    return release


def off_centre():
    release = system_release()
    return lambda total: release(total) + 0.05 * STD


NOISES = {
    "sigma times 0.9": (scaled(0.9), "noise_scale"),
    "sigma times 0.97": (scaled(0.97), "noise_scale"),
    "sigma divided by the batch size": (scaled(1 / 8), "noise_scale"),
    "no noise": (scaled(0.0), "noise_scale"),
    "noise before the clip": (before_the_clip, "noise_scale"),
    "noise reused": (reused, "noise_reuse"),
    "noise of ten coordinates reused": (ten_numbers_reused, "noise_repeats"),
    "noise the same for every layer": (same_for_every_layer, "noise_reuse"),
    "noise taken back": (mirrored, "noise_reuse"),
    "noise from a fixed seed": (fixed_seed, "noise_rerun"),
    "noise from the global seed": (from_global_seed, "noise_rerun"),
    "noise stream carried into forked processes": (carried_into_children, "noise_fork"),
    "uniform noise": (uniform, "noise_law"),
    "noise off centre": (off_centre, "noise_mean"),
}


@pytest.mark.parametrize("fault", NOISES)
def test_faults_of_the_noise_are_found(fault):
    if NOISES[fault][1] == "noise_fork" and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    make, named = NOISES[fault]
    assert named in failures(replace(HONEST, draw=None, release=make(), fresh_release=make))
