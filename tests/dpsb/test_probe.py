"""The probe passes what is safe and refuses what couples examples or trains nothing."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpsb.adapter import CoreUp
from dpsb.data import Collator, synthetic_examples
from dpsb.losses import IGNORED, classification_loss
from dpsb.probe import ProbeError, check_step_moves_model, probe, without_dropout

PADDED = 16


def collate(examples):
    return Collator(0)(examples, PADDED)


def synthetic(tiny, kind="bert"):
    return synthetic_examples("classification" if kind == "bert" else "causal-lm", tiny.vocab, 3, PADDED)


def simple(tiny, model, targets=("layer",), **options):
    return tiny.adapter(model, target_modules=list(targets), **options)


# --- what passes


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_passes_good_models(tiny, kind, use_reentrant):
    adapter = tiny.adapter(tiny.base(kind), scatter=0.0)
    if use_reentrant is not None:
        adapter.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        adapter.model.enable_input_require_grads()
    probe(adapter, tiny.loss[kind], collate, synthetic(tiny, kind))


def test_passes_a_trained_head(tiny):
    adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",), scatter=0.0)
    probe(adapter, classification_loss, collate, synthetic(tiny))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_passes_a_bf16_base(tiny, kind):
    adapter = tiny.adapter(tiny.base(kind, dtype=torch.bfloat16), scatter=0.0)
    probe(adapter, tiny.loss[kind], collate, synthetic(tiny, kind))


def test_passes_a_layer_used_twice(tiny):
    probe(simple(tiny, tiny.twice()), classification_loss, collate, synthetic(tiny))


# --- what is refused


def with_batch_norm(tiny):
    class Normed(tiny.twice):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(16)

        def _once(self, h):
            return torch.tanh(self.layer(self.norm(h.transpose(1, 2)).transpose(1, 2)))

    return Normed()


def centred_over_the_batch(tiny):
    class Centred(tiny.twice):
        def _once(self, h):
            h = torch.tanh(self.layer(h))
            return h - 0.1 * h.mean(dim=0, keepdim=True)

    return Centred()


@pytest.mark.parametrize("build", [with_batch_norm, centred_over_the_batch])
def test_refuses_a_model_that_couples_examples(tiny, build):
    with pytest.raises(ProbeError, match="the examples are coupled"):
        probe(simple(tiny, build(tiny)), classification_loss, collate, synthetic(tiny))


def carried_to_the_next(tiny):
    class Carried(tiny.twice):
        def _once(self, h):
            h = torch.tanh(self.layer(h))
            return h + 0.1 * torch.cat([torch.zeros_like(h[:1]), h[:-1]]).detach()

    return Carried()


def centred_in_large_batches(tiny):
    class Large(tiny.twice):
        def _once(self, h):
            h = torch.tanh(self.layer(h))
            return h - 0.1 * h.mean(dim=0, keepdim=True) * (len(h) > 3)

    return Large()


@pytest.mark.parametrize("build", [carried_to_the_next, centred_in_large_batches])
def test_refuses_coupling_that_needs_a_place_or_a_size(tiny, build):
    with pytest.raises(ProbeError, match="the examples are coupled"):
        probe(simple(tiny, build(tiny)), classification_loss, collate, synthetic(tiny), batch_size=6)


def test_refuses_a_forward_pass_that_writes_a_buffer(tiny):
    class Observed(tiny.twice):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def _once(self, h):
            self.seen += h.detach().abs().max()
            return torch.tanh(self.layer(h))

    with pytest.raises(ProbeError, match=r"changes the buffer .*seen"):
        probe(simple(tiny, Observed()), classification_loss, collate, synthetic(tiny))


def token_mean_loss(model, batch):
    """What Hugging Face's loss does, made to look like a vector: divided by the tokens of the batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    terms = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return terms.view_as(labels).sum(dim=1) / (labels != IGNORED).sum()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_refuses_the_token_mean_loss(tiny, kind):
    """Peers' fault: with it, removing one long example moved a clipped sum by 8.4 C instead of at most C."""
    with pytest.raises(ProbeError, match="a loss averaged over the batch's tokens"):
        probe(tiny.adapter(tiny.base(kind)), token_mean_loss, collate, synthetic(tiny, kind))


def batch_mean_loss(model, batch):
    return classification_loss(model, batch) / len(batch["labels"])


def test_refuses_a_loss_divided_by_the_batch_size(tiny):
    with pytest.raises(ProbeError, match="coupled"):
        probe(tiny.adapter(tiny.base("bert")), batch_mean_loss, collate, synthetic(tiny))


def spread_over_the_batch(model, batch):
    losses = classification_loss(model, batch)
    return losses + 0.0 * losses.std()  # of one number: NaN


