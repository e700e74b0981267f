"""Each kind of finding, seeded in a claim that is honest otherwise; and the honest claim, which has none."""

import dataclasses
import math
import tomllib
from pathlib import Path

import pytest

from dpsb_accounting.claims import CATALOG, Claim, Client, claim_from, example, lint, read_claim

GOLDEN = Path(__file__).parent.parent / "golden"
HONEST = claim_from(tomllib.loads(example()))

SEEDED = {
    "not-a-claim": {"epsilon": None},
    "no-guarantee": {"epsilon": math.inf},
    "epsilon-understated": {"epsilon": 1.9},
    "delta-too-large": {"delta": 1e-5},
    "delta-one-over-batches": {"delta": 0.01},
    "delta-zero": {"delta": 0},
    "shuffled-as-poisson": {"sampler": "shuffle"},
    "fixed-order-as-poisson": {"sampler": "fixed_order"},
    "fixed-size-as-poisson": {"sampler": "without_replacement"},
    "poisson-batches-capped": {"max_batch_size": 1010},
    "microbatches-summed": {"microbatches_drawn": 4},
    "sampling-prob-too-small": {"sampling_prob": 0.005, "epochs": 5, "epsilon": 1.1},
    "sampling-prob-from-batches": {
        "num_examples": 100_000, "batch_size": 30_000, "sampling_prob": 0.25, "epochs": 250, "noise_multiplier": 30,
        "drop_last": True, "epsilon": 1.3,
    },
    "sampling-prob-of-other-steps": {"steps": 250},
    "steps-one-short": {"sampling_prob": 1 / 93, "batch_size": None, "steps": 929, "epsilon": 2.2, "delta": 1e-6},
    "steps-too-few": {"steps": 900, "epsilon": 2.02},
    "stopped-by-data": {"stopped": "data_dependent", "planned_steps": 3000},
    "gdp-clt-as-bound": {"accountant": "gdp_clt", "epsilon": 1.9},
    "replace-one-factor-two": {"neighboring": "replace_one"},
    "unit-mismatch": {"unit": "user", "examples_per_unit": 4},
    "basis-from-private-data": {"basis": "private_raw"},
    "basis-not-charged": {"basis": "private_release", "basis_noise_multiplier": 3},
    "federated-data-pooled": {"basis": "private_release", "basis_computed_by": "server_on_pooled_data"},
    "noise-seeded": {"noise_source": "seeded"},
    "noise-shared": {"noise_shared_between_clients": True},
    "part-not-counted": {"trained": ["adapter", "head"]},
    "not-clipped": {"clipping": "none"},
    "clipped-per-microbatch": {"clipping": "per_microbatch"},
    "no-noise": {"noise_added": "none"},
    "divisor-drawn-size": {"divisor": "drawn_size"},
    "loss-couples-examples": {"loss": "token_mean"},
    "batch-statistics": {"batch_norm": True},
    "empty-batches": {"empty_batches": "skipped"},
    "tuning-not-charged": {"tuning_runs": 10},
    "selection-on-private-data": {"model_selection": "training_data"},
    "raw-metrics-released": {"raw_metrics": "released"},
    "rounds-not-charged": {"rounds": 5, "rounds_charged": 1},
    "noise-multiplier-mismatch": {"noise_std": 0.5},
    "run-tainted": {"taints": ["seeded_randomness"]},
}  # fmt: skip
SEEDED["delta-too-large"] = {"delta": 1e-5, "num_examples": 100_000, "epsilon": 1.9}
SEEDED["delta-changed"] = {"delta": 1e-8, "calibrated_delta": 1e-6}
CLIENTS = (Client(name="a", num_examples=50_000, epsilon=2.13), Client(name="b", num_examples=100_000, epsilon=2.13))
SEEDED_CLIENTS = {
    "last-client-only": {"reported_client": "last"},
    "clients-averaged": {"reported_client": "mean"},
    "client-above-claim": {"reported_client": "maximum"},
    "client-deltas-mixed": {"clients": (Client(name="a", delta=1e-5), Client(name="b"))},
    "person-in-several-silos": {"silos_per_person": 2, "clients": (Client(name="a"), Client(name="b"))},
}
WARNINGS = {
    "epsilon-rounded-down": {"epsilon": 2.12},
    "missing-fact": {"sampler": None},
    "not-recomputable": {"noise_multiplier": None},
    "sampling-prob-from-batches": {
        "num_examples": 60_000, "batch_size": 256, "sampling_prob": 1 / 235, "epochs": None, "epsilon": 1.0,
    },
    "delta-changed": {"calibrated_delta": 1e-5},
    "rdp-replace-one": {"accountant": "rdp", "neighboring": "replace_one", "epsilon": 4},
    "relation-without-meaning": {"sampler": "shuffle"},
    "generator-not-secure": {"noise_source": "global_generator"},
    "noise-per-microbatch": {"noise_added": "per_microbatch"},
    "divisor-num-examples": {"divisor": "num_examples"},
    "empty-batches-unhandled": {"empty_batches": "unhandled"},
    "selection-on-held-out": {"model_selection": "held_out_private"},
}  # fmt: skip
INFOS = {
    "epsilon-overstated": {"epsilon": 3},
    "delta-near-one-over-n": {"delta": 5e-6},
    "head-trained": {"trained": ["adapter", "head"], "clipped": ["adapter", "head"]},
}


