"""Norms and clipped sums of whole weight gradients are those of one-by-one autograd, and their bounds hold."""

import pytest
import torch
from torch import nn

from dpsb.adapter import lora_layers
from dpsb.basis import per_example
from dpsb.basis.per_example import WHOLE, PartlyAdded, Sketch, add_clipped_sum, example_norms, squared_norms
from dpsb.capture import CaptureError
from dpsb.losses import classification_loss
from dpsb.mechanism import Mechanism

KINDS = ("bert", "llama", "gpt2")
C = 0.2


def mechanism(clipping="flat", bound=C):
    return Mechanism(l2_clip_norm=bound, noise_multiplier=1.0, clipping=clipping)


def one_by_one(tiny, kind, batch, base=None):
    """Each example's gradient (out, in) of every target by autograd, float64."""
    layers = lora_layers(tiny.lora(tiny.base(kind)))
    base = (base or tiny.base(kind)).train()
    found = []
    for i in range(len(batch["input_ids"])):
        base.zero_grad()
        tiny.loss[kind](base, tiny.take(batch, slice(i, i + 1))).sum().backward()
        gradients = {}
        for name, layer in layers.items():
            gradient = base.get_submodule(name.removeprefix("base_model.model.")).weight.grad.double()
            gradients[name] = gradient.T if layer.fan_in_fan_out else gradient
        found.append(gradients)
    return found


def joint_norm(gradients, sketches):
    return sum(float(sketches[name].of(g).square().sum()) for name, g in gradients.items()) ** 0.5


def frame(rows, columns, seed):
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn).Q


def sketches_for(layers, what):
    made = {}
    for index, (name, layer) in enumerate(layers.items()):
        left = frame(layer.out_features, 5, index) if what in ("left", "both") else None
        right = frame(layer.in_features, 4, index + 99) if what in ("right", "both") else None
        made[name] = Sketch(left, right)
    return made


def clipped_sums(model, loss_fn, batch, layers, sketches, clipping="flat", bound=C):
    totals = {}
    for name, layer in layers.items():
        shape = sketches[name].of(torch.zeros(layer.out_features, layer.in_features)).shape
        totals[name] = torch.zeros(shape, dtype=torch.float64)
    add_clipped_sum(model, loss_fn, batch, layers, sketches, mechanism(clipping, bound), totals)
    return totals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["whole", "left", "right", "both"])
def test_norms_and_sums_are_autograds(tiny, kind, what):
    batch, model = tiny.batch(kind), tiny.lora(tiny.base(kind)).train()
    layers = lora_layers(model)
    sketches = dict.fromkeys(layers, WHOLE) if what == "whole" else sketches_for(layers, what)
    exact = one_by_one(tiny, kind, batch)
    in_double = {name: Sketch(*(None if s is None else s.double() for s in sk)) for name, sk in sketches.items()}
    norms = [joint_norm(gradients, in_double) for gradients in exact]
    got = example_norms(model, tiny.loss[kind], batch, layers, [sketches])[:, 0]
    assert tiny.distance(got, torch.tensor(norms)) <= 1e-4  # never below, see squared_norms
    bound = 0.7 * max(norms)  # some are clipped
    totals = clipped_sums(model, tiny.loss[kind], batch, layers, sketches, bound=bound)
    for name, total in totals.items():
        expected = sum(
            in_double[name].of(g[name]) * (min(1.0, bound / norm) if norm else 0.0)
            for g, norm in zip(exact, norms, strict=True)
        )
        assert tiny.distance(total, expected) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_one_example_moves_the_sum_by_no_more_than_c(tiny, kind):
    batch, model = tiny.batch(kind), tiny.lora(tiny.base(kind)).train()
    layers = lora_layers(model)
    whole = dict.fromkeys(layers, WHOLE)
    everyone = clipped_sums(model, tiny.loss[kind], batch, layers, whole)
    for left_out in range(5):
        keep = [i for i in range(5) if i != left_out]
        without = clipped_sums(model, tiny.loss[kind], tiny.take(batch, keep), layers, whole)
        moved = sum(float((everyone[n] - without[n]).square().sum()) for n in layers) ** 0.5
        assert moved <= C * (1 + 1e-5)


