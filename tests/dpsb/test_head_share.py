"""Head and adapter clipped apart: the whole row stays in its ball, and the plan says how it was divided."""

import math
from dataclasses import replace

import pytest
import torch
import workbench
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsb import run
from dpsb.config import ConfigError
from dpsb.head_share import clip_parts
from dpsb.mechanism import AUTOMATIC_GAMMA, ClipPart, Mechanism, clip_and_sum_parts
from dpsb.trainer.arguments import PrivacyArguments
from dpsb_accounting import Ledger, verify

NUMBER = st.one_of(st.floats(width=32), st.sampled_from([0.0, math.nan, math.inf, 3e38, 1e-45]), st.floats(-10, 10))


pytestmark = pytest.mark.usefixtures("quick_calibration")


@given(
    rows=st.lists(st.lists(NUMBER, min_size=5, max_size=5), min_size=1, max_size=6),
    cut=st.integers(1, 4),
    share=st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.9, 0.999]),
    rule=st.sampled_from(["flat", "automatic"]),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_removing_one_row_moves_the_sum_by_at_most_the_clip_norm(rows, cut, share, rule):
    rows = torch.tensor(rows, dtype=torch.float32)
    parts = (ClipPart(cut, 1.0 - share), ClipPart(5 - cut, share))
    moved = clip_and_sum_parts(rows, 2.0, rule, parts) - clip_and_sum_parts(rows[1:], 2.0, rule, parts)
    assert float(moved.norm()) <= 2.0 * (1 + 1e-12)
    assert float(moved[:cut].norm()) <= 2.0 * math.sqrt(1.0 - share) * (1 + 1e-12)
    if not bool(torch.isfinite(rows[0]).all()):
        assert float(moved.norm()) <= 1e-9  # nothing of it, in no part


def test_each_part_is_clipped_by_its_formula():
    rows = torch.tensor([[30.0, 40.0, 0.3, 0.4], [0.1, 0.0, 0.0, 9.0]])
    parts = (ClipPart(2, 0.75), ClipPart(2, 0.25))
    flat = clip_and_sum_parts(rows, 2.0, "flat", parts)
    low, high = 2 * math.sqrt(0.75), 2 * math.sqrt(0.25)
    expected = torch.tensor([0.6 * low + 0.1, 0.8 * low, 0.3, 0.4 + high], dtype=torch.float64)
    torch.testing.assert_close(flat, expected, rtol=1e-6, atol=0)
    automatic = clip_and_sum_parts(rows[:1], 2.0, "automatic", parts)
    assert float(automatic[2:].norm()) == pytest.approx(high * 0.5 / (0.5 + AUTOMATIC_GAMMA))


def test_parts_must_fill_the_row_and_no_more_than_the_ball():
    with pytest.raises(ValueError, match="to sum to 4"):
        clip_and_sum_parts(torch.zeros(1, 4), 1.0, "flat", (ClipPart(3, 0.5),))
    for parts, rule in (
        ((ClipPart(2, 0.6), ClipPart(2, 0.6)), "flat"),
        ((ClipPart(2, 1.2), ClipPart(2, -0.2)), "flat"),
        ((ClipPart(2, math.nan), ClipPart(2, 0.5)), "flat"),
        ((ClipPart(2, 0.5), ClipPart(2, 0.5)), "none"),
    ):
        with pytest.raises(ValueError, match="shares that sum to at most 1"):
            Mechanism(l2_clip_norm=1.0, noise_multiplier=1.0, clipping=rule, parts=parts)


@pytest.mark.parametrize("method", ["sb", "lora", "ffa-lora", "bitfit"])
def test_a_run_divides_its_rows_and_says_so(tmp_path, method):
    out = tmp_path / "run"
    run.fine_tune(workbench.run_config(out, head_share=0.25, method=method, insecure_seed=3))
    plan = Ledger.read(out / "ledger.jsonl").plan
    parts = {fact["what"]: fact for fact in plan.details["clip_parts"]}
    assert (parts["head"]["share"], parts["adapter"]["share"]) == (0.25, 0.75)
    mechanism = Mechanism.from_plan(plan)
    dimension = sum(part.size for part in mechanism.parts)
    sizes = {"adapter": slice(None), "head": slice(None)}
    start = 0
    for fact in plan.details["clip_parts"]:
        sizes[fact["what"]] = slice(start, start + fact["size"])
        start += fact["size"]
    total = mechanism.clip_and_sum(100 * torch.ones(1, dimension))
    assert float(total[sizes["head"]].norm()) == pytest.approx(0.5 * plan.l2_clip_norm)
    assert float(total.norm()) == pytest.approx(plan.l2_clip_norm)
    assert verify(out / "ledger.jsonl").ok


def test_what_the_head_learns_does_not_depend_on_the_adapters_gradient(tiny, tmp_path):
    """Peers clip jointly: a basis that holds more gradient takes the head's part of C."""
    adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",))
    facts = clip_parts(adapter, 0.5)
    parts = tuple(ClipPart(fact["size"], fact["share"]) for fact in facts)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(8, adapter.dimension, generator=generator)
    louder = rows.clone()
    louder[:, : parts[0].size] *= 1000
    assert facts[1]["what"] == "head"
    first, second = (clip_and_sum_parts(each, 1.0, "flat", parts)[parts[0].size :] for each in (rows, louder))
    assert torch.equal(first, second)


def test_a_resume_with_another_share_is_refused(tmp_path):
    config = workbench.run_config(tmp_path / "run", head_share=0.25)

    class Stopped(Exception):
        pass

    def stop(_progress):
        raise Stopped

    with pytest.raises(Stopped):
        run.fine_tune(config, callbacks=run.Callbacks(on_step=stop))
    with pytest.raises(run.RunError, match="differ from the run's plan in details"):
        run.fine_tune(replace(config, head_share=0.5), resume=True)
    run.fine_tune(config, resume=True)


def test_without_privacy_nothing_is_divided(tmp_path):
    run.fine_tune(workbench.run_config(tmp_path / "run", head_share=0.25, epsilon=math.inf))
    assert "clip_parts" not in Ledger.read(tmp_path / "run" / "ledger.jsonl").plan.details


def test_bad_shares_are_one_sentence(tmp_path):
    for share in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match=r"Expected head_share=.* between 0 and 1"):
            workbench.run_config(tmp_path, head_share=share)
    for changes in ({"method": "head-only"}, {"adaptive_clip": 0.5}):
        with pytest.raises(ConfigError, match="is for a classification head that is trained beside an adapter"):
            workbench.run_config(tmp_path, head_share=0.5, **changes)
    with pytest.raises(ConfigError, match="is for a classification head"):
        workbench.run_config(tmp_path, "causal-lm", head_share=0.5)
    with pytest.raises(ValueError, match=r"head_share=1\.5"):
        PrivacyArguments(epsilon=3, delta=1e-5, num_examples=100, expected_batch_size=10, head_share=1.5)


def test_a_head_alone_cannot_be_divided(tiny):
    adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",))
    with pytest.raises(ValueError, match="needs a head and an adapter"):
        clip_parts(replace(adapter, cores=()), 0.5)
