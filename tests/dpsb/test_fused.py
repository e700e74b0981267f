"""The fused pass gives what PEFT's own pass gives, and steps aside for whatever it does not know."""

import copy
import pickle

import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear

from dpsb.adapter import detach, merge
from dpsb.layers import FusedLinear, unfuse


@pytest.fixture(params=["bert", "llama"])
def scene(request, tiny):
    """An adapter with R far from 0, a batch, and the kind of model."""
    kind = request.param
    adapter = tiny.adapter(tiny.base(kind), allow=("classifier",) if kind == "bert" else ())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for core in adapter.cores:
            core.up.core.weight.copy_(torch.randn(core.up.core.weight.shape, generator=generator))
    return kind, adapter, tiny.batch(kind)


def layers(adapter):
    return [core.layer for core in adapter.cores]


def as_peft(adapter):
    for layer in layers(adapter):
        unfuse(layer)
    return adapter


def count_fused(monkeypatch, layer):
    """How often the layer's fused path was taken, as a list that grows."""
    calls = []
    decide = FusedLinear._fusable

    def spy(self, x):
        name = decide(self, x)
        if self is layer:
            calls.append(name)
        return name

    monkeypatch.setattr(FusedLinear, "_fusable", spy)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_rows_are_those_of_the_unfused_layer(tiny, scene, dtype):
    kind, adapter, batch = scene
    adapter.model.to(dtype)
    for core in adapter.cores:
        core.up.core.float()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2  # two roundings to bf16, taken elsewhere
    assert all(type(layer) is FusedLinear for layer in layers(adapter))
    loss_fn = tiny.loss[kind]
    fused, fused_rows = adapter.model(**batch).logits.detach().float(), tiny.rows(adapter, loss_fn, batch)
    plain = as_peft(adapter).model(**batch).logits.detach().float()
    assert tiny.distance(fused, plain) <= tolerance
    assert tiny.distance(fused_rows, tiny.rows(adapter, loss_fn, batch)) <= tolerance


def test_gradient_of_the_input_is_that_of_the_unfused_layer(scene):
    _, adapter, _ = scene
    layer = layers(adapter)[0]
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    weights = torch.randn(2, 3, layer.out_features)
    found = []
    for _ in range(2):
        (layer(x) * weights).sum().backward()
        found.append(x.grad.clone())
        x.grad = None
        unfuse(layer)
    torch.testing.assert_close(found[0], found[1])


def test_an_input_used_elsewhere_keeps_its_own_gradient(scene):
    """The gradient is summed in place; nobody else may hold the tensor that it is summed in."""
    _, adapter, _ = scene
    layer = layers(adapter)[0]
    x = torch.randn(3, layer.in_features, requires_grad=True)
    found = []
    for _ in range(2):
        other = x * 2
        (layer(other).sum() + layer(other).square().sum() + other.square().sum()).backward(retain_graph=True)
        found.append(x.grad.clone())
        x.grad = None
        unfuse(layer)
    torch.testing.assert_close(found[0], found[1])


def test_backward_twice_through_one_graph(scene):
    _, adapter, _ = scene
    layer = layers(adapter)[0]
    x = torch.randn(3, layer.in_features, requires_grad=True)
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * first)


@pytest.mark.parametrize("case", ["forward_hook", "backward_hook", "trainable_base", "dtype", "two_adapters", "merged"])
def test_steps_aside(scene, case, monkeypatch):
    _, adapter, batch = scene
    layer = layers(adapter)[-1]
    seen = []
    calls = count_fused(monkeypatch, layer)
    if case == "forward_hook":
        layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    elif case == "backward_hook":
        layer.base_layer.register_full_backward_hook(lambda *_: seen.append(1))
    elif case == "trainable_base":
        layer.base_layer.weight.requires_grad_(True)
    elif case == "dtype":
        layer.base_layer.double()
        layer.lora_A["default"].double()
        x = torch.randn(2, layer.in_features)
        assert layer._fusable(x) is None
        return
    elif case == "two_adapters":
        layer.update_layer("second", 2, lora_alpha=2, config=adapter.model.peft_config["default"])
        layer.set_adapter(["default", "second"])
    else:
        layer.merge()
    adapter.model(**batch).logits.sum().backward()
    assert calls
    assert set(calls) == {None}
    assert case not in ("forward_hook", "backward_hook") or seen
    assert case != "trainable_base" or layer.base_layer.weight.grad.abs().sum() > 0


def test_steps_aside_under_autocast_and_when_disabled(tiny, scene, monkeypatch):
    _, adapter, batch = scene
    fused = adapter.model(**batch).logits.detach()
    calls = count_fused(monkeypatch, layers(adapter)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny.distance(adapter.model(**batch).logits.detach().float(), fused) <= 5e-2
    with adapter.model.disable_adapter():
        assert tiny.distance(adapter.model(**batch).logits.detach(), fused) > 1e-2
    assert calls == [None, None]
    assert tiny.distance(adapter.model(**batch).logits.detach(), fused) == 0
    assert calls[2:] == ["default"]


def test_copies_and_pickles_are_independent(tiny, scene):
    _, adapter, batch = scene
    before = adapter.model(**batch).logits.detach()
    for twin in (copy.deepcopy(adapter.model), pickle.loads(pickle.dumps(adapter.model))):
        for module in twin.modules():
            if isinstance(module, FusedLinear):
                with torch.no_grad():
                    module.lora_B["default"].core.weight.zero_()
        assert tiny.distance(twin(**batch).logits.detach(), before) > 1e-3
        assert tiny.distance(adapter.model(**batch).logits.detach(), before) == 0


def test_detach_and_merge_leave_peft_layers(tiny, scene):
    _, adapter, batch = scene
    before = adapter.model(**batch).logits.detach()
    detach(adapter)
    assert all(type(layer) is LoraLinear for layer in layers(adapter))
    assert tiny.distance(adapter.model(**batch).logits.detach(), before) <= 1e-5
    assert tiny.distance(merge(adapter)(**batch).logits.detach(), before) <= 1e-5


def test_only_plain_linear_layers_are_fused(tiny):
    adapter = tiny.adapter(tiny.base("gpt2"))
    x = torch.randn(2, layers(adapter)[0].in_features)
    assert layers(adapter)[0]._fusable(x) is None  # GPT-2's Conv1D
