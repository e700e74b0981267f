"""The numbers behind the findings, against independent values; and the Fed-SB reference as a whole."""

import dataclasses
from pathlib import Path

import pytest

from dpsb_accounting import epsilon
from dpsb_accounting.claims import claim_from, lint, read_claim
from dpsb_accounting.claims.shuffle import fixed_size_lower_epsilon, lower_epsilon
from dpsb_accounting.claims.tails import Observation
from dpsb_accounting.claims.tails import lower_epsilon as seen_epsilon
from dpsb_accounting.events import Gaussian, PoissonGaussian

CLAIMS = Path(__file__).parent.parent / "golden" / "claims"


def finding(name, **facts):
    outcome = lint(claim_from({"delta": 1e-5, "neighboring": "zero_out", **facts}))
    return next(entry for entry in outcome.findings if entry.id == name)


@pytest.mark.parametrize(
    ("noise", "epochs", "batches", "poisson", "least", "most"),
    [
        (1, 1, 1000, 0.1490, 2.882, 4.377),
        (1, 1, 100, 0.7180, 4.063, 4.377),
        (1, 10, 100, 1.8282, 9.360, 17.857),
        (2, 10, 100, 0.6220, 0.944, 7.511),
        (0.6, 10, 1000, 2.456, 27.7, None),
    ],
)
def test_shuffled_batches(noise, epochs, batches, poisson, least, most):
    found = finding(
        "shuffled-as-poisson", epsilon=poisson, noise_multiplier=noise, epochs=epochs, num_examples=100 * batches,
        batch_size=100, sampler="shuffle",
    )  # fmt: skip
    assert found.severity == "error"
    assert found.evidence["epsilon_if_poisson"] == pytest.approx(poisson, rel=2e-3)
    # At least the reference, which composed on a coarser grid, and within one per cent of it.
    assert least - 6e-4 <= found.recomputed.lower <= 1.01 * least
    if most is not None:
        assert found.recomputed.upper == pytest.approx(most, abs=1e-3)
    assert "wrong by at least" in found.message


def test_fixed_order_is_exactly_a_gaussian():
    found = finding("fixed-order-as-poisson", epsilon=1.83, noise_multiplier=1, epochs=10, num_examples=10_000,
                    batch_size=100, sampler="fixed_order")  # fmt: skip
    exact = epsilon([(Gaussian(noise_multiplier=1), 10)], 1e-5)
    assert (found.recomputed.lower, found.recomputed.upper) == (exact.lower, exact.upper)
    assert found.recomputed.upper == pytest.approx(17.857, abs=1e-3)


def test_an_order_kept_over_the_epochs_leaks_more_than_a_new_one_each_time():
    facts = {"noise_multiplier": 1, "steps": 1000, "batches_per_epoch": 100, "delta": 1e-5}
    assert lower_epsilon(**facts, reshuffled=False) > 1.5 * lower_epsilon(**facts)


def test_one_batch_an_epoch_is_the_gaussian_itself():
    exact = epsilon([(Gaussian(noise_multiplier=2), 9)], 1e-5)
    found = lower_epsilon(noise_multiplier=2, steps=9, batches_per_epoch=1, delta=1e-5)
    assert exact.lower - 1e-3 <= found <= exact.upper


