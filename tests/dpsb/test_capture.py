"""Rows are the per-example gradients that one-by-one autograd gives, and nothing stays on the model."""

import pytest
import torch
from torch import nn

from dpsb.capture import adapter_train_mode, check_train_mode, per_example_gradients

KINDS = ("bert", "llama", "gpt2")
CHECKPOINTING = (None, False, True)  # off, non-reentrant, reentrant


def one_by_one(tiny, adapter, loss_fn, batch):
    n = len(batch["labels"])
    return torch.stack(
        [tiny.autograd_row(adapter, loss_fn(adapter.model, tiny.take(batch, slice(i, i + 1))).sum()) for i in range(n)]
    )


def checkpointed(model, use_reentrant):
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_one_by_one_autograd(tiny, kind, use_reentrant):
    batch, loss_fn = tiny.batch(kind), tiny.loss[kind]
    adapter = tiny.adapter(tiny.base(kind), allow=("classifier",) if kind == "bert" else ())
    exact = one_by_one(tiny, adapter, loss_fn, batch)
    checkpointed(adapter.model, use_reentrant)
    rows = tiny.rows(adapter, loss_fn, batch)
    assert rows.shape == (5, adapter.dimension)
    assert rows.dtype == torch.float32
    assert not rows.requires_grad
    for row, expected in zip(rows, exact, strict=True):
        assert tiny.distance(row, expected) <= 1e-5
    if kind == "bert":
        assert any("classifier" in name for name, _ in adapter.named_parameters())
    else:
        assert not rows[4].any()  # the example of one token has no labelled token


@pytest.mark.parametrize(
    ("plan", "use_reentrant"),
    [
        ("none", False),
        ("same", False),
        ("separate", False),
        ("mixed", False),
        ("same", True),
        ("separate", True),
        ("mixed", True),
    ],
)
def test_layer_used_twice(tiny, plan, use_reentrant):
    adapter = tiny.adapter(tiny.twice(plan, use_reentrant), target_modules=["layer"])
    batch, loss_fn = tiny.batch("bert"), tiny.loss["bert"]
    rows = tiny.rows(adapter, loss_fn, batch)
    adapter.model.get_base_model().plan = "none"
    for row, expected in zip(rows, one_by_one(tiny, adapter, loss_fn, batch), strict=True):
        assert tiny.distance(row, expected) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_any_microbatch_split_gives_the_same_rows(tiny, kind):
    adapter, batch, loss_fn = tiny.adapter(tiny.base(kind)), tiny.batch(kind), tiny.loss[kind]
    whole = tiny.rows(adapter, loss_fn, batch)
    for cuts in ([1, 1, 1, 1, 1], [2, 3], [4, 1]):
        starts = [sum(cuts[:i]) for i in range(len(cuts))]
        parts = [
            tiny.rows(adapter, loss_fn, tiny.take(batch, slice(start, start + size)))
            for start, size in zip(starts, cuts, strict=True)
        ]
        assert tiny.distance(torch.cat(parts), whole) <= 1e-5


def test_single_example(tiny):
    adapter, batch = tiny.adapter(tiny.base("bert")), tiny.take(tiny.batch("bert"), slice(0, 1))
    rows = tiny.rows(adapter, tiny.loss["bert"], batch)
    exact = tiny.autograd_row(adapter, tiny.loss["bert"](adapter.model, batch).sum())
    assert rows.shape == (1, adapter.dimension)
    assert tiny.distance(rows[0], exact) <= 1e-5


def test_row_order_is_the_order_of_set_gradient(tiny):
    adapter, batch = tiny.adapter(tiny.base("bert"), allow=("classifier",)), tiny.batch("bert")
    rows = tiny.rows(adapter, tiny.loss["bert"], batch)
    tiny.loss["bert"](adapter.model, batch).sum().backward()
    sizes = [p.numel() for p in adapter.parameters()]
    for part, parameter in zip(rows.sum(dim=0).split(sizes), adapter.parameters(), strict=True):
        assert tiny.distance(part.view_as(parameter), parameter.grad) <= 1e-5


