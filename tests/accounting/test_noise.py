"""Noise amplification: every closed form against Monte Carlo, and what the command says."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import make_plan

from dpsb_accounting.noise import CENTRAL, FEDERATED, amplification, compare, comparison_for
from dpsb_accounting.shapes import Layer, layers_from_json

M, N, R, CLIENTS, DRAWS = 20, 14, 3, 5, 12_000
RNG = np.random.default_rng(7)
STD = 0.4  # large enough for the product of two noises to matter
A, B = RNG.normal(size=(CLIENTS, R, N)), RNG.normal(size=(CLIENTS, M, R))
Q_B, Q_A = np.linalg.qr(RNG.normal(size=(M, R)))[0], np.linalg.qr(RNG.normal(size=(N, R)))[0].T


def rms(factors):
    return float(np.sqrt(np.mean(np.sum(factors**2, axis=(-2, -1)))))


LAYER = Layer(
    out_features=M,
    in_features=N,
    rank=R,
    norm_a=rms(A),
    norm_b=rms(B),
    norm_of_mean_a=float(np.linalg.norm(A.mean(0))),
    norm_of_mean_b=float(np.linalg.norm(B.mean(0))),
)


def draws(*shape):
    return STD * RNG.normal(size=(DRAWS, *shape))


def energy(errors):
    return float(np.mean(np.sum(errors**2, axis=(-2, -1))))


def averaged(errors):
    """The error of the mean over clients, from one generator of a client's error per draw."""
    return energy(sum(errors(i) for i in range(CLIENTS)) / CLIENTS)


def fedit():
    noisy_a = sum(A[i] + draws(R, N) for i in range(CLIENTS)) / CLIENTS
    noisy_b = sum(B[i] + draws(M, R) for i in range(CLIENTS)) / CLIENTS
    return energy(noisy_b @ noisy_a - B.mean(0) @ A.mean(0))


def exact_product():
    return averaged(lambda i: (B[i] + draws(M, R)) @ (A[i] + draws(R, N)) - B[i] @ A[i])


def stacked():
    """FLoRA: the server multiplies the stacks [B_1 .. B_c] and [A_1/c; ..; A_c/c]."""
    left = np.concatenate([B[i] + draws(M, R) for i in range(CLIENTS)], axis=2)
    right = np.concatenate([(A[i] + draws(R, N)) / CLIENTS for i in range(CLIENTS)], axis=1)
    return energy(left @ right - sum(B[i] @ A[i] for i in range(CLIENTS)) / CLIENTS)


def refactored():
    """FedSVD: the averaged noisy B times an orthonormal A, factored again; the product is what it was."""
    errors = sum(draws(M, R) for _ in range(CLIENTS)) / CLIENTS @ Q_A
    product = B[0] @ Q_A + errors[:50]
    u, s, vt = np.linalg.svd(product, full_matrices=False)
    again = (u[..., :R] * s[:, None, :R]) @ vt[:, :R]
    assert np.allclose(again, product), "the factorization loses nothing, so it adds no noise of its own"
    return energy(errors)


FROZEN_A = A[0]
ONE = Layer(out_features=M, in_features=N, rank=R, norm_a=float(np.linalg.norm(FROZEN_A)), norm_b=rms(B[:1]))
MEASURED = {
    ("r_only", 1): (ONE, lambda: energy(Q_B @ draws(R, R) @ Q_A)),
    ("ffa_lora", 1): (ONE, lambda: energy(draws(M, R) @ FROZEN_A)),
    ("lora", 1): (ONE, lambda: energy((B[0] + draws(M, R)) @ (A[0] + draws(R, N)) - B[0] @ A[0])),
    ("full_matrix", 1): (ONE, lambda: energy(draws(M, N))),
    ("fed_sb", CLIENTS): (LAYER, lambda: averaged(lambda _: Q_B @ draws(R, R) @ Q_A)),
    ("ffa_lora", CLIENTS): (ONE, lambda: averaged(lambda _: draws(M, R) @ FROZEN_A)),
    ("fedsvd", CLIENTS): (LAYER, refactored),
    ("fedit", CLIENTS): (LAYER, fedit),
    ("fedex_lora", CLIENTS): (LAYER, exact_product),
    ("flora", CLIENTS): (LAYER, stacked),
}


@pytest.mark.parametrize(("method", "clients"), MEASURED)
def test_closed_form_agrees_with_monte_carlo_within_two_per_cent(method, clients):
    layer, measure = MEASURED[method, clients]
    predicted = amplification(method, [layer], noise_std=STD, clients=clients)
    assert measure() == pytest.approx(predicted.energy, rel=0.02)


