"""Users' pains that show under ``fit`` itself, each named by the thread that it answers."""

import pytest
import torch
import workbench
from peft import PeftModel
from transformers import PreTrainedModel

from dpsb import clipped_sums
from dpsb.capture import CaptureError, per_example_gradients
from dpsb.data import Collator
from dpsb.losses import causal_lm_loss, classification_loss
from dpsb.mechanism import Mechanism
from dpsb.sampling import length_buckets
from dpsb.train import fit

NORM = 0.2


def clipped_by_hand(tiny, adapter, loss_fn, examples):
    """One example after the other, plain autograd, plain clipping."""
    total = torch.zeros(adapter.dimension, dtype=torch.float64)
    for example in examples:
        batch = Collator(0)([example], workbench.bucket(example))
        row = tiny.autograd_row(adapter, loss_fn(adapter.model, batch).sum()).double()
        total += row * min(1.0, NORM / float(row.norm()))
    return total


@pytest.mark.parametrize("token_budget", [1, 64, 4096])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_there_is_one_way_of_clipping_and_it_is_the_plain_one(tiny, kind, token_budget):
    """opacus#692: ghost clipping and ordinary clipping of the same run reached 34 % and 44 % accuracy."""
    adapter, examples = tiny.adapter(tiny.base(kind)), workbench.examples(9, kind=kind)
    mechanism = Mechanism(l2_clip_norm=NORM, noise_multiplier=1.0, clipping="flat")
    buckets = length_buckets(workbench.PADDED)
    found = clipped_sums.clipped_sum(adapter, mechanism, tiny.loss[kind], Collator(0), examples, buckets, token_budget)
    assert tiny.distance(found, clipped_by_hand(tiny, adapter, tiny.loss[kind], examples)) <= 1e-5


def test_the_model_stays_what_it_was(tiny, tmp_path):
    """opacus PR #794, #341; dp-transformers#25: wrappers break generate(), save_pretrained() and type checks."""
    adapter = tiny.adapter(tiny.base("llama"), scatter=0.0)
    model, kinds = adapter.model, [type(module) for module in adapter.model.modules()]
    with workbench.new_ledger(tmp_path) as ledger:
        given, named = workbench.fit_arguments(
            adapter, workbench.examples(kind="llama"), ledger, loss_fn=causal_lm_loss, kind="llama"
        )
        fit(*given, **named)
    assert adapter.model is model
    assert [type(module) for module in model.modules()] == kinds
    assert type(model).__module__.startswith("peft.")
    assert isinstance(model.get_base_model(), PreTrainedModel)
    prompt = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3).long()}
    said = model.eval().generate(**prompt, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.base("llama"), tmp_path / "adapter").eval()
    assert torch.equal(loaded.generate(**prompt, max_new_tokens=3, do_sample=False), said)


@pytest.mark.parametrize("why", ["not used", "eval mode", "hooks gone"])
def test_a_missing_row_says_whose_and_why(tiny, why):
    """opacus#578, #469, #732: 'Per sample gradient is not initialized', and not a word of where or why."""
    adapter, batch = tiny.adapter(tiny.base("bert")), tiny.batch("bert")
    core = adapter.cores[1]

    def run():
        with per_example_gradients(adapter, 5) as rows:
            if why == "hooks gone":
                core.up.core._forward_hooks.clear()
            classification_loss(adapter.model, batch).sum().backward()
            rows.get()

    if why == "not used":
        core.layer.enable_adapters(False)
    if why == "eval mode":
        core.up.core.eval()
        with pytest.raises(CaptureError, match=r"eval mode.*call adapter_train_mode"):
            run()
        return
    with pytest.raises(CaptureError, match=rf"{core.name}\.R got no per-example gradient: it was not used.*hooks"):
        run()
