"""Averages of adapters: exact where they claim it, and the noise that reaches the weights against the closed forms."""

import math

import pytest
import torch

from dpsb.federated import aggregate
from dpsb.federated.checks import FederatedError
from dpsb_accounting.noise import amplification
from dpsb_accounting.shapes import Layer

OUT, IN, RANK, CLIENTS = 24, 20, 4, 5


def pair(seed, rank=RANK, dtype=torch.float32, shared_a=None):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, IN, generator=generator, dtype=torch.float64) if shared_a is None else shared_a
    return {"w.A": A.to(dtype), "w.B": torch.randn(OUT, rank, generator=generator, dtype=torch.float64).to(dtype)}


def orthonormal(rows, columns, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64))[0].T


def delta(state):
    return state["w.B"].double() @ state["w.A"].double()


def mean_delta(states):
    return torch.stack([delta(state) for state in states]).mean(dim=0)


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


SHARED = orthonormal(RANK, IN)


def test_fed_sb_is_exact():
    B = orthonormal(RANK, OUT, seed=4).T
    states = [{"w.R": torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(i))} for i in range(CLIENTS)]
    wanted = torch.stack([B @ state["w.R"].double() @ SHARED for state in states]).mean(dim=0)
    assert off(B @ aggregate.fed_sb(states)["w.R"].double() @ SHARED, wanted) < 1e-6


def test_ffa_and_fedsvd_are_exact():
    states = [pair(i, shared_a=SHARED) for i in range(CLIENTS)]
    assert off(delta(aggregate.ffa_lora(states)), mean_delta(states)) < 1e-6
    turned = aggregate.fedsvd(states)
    assert off(delta(turned), mean_delta(states)) < 1e-6
    assert torch.allclose(turned["w.A"] @ turned["w.A"].T, torch.eye(RANK), atol=1e-6)


def test_fedsvd_keeps_an_orthonormal_a_where_b_is_zero():
    states = [{"w.A": SHARED.float(), "w.B": torch.zeros(OUT, RANK)} for _ in range(2)]
    turned = aggregate.fedsvd(states)
    assert torch.allclose(turned["w.A"] @ turned["w.A"].T, torch.eye(RANK), atol=1e-6)
    assert float(delta(turned).norm()) < 1e-9


def test_fedex_is_exact_and_fedit_is_not():
    states = [pair(i) for i in range(CLIENTS)]
    means, residual = aggregate.fedex_lora(states)
    assert off(delta(means) + residual["w"], mean_delta(states)) < 1e-6
    assert torch.linalg.matrix_rank(residual["w"], tol=1e-6) <= (CLIENTS - 1) * RANK
    assert aggregate.aggregation_error(states, aggregate.fedit(states)) > 0.1


def test_flora_is_exact_with_different_ranks():
    states = [pair(i, rank=rank) for i, rank in enumerate((1, 4, 7))]
    stacked = aggregate.flora(states)
    assert stacked["w.A"].shape == (12, IN)
    assert aggregate.aggregation_error(states, stacked) < 1e-6


def noised(state, std, generator, which):
    return {
        name: value + std * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if name[-2:] in which
        else value
        for name, value in state.items()
    }


@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize("method", ["fed_sb", "ffa_lora", "fedsvd", "fedit", "fedex_lora", "flora"])
def test_noise_energy_matches_the_closed_form(method, std):
    """Expected squared norm of what the clients' noise does to the average, within 2 %."""
    generator = torch.Generator().manual_seed(11)
    B = orthonormal(RANK, OUT, seed=4).T
    if method == "fed_sb":
        clean = [{"w.R": torch.zeros(RANK, RANK, dtype=torch.float64)}] * CLIENTS
    else:
        shared = SHARED if method in ("ffa_lora", "fedsvd") else None
        clean = [pair(i, dtype=torch.float64, shared_a=shared) for i in range(CLIENTS)]
    which = {"fed_sb": (".R",), "ffa_lora": (".B",), "fedsvd": (".B",)}.get(method, (".A", ".B"))

    def weight(states):
        if method == "fed_sb":
            return B @ aggregate.fed_sb(states)["w.R"] @ SHARED
        if method == "fedex_lora":
            means, residual = aggregate.fedex_lora(states)
            return delta(means) + residual["w"]
        return delta(getattr(aggregate, method)(states))

    reference, draws = weight(clean), 4000 if method == "fed_sb" else 800
    energy = math.fsum(
        float((weight([noised(state, std, generator, which) for state in clean]) - reference).square().sum())
        for _ in range(draws)
    )
    layer = Layer(out_features=OUT, in_features=IN, rank=RANK)
    if which == (".A", ".B"):
        norm = {
            f"norm_{k.lower()}": math.sqrt(sum(float(s[f"w.{k}"].square().sum()) for s in clean) / CLIENTS)
            for k in "AB"
        }
        means = aggregate.mean(clean)
        of_mean = {f"norm_of_mean_{k.lower()}": float(means[f"w.{k}"].norm()) for k in "AB"}
        layer = Layer(out_features=OUT, in_features=IN, rank=RANK, **norm, **of_mean)
    predicted = amplification(method, [layer], noise_std=std, clients=CLIENTS)
    assert energy / draws == pytest.approx(predicted.energy, rel=0.02)


@pytest.mark.parametrize("states", [[], [{"w.A": torch.zeros(1, 2)}], [pair(0), {"v.A": torch.zeros(1, 2)}]])
def test_what_does_not_fit_is_refused(states):
    with pytest.raises(FederatedError):
        aggregate.fedit(states)


def test_a_different_frozen_factor_is_refused():
    with pytest.raises(FederatedError, match="same frozen A"):
        aggregate.ffa_lora([pair(0), pair(1)])


def test_other_shapes_are_refused():
    with pytest.raises(FederatedError, match="shape or type"):
        aggregate.mean([{"R": torch.zeros(2, 2)}, {"R": torch.zeros(3, 3)}])
