"""Secure aggregation with noise in shares: reference numbers, losses, integer noise, and what is refused."""

import math

import pytest
from federations import silo, silos, step
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import BASIS

from dpsb_accounting import Gaussian, NonPrivate, Phase, PoissonSkellam, epsilon, skellam
from dpsb_accounting.events import Laplace
from dpsb_accounting.federated import Losses, secagg

ONE = {"local_steps": 1, "dropouts": 0, "colluders": 1}
INTEGER = {"noise": "skellam", "scale": 1000.0, "dimension": 256, "share_variance": 2.5e5}


def test_reference_numbers():
    """Ten shares of a sum with noise multiplier 1, q = 0.01, 1000 steps, delta 1e-5."""
    report = secagg(silos(10), local_steps=1, dropouts=3, colluders=2)
    colluding, outsiders, alone = (party.epsilon for party in report.parties)
    for found, exact in ((colluding, 4.48077), (outsiders, 2.78425)):
        assert found.lower <= exact <= found.upper <= exact * 1.005
    assert alone.upper == pytest.approx(59.15, rel=1e-3)
    assert report.epsilon == colluding


def test_without_losses_it_is_the_central_run():
    none_lost = secagg(silos(2), local_steps=1, dropouts=0, colluders=1).parties[1].epsilon
    assert none_lost.upper == epsilon([(step(), 1000)], 1e-5).upper
    assert none_lost.lower <= 1.82824 <= none_lost.upper


def test_what_the_noise_multiplier_stands_for():
    total = secagg(silos(10, Gaussian(noise_multiplier=1.0), 5), local_steps=1, dropouts=3, colluders=2)
    share = secagg(
        silos(10, Gaussian(noise_multiplier=1 / math.sqrt(10)), 5),
        local_steps=1,
        dropouts=3,
        colluders=2,
        noise_of="share",
    )
    sure = secagg(
        silos(10, Gaussian(noise_multiplier=math.sqrt(0.5)), 5),
        local_steps=1,
        dropouts=3,
        colluders=2,
        noise_of="guaranteed",
    )
    assert share.epsilon.upper == pytest.approx(total.epsilon.upper, rel=1e-6)
    assert sure.epsilon.upper == pytest.approx(total.epsilon.upper, rel=1e-6)
    for meaning in ("share", "guaranteed"):
        less = secagg(
            silos(10, Gaussian(noise_multiplier=1.0), 5), local_steps=1, dropouts=3, colluders=2, noise_of=meaning
        )
        assert less.epsilon.upper < total.epsilon.upper, "the default meaning is the one that is always safe"


def test_each_record_is_sampled_with_its_own_silos_probability():
    parties = [silo(f"silo {q}", step(1.0, q), 100) for q in (0.005, 0.02, 0.01)]
    report = secagg(parties, **ONE)
    left = math.sqrt(2 / 3)
    expected = [epsilon([(step(left, q), 100)], 1e-5).upper for q in (0.005, 0.02, 0.01)]
    assert [entry.epsilon.upper for entry in report.per_silo] == pytest.approx(expected, rel=1e-9)
    assert report.epsilon.upper == max(entry.epsilon.upper for entry in report.per_silo)


def test_unequal_shares_lose_the_largest_of_the_others():
    noises = [0.5, 1.0, 2.0, 3.0]
    parties = [silo(f"silo {noise}", Gaussian(noise_multiplier=noise), 5) for noise in noises]
    report = secagg(parties, local_steps=1, dropouts=1, colluders=1, noise_of="share")
    left = [math.hypot(0.5, 1.0), math.hypot(1.0, 0.5), math.hypot(2.0, 0.5), math.hypot(3.0, 0.5)]
    for entry, noise in zip(report.per_silo, left, strict=True):
        expected = epsilon([(Gaussian(noise_multiplier=noise), 5)], 1e-5).upper
        assert entry.epsilon.upper == pytest.approx(expected, rel=1e-9)


def test_clip_norms_count():
    """A silo that clips to half the norm moves the sum half as far."""
    parties = [
        silo("a", Gaussian(noise_multiplier=1.0), 3),
        silo("b", Gaussian(noise_multiplier=2.0), 3, l2_clip_norm=0.5),
    ]
    report = secagg(parties, **ONE)
    expected = [epsilon([(Gaussian(noise_multiplier=noise / math.sqrt(2)), 3)], 1e-5).upper for noise in (1.0, 2.0)]
    assert [entry.epsilon.upper for entry in report.per_silo] == pytest.approx(expected, rel=1e-9)


