"""Whole clients, trusted servers, persons in several silos, and the command."""

import json
import math
from functools import partial

import pytest
from federations import silo, silos, step, write_ledger
from plans import BASIS

from dpsb_accounting import Gaussian, NonPrivate, Phase, PoissonSkellam, epsilon
from dpsb_accounting.events import SampledWithoutReplacementGaussian
from dpsb_accounting.federated import client_level, secagg, silo_local, trusted_server
from dpsb_accounting.federated.persons import drawn_records


def coordinator(noise_multiplier=1.0, sampling_prob=0.05, steps=200, delta=1e-4, **changes):
    fields = {"unit": "client", "delta": delta, **changes}
    return silo("server", step(noise_multiplier, sampling_prob), steps, **fields)


def test_client_sampling_reference_numbers():
    found = client_level([coordinator()], participation="poisson").epsilon
    assert found.lower <= 3.99931 <= found.upper <= 3.99931 * 1.005
    other = coordinator(sampling_prob=100 / 3400, steps=1000, delta=3400**-1.1)
    found = client_level([other], participation="poisson").epsilon
    assert found.lower <= 5.04639 <= found.upper <= 5.0464 * 1.005


def test_every_round_reference_number():
    """50 rounds at noise multiplier 1 and delta 1e-2: epsilon 40.588."""
    server = silo("server", Gaussian(noise_multiplier=1.0), 50, unit="client", delta=1e-2)
    assert client_level([server], participation="every_round").epsilon.upper == pytest.approx(40.588, rel=1e-4)


def test_amplification_only_against_those_who_do_not_know_the_cohort():
    report = client_level([coordinator()], participation="poisson")
    server, knowing, others = report.parties
    unsampled = epsilon([(Gaussian(noise_multiplier=1.0), 200)], 1e-4).upper
    assert server.epsilon is None
    assert knowing.epsilon.upper == unsampled
    assert others.epsilon == report.epsilon
    shared = client_level([coordinator()], participation="poisson", noise_by="shares", clients=50)
    assert shared.epsilon.upper > unsampled, "with shares the server is an adversary that knows the cohort"
    assert shared.parties[1].epsilon.upper < shared.epsilon.upper


def test_a_cohort_of_a_fixed_size_is_not_amplified():
    with pytest.raises(ValueError, match="does not fit cohorts of a fixed size"):
        client_level([coordinator()], participation="fixed_cohort")
    fixed = client_level([coordinator(neighboring="zero_out")], participation="fixed_cohort")
    assert fixed.epsilon.upper == epsilon([(Gaussian(noise_multiplier=1.0), 200)], 1e-4, "zero_out").upper
    assert any("not Poisson" in line for line in fixed.assumptions)


def test_missing_clients_change_nothing_where_the_server_adds_the_noise():
    with_server = client_level([coordinator()], participation="poisson", dropouts=3, clients=10)
    assert with_server.epsilon == client_level([coordinator()], participation="poisson").epsilon


def test_shares_of_clients():
    every = silo("server", Gaussian(noise_multiplier=4.0), 20, unit="client")
    report = client_level([every], participation="every_round", noise_by="shares", clients=10, dropouts=3, colluders=2)
    left = Gaussian(noise_multiplier=4.0 * math.sqrt(0.5))
    assert report.epsilon.upper == epsilon([(left, 20)], 1e-5).upper
    before = silo("server", Gaussian(noise_multiplier=4.0), 20, unit="client", before=(Phase("basis", BASIS, 1),))
    paid = client_level([before], participation="every_round", noise_by="shares", clients=10, noise_of="share")
    expected = epsilon([(BASIS, 1), (Gaussian(noise_multiplier=4.0 * 3), 20)], 1e-5).upper
    assert paid.epsilon.upper == pytest.approx(expected, rel=1e-9), "a basis is not multiplied by anybody's shares"


