"""Silo-local federations: maximum over silos, composition for a person in several, and what is refused."""

import itertools

import pytest
from federations import silo, silos, step, write_ledger
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import BASIS

from dpsb_accounting import Gaussian, Ledger, NonPrivate, Phase, ResourceLimit, epsilon
from dpsb_accounting.federated import report as federated_report
from dpsb_accounting.federated import silo_local
from dpsb_accounting.federated.report import rounded_up

UNEQUAL = [
    silo("a", step(1.0, 0.01), 60),
    silo("b", step(2.0, 0.03), 50),
    silo("c", step(0.8, 0.004), 40),
]


def reference(parts, delta=1e-5, mesh=2e-4):
    """dp-accounting's own epsilon of the parts, asked directly and on a finer mesh."""
    from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=mesh)
    accountant.compose(
        ComposedDpEvent(
            [
                SelfComposedDpEvent(
                    PoissonSampledDpEvent(event.sampling_prob, GaussianDpEvent(event.noise_multiplier)), count
                )
                for event, count in parts
            ]
        )
    )
    return accountant.get_epsilon(delta)


def test_disjoint_silos_pay_the_maximum():
    report = silo_local(UNEQUAL)
    singles = [reference(one.parts) for one in UNEQUAL]
    for entry, exact in zip(report.per_silo, singles, strict=True):
        assert entry.epsilon.lower <= exact * (1 + 1e-4)
        assert exact * (1 - 1e-4) <= entry.epsilon.upper <= exact * 1.01
    assert report.epsilon.upper == max(entry.epsilon.upper for entry in report.per_silo)
    assert report.claim
    assert rounded_up(report.epsilon.upper) in report.statement


def test_a_person_in_several_silos_pays_for_the_worst_ones_composed():
    report = silo_local(UNEQUAL, silos_per_person=2)
    pairs = [a.parts + b.parts for a, b in itertools.combinations(UNEQUAL, 2)]
    worst = max(pairs, key=lambda parts: epsilon(parts, 1e-5).upper)
    exact = reference(worst)
    assert exact * (1 - 1e-4) <= report.epsilon.upper <= exact * 1.01
    assert report.epsilon.upper < 2 * max(entry.epsilon.upper for entry in report.per_silo)
    everywhere = silo_local(UNEQUAL, silos_per_person=3)
    assert everywhere.epsilon.upper == epsilon(sum((one.parts for one in UNEQUAL), ()), 1e-5).upper


def test_a_costlier_silo_is_never_left_out():
    """Ordered silos need one composition, and it is the one with the costliest."""
    ordered = [silo(f"silo {q}", step(1.0, q), 100) for q in (0.002, 0.01, 0.005, 0.02)]
    report = silo_local(ordered, silos_per_person=2)
    assert report.epsilon.upper == epsilon([(step(1.0, 0.01), 100), (step(1.0, 0.02), 100)], 1e-5).upper


def test_too_many_choices_fall_back_to_a_sum_that_holds():
    many = [silo(f"silo {i}", Gaussian(noise_multiplier=1.0 + 0.1 * i), 5 + i) for i in range(12)]
    report = silo_local(many, silos_per_person=4)
    assert "too many choices" in report.epsilon.method
    for choice in (many[:4], many[-4:], many[4:8]):
        assert report.epsilon.upper >= epsilon([part for one in choice for part in one.parts], 1e-5).upper


def test_what_is_planned_counts_and_not_what_was_charged(tmp_path):
    paths = [write_ledger(tmp_path / f"{i}.jsonl", step(1.0, 0.01), 100, charged=i) for i in (3, 7)]
    report = silo_local([Ledger.read(path) for path in paths])
    assert [(entry.charged, entry.planned) for entry in report.per_silo] == [(3, 100), (7, 100)]
    assert report.incomplete_rounds == 4
    assert report.epsilon.upper == epsilon([(step(1.0, 0.01), 100)], 1e-5).upper


