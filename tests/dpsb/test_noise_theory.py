"""The closed forms of ``dpsb_accounting.noise`` against noise drawn through the mechanism on real adapters."""

from statistics import fmean

import pytest
import torch
import workbench

from dpsb.baselines.measure import (
    factors_of,
    layers_of,
    measured_energies,
    measured_federated_energy,
    predicted_energy,
    signal_of,
    weights_at,
)
from dpsb.mechanism import Mechanism
from dpsb.probe import _perturb
from dpsb.randomness import SeededRandomness
from dpsb_accounting.noise import amplification
from dpsb_accounting.shapes import Layer

RANK = 4
STRONG = 0.4  # so much noise that the product of two noises is a tenth of it and more


def mechanism(noise_std):
    return Mechanism(l2_clip_norm=0.5, noise_multiplier=noise_std / 0.5, clipping="flat")


def mean_energy(*arguments):
    return fmean(measured_energies(*arguments))


@pytest.fixture
def adapter(tiny):
    def build(name, size=0.3, seed=1):
        adapter = workbench.method_adapter(tiny.base("llama"), name, RANK)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        return adapter

    return build


@pytest.mark.parametrize("noise_std", [0.02, STRONG])
@pytest.mark.parametrize(("name", "draws"), [("sb", 150), ("ffa-lora", 60), ("lora", 60), ("full", 30)])
def test_one_release(adapter, name, draws, noise_std):
    one = adapter(name)
    form = {"sb": "r_only", "ffa-lora": "ffa_lora", "lora": "lora", "full": "full_matrix"}[name]
    predicted = amplification(form, layers_of(one, RANK), noise_std=noise_std)
    assert predicted_energy(one, layers_of(one, RANK), noise_std) == pytest.approx(predicted.energy)
    measured = mean_energy(one, mechanism(noise_std), SeededRandomness(5), draws)
    assert measured == pytest.approx(predicted.energy, rel=0.02)
    assert sum(layer.dimension for layer in predicted.layers) <= one.dimension
    if name == "lora" and noise_std == STRONG:
        assert predicted.product > 0.1 * predicted.energy


@pytest.mark.parametrize("name", ["lora-xs", "peft:mica"])
def test_one_release_where_one_factor_is_large(adapter, name):
    one = adapter(name)
    predicted = predicted_energy(one, layers_of(one, RANK), 0.1)
    assert mean_energy(one, mechanism(0.1), SeededRandomness(5), 150) == pytest.approx(predicted, rel=0.02)


def test_r_only_does_not_amplify(adapter):
    one = adapter("sb")
    assert amplification("r_only", layers_of(one, RANK), noise_std=0.1).energy == pytest.approx(one.dimension * 0.1**2)


@pytest.mark.parametrize(
    ("form", "name", "average", "draws"),
    [
        ("fed_sb", "sb", "products", 150),
        ("ffa_lora", "ffa-lora", "products", 60),
        ("ffa_lora", "ffa-lora", "factors", 60),
        ("fedit", "lora", "factors", 60),
        ("fedex_lora", "lora", "products", 60),
        ("flora", "lora", "products", 60),
    ],
)
def test_an_average_of_clients(adapter, form, name, average, draws):
    clients = [adapter(name, seed=seed) for seed in (1, 2, 3)]
    layers = federated_layers(clients)
    predicted = amplification(form, layers, noise_std=STRONG, clients=3)
    measured = measured_federated_energy(clients, mechanism(STRONG), SeededRandomness(6), draws, average=average)
    assert measured == pytest.approx(predicted.energy, rel=0.02)


def federated_layers(clients):
    """The layers with the root mean squares and the norms of the means that the clients' factors have."""
    found = [factors_of(client) for client in clients]
    layers = []
    for name in found[0]:
        As, Bs = (torch.stack([one[name][i] for one in found]) for i in (0, 1))
        norms = [float(stack.square().sum(dim=(1, 2)).mean().sqrt()) for stack in (As, Bs)]
        means = [float(stack.mean(dim=0).norm()) for stack in (As, Bs)]
        layers.append(
            Layer(
                out_features=Bs.shape[1],
                in_features=As.shape[2],
                rank=RANK,
                norm_a=norms[0],
                norm_b=norms[1],
                norm_of_mean_a=min(norms[0], means[0]),
                norm_of_mean_b=min(norms[1], means[1]),
            )
        )
    return layers


def test_wrong_noise_is_noticed(adapter):
    one = adapter("sb")
    predicted = amplification("r_only", layers_of(one, RANK), noise_std=0.1)
    measured = mean_energy(one, mechanism(0.105), SeededRandomness(5), 150)
    assert measured != pytest.approx(predicted.energy, rel=0.05)


def test_what_is_measured_is_what_the_model_computes(adapter, tiny):
    """``weights_at`` is PEFT's own delta weight, for R-only and LoRA."""
    for name in ("sb", "lora"):
        one = adapter(name)
        for path, weight in weights_at(one, {}).items():
            layer = one.model.get_submodule(path)
            assert tiny.distance(weight, layer.get_delta_weight("default").detach()) <= 1e-6


def test_signal_to_noise_on_public_examples(adapter, tiny):
    one, batch = adapter("sb"), tiny.batch("llama", lengths=(9, 4, 12, 6))
    rows = tiny.rows(one, tiny.loss["llama"], batch).double()
    signal = signal_of(one, tiny.loss["llama"], [tiny.take(batch, slice(0, 2)), tiny.take(batch, slice(2, 4))])
    assert signal.dimension == one.dimension
    assert signal.median_norm == pytest.approx(float(rows.norm(dim=1).median()), rel=1e-5)
    assert signal.mean_norm == pytest.approx(float(rows.mean(dim=0).norm()), rel=1e-5)
    expected = (64 / 2.0) * signal.mean_norm / (signal.median_norm * one.dimension**0.5)
    assert signal.snr(2.0, 64) == pytest.approx(expected)
    assert signal.clipped_mean_norm <= signal.median_norm


def test_nothing_to_measure(adapter, tiny):
    one = adapter("sb")
    with pytest.raises(ValueError, match="at least one public example"):
        signal_of(one, tiny.loss["llama"], [])
    with pytest.raises(ValueError, match="are zero"):
        signal_of(one, lambda model, batch: 0.0 * tiny.loss["llama"](model, batch), [tiny.batch("llama")])
    _perturb(one)
    with pytest.raises(ValueError, match="average='mean'"):
        measured_federated_energy([one], mechanism(0.1), SeededRandomness(1), 1, average="mean")
