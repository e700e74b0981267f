"""People, not examples: a person's mean gradient is one row, the draw is of people, and no name gets out."""

import json
import math

import numpy as np
import pytest
import torch
import workbench
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeps import Silent, settings_of, shared

from dpsb import clipped_sums, run
from dpsb.canaries import CanaryAudit
from dpsb.config import ConfigError
from dpsb.curves.page import page
from dpsb.curves.sweep import run_sweep
from dpsb.data import Collator, DataError, Table, by_unit
from dpsb.losses import classification_loss
from dpsb.mechanism import Mechanism
from dpsb.plan import make_plan
from dpsb.randomness import SeededRandomness, SystemRandomness
from dpsb.sampling import choose, length_buckets
from dpsb.train import fit
from dpsb_accounting import Ledger, epsilon, verify

BUCKETS = length_buckets(workbench.PADDED)
PLAIN = Mechanism(l2_clip_norm=math.inf, noise_multiplier=0.0, clipping="none")
FLAT = Mechanism(l2_clip_norm=0.2, noise_multiplier=1.0, clipping="flat")
SIZES = (1, 4, 2, 7, 1, 3)


@pytest.fixture
def adapter(tiny):
    return tiny.adapter(tiny.base("bert"), allow=("classifier",))


def people(sizes=SIZES, seed=1):
    examples = iter(workbench.examples(sum(sizes), seed))
    return [[next(examples) for _ in range(size)] for size in sizes]


def summed(adapter, units, mechanism=PLAIN, token_budget=4096, loss_fn=classification_loss):
    return clipped_sums.clipped_sum_of_units(adapter, mechanism, loss_fn, Collator(0), units, BUCKETS, token_budget)


def exact_mean(tiny, adapter, unit):
    rows = []
    for example in unit:
        batch = Collator(0)([example], workbench.bucket(example))
        rows.append(tiny.autograd_row(adapter, classification_loss(adapter.model, batch).sum()))
    return torch.stack(rows).mean(dim=0)


def test_a_row_is_the_mean_of_a_persons_gradients(tiny, adapter):
    for unit in people():
        assert tiny.distance(summed(adapter, [unit]), exact_mean(tiny, adapter, unit)) <= 1e-5


@pytest.mark.parametrize("in_flight", [1, 3000, 1 << 22])
@pytest.mark.parametrize("token_budget", [16, 64, 4096])
def test_rows_meet_before_they_are_clipped(tiny, adapter, token_budget, in_flight, monkeypatch):
    """Whatever microbatches and groups a person's examples fall into."""
    monkeypatch.setattr(clipped_sums, "_NUMBERS_IN_FLIGHT", in_flight)
    rows = torch.stack([exact_mean(tiny, adapter, unit) for unit in people()])
    assert float(rows.norm(dim=1).min()) > FLAT.l2_clip_norm, "so that the order of mean and clip matters"
    expected = FLAT.clip_and_sum(rows)
    assert tiny.distance(summed(adapter, people(), FLAT, token_budget), expected) <= 1e-5


def test_an_example_that_is_not_finite_silences_its_owner_only(tiny, adapter):
    units = people()
    poisoned = len(units[3][2]["input_ids"])

    def loss_fn(model, batch):
        bad = batch["attention_mask"].sum(dim=1) == poisoned
        return classification_loss(model, batch) * torch.where(bad, math.nan, 1.0)

    spoilt = [any(len(example["input_ids"]) == poisoned for example in unit) for unit in units]
    assert spoilt[3]
    assert not all(spoilt)
    others = [unit for unit, bad in zip(units, spoilt, strict=True) if not bad]
    assert tiny.distance(summed(adapter, units, FLAT, loss_fn=loss_fn), summed(adapter, others, FLAT)) <= 1e-5


def test_someone_without_examples_and_an_empty_draw_give_zero(adapter):
    assert not summed(adapter, []).any()
    assert not summed(adapter, [[], []], FLAT).any()


def test_running_out_of_memory_changes_nothing(tiny, adapter, monkeypatch):
    expected = summed(adapter, people(), FLAT)
    reduce = clipped_sums._summed_by_unit

    def tight(owners, units, rows, positions):
        if len(positions) > 2:
            raise MemoryError
        return reduce(owners, units, rows, positions)

    monkeypatch.setattr(clipped_sums, "_summed_by_unit", tight)
    assert tiny.distance(summed(adapter, people(), FLAT), expected) <= 1e-5


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    seed=st.integers(0, 50),
    norm=st.floats(0.01, 10),
    rule=st.sampled_from(["flat", "automatic"]),
)
def test_one_person_more_or_less_moves_the_sum_by_at_most_C(tiny, sizes, seed, norm, rule):
    adapter = tiny.adapter(tiny.twice("none"), target_modules=["layer"])
    mechanism = Mechanism(l2_clip_norm=norm, noise_multiplier=1.0, clipping=rule)
    units = people(sizes, seed)
    with_all = summed(adapter, units, mechanism)
    for left_out in range(len(units)):
        moved = with_all - summed(adapter, units[:left_out] + units[left_out + 1 :], mechanism)
        assert float(moved.norm()) <= norm * (1 + 1e-4)