def test_a_factor_that_float32_cannot_hold_leaves_the_example_out(tiny):
    """An example without a gradient would otherwise turn the whole sum into NaN, which noise does not hide."""
    batch, model = tiny.batch("bert"), tiny.lora(tiny.base("bert")).train()
    layers = lora_layers(model)
    whole = dict.fromkeys(layers, WHOLE)
    everyone = clipped_sums(model, tiny.loss["bert"], batch, layers, whole, "automatic", 2e36)
    assert all(bool(torch.isfinite(total).all()) for total in everyone.values())
    assert any(bool(total.any()) for total in everyone.values())
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0] = -100
    without = clipped_sums(model, tiny.loss["bert"], batch, layers, whole, "automatic", 2e37)
    assert all(bool(torch.isfinite(total).all()) for total in without.values())


def test_the_gram_norm_never_falls_below_the_exact_one():
    """Where terms cancel, float32 loses digits; the norm must err upwards."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 300, generator=generator) * 30 + torch.randn(64, 12, 300, generator=generator)
    g = torch.randn(64, 12, 200, generator=generator)
    g = g - g.mean(dim=1, keepdim=True)  # what all x share cancels
    got = squared_norms(x, g)
    exact = (g.double().mT @ x.double()).square().sum(dim=(1, 2))
    assert 12 * 500 <= 300 * 200, "this is the Gram form"
    assert bool((got >= exact).all())
    assert float((got / exact).max()) < 1.5


@pytest.mark.parametrize("width", [384, 1024, 2048])
@pytest.mark.parametrize("tokens", [2, 16])
def test_no_pattern_of_rounding_brings_the_norm_below_the_exact_one(width, tokens):
    """Many products that fp32 drops, each too small beside the first, and gradients under which the first cancels."""
    small = (2.0**-24 * 0.98) ** 0.5
    x = torch.full((2, width), small)
    x[1] = -small
    x[:, 0] = 1.0001
    g = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    x, g = (torch.cat([pair] * (tokens // 2))[None] for pair in (x, torch.cat([g, -g])))
    got, exact = squared_norms(x, g), (g.double().mT @ x.double()).square().sum(dim=(1, 2))
    assert tokens * 2 * width <= width * width, "this is the Gram form"
    assert bool((got >= exact).all())


@pytest.mark.parametrize("common", [1e3, 1e5, 1e7])
def test_the_norm_of_products_never_falls_below_the_exact_one(common):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 12, generator=generator) * common + torch.randn(8, 40, 12, generator=generator)
    g = torch.randn(8, 40, 10, generator=generator)
    g = g - g.mean(dim=1, keepdim=True)
    got, exact = squared_norms(x, g), (g.double().mT @ x.double()).square().sum(dim=(1, 2))
    assert 40 * 22 > 120, "this is the form that multiplies out"
    assert bool((got >= exact).all())


def test_both_forms_of_the_norm_agree(monkeypatch):
    x, g = torch.randn(7, 9, 6), torch.randn(7, 9, 5)
    exact = (g.double().mT @ x.double()).square().sum(dim=(1, 2))
    assert 9 * 11 > 30, "this is the form that multiplies out"
    for numbers in (1 << 22, 60, 1):
        monkeypatch.setattr(per_example, "_CHUNK_NUMBERS", numbers)
        torch.testing.assert_close(squared_norms(x, g), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_contributes_zero(tiny, bad):
    batch, model = tiny.batch("bert"), tiny.lora(tiny.base("bert")).train()
    layers = lora_layers(model)

    def spoilt(model, batch):
        losses = classification_loss(model, batch)
        return losses * torch.where(batch["labels"] == 1, bad, 1.0)

    keep = [i for i in range(5) if int(batch["labels"][i]) != 1]
    for what in ("whole", "right", "both"):
        sketches = dict.fromkeys(layers, WHOLE) if what == "whole" else sketches_for(layers, what)
        got = clipped_sums(model, spoilt, batch, layers, sketches)
        expected = clipped_sums(model, classification_loss, tiny.take(batch, keep), layers, sketches)
        assert all(tiny.distance(got[name], expected[name]) <= 1e-5 for name in layers)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("plan", ["none", "same", "separate", "mixed"])
def test_a_layer_used_twice_counts_once(tiny, plan, use_reentrant):
    """Its two gradients add up before the norm is taken, with every kind of activation checkpointing."""
    from peft import LoraConfig, get_peft_model

    def built(wrapped):
        model = tiny.twice(plan, use_reentrant)
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=["layer"])) if wrapped else model

    batch = {"input_ids": torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(0))}
    batch["labels"] = torch.arange(4) % 3
    model = built(True).train()
    layers = lora_layers(model)
    got = example_norms(model, classification_loss, batch, layers, [dict.fromkeys(layers, WHOLE)])[:, 0]
    plain, exact = built(False), []
    for i in range(4):
        plain.zero_grad()
        classification_loss(plain, tiny.take(batch, slice(i, i + 1))).sum().backward()
        exact.append(float(plain.layer.weight.grad.norm()))
    torch.testing.assert_close(got, torch.tensor(exact, dtype=torch.float64), rtol=1e-5, atol=0)
    totals = clipped_sums(model, classification_loss, batch, layers, dict.fromkeys(layers, WHOLE), "automatic")
    assert float(next(iter(totals.values())).norm()) <= 4 * C


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(tiny, use_reentrant):
    batch = tiny.batch("llama")
    results = []
    for checkpointed in (False, True):
        model = tiny.lora(tiny.base("llama")).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        layers = lora_layers(model)
        results.append(clipped_sums(model, tiny.loss["llama"], batch, layers, dict.fromkeys(layers, WHOLE)))
    assert all(tiny.distance(results[0][name], results[1][name]) <= 1e-6 for name in results[0])


def test_nothing_stays_on_the_model(tiny):
    model = tiny.lora(tiny.base("bert")).train()
    layers = lora_layers(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    clipped_sums(model, classification_loss, tiny.batch("bert"), layers, dict.fromkeys(layers, WHOLE))
    with pytest.raises(ValueError, match="one loss per example"):
        clipped_sums(
            model,
            lambda m, b: classification_loss(m, b).mean(),
            tiny.batch("bert"),
            layers,
            sketches_for(layers, "both"),
        )
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(layer.disable_adapters for layer in layers.values())


def test_no_gradient_of_a_single_example_is_ever_made(tiny, monkeypatch):
    """The largest tensor with the examples in front has a token axis, never (n, out, in)."""
    model, batch = tiny.lora(tiny.base("llama")).train(), tiny.batch("llama")
    layers = lora_layers(model)
    shapes, multiply = set(), torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: shapes.add(tuple((r := multiply(a, b)).shape)) or r)
    clipped_sums(model, tiny.loss["llama"], batch, layers, dict.fromkeys(layers, WHOLE))
    weights = {(layer.out_features, layer.in_features) for layer in layers.values()}
    assert weights & shapes, "the sums were seen"
    long = {shape for shape in weights if 12 * sum(shape) <= shape[0] * shape[1]}  # 12 tokens
    assert not {shape for shape in shapes if len(shape) == 3 and shape[1:] in long}
    assert long


def test_products_are_made_a_few_examples_at_a_time(monkeypatch):
    """Where multiplying out is cheaper than the Gram form, never more than 4 million numbers at once."""
    largest, multiply = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: largest.append((r := multiply(a, b)).numel()) or r)
    squared_norms(torch.randn(700, 60, 100), torch.randn(700, 60, 100))
    assert max(largest) <= 1 << 22 < 700 * 100 * 100


def test_examples_must_be_in_the_first_dimension():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).view_as(x).sum(dim=(1, 2))

    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Flat(), LoraConfig(r=2, lora_alpha=2, target_modules=["layer"]))
    layers = lora_layers(model)
    with pytest.raises(CaptureError, match="not in dimension 0"):
        example_norms(
            model, lambda m, b: m(b["x"]), {"x": torch.randn(3, 5, 4)}, layers, [dict.fromkeys(layers, WHOLE)]
        )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_second_backward_pass_runs_only_under_checkpointing(tiny, monkeypatch, checkpointed):
    model, batch, passes = tiny.lora(tiny.base("llama")).train(), tiny.batch("llama"), []
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    layers, backward = lora_layers(model), torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda t, **options: passes.append(1) or backward(t, **options))
    for what, expected in (("whole", 2), ("right", 2), ("both", 1)):
        passes.clear()
        sketches = dict.fromkeys(layers, WHOLE) if what == "whole" else sketches_for(layers, what)
        clipped_sums(model, tiny.loss["llama"], batch, layers, sketches)
        assert len(passes) == (expected if checkpointed else 1)


@pytest.mark.parametrize("what", ["whole", "right", "both"])
def test_memory_that_runs_out_while_adding_is_no_half_sum(tiny, monkeypatch, what):
    """The caller must not halve the microbatch and add some layers again: that would count examples twice."""
    model, batch = tiny.lora(tiny.base("bert")).train(), tiny.batch("bert")
    layers, added, add = lora_layers(model), [], per_example._add_weighted

    def runs_out(*arguments):
        if len(added) == 3:
            raise torch.OutOfMemoryError("out of memory")
        added.append(add(*arguments))

    monkeypatch.setattr(per_example, "_add_weighted", runs_out)
    with pytest.raises(per_example.PartlyAdded):
        clipped_sums(
            model,
            classification_loss,
            batch,
            layers,
            dict.fromkeys(layers, WHOLE) if what == "whole" else sketches_for(layers, what),
        )
    assert len(added) == 3


def test_sums_do_not_depend_on_blocks(tiny, monkeypatch):
    model, batch = tiny.lora(tiny.base("llama")).train(), tiny.batch("llama")
    layers = lora_layers(model)
    whole = clipped_sums(model, tiny.loss["llama"], batch, layers, dict.fromkeys(layers, WHOLE))
    for numbers in (1, 500):
        monkeypatch.setattr(per_example, "_BLOCK_NUMBERS", numbers)
        got = clipped_sums(model, tiny.loss["llama"], batch, layers, dict.fromkeys(layers, WHOLE))
        assert all(tiny.distance(got[name], whole[name]) <= 1e-6 for name in layers)


def test_half_precision_is_multiplied_in_fp32(tiny):
    model, batch = tiny.lora(tiny.base("llama", torch.bfloat16)).train(), tiny.batch("llama")
    layers, bound = lora_layers(model), 1e6
    got = clipped_sums(model, tiny.loss["llama"], batch, layers, dict.fromkeys(layers, WHOLE), bound=bound)
    exact = one_by_one(tiny, "llama", batch)
    for name, total in got.items():
        assert tiny.distance(total, sum(gradients[name] for gradients in exact)) <= 0.05
        assert total.dtype == torch.float64


class InPlace(nn.Module):
    """Changes what its layer received after the layer has used it; autograd lets that pass where weights are frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = 2 * self.first(x)
        y = self.layer(x)
        return x.add_(y).sum(dim=(1, 2))