def test_another_phase_counts_with_the_smaller_noise():
    before = (Phase("basis", BASIS, 1),)
    parties = silos(4, steps=50, before=before)
    total = secagg(parties, **ONE)
    lost = math.sqrt(3 / 4)
    expected = [(Gaussian(noise_multiplier=5 * lost), 1), (step(lost), 50)]
    assert total.epsilon.upper == pytest.approx(epsilon(expected, 1e-5).upper, rel=1e-9)
    share = secagg(parties, **ONE, noise_of="share")
    expected = [(BASIS, 1), (step(math.sqrt(3)), 50)]
    assert share.epsilon.upper == pytest.approx(epsilon(expected, 1e-5).upper, rel=1e-9)


def test_a_tainted_silos_share_counts_for_nobody():
    good, bad = silos(4, steps=50), silo("bad", steps=50, taints=("seeded_randomness",))
    report = secagg([*good, bad], **ONE)
    assert not report.claim
    assert "seeded_randomness" in report.statement
    expected = epsilon([(step(math.sqrt(3 / 5)), 50)], 1e-5).upper
    assert [entry.claim for entry in report.per_silo] == [True] * 4 + [False]
    assert report.per_silo[0].epsilon.upper == pytest.approx(expected, rel=1e-9)


def test_several_local_steps_are_refused():
    with pytest.raises(ValueError, match="local_steps=2 cannot be claimed under secure aggregation"):
        secagg(silos(3), local_steps=2, dropouts=0, colluders=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colluders": 0}, "colluders must be at least 1, not 0: an insider knows its own share"),
        ({"dropouts": 2}, "none is left that certainly adds noise"),
        ({"dropouts": -1}, "dropouts must be at least 0"),
        ({"noise_of": "total"}, "noise_of must be one of"),
        ({"silos_per_person": 4}, "silos_per_person must be at most 3"),
        ({"local_steps": 0}, "local_steps must be at least 1"),
    ],
)
def test_bad_questions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        secagg(silos(3, steps=5), **{**ONE, **changes})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"steps": 6}, "'a' and 'b' plan different releases"),
        ({"event": step(2.0)}, "'a' and 'b' state different noise for the same sum"),
        ({"l2_clip_norm": 2.0}, "state different noise for the same sum"),
        ({"l2_clip_norm": 2.0, "before": (Phase("basis", BASIS, 1),)}, "clip to different norms, 1.0 and 2.0"),
        ({"stated": {"local_steps": 4}}, "states local_steps=4 in its plan"),
        ({"stated": {"clients": 5}}, "states clients=5 in its plan, which is not 2"),
        ({"stated": {"dropouts": 1}}, "states dropouts=1"),
        ({"stated": {"noise_of": "share"}}, "states noise_of='share'"),
        ({"stated": {"model": "silo_local"}}, "states model='silo_local'"),
        ({"stated": INTEGER}, "the same kind of noise"),
        ({"event": Laplace(noise_multiplier=1.0)}, "releases a Laplace"),
    ],
)
def test_silos_that_do_not_fit_are_refused_by_name(other, message):
    fields = {"name": "b", "steps": 5, **other}
    first = silo("a", steps=5, before=fields.get("before", ()))
    with pytest.raises(ValueError, match=message):
        secagg([first, silo(**fields)], **ONE)


def test_one_silo_is_no_sum_and_whole_clients_are_another_model():
    with pytest.raises(ValueError, match="clients must be at least 2"):
        secagg([silo()], **ONE)
    with pytest.raises(ValueError, match="accounted for by client_level"):
        secagg(silos(3, unit="client"), **ONE)


def test_a_non_private_phase_leaves_no_claim():
    before = (Phase("basis", NonPrivate(reason="raw gradients"), 1),)
    report = secagg([silo("a", steps=5, before=before), silo("b", steps=5, before=before)], **ONE)
    assert not report.claim
    assert report.epsilon is None


def test_integer_noise_has_its_own_bound():
    parties = silos(4, step(1.0, 0.01), 20, stated=INTEGER)
    report = secagg(parties, **ONE)
    found = skellam.sensitivity_after_rounding(l2_clip_norm=1, scale=1000, dimension=256)
    expected = skellam.epsilon(variance=3 * 2.5e5, sensitivity=found, count=20, delta=1e-5)
    assert report.epsilon.upper == pytest.approx(expected)
    assert "skellam" in report.epsilon.method
    sampled = epsilon([(step(math.sqrt(0.75), 0.01), 20)], 1e-5)
    unsampled = epsilon([(Gaussian(noise_multiplier=math.sqrt(0.75)), 20)], 1e-5)
    assert sampled.upper < unsampled.upper < report.epsilon.upper, "no amplification is claimed, and rounding costs"


