"""What a pass for a private basis costs, counted and not timed: memory and arithmetic against a plain one."""

import pytest
import torch
import workbench
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from dpsb.adapter import lora_layers
from dpsb.basis.per_example import WHOLE, Sketch, add_clipped_sum, zeros_for
from dpsb.basis.release import pass_budget
from dpsb.data import Collator
from dpsb.losses import causal_lm_loss, classification_loss
from dpsb.mechanism import Mechanism
from dpsb.models import HEAD_NAMES, MeanPooledClassifier, add_lora

EXAMPLES, TOKENS, WIDTH, HYBRID_WIDTH = 16, 64, 256, 48
FEWER = pass_budget(EXAMPLES * TOKENS) // TOKENS
"""Examples in a microbatch of a pass, where one of training has EXAMPLES."""
LOSS = {"bert": classification_loss, "llama": causal_lm_loss}
TASK = {"bert": "classification", "llama": "causal-lm"}


def base(kind):
    """Four blocks, wide enough that weights and activations count and not what comes once a layer."""
    size = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**size, vocab_size=400, num_key_value_heads=2))
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return MeanPooledClassifier(BertModel(BertConfig(**size, **no_dropout, vocab_size=400)), 2)


def batch(kind, count):
    tokens = list(range(5, 5 + TOKENS))
    return Collator(0)([{"input_ids": tokens, "labels": tokens if kind == "llama" else 1}] * count, TOKENS)


def squares(model, batch):
    """A loss of plain modules: the counter of operations cannot look into the head's own autograd function."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits.flatten(1).square().mean(dim=1)


def plain_pass(kind, whole_gradients, loss_fn):
    """A forward and backward for the gradients of the same weights, each dropped once made; or from embeddings on."""
    model = base(kind).train().requires_grad_(False)
    for name, module in model.named_modules():
        if whole_gradients and isinstance(module, nn.Linear) and not {"lm_head", *HEAD_NAMES} & set(name.split(".")):
            module.weight.requires_grad_(True)
            module.weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        if not whole_gradients and isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _module, _inputs, output: output + torch.zeros((), requires_grad=True))
    return lambda count: loss_fn(model, batch(kind, count)).sum().backward()


def basis_pass(kind, what, loss_fn):
    """One microbatch of the pass, and the bytes of its sums."""
    model = add_lora(base(kind), TASK[kind], 8).train()
    layers = lora_layers(model)
    sketches = dict.fromkeys(layers, WHOLE)
    if what == "cores":
        sketches = {n: Sketch(frame(layer.out_features), frame(layer.in_features)) for n, layer in layers.items()}
    totals = zeros_for(layers, sketches, torch.device("cpu"))
    mechanism = Mechanism(l2_clip_norm=1.0, noise_multiplier=4.0, clipping="automatic")

    def run(count):
        add_clipped_sum(model, loss_fn, batch(kind, count), layers, sketches, mechanism, totals)

    return run, sum(8 * total.numel() for total in totals.values())


def frame(rows):
    return torch.linalg.qr(torch.randn(rows, HYBRID_WIDTH)).Q


def operations(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("what", ["whole", "cores"])
def test_a_pass_holds_no_more_than_a_plain_microbatch_and_its_sums(kind, what):
    plain = plain_pass(kind, True, LOSS[kind])
    ours, sums = basis_pass(kind, what, LOSS[kind])
    for warm_up in (plain, ours):
        warm_up(1)
    allowed = workbench.peak_bytes(lambda: plain(EXAMPLES)) + sums
    peak = workbench.peak_bytes(lambda: ours(FEWER)) + sums
    assert 0.5 * allowed < peak <= allowed


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize(("what", "bound"), [("whole", 1.9), ("cores", 1.3)])
def test_a_pass_makes_no_second_backward_pass(kind, what, bound):
    """Multiplications, over those of a forward and backward of the frozen model: 1.65 and 1.13; the aim is 2.5."""
    plain = plain_pass(kind, False, squares)
    ours, _ = basis_pass(kind, what, squares)
    ratio = operations(lambda: ours(EXAMPLES)) / operations(lambda: plain(EXAMPLES))
    assert 0.9 < ratio <= bound