@pytest.mark.parametrize(
    ("party", "options", "message"),
    [
        ({"unit": "example"}, {}, "needs ledgers whose unit is 'client' or 'user'"),
        ({}, {"participation": "every_round"}, "samples clients in phase 'train'"),
        ({}, {"participation": "sometimes"}, "participation must be one of"),
        ({}, {"noise_by": "nobody"}, "noise_by must be one of"),
        ({}, {"noise_by": "shares"}, "clients must be given"),
        ({}, {"noise_by": "shares", "clients": 9, "colluders": 0}, "colluders must be at least 1"),
        ({"stated": {"clients": 8}}, {"noise_by": "shares", "clients": 9}, "states clients=8"),
        ({"stated": {"noise": "skellam"}}, {}, "states noise='skellam'"),
        ({"stated": {"participation": "fixed_cohort"}}, {}, "states participation='fixed_cohort'"),
    ],
)
def test_client_level_refuses(party, options, message):
    with pytest.raises(ValueError, match=message):
        client_level([coordinator(**party)], **{"participation": "poisson", **options})


def test_client_level_knows_only_plain_sums():
    event = SampledWithoutReplacementGaussian(noise_multiplier=1.0, batch_size=5, num_examples=50)
    party = silo("server", event, 5, unit="client", neighboring="replace_one")
    with pytest.raises(ValueError, match="each release must be a Gaussian or a PoissonGaussian"):
        client_level([party], participation="fixed_cohort")


def test_a_tainted_clients_share_counts_for_nobody():
    every = Gaussian(noise_multiplier=4.0)
    good, bad = silo("good", every, 20, unit="client"), silo("bad", every, 20, unit="client", taints=("seeded",))
    options = {"participation": "every_round", "noise_by": "shares", "clients": 10, "noise_of": "guaranteed"}
    report = client_level([good, bad], **options)
    assert [entry.claim for entry in report.per_silo] == [True, False]
    expected = epsilon([(Gaussian(noise_multiplier=4.0 * math.sqrt(8 / 9)), 20)], 1e-5).upper
    assert report.per_silo[0].epsilon.upper == pytest.approx(expected, rel=1e-9)


def test_client_level_makes_no_claim_for_a_taint():
    report = client_level([coordinator(taints=("seeded_randomness",))], participation="poisson")
    assert not report.claim
    assert all(party.epsilon is None for party in report.parties)


def test_a_trusted_server_is_a_central_run():
    """q = 0.02, 500 steps, noise multiplier 1, delta 1e-6: 3.214."""
    parties = silos(3, step(1.0, 0.02), 500, delta=1e-6)
    report = trusted_server(parties, local_steps=1)
    assert report.epsilon.lower <= 3.214 * (1 + 1e-4)
    assert 3.2135 <= report.epsilon.upper <= 3.214 * 1.005
    assert report.parties[0].epsilon is None


def test_a_trusted_server_takes_the_worst_silo():
    parties = [silo(f"silo {q}", step(1.0, q), 100) for q in (0.005, 0.02)]
    assert trusted_server(parties, local_steps=1).epsilon.upper == epsilon([(step(1.0, 0.02), 100)], 1e-5).upper


def test_a_trusted_server_refuses():
    with pytest.raises(ValueError, match="local_steps=3 cannot be claimed for unit 'example'"):
        trusted_server(silos(2, steps=5), local_steps=3)
    assert trusted_server(silos(2, steps=5, unit="client"), local_steps=3).claim
    with pytest.raises(ValueError, match="state different noise for the same sum"):
        trusted_server([silo("a", steps=5), silo("b", step(2.0), 5)], local_steps=1)
    with pytest.raises(ValueError, match="states noise_by='shares'"):
        trusted_server([silo("a", steps=5, stated={"noise_by": "shares"})], local_steps=1)
    with pytest.raises(ValueError, match="plan different releases"):
        trusted_server([silo("a", steps=5), silo("b", steps=6)], local_steps=1)
    with pytest.raises(ValueError, match="silos_per_person must be at most 2"):
        trusted_server(silos(2, steps=5), local_steps=1, silos_per_person=3)
    raw = NonPrivate(reason="no noise")
    assert not trusted_server([silo("a", raw, 5), silo("b", steps=5)], local_steps=1).claim


def test_records_of_one_person_add_up_inside_a_sum():
    """Two records that are always in the sum move it twice as far: noise multiplier 2 is as good as 1."""
    parties = silos(4, Gaussian(noise_multiplier=2.0), 5)
    together = trusted_server(parties, local_steps=1, silos_per_person=2).epsilon.upper
    assert together == epsilon([(Gaussian(noise_multiplier=1.0), 5)], 1e-5).upper
    shared = secagg(parties, local_steps=1, dropouts=0, colluders=1, silos_per_person=2).epsilon.upper
    assert shared == pytest.approx(epsilon([(Gaussian(noise_multiplier=math.sqrt(3) / 2), 5)], 1e-5).upper, rel=1e-9)