def test_integer_noise_counts_taints_losses_and_other_phases():
    plain = secagg(silos(5, steps=20, stated=INTEGER), **ONE).epsilon.upper
    fewer = secagg(silos(5, steps=20, stated=INTEGER), local_steps=1, dropouts=2, colluders=1).epsilon.upper
    paid = secagg(silos(5, steps=20, stated=INTEGER, before=(Phase("basis", BASIS, 1),)), **ONE).epsilon.upper
    assert plain < paid
    assert plain < fewer
    bad = silo("bad", steps=20, stated=INTEGER, taints=("seeded_randomness",))
    tainted = secagg([*silos(4, steps=20, stated=INTEGER), bad], **ONE)
    assert not tainted.claim
    assert tainted.per_silo[0].epsilon.upper > plain
    raw = (Phase("basis", NonPrivate(reason="raw gradients"), 1),)
    assert not secagg(silos(3, steps=20, stated=INTEGER, before=raw), **ONE).claim


WHOLE = PoissonSkellam(noise_multiplier=1.5, sampling_prob=0.1, clip_steps=2.0**14, dimension=256)


def test_the_event_of_integer_noise_is_accounted_for_as_what_is_left_of_it():
    lost = {"local_steps": 1, "dropouts": 1, "colluders": 1}
    sure = secagg(silos(6, WHOLE, 20, stated={"noise": "skellam"}), noise_of="guaranteed", **lost)
    assert sure.epsilon.upper == pytest.approx(epsilon([(WHOLE, 20)], 1e-5).upper, rel=1e-9)
    assert sure.epsilon.upper > epsilon([(step(1.5, 0.1), 20)], 1e-5).upper, "it is not the Gaussian one"
    assert "skellam" in " ".join(sure.assumptions).lower()
    assert "The noisy vectors are added as they are" not in " ".join(sure.assumptions)
    total = secagg(silos(6, WHOLE, 20), noise_of="sum", **lost)
    assert total.epsilon.upper > sure.epsilon.upper
    alone = next(party for party in sure.parties if "without secure aggregation" in party.name)
    assert alone.epsilon.upper > sure.epsilon.upper


def test_whole_numbers_that_differ_are_no_sum():
    other = PoissonSkellam(noise_multiplier=1.5, sampling_prob=0.1, clip_steps=2.0**13, dimension=256)
    with pytest.raises(ValueError, match="round a sum to the same whole numbers"):
        secagg([silo("a", WHOLE, 5), silo("b", other, 5)], **ONE)
    with pytest.raises(ValueError, match="say that its noise is 'skellam'"):
        secagg(silos(3, WHOLE, 5, stated={"noise": "gaussian"}), **ONE)
    with pytest.raises(ValueError, match="the same kind of noise"):
        secagg([silo("a", WHOLE, 5), silo("b", steps=5)], **ONE)
    with pytest.raises(ValueError, match="records of one person in several"):
        secagg(silos(3, WHOLE, 5), silos_per_person=2, **ONE)


@pytest.mark.parametrize("fact", ["scale", "dimension", "share_variance"])
def test_integer_noise_needs_its_facts(fact):
    stated = {name: value for name, value in INTEGER.items() if name != fact}
    with pytest.raises(ValueError, match=f"states integer noise but no '{fact}'"):
        secagg(silos(3, steps=5, stated=stated), **ONE)


@settings(max_examples=6, deadline=None)
@given(st.integers(3, 12), st.data(), st.sampled_from(["sum", "share"]), st.floats(0.5, 4))
def test_more_dropouts_or_colluders_never_lower_epsilon(clients, data, noise_of, noise):
    dropouts = data.draw(st.integers(0, clients - 3))
    colluders = data.draw(st.integers(1, clients - 2 - dropouts))
    parties = silos(clients, Gaussian(noise_multiplier=noise), 3)

    def upper(lost, helped, stated=None):
        changed = [silo(one.name, one.train.event, 3, stated=stated or {}) for one in parties]
        return secagg(changed, local_steps=1, dropouts=lost, colluders=helped, noise_of=noise_of).epsilon.upper

    assert upper(dropouts, colluders) <= upper(dropouts + 1, colluders)
    assert upper(dropouts, colluders) <= upper(dropouts, colluders + 1)
    assert upper(dropouts, colluders, INTEGER) <= upper(dropouts + 1, colluders, INTEGER)
    assert upper(dropouts, colluders, INTEGER) <= upper(dropouts, colluders + 1, INTEGER)
    report = secagg(parties, local_steps=1, dropouts=dropouts, colluders=colluders, noise_of=noise_of)
    inside, outside, alone = (party.epsilon.upper for party in report.parties)
    assert outside <= inside <= alone * (1 + 1e-9)


def test_losses():
    losses = Losses(clients=10, dropouts=3, colluders=2)
    assert losses.honest == 5
    assert losses.factor("sum") == pytest.approx(math.sqrt(0.5))
    assert losses.factor("share") == pytest.approx(math.sqrt(5))
    assert losses.factor("guaranteed") == 1
