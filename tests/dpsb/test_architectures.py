"""The matrix: rows are exact for nine model classes, in fp32 and bf16, under every kind of activation checkpointing."""

import math

import architectures
import pytest
import torch
import transformers
import workbench
from architectures import ARCHITECTURES, LENGTHS, SHARING

from dpsb.data import Collator
from dpsb.losses import IGNORED, seq2seq_loss
from dpsb.probe import ProbeError
from dpsb.train import fit, probe_every_bucket

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKPOINTING = {"off": None, "reentrant": True, "non-reentrant": False}


def alone(tiny, adapter, kind, batch):
    """Autograd's gradient of each example in a batch of its own."""
    loss_fn = architectures.loss_of(kind)
    ones = (tiny.take(batch, slice(i, i + 1)) for i in range(len(LENGTHS)))
    return [tiny.autograd_row(adapter, loss_fn(adapter.model, one).sum()) for one in ones]


def inside(tiny, adapter, kind, batch):
    """Autograd's gradient of each example's loss in the same batch."""
    loss_fn = architectures.loss_of(kind)
    return [tiny.autograd_row(adapter, loss_fn(adapter.model, batch)[i]) for i in range(len(LENGTHS))]


def checkpointed(model, kind):
    use_reentrant = CHECKPOINTING[kind]
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_are_exact(tiny, kind, dtype, checkpointing):
    """fp32: against each example alone. bf16: against its loss in the same batch; what alone differs by is printed."""
    adapter = architectures.adapted(kind, architectures.build(kind, DTYPES[dtype]))
    batch = architectures.batch_for(kind, DTYPES[dtype])
    by_itself = alone(tiny, adapter, kind, batch)
    checkpointed(adapter.model, checkpointing)
    same_batch = inside(tiny, adapter, kind, batch)  # checkpointed too: T5's bf16 sums come in another order under it
    rows = tiny.rows(adapter, architectures.loss_of(kind), batch)
    assert rows.shape == (len(LENGTHS), adapter.dimension)
    assert rows.dtype == torch.float32
    for name, parameter in adapter.named_parameters():
        assert parameter.dtype == torch.float32, name
    exact = by_itself if dtype == "fp32" else same_batch
    assert max(tiny.distance(row, other) for row, other in zip(rows, exact, strict=True)) <= 1e-5
    moved = max(tiny.distance(row, other) for row, other in zip(rows, by_itself, strict=True))
    print(f"{kind}, {dtype}, checkpointing {checkpointing}: a row moves by {moved:.1e} when its example is alone")
    assert moved <= 0.1
    for part in rows.split([p.numel() for p in adapter.parameters()], dim=1):
        assert part.any(), "a core that no example moves would be moved by noise alone"


# --- blocks that use the keys and values of other blocks

shares = pytest.mark.skipif(not hasattr(transformers, "Gemma4ForCausalLM"), reason="needs a transformers with Gemma 4")


@shares
@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant"])
@pytest.mark.parametrize("kind", SHARING)
def test_shared_keys_and_values(tiny, kind, checkpointing):
    adapter = architectures.adapted(kind, architectures.build(kind))
    batch = architectures.batch_for(kind)
    by_itself = alone(tiny, adapter, kind, batch)
    checkpointed(adapter.model, checkpointing)
    rows = tiny.rows(adapter, architectures.loss_of(kind), batch)
    assert max(tiny.distance(row, other) for row, other in zip(rows, by_itself, strict=True)) <= 1e-5
    probed(kind, adapter)


@shares
@pytest.mark.parametrize("kind", SHARING)
def test_shared_keys_and_values_under_reentrant_checkpointing_are_refused(kind):
    """Autograd's own gradients lose a fifth to a half there; one-by-one autograd loses the same, so it cannot tell."""
    adapter = architectures.adapted(kind, architectures.build(kind))
    before = adapter.state()
    checkpointed(adapter.model, "reentrant")
    with pytest.raises(ProbeError, match=r'checkpointing changes the per-example gradients.*"use_reentrant": False'):
        probed(kind, adapter)
    assert all(torch.equal(value, before[name]) for name, value in adapter.state().items())
    assert any(getattr(module, "gradient_checkpointing", False) for module in adapter.model.modules())


def probed(kind, adapter):
    examples = architectures.examples_for(kind, 6)
    loss_fn, collate = architectures.loss_of(kind), architectures.collate_for(kind)
    return probe_every_bucket(adapter, loss_fn, collate, examples, (architectures.PADDED,), 64)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["t5", "gemma", "roberta"])
def test_the_probe_passes_what_is_exact(kind, dtype, checkpointing):
    adapter = architectures.adapted(kind, architectures.build(kind, DTYPES[dtype]), scatter=0.0)
    checkpointed(adapter.model, checkpointing)
    probed(kind, adapter)


# --- what has no token ids, or two sequences


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_fit(kind, tmp_path):
    """An encoder-decoder and an image classifier under the loop of everybody else; both learn without noise."""
    adapter = architectures.adapted(kind, architectures.build(kind), scatter=0.0)
    examples, loss_fn = architectures.examples_for(kind, 24), architectures.loss_of(kind)
    before = mean_loss(adapter, kind, examples)
    with workbench.new_ledger(tmp_path, epsilon=math.inf, expected_batch_size=24, steps=12) as ledger:
        fit(
            adapter,
            examples,
            ledger=ledger,
            optimizer=torch.optim.Adam(adapter.parameters(), lr=0.05),
            loss_fn=loss_fn,
            collate=architectures.collate_for(kind),
            synthetic=architectures.examples_for(kind, 6, seed=6),
            max_length=architectures.PADDED,
        )
    assert mean_loss(adapter, kind, examples) < 0.97 * before


def mean_loss(adapter, kind, examples):
    batch = architectures.collate_for(kind)(examples, architectures.PADDED)
    with torch.no_grad():
        return float(architectures.loss_of(kind)(adapter.model, batch).mean())


def test_a_target_is_padded_to_its_own_public_length():
    examples = [{"input_ids": [5, 6, 7], "labels": [8] * 9}, {"input_ids": [5], "labels": [8, 9]}]
    batch = Collator(0, target_length=4)(examples, 6)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["labels"].tolist() == [[8, 8, 8, 8], [8, 9, IGNORED, IGNORED]]


def test_the_loss_of_an_encoder_decoder_is_the_mean_over_its_own_target():
    model, batch = architectures.build("t5").eval(), architectures.batch_for("t5")
    batch["labels"][2] = IGNORED
    with torch.no_grad():
        found = seq2seq_loss(model, batch)
        for i, (length, written) in enumerate(zip(LENGTHS[:2], (2, 5), strict=True)):
            ids, labels = batch["input_ids"][i : i + 1, :length], batch["labels"][i : i + 1, :written]
            torch.testing.assert_close(found[i], model(input_ids=ids, labels=labels).loss, rtol=1e-5, atol=1e-5)
    assert float(found[2]) == 0.0