def test_every_method_is_measured():
    assert {method for method, clients in MEASURED if clients == 1} == set(CENTRAL)
    assert {method for method, clients in MEASURED if clients > 1} == set(FEDERATED)


def test_noise_of_several_steps_alone_adds_up_as_said():
    """T steps of SGD on noise alone: linear terms grow with T, the product of the noises with T squared."""
    steps, rate = 6, 0.5
    left, right = (
        B[0] + sum(rate * draws(M, R) for _ in range(steps)),
        A[0] + sum(rate * draws(R, N) for _ in range(steps)),
    )
    rows = compare([ONE], noise_multiplier=STD, l2_clip_norm=1, steps=steps, learning_rate=rate)
    predicted = next(row for row in rows if row.method == "lora")
    assert energy(left @ right - B[0] @ A[0]) == pytest.approx(predicted.energy, rel=0.02)


def test_reference_numbers():
    layer = Layer(out_features=768, in_features=768, rank=32)
    norms = {row.method: row.norm for row in compare([layer], noise_multiplier=1, l2_clip_norm=1)}
    assert norms["r_only"] == pytest.approx(32)
    assert norms["ffa_lora"] == pytest.approx(157, abs=0.3)
    assert norms["full_matrix"] == 768
    start = Layer.at_peft_start(768, 768, 32)
    assert amplification("ffa_lora", [start], noise_std=1).ratio_to_r_only == pytest.approx(768 / (3 * 32))


def test_the_exact_average_keeps_clients_times_the_product_of_the_plain_one():
    layer = Layer(out_features=M, in_features=N, rank=R)
    plain, exact = (amplification(name, [layer], noise_std=1, clients=8) for name in ("fedit", "fedex_lora"))
    assert exact.product == pytest.approx(8 * plain.product)
    assert exact.energy - exact.product == pytest.approx(plain.energy - plain.product)


def test_dimension_and_bytes():
    layers = [Layer(out_features=4096, in_features=1024, rank=16, count=3)]
    sizes = {row.method: row.dimension for row in compare(layers, noise_multiplier=1, l2_clip_norm=1)}
    assert sizes == {
        "r_only": 3 * 16**2,
        "ffa_lora": 3 * 4096 * 16,
        "lora": 3 * 16 * (4096 + 1024),
        "full_matrix": 3 * 4096 * 1024,
    }
    assert amplification("fed_sb", layers, noise_std=1, clients=4).bytes_released == 4 * 3 * 16**2
    both = 16 * (4096 + 1024)
    received = {
        row.method: row.bytes_received for row in compare(layers, noise_multiplier=1, l2_clip_norm=1, clients=4)
    }
    assert received == {
        "fed_sb": 12 * 16**2,
        "ffa_lora": 12 * 4096 * 16,
        "fedsvd": 12 * both,
        "fedit": 12 * both,
        "fedex_lora": 12 * 4 * both,
        "flora": 12 * 4 * both,
    }
    assert amplification("lora", layers, noise_std=1).bytes_received == 0


def test_bytes_at_llama_8b_shape():
    """Seven modules in each of 32 blocks, float32, one direction: LoRA r=32 335.5 MB; R-only r=16 0.23, r=200 35.8."""
    shapes = [(4096, 4096, 2), (1024, 4096, 2), (14336, 4096, 2), (4096, 14336, 1)]

    def sent(method, rank):
        layers = [Layer(out_features=m, in_features=n, rank=rank, count=32 * k) for m, n, k in shapes]
        return amplification(method, layers, noise_std=1).bytes_released / 1e6

    assert sent("lora", 32) == pytest.approx(335.5, abs=0.05)
    assert sent("r_only", 16) == pytest.approx(0.23, abs=0.005)
    assert sent("r_only", 64) == pytest.approx(3.7, abs=0.05)
    assert sent("r_only", 200) == pytest.approx(35.8, abs=0.05)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.data(), st.floats(1e-3, 1e3), st.integers(1, 50), st.integers(1, 20))
def test_laws(m, n, data, std, clients, count):
    rank = data.draw(st.integers(1, min(m, n)))
    layer, many = (Layer(out_features=m, in_features=n, rank=rank, count=k) for k in (1, count))
    for method in FEDERATED:
        one = amplification(method, [layer], noise_std=std, clients=clients)
        assert one.ratio_to_r_only >= 1 - 1e-9, "nothing beats R-only at equal noise"
        assert amplification(method, [many], noise_std=std, clients=clients).energy == pytest.approx(count * one.energy)
        assert amplification(method, [layer] * 2, noise_std=std, clients=clients).energy == pytest.approx(
            2 * one.energy
        )
        assert amplification(method, [layer], noise_std=2 * std, clients=clients).energy >= 4 * one.energy * (1 - 1e-9)
        assert amplification(method, [layer], noise_std=std, clients=clients + 1).energy <= one.energy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"rank": 15}, "rank must be at most 14"),
        ({"out_features": 2.5}, "out_features must be a whole number"),
        ({"norm_a": -1}, "norm_a must be at least 0, not -1"),
        ({"norm_a": 1.0, "norm_of_mean_a": 2.0}, "norm_of_mean_a=2.0 must not exceed norm_a=1.0"),
    ],
)
def test_layers_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Layer(**{"out_features": 20, "in_features": 14, "rank": 3, **changes})