@pytest.mark.filterwarnings("ignore:std")
def test_refuses_a_loss_that_is_nan_for_an_example_alone(tiny):
    """A NaN is larger than no tolerance; comparing with it must not count as agreement."""
    with pytest.raises(ProbeError, match="coupled"):
        probe(tiny.adapter(tiny.base("bert")), spread_over_the_batch, collate, synthetic(tiny))


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda model, batch: model(**batch).loss,
        lambda model, batch: classification_loss(model, batch).sum(),
        lambda model, batch: classification_loss(model, batch)[:, None],
        lambda model, batch: classification_loss(model, batch)[:1],
    ],
    ids=["hugging face", "scalar", "column", "one for all"],
)
def test_refuses_a_loss_of_another_shape(tiny, loss_fn):
    """Peers' fault: a loss that is not shaped (n,) is not clipped at all."""
    with pytest.raises(ValueError, match="one loss per example"):
        probe(tiny.adapter(tiny.base("bert")), loss_fn, collate, synthetic(tiny))


def test_refuses_padding_that_depends_on_the_neighbours(tiny):
    """The model averages over all positions, so an example's padding matters."""

    def to_the_longest(examples):
        return Collator(0)(examples, max(len(e["input_ids"]) for e in examples))

    adapter = simple(tiny, tiny.twice())
    with pytest.raises(ProbeError, match="padding to the longest neighbour"):
        probe(adapter, classification_loss, to_the_longest, synthetic(tiny))


def test_refuses_a_target_that_the_forward_pass_does_not_use(tiny):
    class Spare(tiny.twice):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(16, 16)

    with pytest.raises(RuntimeError, match=r"spare\.R got no per-example gradient: it was not used"):
        probe(simple(tiny, Spare(), ("layer", "spare")), classification_loss, collate, synthetic(tiny))


def test_refuses_a_target_without_influence(tiny):
    class Muted(tiny.twice):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(16, 16)

        def _once(self, h):
            return super()._once(h) + 0.0 * self.spare(h)

    with pytest.raises(ProbeError, match=r"spare\.R are all zero: it would be moved by noise alone"):
        probe(simple(tiny, Muted(), ("layer", "spare")), classification_loss, collate, synthetic(tiny))


def test_refuses_an_all_nan_model(tiny):
    """Peers' fault: noise alone moves every R, so a model that yields no gradient seems to train."""
    base = tiny.base("bert")
    adapter = tiny.adapter(base)
    with torch.no_grad():
        for parameter in base.get_input_embeddings().parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ProbeError, match="not finite"):
        probe(adapter, classification_loss, collate, synthetic(tiny))


DROPOUTS = {
    "bert": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "llama": {"attention_dropout": 0.2},
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
}


@pytest.mark.parametrize("kind", DROPOUTS)
def test_refuses_dropout_unless_it_is_switched_off(tiny, kind):
    adapter = tiny.adapter(tiny.base(kind, **DROPOUTS[kind]))
    with pytest.raises(ProbeError, match="dropout"):
        probe(adapter, tiny.loss[kind], collate, synthetic(tiny, kind))
    with without_dropout(adapter.model):
        probe(adapter, tiny.loss[kind], collate, synthetic(tiny, kind))
    with pytest.raises(ProbeError, match="dropout"):  # it is back
        probe(adapter, tiny.loss[kind], collate, synthetic(tiny, kind))


def test_without_dropout_restores_after_an_exception(tiny):
    model = tiny.base("bert", **DROPOUTS["bert"])
    before = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]

    def run():
        with without_dropout(model):
            assert not any(m.p for m in model.modules() if isinstance(m, nn.Dropout))
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == before
    assert any(before)


def test_refuses_cores_that_the_forward_pass_does_not_read(tiny):
    """Peers' fault: an R that silently does not train, because the forward pass uses another tensor."""
    adapter = tiny.adapter(tiny.base("bert"))
    for core in adapter.cores:  # somebody puts copies into the layers after the adapter was made
        core.layer.lora_B["default"] = CoreUp(core.up.up, core.up.core.weight.detach())
    with pytest.raises(RuntimeError, match="got no per-example gradient"):
        probe(adapter, classification_loss, collate, synthetic(tiny))


def test_refuses_hooks_that_a_model_removes(tiny):
    class Stripping(tiny.twice):
        def _once(self, h):
            for module in self.layer.modules():
                module._forward_hooks.clear()
                module._backward_hooks.clear()
            return super()._once(h)

    with pytest.raises(RuntimeError, match=r"layer\.R got no per-example gradient"):
        probe(simple(tiny, Stripping()), classification_loss, collate, synthetic(tiny))