def inside_the_same_batch(tiny, adapter, loss_fn, batch):
    n = len(batch["labels"])
    return torch.stack([tiny.autograd_row(adapter, loss_fn(adapter.model, batch)[i]) for i in range(n)])


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_base(tiny, kind):
    """Exact against autograd in the same batch; alone, the example differs by bf16 rounding (printed)."""
    batch, loss_fn = tiny.batch(kind, lengths=(9, 4, 12, 6, 11)), tiny.loss[kind]
    adapter = tiny.adapter(tiny.base(kind, dtype=torch.bfloat16))
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    rows = tiny.rows(adapter, loss_fn, batch)
    for row, expected in zip(rows, inside_the_same_batch(tiny, adapter, loss_fn, batch), strict=True):
        assert tiny.distance(row, expected) <= 1e-5
    alone = one_by_one(tiny, adapter, loss_fn, batch)
    moved = max(tiny.distance(row, other) for row, other in zip(rows, alone, strict=True))
    print(f"{kind}, bf16 base: a row moves by at most {moved:.2e} when the example is alone")
    assert moved <= 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_on_cuda(tiny, kind):
    batch = {name: value.cuda() for name, value in tiny.batch(kind, lengths=(9, 4, 12, 6, 11)).items()}
    adapter = tiny.adapter(tiny.base(kind).cuda())
    rows = tiny.rows(adapter, tiny.loss[kind], batch)
    for row, expected in zip(rows, one_by_one(tiny, adapter, tiny.loss[kind], batch), strict=True):
        assert tiny.distance(row, expected) <= 1e-4


def test_eval_mode_raises(tiny):
    """Opacus captures nothing in eval mode: the rows would vanish and noise alone would train the model."""
    adapter = tiny.adapter(tiny.base("bert"))
    adapter.model.eval()
    with pytest.raises(RuntimeError, match="eval mode"), per_example_gradients(adapter, 1):
        pass
    with pytest.raises(RuntimeError, match="eval mode"):
        check_train_mode(adapter)
    adapter_train_mode(adapter)
    check_train_mode(adapter)
    assert not adapter.model.training  # the rest was left alone


def test_eval_mode_of_one_core_inside_the_block_raises(tiny):
    adapter, batch = tiny.adapter(tiny.base("bert")), tiny.batch("bert")

    def run():
        with per_example_gradients(adapter, 5) as rows:
            adapter.cores[1].up.core.eval()
            tiny.loss["bert"](adapter.model, batch).sum().backward()
            rows.get()

    with pytest.raises((RuntimeError, ValueError), match=r"No activations|no per-example gradient"):
        run()


def left_behind(model):
    """Everything Opacus puts on modules and parameters."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}: hook" for _ in (*module._forward_hooks, *module._backward_hooks)]
        found += [
            f"{name}.{a}" for a in ("activations", "max_batch_len", "autograd_grad_sample_hooks") if hasattr(module, a)
        ]
    for name, parameter in model.named_parameters():
        found += [
            f"{name}.{a}" for a in ("grad_sample", "_current_grad_sample", "_forward_counter") if hasattr(parameter, a)
        ]
        found += [f"{name}.grad"] if parameter.grad is not None else []
    return found


def test_nothing_is_left_after_the_block(tiny):
    adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",))
    tiny.rows(adapter, tiny.loss["bert"], tiny.batch("bert"))
    assert left_behind(adapter.model) == []


@pytest.mark.parametrize("when", ["before the forward", "after the forward", "after the backward"])
def test_nothing_is_left_after_an_exception(tiny, when):
    adapter, batch = tiny.adapter(tiny.base("bert")), tiny.batch("bert")

    def run():
        with per_example_gradients(adapter, 5):
            if when == "before the forward":
                raise KeyError(when)
            loss = tiny.loss["bert"](adapter.model, batch).sum()
            if when == "after the backward":
                loss.backward()
            raise KeyError(when)

    with pytest.raises(KeyError, match=when):
        run()
    assert left_behind(adapter.model) == []
    rows = tiny.rows(adapter, tiny.loss["bert"], batch)
    assert tiny.distance(rows, one_by_one(tiny, adapter, tiny.loss["bert"], batch)) <= 1e-5


def test_hooks_silently_detached(tiny):
    """Peers' fault: adapters that silently do not train, because something removed the per-example hooks."""
    adapter, batch = tiny.adapter(tiny.base("bert")), tiny.batch("bert")
    core = adapter.cores[2]
    with per_example_gradients(adapter, 5) as rows:
        core.up.core._forward_hooks.clear()
        core.up.core._backward_hooks.clear()
        tiny.loss["bert"](adapter.model, batch).sum().backward()
        with pytest.raises(RuntimeError, match=core.name.replace(".", r"\.") + r"\.R got no per-example gradient"):
            rows.get()


def test_replaced_core_parameter_is_the_one_read(tiny):
    adapter, batch = tiny.adapter(tiny.base("bert")), tiny.batch("bert")
    core = adapter.cores[0].up.core
    core.weight = nn.Parameter(core.weight.detach().clone())
    rows = tiny.rows(adapter, tiny.loss["bert"], batch)
    assert tiny.distance(rows, one_by_one(tiny, adapter, tiny.loss["bert"], batch)) <= 1e-5