def test_an_input_that_is_changed_in_place_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(InPlace(), LoraConfig(r=2, lora_alpha=2, target_modules=["first", "layer"]))
    layers = lora_layers(model)
    batch = {"x": torch.randn(3, 5, 4)}
    with pytest.raises(CaptureError, match=r"layer was changed in place"):
        clipped_sums(model, lambda m, b: m(b["x"]), batch, layers, dict.fromkeys(layers, WHOLE))


class FiveTimes(torch.autograd.Function):
    """A backward pass that works in place, as fused kernels do; its gradient is shared with the other summand's."""

    @staticmethod
    def forward(_ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(_ctx, g):
        return g.mul_(5)


class SharedGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        first = FiveTimes.apply(self.first(x))  # made earlier, so its backward runs after that of ``second``
        return self.last(self.second(x) + first).sum(dim=(1, 2))


def test_a_gradient_that_is_changed_in_place_while_it_is_kept_is_refused():
    """Its norm was taken before: added as it is now, an example would count for more than C."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(SharedGradient(), LoraConfig(r=2, lora_alpha=2, target_modules=["first", "second"]))
    layers = lora_layers(model)
    batch = {"x": torch.randn(1, 5, 4)}

    def add(sketches):
        return clipped_sums(model, lambda m, b: m(b["x"]), batch, layers, sketches)

    with pytest.raises(PartlyAdded) as caught:
        add(dict.fromkeys(layers, WHOLE))
    assert isinstance(caught.value.__cause__, CaptureError)
    small = add(dict.fromkeys(layers, Sketch(torch.eye(4), torch.eye(4))))  # a sketch is a copy
    assert sum(float(total.square().sum()) for total in small.values()) ** 0.5 <= C + 1e-6
