"""Bytes of a round at the shape of Llama-3-8B: the real state dicts, on the meta device, against the closed forms."""

import pytest
import torch
from transformers import LlamaForCausalLM
from workbench import LLAMA_3_8B

from dpsb.adapter import lora_layers
from dpsb.models import add_lora
from dpsb_accounting.noise import amplification
from dpsb_accounting.shapes import Layer


def bytes_of(shapes):
    return 4 * sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize(("rank", "megabytes"), [(16, 0.229), (64, 3.67)])
def test_what_a_silo_sends_at_the_shape_of_llama_3_8b(rank, megabytes):
    with torch.device("meta"):
        model = add_lora(LlamaForCausalLM(LLAMA_3_8B), "causal-lm", rank)
    state = {name: p.shape for name, p in model.named_parameters() if "lora_" in name}
    layers = lora_layers(model)
    assert len(layers) == 224
    found = [
        Layer(out_features=layer.out_features, in_features=layer.in_features, rank=rank) for layer in layers.values()
    ]

    def sent(method):
        return amplification(method, found, noise_std=1.0, clients=3).bytes_released

    assert sent("fed_sb") == 4 * rank**2 * 224
    assert sent("fed_sb") / 1e6 == pytest.approx(megabytes, rel=2e-3)
    assert sent("fedit") == bytes_of(state.values())
    assert sent("ffa_lora") == bytes_of(shape for name, shape in state.items() if "lora_B" in name)
