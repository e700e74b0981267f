"""Losses: one number per example, of that example alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from dpsb import losses as module
from dpsb.data import Collator
from dpsb.losses import IGNORED, causal_lm_loss, check_losses, classification_loss, measure_head
from dpsb.train import probe_every_bucket

CAUSAL = ("llama", "gpt2", "gemma2")


@pytest.mark.parametrize("kind", ["bert", *CAUSAL])
def test_loss_of_an_example_alone_is_its_loss_in_a_batch(tiny, kind):
    model, batch, loss_fn = tiny.base(kind).eval(), tiny.batch(kind), tiny.loss[kind]
    with torch.no_grad():
        whole = loss_fn(model, batch)
        alone = torch.cat([loss_fn(model, tiny.take(batch, slice(i, i + 1))) for i in range(5)])
        swapped = loss_fn(model, tiny.take(batch, torch.tensor([0, 3, 1])))
    assert whole.shape == (5,)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole[[0, 3, 1]], swapped, rtol=1e-6, atol=1e-6)


def test_classification_is_cross_entropy(tiny):
    model, batch = tiny.base("bert").eval(), tiny.batch("bert")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    expected = -F.log_softmax(model(**inputs).logits, dim=1)[torch.arange(5), batch["labels"]]
    torch.testing.assert_close(classification_loss(model, batch), expected)


BEYOND_A_HEAD = {
    "bert": {"is_decoder": True},  # a transform in the head
    "roberta": {"is_decoder": True},
    "recurrent_gemma": {"logits_soft_cap": 2.0},
    "modernbert-decoder": {},  # a transform beside the head
    "electra": {"is_decoder": True, "embedding_size": 16},
}


@pytest.mark.parametrize("kind", BEYOND_A_HEAD)
def test_a_head_that_is_more_than_a_linear_layer_is_the_models_own(kind):
    size = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "use_cache": False}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **size, intermediate_size=32, pad_token_id=0, **BEYOND_A_HEAD[kind])
    ).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8)
    ids = torch.randint(3, 50, (3, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    logits = model(input_ids=ids).logits[:, :-1].float()
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 6).mean(dim=1)
    torch.testing.assert_close(causal_lm_loss(model, batch), expected)


class Doubled(LlamaForCausalLM):
    """Does something to its logits that no setting tells."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