def test_refuses_rows_that_differ_from_autograd(tiny, monkeypatch):
    from dpsb import probe as module

    real = module._losses_and_rows

    def wrong(*args):
        losses, rows = real(*args)
        return losses, 1.01 * rows

    monkeypatch.setattr(module, "_losses_and_rows", wrong)
    with pytest.raises(ProbeError, match="differs from one-by-one autograd"):
        probe(tiny.adapter(tiny.base("bert")), classification_loss, collate, synthetic(tiny))


def test_needs_five_examples(tiny):
    with pytest.raises(ValueError, match="at least 5 synthetic examples"):
        probe(tiny.adapter(tiny.base("bert")), classification_loss, collate, synthetic(tiny)[:4])


def condition(model):
    """Everything that the probe must leave as it was."""
    tensors = {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    modes = {name: module.training for name, module in model.named_modules()}
    wants = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    hooks = {name: len(m._forward_hooks) + len(m._backward_hooks) for name, m in model.named_modules()}
    return tensors, modes, wants, hooks


@pytest.mark.parametrize(
    "loss_fn", [classification_loss, batch_mean_loss, lambda m, b: classification_loss(m, b).sum()]
)
def test_leaves_the_model_as_it_was(tiny, loss_fn):
    adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",))
    adapter.model.get_base_model().bert.embeddings.eval()
    tensors, *rest = condition(adapter.model)
    generator = torch.get_rng_state()
    with nullcontext() if loss_fn is classification_loss else pytest.raises(ValueError):
        probe(adapter, loss_fn, collate, synthetic(tiny))
    after, *rest_after = condition(adapter.model)
    assert rest_after == rest
    assert set(after) == set(tensors)
    assert all(torch.equal(after[name], value) for name, value in tensors.items())
    assert torch.equal(torch.get_rng_state(), generator)


# --- after the first release


def stepped(adapter, size=1e-6):
    before = adapter.state()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(size)
    return before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_tiny_step_is_seen_in_the_output(tiny, kind, dtype):
    adapter = tiny.adapter(tiny.base(kind, dtype=dtype), scatter=0.0)
    check = partial(check_step_moves_model, loss_fn=tiny.loss[kind], batch=collate(synthetic(tiny, kind)[:3]))
    before = stepped(adapter)
    moved = adapter.state()
    check(adapter, before)
    assert all(torch.equal(moved[name], value) for name, value in adapter.state().items())


def test_a_step_that_moves_nothing_is_refused(tiny):
    adapter = tiny.adapter(tiny.base("bert"))
    with pytest.raises(ProbeError, match="left every trained tensor where it was"):
        check_step_moves_model(adapter, adapter.state(), classification_loss, collate(synthetic(tiny)[:3]))


def test_a_step_that_does_not_reach_the_output_is_refused(tiny):
    """Peers' fault: the optimizer moves a tensor that the forward pass no longer uses."""
    adapter = tiny.adapter(tiny.base("bert"))
    for core in adapter.cores:
        core.layer.lora_B["default"] = CoreUp(core.up.up, core.up.core.weight.detach())
    before = stepped(adapter)
    moved = adapter.state()
    with pytest.raises(ProbeError, match="does not reach the model's output"):
        check_step_moves_model(adapter, before, classification_loss, collate(synthetic(tiny)[:3]))
    assert all(torch.equal(moved[name], value) for name, value in adapter.state().items())


def test_a_merged_adapter_is_refused(tiny):
    """PEFT's merge bakes R into the weight: the forward pass then no longer reads R."""
    adapter = tiny.adapter(tiny.base("bert"))
    adapter.model.merge_adapter()
    with pytest.raises((RuntimeError, ValueError), match=r"no per-example gradient|does not require grad"):
        probe(adapter, classification_loss, collate, synthetic(tiny))


def test_expert_routing_over_the_batch_is_refused(tiny):
    class Routed(tiny.twice):
        """Takes only the examples with the largest activations through the layer, as capacity limits do."""

        def forward(self, input_ids, attention_mask=None):
            h = self.embed(input_ids).requires_grad_()
            strength = h.square().mean(dim=(1, 2))
            chosen = (strength >= strength.median()).float()[:, None, None]
            h = h + chosen * torch.tanh(self.layer(h))
            return SimpleNamespace(logits=self.out(h.mean(dim=1)))

    examples = synthetic(tiny)
    strengths = Routed().embed(collate(examples)["input_ids"]).square().mean(dim=(1, 2))
    order = strengths.argsort(descending=True).tolist()  # so that example 0 is in when alone and out beside stronger
    weakest = [examples[i] for i in reversed(order)]
    with pytest.raises(ProbeError, match="expert routing"):
        probe(simple(tiny, Routed()), classification_loss, collate, weakest)