def test_input_without_examples_in_dimension_0_is_refused(tiny):
    class Flattening(tiny.twice):
        def _once(self, h):
            return torch.tanh(self.layer(h.flatten(0, 1))).view_as(h)

    adapter = tiny.adapter(Flattening(), target_modules=["layer"])
    with pytest.raises(RuntimeError, match="examples in dimension 0"):
        tiny.rows(adapter, tiny.loss["bert"], tiny.batch("bert"))


def test_a_use_without_influence_on_the_loss_leaves_the_rows_of_the_others(tiny):
    """Its gradient never arrives; the input that was kept for it must not be taken for that of another use."""

    class Unheard(tiny.twice):
        def _both(self, h):
            heard = self._once(h)
            self._once(2.0 * h + 1.0)
            return heard

    adapter = tiny.adapter(Unheard(), target_modules=["layer"])
    batch, loss_fn = tiny.batch("bert", lengths=(9, 4, 12)), tiny.loss["bert"]
    rows = tiny.rows(adapter, loss_fn, batch)
    assert tiny.distance(rows, torch.cat(list(one_by_one(tiny, adapter, loss_fn, batch))).view_as(rows)) <= 1e-5
    assert left_behind(adapter.model) == []


def test_uses_with_different_numbers_of_examples_are_refused(tiny):
    class Narrow(tiny.twice):
        def _both(self, h):
            return self._once(h) + self._once(h[:1])

    adapter = tiny.adapter(Narrow(), target_modules=["layer"])
    with pytest.raises(RuntimeError, match="different numbers of examples"):
        tiny.rows(adapter, tiny.loss["bert"], tiny.batch("bert"))


def test_a_second_backward_pass_is_refused(tiny):
    adapter, batch = tiny.adapter(tiny.base("bert")), tiny.batch("bert")
    with per_example_gradients(adapter, 5):
        loss = tiny.loss["bert"](adapter.model, batch).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="ran twice"):
            loss.backward()


def test_a_graph_that_outlives_the_block_keeps_no_input(tiny):
    adapter, batch = tiny.adapter(tiny.base("bert")), tiny.batch("bert")
    with per_example_gradients(adapter, 5):
        loss = tiny.loss["bert"](adapter.model, batch).sum()
        held = [held for core in adapter.cores for held in core.up.core.activations]
        assert all(held)
    assert not any(held)
    loss.backward()  # an ordinary one
    assert all(name.endswith(".grad") for name in left_behind(adapter.model))


def saved_tensors(model, run):
    """Shapes and bytes of the unique storages that a forward pass keeps, parameters and buffers excluded."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (
                tuple(tensor.shape),
                storage.nbytes(),
                tensor,
            )  # alive, so pointers are unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sorted(shape for shape, _, _ in kept.values()), sum(size for _, size, _ in kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_activations_are_those_of_the_frozen_model(tiny, kind):
    """R keeps one r-wide activation per layer; nothing of d_in width is kept for it."""
    width = {"bert": "hidden_size", "llama": "hidden_size", "gpt2": "n_embd"}[kind]
    base, rank = tiny.base(kind, **{width: 64}), 2
    batch = {k: v for k, v in tiny.batch(kind, lengths=(32,) * 4, padded=32).items() if k != "labels"}
    embed = base.get_input_embeddings()
    embed.register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    base.requires_grad_(False).train()
    frozen_shapes, frozen = saved_tensors(base, lambda: base(**batch).logits.sum())
    adapter = tiny.adapter(base, rank=rank)

    def run():
        with per_example_gradients(adapter, 4):
            adapter.model(**batch).logits.sum()

    shapes, kept = saved_tensors(adapter.model, run)
    for shape in frozen_shapes:
        if shape in shapes:
            shapes.remove(shape)
    print(f"{kind}: saved activations {kept / frozen:.4f} of the frozen model's")
    assert kept <= 1.05 * frozen
    assert {shape[-1] for shape in shapes} <= {rank}


@pytest.mark.parametrize("said", [1, 4, 6, 50])
def test_rows_of_another_number_of_examples_are_refused(tiny, said):
    """More or fewer than the block was opened for: a reshape would mix the gradients of several examples."""
    adapter, batch = tiny.adapter(tiny.base("bert")), tiny.batch("bert")
    adapter.model.train()
    adapter_train_mode(adapter)
    with per_example_gradients(adapter, said) as rows:
        tiny.loss["bert"](adapter.model, batch).sum().backward()
        with pytest.raises(RuntimeError, match="another number of examples"):
            rows.get()
