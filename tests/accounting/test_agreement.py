"""The cross-check: agreement, seeded disagreements, and that an estimate never becomes a claim."""

import dataclasses
import json
import math

import pytest
from plans import BASIS, STEP, two_phases

from dpsb_accounting import (
    Composed,
    Gaussian,
    Laplace,
    NonPrivate,
    Parallel,
    PoissonGaussian,
    agreement,
    cross_check,
    engines,
    epsilon,
)
from dpsb_accounting.composition import Composition
from dpsb_accounting.engines import clt, prv, quadrature
from dpsb_accounting.engines.answer import Answer, Unavailable

TRAINING = [(PoissonGaussian(noise_multiplier=1, sampling_prob=0.01), 1000)]


def seeded(lower, upper):
    """A second engine with a fixed answer."""
    answer = Answer(engine="seeded", lower=lower, upper=upper, rigorous=True, method="none")
    return (lambda *_: answer,)


@pytest.mark.parametrize("neighboring", ["add_or_remove_one", "zero_out", "replace_one"])
def test_training_agrees(neighboring):
    found = cross_check(TRAINING, 1e-5, neighboring)
    claimed = epsilon(TRAINING, 1e-5, neighboring)
    assert (found.status, found.engine, found.claimed) == ("agrees", "quadrature", claimed.upper)
    assert claimed.lower * (1 - 1e-6) <= found.upper
    assert found.lower <= claimed.upper * (1 + 1e-6)


def test_one_exact_gaussian_is_checked_too():
    found = cross_check([(Gaussian(noise_multiplier=5), 1)], 1e-5, "replace_one")
    assert (found.status, found.engine) == ("agrees", "quadrature")
    assert found.upper == pytest.approx(found.claimed, rel=1e-6)


def test_a_plan_a_composition_and_an_iterator_give_the_same():
    of_plan = cross_check(two_phases())
    parts = [(phase.event, phase.count) for phase in two_phases().phases]
    of_parts = cross_check(iter(parts), two_phases().delta, two_phases().neighboring)
    of_composition = cross_check(Composition.of(parts), two_phases().delta, two_phases().neighboring)
    assert of_plan == of_parts == of_composition


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ([NonPrivate(reason="raw")], "infinite"),
        ([], "nothing was released"),
        ([(Laplace(noise_multiplier=2), 3)], "Laplace"),
        ([Composed(events=(STEP, Laplace(noise_multiplier=3)))], "Laplace"),
    ],
)
def test_none_has_a_reason(schedule, words):
    found = cross_check(schedule, 1e-5)
    assert (found.status, found.engine, found.lower, found.upper) == ("none", None, None, None)
    assert words in found.reason
    assert found.claimed == epsilon(schedule, 1e-5).upper
    json.dumps(found.to_json(), allow_nan=False)


def test_of_parallel_parts_the_worst_is_checked():
    found = cross_check([Parallel(events=(BASIS, Gaussian(noise_multiplier=2)))], 1e-5)
    assert found.status == "agrees"
    assert found.upper == pytest.approx(epsilon([Gaussian(noise_multiplier=2)], 1e-5).upper, rel=1e-6)


def test_an_understated_claim_is_a_disagreement_and_the_looser_is_claimed(monkeypatch):
    claimed = epsilon(TRAINING, 1e-5).upper
    monkeypatch.setattr(agreement, "SECOND_ENGINES", seeded(1.1 * claimed, 1.2 * claimed))
    found = cross_check(TRAINING, 1e-5)
    assert found.status == "disagrees"
    assert found.claimed == 1.2 * claimed
    assert "seeded" in found.reason
    assert "looser" in found.reason


def test_an_overstated_claim_is_a_disagreement_and_stays(monkeypatch):
    claimed = epsilon(TRAINING, 1e-5).upper
    monkeypatch.setattr(agreement, "SECOND_ENGINES", seeded(0.1, 0.5))
    found = cross_check(TRAINING, 1e-5)
    assert (found.status, found.claimed) == ("disagrees", claimed)