@pytest.mark.parametrize("delta", [1e-9, 1e-3])
@pytest.mark.parametrize("noise", [0.3, 1, 5])
@pytest.mark.parametrize(("steps", "batches"), [(1, 1), (3, 7), (40, 20), (45, 20.5)])
@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
def test_the_lower_bound_never_exceeds_the_upper_one(delta, noise, steps, batches, relation):
    often = -(-steps // int(batches))
    exact = epsilon([(Gaussian(noise_multiplier=noise), often)], delta, relation)
    found = lower_epsilon(
        noise_multiplier=noise, steps=steps, batches_per_epoch=batches, delta=delta, neighboring=relation
    )
    assert 0 <= found <= exact.upper


@pytest.mark.parametrize(("noise", "prob", "count"), [(1, 0.01, 1000), (0.6, 0.1, 20), (3, 0.3, 300)])
def test_observed_sums_agree_with_the_accountant(noise, prob, count):
    """A Poisson sum is such an observation, so the engine that shares no code with it must give the same."""
    sampled = ((prob, 1.0), (1 - prob, 0.0))
    once = Observation(p=sampled, q=((1.0, 0.0),), others=0, noise=noise, count=count)
    bound = epsilon([(PoissonGaussian(noise_multiplier=noise, sampling_prob=prob), count)], 1e-5)
    assert bound.upper * 0.995 <= seen_epsilon((once,), 1e-5) <= bound.upper


@pytest.mark.parametrize(
    ("facts", "often"),
    [
        ({"epochs": 1}, 1),
        ({"epochs": 3, "steps": 705}, 3),
        ({"epochs": 3, "drop_last": True}, 3),
        ({"steps": 702, "drop_last": True}, 3),
        ({"steps": 705}, 3),
        ({"steps": 703}, 4),  # an epoch may have 234 or 235 steps: the bound that holds for both
    ],
)
def test_a_smaller_last_batch_is_no_epoch_of_its_own(facts, often):
    found = finding("shuffled-as-poisson", epsilon=0.3, noise_multiplier=2, num_examples=60_000, batch_size=256,
                    sampler="shuffle", **facts)  # fmt: skip
    assert found.recomputed.upper == epsilon([(Gaussian(noise_multiplier=2), often)], 1e-5).upper


def test_the_lower_bound_counts_only_epochs_that_are_complete_either_way():
    def least(steps, batches):
        return lower_epsilon(noise_multiplier=1, steps=steps, batches_per_epoch=batches, delta=1e-5)

    assert least(21, 20.5) == least(22, 20.5) == least(41, 20.5) < least(42, 20.5)
    assert least(10, 20.5) < least(20, 20.5) == least(21, 20.5)
    assert least(20, 20) < least(25, 20)


def test_less_noise_and_more_steps_leak_more():
    grid = [lower_epsilon(noise_multiplier=noise, steps=steps, batches_per_epoch=50, delta=1e-5)
            for steps in (50, 100, 500) for noise in (2, 1, 0.5)]  # fmt: skip
    assert all(grid[i] < grid[i + 1] for i in (0, 1, 3, 4, 6, 7))
    assert all(grid[i] < grid[i + 3] for i in range(6))


def test_batches_of_a_fixed_size():
    found = finding("fixed-size-as-poisson", epsilon=3.58, noise_multiplier=1, steps=1000, num_examples=10_000,
                    batch_size=100, sampler="without_replacement", neighboring="replace_one")  # fmt: skip
    assert found.recomputed.upper == pytest.approx(20.99, abs=0.01)
    assert 13.3 < found.recomputed.lower < found.recomputed.upper
    zero = fixed_size_lower_epsilon(
        noise_multiplier=1, sampling_prob=0.01, steps=1000, delta=1e-5, neighboring="zero_out"
    )
    assert 1.8282 < zero < 20.99


@pytest.mark.parametrize(("cap", "bound"), [(128, 4.013), (110, 7.682)])
def test_capped_batches(cap, bound):
    found = finding("poisson-batches-capped", epsilon=1.829, noise_multiplier=1, steps=1000, num_examples=10_000,
                    batch_size=100, sampler="poisson", max_batch_size=cap)  # fmt: skip
    assert found.recomputed.upper == pytest.approx(bound, rel=1e-3)


def test_a_generous_cap_costs_next_to_nothing_and_is_no_finding():
    claim = claim_from({"epsilon": 1.8305, "delta": 1e-5, "noise_multiplier": 1, "steps": 1000, "num_examples": 10_000,
                        "batch_size": 100, "sampler": "poisson", "max_batch_size": 150})  # fmt: skip
    assert "poisson-batches-capped" not in {entry.id for entry in lint(claim).findings}


def test_microbatches_with_draws_of_their_own():
    found = finding("microbatches-summed", epsilon=8.492, noise_multiplier=1, steps=1000, sampling_prob=0.01,
                    sampler="poisson", microbatches_drawn=4)  # fmt: skip
    assert found.recomputed.upper == pytest.approx(8.899, rel=1e-3)


def test_a_user_with_four_examples():
    found = finding("unit-mismatch", epsilon=1.829, noise_multiplier=1, steps=1000, sampling_prob=0.01,
                    sampler="poisson", unit="user", examples_per_unit=4)  # fmt: skip
    assert found.recomputed.upper == pytest.approx(8.899, rel=1e-3)


def test_tuning_runs_and_papernot_steinke():
    found = finding("tuning-not-charged", epsilon=1.829, noise_multiplier=1, steps=1000, sampling_prob=0.01,
                    sampler="poisson", tuning_runs=10, neighboring="add_or_remove_one")  # fmt: skip
    assert found.recomputed.upper == pytest.approx(6.18775, rel=2e-3)
    assert found.evidence["epsilon_random_number_of_runs"] == pytest.approx(4.10327, rel=1e-3)


def test_a_private_basis():
    found = finding("basis-not-charged", epsilon=1.829, noise_multiplier=1, steps=1000, sampling_prob=0.01,
                    sampler="poisson", basis="private_release", basis_noise_multiplier=5)  # fmt: skip
    assert found.recomputed.upper == pytest.approx(1.99248, rel=2e-3)


def test_replace_one():
    found = finding("replace-one-factor-two", epsilon=1.829, noise_multiplier=1, steps=1000, sampling_prob=0.01,
                    sampler="poisson", neighboring="replace_one")  # fmt: skip
    assert found.recomputed.upper == pytest.approx(2.8434, rel=2e-3)
    buggy = finding("epsilon-understated", epsilon=3.617, noise_multiplier=4, steps=10, sampling_prob=1,
                    neighboring="replace_one", accountant="rdp")  # fmt: skip
    assert buggy.recomputed.upper == pytest.approx(7.511, abs=1e-3)


def test_a_central_limit_target_of_three():
    found = finding("gdp-clt-as-bound", epsilon=3, delta=1e-6, noise_multiplier=0.569, steps=20_000, sampling_prob=1e-3,
                    sampler="poisson", accountant="gdp")  # fmt: skip
    assert found.severity == "error"
    assert found.recomputed.upper == pytest.approx(4.61, abs=0.02)


# Every fault of the reference that a claim can show, by the finding that shows it.
FED_SB_FAULTS = {
    "one seed fixes noise and draws": "noise-seeded",
    "all clients draw the same noise": "noise-shared",
    "A, B and R start from raw private gradients": "basis-from-private-data",
    "the server computes that gradient on pooled data": "federated-data-pooled",
    "delta is 1 / number of batches": "delta-one-over-batches",
    "delta is far above 1/n": "delta-too-large",
    "each client has its own delta": "client-deltas-mixed",
    "only the last client's accountant is reported": "last-client-only",
    "reported at another delta than calibrated": "delta-changed",
    "un-noised losses go to a tracking service": "raw-metrics-released",
    "empty draws are not handled": "empty-batches-unhandled",
    "the head is trained beside R": "head-trained",
    "neither unit nor relation is stated": "missing-fact",
    "the dev set is test set and is looked at in training": "selection-on-held-out",
}


@pytest.mark.parametrize("fault", FED_SB_FAULTS)
def test_every_fault_of_the_fed_sb_reference_is_found(fault):
    outcome = lint(read_claim(CLAIMS / "fed-sb-reference.toml"))
    assert FED_SB_FAULTS[fault] in {entry.id for entry in outcome.findings}


def test_the_fed_sb_reference_in_numbers():
    outcome = lint(read_claim(CLAIMS / "fed-sb-reference.toml"))
    assert outcome.recomputed.upper == float("inf")
    by_client = [entry for entry in outcome.findings if entry.id == "delta-too-large" and entry.recomputed]
    assert by_client[0].evidence["epsilon_at_1_over_n"] == pytest.approx(4.79, abs=0.01)
    assert by_client[0].recomputed.upper == pytest.approx(5.39, abs=0.01)
    missing = [entry.message for entry in outcome.findings if entry.id == "missing-fact"]
    assert any(text.startswith("unit ") for text in missing)
    assert any(text.startswith("neighboring ") for text in missing)
    printed = next(entry for entry in outcome.findings if entry.id == "delta-changed")
    assert printed.recomputed.upper == pytest.approx(3.58, abs=0.01)


def test_the_central_fed_sb_reference_in_numbers():
    claim = read_claim(CLAIMS / "fed-sb-reference-central.toml")
    errors = {entry.id: entry for entry in lint(claim).findings if entry.severity == "error"}
    assert set(errors) == {
        "delta-too-large", "delta-one-over-batches", "basis-from-private-data", "noise-seeded", "raw-metrics-released",
    }  # fmt: skip
    assert errors["delta-too-large"].evidence["epsilon_at_1_over_n"] == pytest.approx(4.84, abs=0.01)
    assert errors["delta-too-large"].recomputed.upper == pytest.approx(5.50, abs=0.01)
    bare = dataclasses.replace(claim, basis="public", seed=None, raw_metrics="none", delta=1e-6)
    under = next(entry for entry in lint(bare).findings if entry.id == "epsilon-understated")
    assert under.recomputed.upper == pytest.approx(5.15, abs=0.01)
