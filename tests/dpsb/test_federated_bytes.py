"""Bytes of a round at the shape of Llama-3-8B: the real state dicts, on the meta device, against the closed forms."""

import pytest
import torch
from transformers import LlamaForCausalLM
from workbench import LLAMA_3_8B

from dpsb.adapter import Basis, Factors, Provenance, attach, lora_layers
from dpsb.federated.messages import bytes_of
from dpsb.models import add_lora
from dpsb_accounting.noise import amplification
from dpsb_accounting.shapes import Layer


@pytest.mark.parametrize(("rank", "megabytes"), [(16, 0.229), (64, 3.67)])
def test_what_a_silo_sends_at_the_shape_of_llama_3_8b(monkeypatch, rank, megabytes):
    with torch.device("meta"):
        model = add_lora(LlamaForCausalLM(LLAMA_3_8B), "causal-lm", rank)
    lora = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    layers = lora_layers(model)
    assert len(layers) == 224
    found = [
        Layer(out_features=layer.out_features, in_features=layer.in_features, rank=rank) for layer in layers.values()
    ]

    def sent(method):
        return amplification(method, found, noise_std=1.0, clients=3).bytes_released

    assert sent("fedit") == bytes_of(lora)
    assert sent("ffa_lora") == bytes_of({name: each for name, each in lora.items() if "lora_B" in name})
    theta = on_meta(model, layers, rank, monkeypatch).state()
    assert len(theta) == 224
    assert sent("fed_sb") == bytes_of(theta)
    assert bytes_of(theta) / 1e6 == pytest.approx(megabytes, rel=2e-3)


def on_meta(model, layers, rank, monkeypatch):
    """The adapter whose cores alone are trained, with factors that have shapes and no numbers."""
    monkeypatch.setattr("dpsb.adapter._check_orthonormal", lambda *_: None)
    factors = {
        name: Factors(
            A=torch.empty(rank, layer.in_features, device="meta"),
            B=torch.empty(layer.out_features, rank, device="meta"),
        )
        for name, layer in layers.items()
    }
    return attach(model, Basis(factors=factors, provenance=Provenance(kind="none", access="data_free")))