@pytest.mark.parametrize(("distance", "status"), [(1.9e-3, "agrees"), (2.1e-3, "disagrees")])
def test_the_tolerance_is_two_thousandths(monkeypatch, distance, status):
    claimed = epsilon(TRAINING, 1e-5).upper
    monkeypatch.setattr(agreement, "SECOND_ENGINES", seeded(claimed * (1 + distance), claimed * 2))
    assert cross_check(TRAINING, 1e-5).status == status


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(lambda c: clt.epsilon(c, 1e-5, "zero_out").upper, id="an estimate used as a bound"),
        pytest.param(lambda _: epsilon([(TRAINING[0][0], 100)], 1e-5).upper, id="a forgotten count"),
        pytest.param(
            lambda _: epsilon([(PoissonGaussian(noise_multiplier=1, sampling_prob=0.0098), 1000)], 1e-5).upper,
            id="q off by a dropped batch",
        ),
    ],
)
def test_seeded_bugs_in_the_accountant_are_caught(monkeypatch, bug):
    """The bug's number takes the place of the upper bound; the second engine must see it and the looser be claimed."""
    composition = Composition.of(TRAINING)
    truth = epsilon(TRAINING, 1e-5)
    wrong = bug(composition)
    assert wrong < truth.lower
    monkeypatch.setattr(engines, "epsilon", lambda *_: (0.0, wrong, "bug"))
    found = cross_check(TRAINING, 1e-5)
    assert found.status == "disagrees"
    assert found.claimed >= truth.lower


def test_the_sensitivity_of_add_remove_under_replace_one_is_caught(monkeypatch):
    truth = epsilon(TRAINING, 1e-5, "replace_one")
    wrong = epsilon(TRAINING, 1e-5, "add_or_remove_one").upper
    monkeypatch.setattr(engines, "epsilon", lambda *_: (0.0, wrong, "bug"))
    found = cross_check(TRAINING, 1e-5, "replace_one")
    assert found.status == "disagrees"
    assert found.claimed >= truth.lower


def test_an_estimate_never_becomes_a_claim():
    composition = Composition.of([(PoissonGaussian(noise_multiplier=0.5, sampling_prob=1e-4), 1000)])
    estimate = clt.epsilon(composition, 1e-9, "zero_out")
    truth = epsilon([(PoissonGaussian(noise_multiplier=0.5, sampling_prob=1e-4), 1000)], 1e-9)
    assert estimate.upper < 0.2 < 3 < truth.lower  # why it may not
    assert not estimate.rigorous
    assert not quadrature.epsilon(Composition.of(TRAINING), 1e-5, "zero_out").rigorous
    assert "gdp_clt" not in truth.method
    names = {second.__name__ for second in agreement.SECOND_ENGINES}
    assert names == {"_quadrature", "_prv"}


def test_the_central_limit_is_right_in_the_limit():
    composition = Composition.of([(PoissonGaussian(noise_multiplier=10, sampling_prob=0.1), 100_000)])
    assert clt.epsilon(composition, 1e-5, "zero_out").upper == pytest.approx(17.917, rel=1e-3)
    with pytest.raises(Unavailable, match="add_or_remove_one and zero_out"):
        clt.epsilon(composition, 1e-5, "replace_one")
    with pytest.raises(Unavailable, match="too small"):
        clt.epsilon(Composition.of([(PoissonGaussian(noise_multiplier=0.03, sampling_prob=0.1), 1)]), 1e-5, "zero_out")


def test_prv_takes_over_where_the_quadrature_refuses(monkeypatch):
    def refuses(*_):
        raise Unavailable("not today")

    def short(composition, delta, neighboring):
        return prv.epsilon(composition, delta, neighboring, 200_000)

    monkeypatch.setattr(agreement, "SECOND_ENGINES", (refuses, short))
    schedule = [(PoissonGaussian(noise_multiplier=2, sampling_prob=0.1), 20)]
    found = cross_check(schedule, 1e-5)
    assert (found.status, found.engine) == ("agrees", "prv")
    assert found.lower <= epsilon(schedule, 1e-5).upper
    monkeypatch.setattr(agreement, "SECOND_ENGINES", (refuses,))
    assert "not today" in cross_check(schedule, 1e-5).reason


def test_a_check_is_frozen_and_becomes_json():
    found = cross_check(TRAINING, 1e-5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.status = "agrees"
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["status"] == "agrees"
    assert data["epsilon"] == {"lower": found.lower, "upper": found.upper}
    assert math.isfinite(data["claimed"])


@pytest.mark.parametrize("delta", [0, 1, math.nan])
def test_bad_arguments_are_named(delta):
    with pytest.raises(ValueError, match="delta"):
        cross_check(TRAINING, delta)
    with pytest.raises(ValueError, match="delta"):
        cross_check(TRAINING)
    with pytest.raises(ValueError, match="neighboring"):
        cross_check(TRAINING, 1e-5, "x")
    with pytest.raises(ValueError, match="delta"):
        cross_check(Composition.of(TRAINING))
    with pytest.raises(ValueError, match="delta"):
        cross_check(Composition.of(TRAINING), delta)