@pytest.mark.parametrize("training", [False, True])
def test_what_is_done_to_logits_behind_the_head_is_measured(tiny, training):
    plain = tiny.base("llama")
    config = plain.config
    config.attention_dropout = 0.5
    model = Doubled(config)
    model.load_state_dict(plain.state_dict())
    batch = tiny.batch("llama")
    model.train(training).model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    measure_head(model)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    with torch.no_grad():
        expected = torch.stack([by_hand(model, batch, i) for i in range(5)])
    torch.testing.assert_close(causal_lm_loss(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_a_run_measures_before_it_trains(tiny):
    plain = tiny.base("llama")
    model = Doubled(plain.config)
    model.load_state_dict(plain.state_dict())
    adapter, batch = tiny.adapter(model, scatter=0.0), tiny.batch("llama")
    examples = [{"input_ids": list(range(3, 5 + n)), "labels": list(range(3, 5 + n))} for n in range(5)]
    probe_every_bucket(adapter, causal_lm_loss, Collator(0), examples, (16,), 256)
    model.eval()
    with torch.no_grad():
        expected = torch.stack([by_hand(model, batch, i) for i in range(5)])
    torch.testing.assert_close(causal_lm_loss(adapter.model, batch), expected, rtol=1e-5, atol=1e-5)


def by_hand(model, batch, i):
    """Mean of -log p over the labelled tokens of example i, computed without its padding."""
    length = int(batch["attention_mask"][i].sum())
    ids, labels = batch["input_ids"][i : i + 1, :length], batch["labels"][i, :length]
    log_p = F.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
    terms = [-log_p[t - 1, labels[t]] for t in range(1, length) if labels[t] != IGNORED]
    return torch.stack(terms).mean() if terms else torch.zeros(())


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_loss_is_the_mean_over_the_examples_own_tokens(tiny, kind):
    model, batch = tiny.base(kind).eval(), tiny.batch(kind)
    with torch.no_grad():
        got = causal_lm_loss(model, batch)
        expected = torch.stack([by_hand(model, batch, i) for i in range(5)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert float(got[4]) == 0.0  # one token: nothing to predict


@pytest.mark.parametrize("wrap", [False, True])
def test_peft_model_has_the_same_loss(tiny, wrap):
    batch = tiny.batch("llama")
    model = tiny.adapter(tiny.base("llama"), scatter=0.0).model if wrap else tiny.base("llama")
    expected = causal_lm_loss(tiny.base("llama"), batch)
    torch.testing.assert_close(causal_lm_loss(model, batch), expected)


def test_tokens_per_example_divides_by_a_public_constant(tiny):
    model, batch = tiny.base("llama"), tiny.batch("llama")
    counts = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
    mean, constant = causal_lm_loss(model, batch), causal_lm_loss(model, batch, tokens_per_example=7)
    torch.testing.assert_close(constant, mean * counts / 7, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", *CAUSAL])
def test_ignored_example_has_zero_loss_and_gradient(tiny, kind):
    adapter, batch = tiny.adapter(tiny.base(kind)), tiny.batch(kind)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1] = IGNORED
    losses = tiny.loss[kind](adapter.model, batch)
    rows = tiny.rows(adapter, tiny.loss[kind], batch)
    assert not losses[1].any()
    assert not rows[1].any()
    assert rows[0].any()
    assert bool(torch.isfinite(rows).all())


def test_a_batch_without_any_label_is_zero_and_finite(tiny):
    adapter, batch = tiny.adapter(tiny.base("llama")), tiny.batch("llama")
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    assert not causal_lm_loss(adapter.model, batch).any()
    assert not tiny.rows(adapter, causal_lm_loss, batch).any()


def test_a_backbone_with_more_states_than_tokens_is_refused(tiny):
    """The list of labelled tokens of the batch would take other examples' states."""
    model, batch = tiny.base("llama"), tiny.batch("llama")

    def longer(_module, _inputs, out):
        out.last_hidden_state = F.pad(out.last_hidden_state, (0, 0, 1, 0))
        return out

    model.model.register_forward_hook(longer)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Expected one hidden state per token"):
        causal_lm_loss(model, batch)


def logit_shapes(model, run):
    shapes = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))
    run()
    handle.remove()
    return shapes


def test_what_was_not_measured_is_taken_at_its_own_logits(tiny):
    """A copy, a model that was loaded otherwise, one that cannot run yet; a probe measures again."""
    plain = tiny.base("llama")
    model = Doubled(plain.config)
    model.load_state_dict(plain.state_dict())
    batch = tiny.batch("llama")
    with torch.no_grad():
        doubled = torch.stack([by_hand(model, batch, i) for i in range(5)])
        for other in (model, copy.deepcopy(model)):
            torch.testing.assert_close(causal_lm_loss(other, batch), doubled, rtol=1e-5, atol=1e-5)
        measure_head(plain)
        plain.register_forward_hook(lambda _m, _i, out: setattr(out, "logits", 2 * out.logits))
        measure_head(plain)
        torch.testing.assert_close(causal_lm_loss(plain, batch), doubled, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_no_layer_is_no_error(tiny):
    model = tiny.base("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    batch = tiny.batch("llama")
    measure_head(model)
    with torch.no_grad():
        torch.testing.assert_close(causal_lm_loss(model, batch)[0], by_hand(model, batch, 0))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_of_the_batch_never_exist_at_once(tiny, kind):
    vocab, n, t = 40_000, 4, 64
    adapter = tiny.adapter(tiny.base(kind, vocab_size=vocab))
    batch = tiny.batch(kind, lengths=(64, 40, 9, 3), padded=t, vocab=vocab)
    base = adapter.model.get_base_model()
    shapes = logit_shapes(base, lambda: causal_lm_loss(adapter.model, batch).sum().backward())
    assert max(tokens * width for tokens, width in shapes) <= module._CHUNK_LOGITS < n * t * vocab
    labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert 0 < labelled < n * t
    assert sum(tokens for tokens, _ in shapes) == labelled, "made once, and none for prompts and padding"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_chunked_equals_unchunked(tiny, kind, monkeypatch):
    adapter, batch = tiny.adapter(tiny.base(kind)), tiny.batch(kind)
    base = adapter.model.get_base_model()
    results = []
    labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
    for numbers, chunks in ((1 << 22, 1), (tiny.vocab * 10, -(-labelled // 10)), (1, labelled)):
        monkeypatch.setattr(module, "_CHUNK_LOGITS", numbers)
        shapes = logit_shapes(base, lambda: causal_lm_loss(adapter.model, batch))
        assert len(shapes) == chunks
        results.append((causal_lm_loss(adapter.model, batch).detach(), tiny.rows(adapter, causal_lm_loss, batch)))
    for losses, rows in results[1:]:
        torch.testing.assert_close(losses, results[0][0])
        assert tiny.distance(rows, results[0][1]) <= 1e-5


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_rows_of_a_targeted_output_layer(tiny, use_reentrant, monkeypatch):
    """The output layer is then used once per chunk, each time in a segment that is computed twice."""
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 5 * tiny.vocab * 5)
    adapter, batch = (
        tiny.adapter(tiny.base("llama"), target_modules=["q_proj", "lm_head"]),
        tiny.batch("llama"),
    )
    assert any("lm_head" in core.name for core in adapter.cores)
    exact = torch.stack([tiny.autograd_row(adapter, causal_lm_loss(adapter.model, batch)[i]) for i in range(5)])
    if use_reentrant is not None:
        adapter.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        adapter.model.enable_input_require_grads()
    rows = tiny.rows(adapter, causal_lm_loss, batch)
    for row, expected in zip(rows, exact, strict=True):
        assert tiny.distance(row, expected) <= 1e-5


def test_transformed_logits_are_the_models_own(tiny):
    """Gemma 2 caps its logits after the output layer; recomputing them from hidden states would miss that."""
    model, batch = tiny.base("gemma2").eval(), tiny.batch("gemma2")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        got = causal_lm_loss(model, batch)
    assert float(logits.abs().max()) <= 0.5
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    per_token = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    expected = per_token.view_as(labels).sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)
    torch.testing.assert_close(got, expected)


def test_check_losses():
    """Peers' fault: a loss of shape [n, 1] broadcasts, a scalar loses the examples: nothing is clipped."""
    good = torch.zeros(3)
    assert check_losses(good, 3) is good
    for bad in (torch.zeros(()), torch.zeros(3, 1), torch.zeros(2), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match=r"one loss per example, shape \(3,\); got") as caught:
            check_losses(bad, 3)
        assert str(tuple(bad.shape)) in str(caught.value)


def test_hugging_faces_own_loss_is_refused(tiny):
    batch = tiny.batch("llama")
    with pytest.raises(ValueError, match="one loss per example"):
        check_losses(tiny.base("llama")(**batch).loss, 5)


def test_a_model_without_output_embeddings_uses_its_logits():
    class Plain(nn.Module):
        base_model_prefix = "none"

        class config:
            pass

        def get_output_embeddings(self):
            return None

        def forward(self, input_ids):
            return type("Out", (), {"logits": F.one_hot(input_ids, 5).float()})

    ids = torch.tensor([[1, 2, 3]])
    labels = torch.tensor([[IGNORED, 2, IGNORED]])
    expected = F.cross_entropy(F.one_hot(torch.tensor([1]), 5).float(), torch.tensor([2]))
    torch.testing.assert_close(causal_lm_loss(Plain(), {"input_ids": ids, "labels": labels})[0], expected)