# --- the draw


def test_choose_is_uniform_and_never_more_than_asked_for():
    randomness = SystemRandomness()
    assert choose(3, 5, randomness).tolist() == [0, 1, 2]
    assert choose(0, 5, randomness).tolist() == []
    picks = [choose(6, 2, randomness) for _ in range(6000)]
    assert all(len(pick) == 2 and pick[0] < pick[1] for pick in picks)
    counts = np.bincount(np.concatenate(picks), minlength=6)
    assert (np.abs(counts - 2000) < 5 * math.sqrt(6000 * (1 / 3) * (2 / 3))).all()  # five standard deviations
    pairs = np.unique([6 * a + b for a, b in picks], return_counts=True)[1]
    assert len(pairs) == 15
    assert (np.abs(pairs - 400) < 5 * math.sqrt(400)).all()


def user_fit(tiny, path, units, loss_fn=classification_loss, randomness=None, **plan):
    adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",), scatter=0.0)
    details = {"examples_per_unit": 3}
    plan = {"unit": "user", "num_examples": 6, "expected_batch_size": 2, "steps": 8, "details": details, **plan}
    with workbench.new_ledger(path, **plan) as ledger:
        positional, named = workbench.fit_arguments(adapter, units, ledger, loss_fn=loss_fn, randomness=randomness)
        fit(*positional, **named)
    return adapter


def test_the_draw_is_of_people_and_reads_at_most_k_examples_of_each(tiny, tmp_path, monkeypatch):
    drawn, poisson, clipped = [], clipped_sums.poisson_draw, clipped_sums.clipped_sum_of_units

    def noted(num_rows, sampling_prob, randomness):
        assert num_rows == len(SIZES)
        assert sampling_prob == 2 / 6
        drawn.append(poisson(num_rows, sampling_prob, randomness))
        return drawn[-1]

    def checked(adapter, mechanism, loss_fn, collate, units, *rest):
        assert [len(unit) for unit in units] == [min(3, SIZES[i]) for i in drawn[-1]]
        for unit, index in zip(units, drawn[-1], strict=True):
            whole = people()[index]
            assert all(example in whole for example in unit)
        return clipped(adapter, mechanism, loss_fn, collate, units, *rest)

    monkeypatch.setattr(clipped_sums, "poisson_draw", noted)
    monkeypatch.setattr(clipped_sums, "clipped_sum_of_units", checked)
    user_fit(tiny, tmp_path, people())
    assert len(drawn) == 8
    assert Ledger.read(tmp_path / "ledger.jsonl").plan.unit == "user"