def test_bad_questions_are_refused():
    layer = Layer(out_features=4, in_features=4, rank=2)
    with pytest.raises(ValueError, match="method must be one of"):
        amplification("dora", [layer], noise_std=1)
    with pytest.raises(ValueError, match="'lora' has no federated average"):
        amplification("lora", [layer], noise_std=1, clients=3)
    with pytest.raises(ValueError, match="at least one layer"):
        amplification("lora", [], noise_std=1)
    with pytest.raises(ValueError, match="noise_std must be greater than 0"):
        amplification("lora", [layer], noise_std=0)


SHAPES = [{"out_features": 48, "in_features": 40, "count": 2}, {"out_features": 64, "in_features": 40, "count": 2}]


def test_the_comparison_of_a_plan():
    plan = make_plan(details={"rank": 4, "target_shapes": SHAPES})
    rows = comparison_for(plan)
    assert [row.method for row in rows] == list(CENTRAL)
    assert rows[0].energy == pytest.approx(4 * 4**2 * (plan.noise_std / plan.expected_batch_size) ** 2)
    assert rows[1].ratio_to_r_only == pytest.approx((48 + 64) / (2 * 4))
    assert comparison_for(make_plan()) == (), "a plan that tells no shapes has no comparison"
    for odd in ([{"out_features": 2}], "shapes", [3], [{"out_features": 10**400, "in_features": 4}], None):
        plan = make_plan(details={"rank": 4, "target_shapes": odd})
        assert comparison_for(plan) == (), "nor has one that nobody can read"


def test_layers_of_json_are_checked():
    with pytest.raises(ValueError, match="unknown fields: 'out'"):
        layers_from_json([{"out": 3}])
    with pytest.raises(ValueError, match="lacks fields: 'in_features', 'rank'"):
        layers_from_json([{"out_features": 3}])
    with pytest.raises(ValueError, match="must be a JSON array"):
        layers_from_json("nonsense")
    with pytest.raises(ValueError, match="must be a JSON object"):
        layers_from_json([3])


def test_compare_command(call, tmp_path):
    code, out, _ = call("compare", "--layer", "768x768*2", "--layers", 12, "--rank", 16, "--json")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert [row["method"] for row in rows] == list(CENTRAL)
    assert rows[0]["energy"] == 24 * 16**2
    assert rows[1]["ratio_to_r_only"] == 48
    assert rows[0]["bytes_released"] == 24 * 16**2 * 4
    file = tmp_path / "shapes.json"
    file.write_text(json.dumps(SHAPES))
    code, out, _ = call("compare", "--layers-file", file, "--rank", 4, "--clients", 10, "--steps", 20)
    assert code == 0
    assert "Fed-SB" in out
    assert "not equal information" in " ".join(out.split())
    code, out, _ = call("compare", "--layer", "30x30", "--rank", 3, "--factors", "peft_start", "--json")
    rows = {row["method"]: row for row in json.loads(out)["rows"]}
    assert rows["ffa_lora"]["energy"] == pytest.approx(30 * 3 / 3)
    assert math.isclose(rows["lora"]["energy"] - rows["lora"]["product_energy"], rows["ffa_lora"]["energy"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--layer OUTxIN or by --layers-file"),
        (["--layer", "768x", "--rank", 2], "layer must be OUTxIN"),
        (["--layer", "8x8"], "rank must be given"),
        (["--layer", "8x8", "--rank", 9], "rank must be at most 8"),
        (["--layer", "8x8", "--rank", 2, "--factors", "big"], "factors must be one of"),
        (["--layer", "8x8", "--rank", 2, "--layers", 0], "layers must be at least 1"),
        (["--layers-file", "nowhere.json"], "cannot read nowhere.json"),
        (["--layer", "8x8", "--rank", 2, "--noise-multiplier", 0], "noise_multiplier must be greater than 0"),
    ],
)
def test_compare_refuses_in_one_sentence(call, arguments, message):
    code, out, err = call("compare", *arguments)
    assert (code, out) == (1, "")
    assert message in err