def test_a_torn_last_line_is_a_charged_step(tmp_path):
    path = write_ledger(tmp_path / "torn.jsonl", charged=2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert silo_local([Ledger.read(path)]).per_silo[0].charged == 2


def test_a_private_basis_is_composed():
    plain, paid = silo("a"), silo("a", before=(Phase("basis", BASIS, 1),))
    assert silo_local([paid]).epsilon.upper == epsilon([(BASIS, 1), (step(), 1000)], 1e-5).upper
    assert silo_local([paid]).epsilon.upper > silo_local([plain]).epsilon.upper


def test_one_tainted_silo_has_no_claim_and_the_others_keep_theirs(tmp_path):
    good = write_ledger(tmp_path / "good.jsonl", stated={"silo": "good"})
    bad = write_ledger(tmp_path / "bad.jsonl", taint="seeded_randomness", stated={"silo": "bad"})
    report = silo_local([Ledger.read(good), Ledger.read(bad)])
    assert not report.claim
    assert report.epsilon is None
    assert [(entry.name, entry.claim) for entry in report.per_silo] == [("good", True), ("bad", False)]
    assert "seeded_randomness" in report.per_silo[1].reason
    assert "No privacy claim" in report.statement
    assert all(party.epsilon is None for party in report.parties)
    assert report.to_json()["epsilon"] is None


def test_a_non_private_silo_has_no_claim():
    report = silo_local([silo("a"), silo("b", NonPrivate(reason="no noise"))])
    assert not report.claim
    assert [entry.claim for entry in report.per_silo] == [True, False]
    assert silo_local([silo("b", NonPrivate(reason="no noise"))]).to_json()["silos"][0]["epsilon"] is None


def test_a_silo_that_no_engine_can_bound_has_no_claim(monkeypatch):
    def bound(schedule, terms):
        if len(schedule) == 2:
            raise ResourceLimit("the privacy loss spreads too far")
        return real(schedule, terms)

    real = federated_report.bound
    monkeypatch.setattr(federated_report, "bound", bound)
    plain, paid = silo("a", steps=5), silo("b", steps=5, before=(Phase("basis", BASIS, 1),))
    report = silo_local([plain, paid])
    assert not report.claim
    assert [entry.claim for entry in report.per_silo] == [True, False]
    assert "spreads too far" in report.statement


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"neighboring": "replace_one"}, "differ in neighboring: 'add_or_remove_one' and 'replace_one'"),
        ({"unit": "user"}, "differ in unit: 'example' and 'user'"),
        ({"delta": 1e-6}, "differ in delta: 1e-05 and 1e-06"),
        ({"name": "a"}, "the name 'a' is there twice"),
        ({"stated": {"federation": "x"}}, "state federation None and 'x'"),
        ({"stated": {"noise_of": "sum"}}, "states noise_of='sum' in its plan, which is not 'share'"),
        ({"stated": {"noise": "skellam"}}, "states noise='skellam' in its plan, which is not 'gaussian'"),
        ({"stated": {"model": "secagg"}}, "states model='secagg' in its plan, which is not 'silo_local'"),
    ],
)
def test_silos_that_do_not_fit_are_refused_by_name(other, message):
    with pytest.raises(ValueError, match=message):
        silo_local([silo("a"), silo(**{"name": "b", **other})])


def test_deltas_are_aligned_only_explicitly():
    mixed = [silo("a", steps=100), silo("b", steps=100, delta=1e-6)]
    report = silo_local(mixed, delta=1e-6)
    expected = epsilon([(step(), 100)], 1e-6).upper
    assert [entry.epsilon.upper for entry in report.per_silo] == [expected, expected]
    assert report.epsilon.delta == 1e-6
    with pytest.raises(ValueError, match=r"delta=0\.01 must be less than 1 / num_examples"):
        silo_local([silo("a", num_examples=1000)], delta=0.01)


def test_a_ledger_given_twice_is_refused(tmp_path):
    path = write_ledger(tmp_path / "one.jsonl")
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="is there twice"):
        silo_local([Ledger.read(path), Ledger.read(copy)])


def test_bad_questions_are_refused():
    with pytest.raises(ValueError, match="at least one silo"):
        silo_local([])
    with pytest.raises(ValueError, match="silos_per_person must be at most 2"):
        silo_local(silos(2, steps=10), silos_per_person=3)
    with pytest.raises(ValueError, match="silos_per_person must be at least 1"):
        silo_local(silos(2, steps=10), silos_per_person=0)
    with pytest.raises(ValueError, match="a party must be a Silo or a LedgerRecord"):
        silo_local(["ledger.jsonl"])
    with pytest.raises(ValueError, match="unknown facts of a federation: 'colour'"):
        silo(stated={"colour": "red"})
    with pytest.raises(ValueError, match="must contain one named 'train'"):
        silo_local([silo(phases=(Phase("basis", BASIS, 1),))])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(0.8, 4), st.floats(1, 3)), min_size=2, max_size=4))
def test_more_silos_per_person_never_cost_less(values):
    parties = [
        silo(f"silo {i}", Gaussian(noise_multiplier=noise), round(steps)) for i, (noise, steps) in enumerate(values)
    ]
    found = [silo_local(parties, silos_per_person=k).epsilon.upper for k in range(1, len(parties) + 1)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(epsilon([part for one in parties for part in one.parts], 1e-5).upper)