def test_empty_draws_are_steps(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(clipped_sums, "poisson_draw", lambda *_: np.array([], dtype=np.int64))
    adapter = user_fit(tiny, tmp_path, people(), randomness=SeededRandomness(1))
    assert Ledger.read(tmp_path / "ledger.jsonl").charged("train") == 8
    assert any(float(value.norm()) > 0 for value in adapter.state().values()), "noise is released all the same"


@pytest.mark.parametrize("changes", [{"details": {}}, {"details": {"examples_per_unit": 0}}, {"unit": "client"}])
def test_a_plan_that_does_not_say_how_many_examples_is_refused(tiny, tmp_path, changes):
    with pytest.raises(ValueError, match="Expected a plan whose unit is 'example', or 'user' with details"):
        user_fit(tiny, tmp_path, people(), **changes)
    assert Ledger.read(tmp_path / "ledger.jsonl").charged("train") == 0


# --- from a column to people


def test_people_are_told_apart_by_their_text():
    table = Table("x", {"who": ["a", " a ", 1, "1", 1.0, "B", "b"]})
    assert by_unit(table, "who", range(7)) == [[0, 1], [2, 3], [4], [5], [6]]


def test_rows_of_nobody_are_left_out():
    table = Table("x", {"who": [None, "", "  ", math.nan, "nan", "a"]})
    assert by_unit(table, "who", range(6)) == [[4], [5]]


NAMES = ("zanzibar-4711@example.org", "kilimanjaro-0815")


def mail(path, owners=None):
    rows = workbench.rows(60)
    owners = owners or [NAMES[0], NAMES[1], *(f"person {i % 13}" for i in range(58))]
    rows = [{**row, "sender": owner} for row, owner in zip(rows, owners, strict=True)]
    path.mkdir(parents=True, exist_ok=True)
    file = path / "mail.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


pytestmark = pytest.mark.usefixtures("quick_calibration")


def user_run(path, **changes):
    changes = {"unit_column": "sender", "examples_per_unit": 2, "expected_batch_size": 5, **changes}
    data = changes.pop("data", None) or mail(path / "data")
    return run.fine_tune(workbench.run_config(path / "run", data=data, **changes))


@pytest.mark.parametrize("declared", [None, 20])
def test_a_run_protects_people_and_names_none(tmp_path, declared, capfd):
    finished = user_run(tmp_path, num_examples=declared)
    plan = Ledger.read(finished.out / "ledger.jsonl").plan
    assert (plan.unit, plan.num_examples) == ("user", declared or 15)
    assert plan.neighboring == ("zero_out" if declared is None else "add_or_remove_one")
    assert plan.sampling_prob == 5 / plan.num_examples
    assert plan.details["unit_column"] == "sender"
    assert plan.details["examples_per_unit"] == 2
    report = finished.report.to_json()
    assert report["unit"] == "user"
    assert report["claim"] is True
    assert "user" in report["statement"]
    assert verify(finished.out / "ledger.jsonl").ok
    out, err = capfd.readouterr()
    for content in [*workbench.written(finished.out).values(), out.encode(), err.encode()]:
        for name in (*NAMES, "person 3"):
            assert name.encode() not in content
            assert name.split("-")[0].encode() not in content


def test_a_curve_protects_people_too(tmp_path):
    """In each cell, in what all of them cost together, and on the page, which then has no warning for people."""
    units = {"unit_column": "sender", "examples_per_unit": 2, "expected_batch_size": 5, "num_examples": 20}
    asked = settings_of(shared(data=mail(tmp_path / "data"), **units), methods="sb,head-only", epsilons="8")
    curve = run_sweep(asked, tmp_path / "curve", Silent())
    assert not curve.failures
    plans = [Ledger.read(path).plan for path in (tmp_path / "curve").glob("cells/*/ledger.jsonl")]
    assert [(plan.unit, plan.num_examples, plan.sampling_prob) for plan in plans] == [("user", 20, 0.25)] * 2
    parts = [(phase.event, phase.count) for plan in plans for phase in plan.phases]
    assert curve.price.bound.unit == "user"
    assert curve.price.bound.upper == epsilon(parts, plans[0].delta, "add_or_remove_one").upper > 8
    shown = page(curve)
    assert "per user, add_or_remove_one" in shown
    assert "--unit-column protects people" not in shown
    assert not any(name in shown for name in (*NAMES, "person 3"))


def test_a_report_of_examples_says_that_people_are_not_protected(tmp_path):
    finished = run.fine_tune(workbench.run_config(tmp_path / "run"))
    assert any("One person contributes one example" in line for line in finished.report.to_json()["assumptions"])


def test_a_column_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="has no column 'patient'; it has 'text', 'label', 'sender'"):
        user_run(tmp_path, unit_column="patient")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [None, "", " ", math.nan])
def test_a_column_without_values(tmp_path, value):
    data = mail(tmp_path / "data", [value] * 60)
    with pytest.raises(DataError, match="holds no rows with a value in the unit column 'sender'"):
        user_run(tmp_path, data=data)
    assert not (tmp_path / "run").exists()


def test_some_values_missing_are_nobodys_business(tmp_path):
    data = mail(tmp_path / "data", [math.nan, None, "", *(f"person {i % 9}" for i in range(57))])
    finished = user_run(tmp_path, data=data)
    assert Ledger.read(finished.out / "ledger.jsonl").plan.num_examples == 9


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"examples_per_unit": 0}, "examples_per_unit=0 of at least 1"),
        ({"unit_column": "sender", "basis": "private"}, "basis='private'"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, changes, match):
    with pytest.raises(ConfigError, match=match):
        workbench.run_config(tmp_path, **changes)


def test_a_plan_of_people_counts_people():
    plan = make_plan(
        epsilon=99, delta=1e-3, num_examples=50, expected_batch_size=5, steps=3, noise_multiplier=1.0, unit="user"
    )
    assert plan.unit == "user"
    with pytest.raises(ValueError, match="unit must be one of"):
        make_plan(epsilon=9, delta=1e-3, num_examples=5, expected_batch_size=5, steps=3, noise_multiplier=1, unit="x")


def test_members_of_an_audit_are_owned(tmp_path, monkeypatch):
    """Rows of nobody were not trained on; the membership attack must not count them as members."""
    seen = []
    monkeypatch.setattr(
        "dpsb.canaries.CanaryAudit.finish", lambda _self, _losses, members, *_: seen.append(len(members))
    )
    data = mail(tmp_path / "data", [None, "", *(f"person {i % 9}" for i in range(58))])
    settings = {"unit_column": "sender", "examples_per_unit": 2, "expected_batch_size": 5, "data": data}
    run.fine_tune(workbench.run_config(tmp_path / "run", **settings), audit=CanaryAudit(4, 0))
    assert seen == [58]