def found(claim, severity=None):
    return {finding.id: finding for finding in lint(claim).findings if severity in (None, finding.severity)}


def with_(**changes):
    return dataclasses.replace(HONEST, **changes)


def test_the_honest_claim_has_no_finding_at_all():
    outcome = lint(HONEST)
    assert outcome.findings == ()
    assert outcome.ok
    assert outcome.recomputed.lower <= outcome.recomputed.upper <= HONEST.epsilon


@pytest.mark.parametrize("name", SEEDED)
def test_a_seeded_error_is_found(name):
    errors = found(with_(**SEEDED[name]), "error")
    assert name in errors
    assert not lint(with_(**SEEDED[name])).ok
    assert errors[name].message.count("None") == 0


@pytest.mark.parametrize("name", SEEDED_CLIENTS)
def test_a_seeded_error_of_clients_is_found(name):
    claim = with_(**{"clients": CLIENTS, "sampling_prob": None, "steps": None, **SEEDED_CLIENTS[name]})
    assert name in found(claim, "error")


@pytest.mark.parametrize("name", WARNINGS)
def test_a_seeded_warning_is_found(name):
    outcome = lint(with_(**WARNINGS[name]))
    assert name in found(with_(**WARNINGS[name]), "warning")
    assert not outcome.strict().ok


@pytest.mark.parametrize("name", INFOS)
def test_a_remark_is_made_and_changes_nothing(name):
    outcome = lint(with_(**INFOS[name]))
    assert name in found(with_(**INFOS[name]), "info")
    assert outcome.strict().ok


def test_every_kind_of_finding_is_seeded_somewhere():
    seeded = {*SEEDED, *SEEDED_CLIENTS, *WARNINGS, *INFOS, "epsilon-not-confirmed"}
    assert set(CATALOG) == seeded


@pytest.mark.parametrize("name", ["private", "zero-out"])
def test_an_honest_report_of_our_own_has_no_error(name):
    outcome = lint(read_claim(GOLDEN / f"schema-1-{name}" / "report.json"))
    assert outcome.ok
    assert {finding.id for finding in outcome.findings} <= {"missing-fact"}
    assert outcome.recomputed.upper == pytest.approx(outcome.claim.epsilon, rel=1e-3)


def test_a_tainted_report_of_our_own_has_errors():
    errors = found(read_claim(GOLDEN / "schema-1-tainted" / "report.json"), "error")
    assert {"no-guarantee", "run-tainted", "basis-from-private-data"} <= set(errors)


def test_what_leaves_no_guarantee_is_infinite_in_all():
    for name in ("basis-from-private-data", "noise-seeded", "part-not-counted", "loss-couples-examples", "no-noise"):
        outcome = lint(with_(**SEEDED[name]))
        assert outcome.recomputed.upper == math.inf
        assert outcome.to_json()["recomputed"]["upper"] == "inf"


def test_what_has_no_known_bound_is_not_given_one():
    for name in ("divisor-drawn-size", "empty-batches", "selection-on-private-data"):
        assert lint(with_(**SEEDED[name])).recomputed is None