def test_drawn_records_are_a_mixture():
    event = drawn_records(3.0, [0.5, 0.2, 0.1])
    assert event.sensitivities == (0, 1, 2, 3)
    assert event.probabilities == pytest.approx((0.36, 0.49, 0.14, 0.01))
    assert sum(event.probabilities) == pytest.approx(1)


def test_sampled_records_of_one_person_lie_between_one_and_everything():
    parties = silos(3, step(1.0, 0.05), 50)
    one = trusted_server(parties, local_steps=1).epsilon.upper
    two = trusted_server(parties, local_steps=1, silos_per_person=2).epsilon.upper
    doubled = epsilon([(step(0.5, 1 - 0.95**2), 50)], 1e-5).upper
    assert one < two < doubled


@pytest.fixture
def call(call):
    return partial(call, "federated")


@pytest.fixture
def ledgers(tmp_path):
    return [
        write_ledger(tmp_path / f"{i}.jsonl", step(1.0, 0.01), 100, charged=i, stated={"silo": f"silo {i}"})
        for i in range(3)
    ]


def test_command(call, ledgers):
    code, out, _ = call("--model", "silo_local", *ledgers, "--json")
    content = json.loads(out)
    assert code == 0
    assert content["schema"] == "dpsb-federated-report/1"
    assert content["claim"] is True
    assert [entry["name"] for entry in content["silos"]] == ["silo 0", "silo 1", "silo 2"]
    assert [entry["charged"] for entry in content["silos"]] == [0, 1, 2]
    assert content["incomplete_rounds"] == 2
    code, out, _ = call("--model", "secagg", "--local-steps", 1, "--dropouts", 0, "--colluders", 1, *ledgers)
    assert code == 0
    assert "server, without secure" in out
    assert "they stay charged" in out
    assert "differentially private" in out
    code, out, _ = call("--model", "silo_local", "--silos-per-person", 2, *ledgers, "--json")
    assert json.loads(out)["epsilon"]["upper"] > content["epsilon"]["upper"]


def test_command_fails_where_there_is_no_claim(call, ledgers, tmp_path):
    bad = write_ledger(tmp_path / "bad.jsonl", taint="seeded_randomness")
    code, out, err = call("--model", "silo_local", *ledgers, bad, "--json")
    assert code == 1
    assert json.loads(out)["claim"] is False
    assert "No privacy claim can be made" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "central"], "model must be one of"),
        (["--model", "secagg", "--local-steps", 1, "--dropouts", 0], "model 'secagg' needs --colluders"),
        (["--model", "secagg", "--local-steps", 5, "--dropouts", 0, "--colluders", 1], "cannot be claimed"),
        (["--model", "secagg", "--local-steps", 1, "--dropouts", 0, "--colluders", 0], "colluders must be at least 1"),
        (["--model", "silo_local", "--colluders", 1], "--colluders has no meaning in model 'silo_local'"),
        (["--model", "client_level", "--participation", "poisson"], "unit is 'client' or 'user'"),
        (["--model", "trusted_server", "--local-steps", 2], "cannot be claimed"),
        (["--model", "silo_local", "--delta", 0.5], "delta=0.5 must be less than 1 / num_examples"),
    ],
)
def test_command_refuses_in_one_sentence(call, ledgers, arguments, message):
    code, out, err = call(*arguments, *ledgers)
    assert (code, out) == (1, "")
    assert message in err


def test_reports_are_json(ledgers):
    report = silo_local(silos(2, steps=5))
    content = json.loads(json.dumps(report.to_json()))
    assert set(content) == {
        "schema",
        "model",
        "claim",
        "epsilon",
        "delta",
        "neighboring",
        "unit",
        "method",
        "statement",
        "silos",
        "parties",
        "incomplete_rounds",
        "assumptions",
    }


def test_client_level_knows_no_integer_noise():
    event = PoissonSkellam(noise_multiplier=1.0, sampling_prob=0.5, clip_steps=1000, dimension=10)
    party = silo("server", event, 5, unit="client")
    with pytest.raises(ValueError, match="integer noise, which is accounted for by secagg only"):
        client_level([party], participation="poisson")