def test_faults_add_up():
    one = lint(with_(tuning_runs=10)).recomputed.upper
    both = lint(with_(tuning_runs=10, basis="private_release", basis_noise_multiplier=3)).recomputed.upper
    assert both > one > 6


def test_a_charge_that_covers_the_fault_is_no_error():
    for changes in (
        {"tuning_runs": 10, "tuning_charged": True, "epsilon": 7},
        {"basis": "private_release", "basis_noise_multiplier": 3, "basis_charged": True, "epsilon": 2.7},
        {"unit": "user", "examples_per_unit": 2, "group_charged": True, "epsilon": 5.5},
        {"sampler": "fixed_order", "neighboring": "zero_out", "epsilon": 21},
        {"sampler": "shuffle", "neighboring": "zero_out", "epsilon": 21},
    ):
        assert found(with_(**changes), "error") == {}, changes


def test_replace_one_is_recomputed_as_replace_one():
    finding = found(with_(neighboring="replace_one", delta=1e-6))["replace-one-factor-two"]
    assert finding.recomputed.neighboring == "replace_one"
    assert finding.recomputed.lower > 1.4 * HONEST.epsilon


def test_a_group_of_two_costs_more_than_one_and_less_than_the_worst_case():
    finding = found(with_(unit="user", examples_per_unit=2))["unit-mismatch"]
    assert HONEST.epsilon < finding.recomputed.upper < 3 * HONEST.epsilon


def test_missing_facts_are_each_named():
    names = [finding.message for finding in lint(Claim(epsilon=1, delta=1e-6)).findings]
    for fact in ("noise_multiplier", "num_examples", "sampler", "neighboring", "unit", "basis", "trained", "loss"):
        assert any(message.startswith(fact) for message in names), fact


def test_an_absurd_claim_ends_in_a_finding_not_in_an_exception():
    for changes in (
        {"noise_multiplier": 1e-30},
        {"noise_multiplier": 1e30, "epsilon": 0},
        {"delta": 1e-300},
        {"steps": 10**15, "epochs": None},
        {"num_examples": 1, "batch_size": 1e-9},
        {"epochs": 1e-300, "steps": None},
        {"epochs": 1e300, "steps": None},
        {"unit": "user", "examples_per_unit": 10**12},
        {"microbatches_drawn": 10**12},
        {"tuning_runs": 10**15},
        {"sampler": "shuffle", "steps": 10**12, "epochs": None},
        {"sampler": "shuffle", "noise_multiplier": 1e-9},
        {"sampler": "shuffle", "batch_size": 1e-6, "sampling_prob": None, "steps": None},
        {"sampler": "without_replacement", "noise_multiplier": 1e-9},
        {"basis": "private_release", "basis_noise_multiplier": 1e-200},
        {"basis": "private_release", "basis_noise_multiplier": 1e200},
        {"noise_multiplier": 1e-200},
        {"noise_multiplier": 1e200},
        {"sampler": "shuffle", "noise_multiplier": 1e200},
    ):
        outcome = lint(with_(**changes))
        assert all(finding.id in CATALOG for finding in outcome.findings), changes


def test_noise_too_small_for_any_engine_is_still_an_error():
    for noise in (1e-30, 1e-3, 0.03):
        finding = found(with_(noise_multiplier=noise), "error")["epsilon-understated"]
        assert finding.recomputed.lower > 100


def test_a_charged_basis_of_unknown_noise_is_not_left_out_of_the_sum():
    outcome = lint(with_(basis="private_release", basis_charged=True))
    assert outcome.recomputed is None
    assert any(finding.message.startswith("basis_noise_multiplier") for finding in outcome.findings)


def test_bounds_say_that_they_rest_on_poisson_sampling_where_nobody_said_so():
    assert "only if batches are Poisson" in lint(with_(sampler=None)).recomputed.method
    assert "only if" not in lint(HONEST).recomputed.method


def test_the_largest_client_may_be_reported_by_its_name():
    claim = with_(clients=CLIENTS, sampling_prob=None, steps=None, epsilon=10, reported_client="a")
    assert "last-client-only" not in found(claim)
    assert "last-client-only" in found(dataclasses.replace(claim, reported_client="b"), "error")
