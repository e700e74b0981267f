"""Bases: orthonormal, reproducible, of stated origin, and equal to a direct computation."""

import pytest
import torch

from dpsb.adapter import attach, lora_layers
from dpsb.basis import _common, lora_sb, mean_gradients, public, random, truncated_svd, weight_svd
from dpsb.losses import classification_loss

KINDS = ("bert", "llama", "gpt2")


def gradients_by_autograd(tiny, kind, batch):
    """Gradient of the mean loss with respect to each target weight (out, in), on an unfrozen copy."""
    copy = tiny.base(kind).eval()
    tiny.loss[kind](copy, batch).mean().backward()
    layers = lora_layers(tiny.lora(tiny.base(kind)))
    found = {}
    for name, layer in layers.items():
        grad = copy.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        found[name] = grad.T if getattr(layer, "fan_in_fan_out", False) else grad
    return found


def all_bases(tiny, kind):
    model, loss_fn, batch = tiny.lora(tiny.base(kind)), tiny.loss[kind], tiny.batch(kind)
    gradients = mean_gradients(model, loss_fn, [batch])
    yield weight_svd(model)
    yield random(model)
    yield public(model, loss_fn, [batch], source="here")
    yield lora_sb(model, gradients, step_size=1e-3, access="public")


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_orthonormal(tiny, kind):
    for basis in all_bases(tiny, kind):
        for A, B, _ in basis.factors.values():
            assert A.shape[0] == B.shape[1] == 4
            assert float((A @ A.T - torch.eye(4)).abs().max()) <= 1e-5
            assert float((B.T @ B - torch.eye(4)).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_bases_are_reproducible_and_leave_the_global_generator_alone(tiny, kind):
    torch.manual_seed(1)
    first = list(all_bases(tiny, kind))
    torch.manual_seed(2)
    second = list(all_bases(tiny, kind))
    model = tiny.lora(tiny.base(kind))
    state = torch.get_rng_state()
    weight_svd(model), random(model), public(model, tiny.loss[kind], [tiny.batch(kind)], source="here")
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first, second, strict=True):
        assert one.provenance == other.provenance
        for name, factors in one.factors.items():
            assert torch.equal(factors.A, other.factors[name].A)
            assert torch.equal(factors.B, other.factors[name].B)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_svd_spans_the_leading_singular_subspace(tiny, kind):
    model = tiny.lora(tiny.base(kind))
    basis = weight_svd(model)
    assert basis.provenance.to_json() == {"kind": "weight_svd", "access": "data_free"}
    for name, layer in lora_layers(model).items():
        weight = layer.get_base_layer().weight.detach()
        weight = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
        U, _, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        A, B, R0 = basis.factors[name]
        assert R0 is None
        for mine, exact in ((B @ B.T, U[:, :4] @ U[:, :4].T), (A.T @ A, Vh[:4].T @ Vh[:4])):
            assert float((mine.double() - exact).norm()) <= 1e-4


def spectrum(rows, columns, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(rows, len(values), generator=generator)).Q
    V = torch.linalg.qr(torch.randn(columns, len(values), generator=generator)).Q
    return U, V, (U * values) @ V.T


@pytest.mark.parametrize("shape", [(1100, 1030), (1030, 1400)])
def test_randomized_svd_finds_the_leading_subspace(shape):
    values = torch.cat([torch.linspace(20, 10, 8), 0.8 ** torch.arange(40.0)])
    U, V, matrix = spectrum(*shape, values)
    assert min(shape) > _common._EXACT_UP_TO
    B, S, A = truncated_svd(matrix, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(S, values[:8], rtol=1e-4, atol=1e-4)
    assert float((B @ B.T - U[:, :8] @ U[:, :8].T).norm()) <= 1e-3
    assert float((A.T @ A - V[:, :8] @ V[:, :8].T).norm()) <= 1e-3
    assert float((B.T @ B - torch.eye(8)).abs().max()) <= 1e-5
    assert float((A @ A.T - torch.eye(8)).abs().max()) <= 1e-5


def test_truncated_svd_is_the_best_approximation():
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    U, S, Vh = truncated_svd(matrix, 5, torch.Generator())
    error = float((matrix - U @ torch.diag(S) @ Vh).norm())
    assert error == pytest.approx(float(torch.linalg.svdvals(matrix)[5:].norm()), rel=1e-5)


@pytest.mark.parametrize("rank", [0, 31])
def test_truncated_svd_refuses_the_rank(rank):
    with pytest.raises(ValueError, match=f"rank={rank}"):
        truncated_svd(torch.zeros(40, 30), rank, torch.Generator())


def test_random_frames_depend_on_the_generator_only(tiny):
    model = tiny.lora(tiny.base("llama"))
    one, two = (random(model, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    name = next(iter(one.factors))
    assert not torch.equal(one.factors[name].A, two.factors[name].A)
    assert one.provenance.access == "data_free"


@pytest.mark.parametrize("kind", KINDS)
def test_mean_gradients_are_autograds(tiny, kind):
    """Linear layers and GPT-2's transposed Conv1D; from one batch or several of different size."""
    batch, model = tiny.batch(kind), tiny.lora(tiny.base(kind))
    exact = gradients_by_autograd(tiny, kind, batch)
    for batches in ([batch], [tiny.take(batch, slice(0, 2)), tiny.take(batch, slice(2, 5))]):
        got = mean_gradients(model, tiny.loss[kind], batches)
        assert set(got) == set(exact)
        assert all(tiny.distance(got[name], exact[name]) <= 1e-5 for name in exact)


def test_mean_gradients_leave_the_model_as_it_was(tiny):
    model = tiny.lora(tiny.base("bert")).train()
    mean_gradients(model, classification_loss, [tiny.batch("bert")])
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="at least one public example"):
        mean_gradients(model, classification_loss, [])
    with pytest.raises(ValueError, match="one loss per example"):
        mean_gradients(model, lambda m, b: classification_loss(m, b).mean(), [tiny.batch("bert")])
    assert not any(m._forward_hooks for m in model.modules())


def test_public_spans_the_leading_directions_of_the_gradient(tiny):
    batch = tiny.batch("bert")
    basis = public(tiny.lora(tiny.base("bert")), classification_loss, [batch], source="public.csv")
    assert basis.provenance.to_json() == {"kind": "public", "access": "public", "source": "public.csv"}
    for name, gradient in gradients_by_autograd(tiny, "bert", batch).items():
        A, B, R0 = basis.factors[name]
        assert R0 is None
        singular = torch.linalg.svdvals(gradient)
        captured = float((B.T @ gradient @ A.T).norm())
        assert captured == pytest.approx(float(singular[:4].norm()), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_sb_is_the_papers_start(tiny, kind):
    """-eta sign(G) = U S V^T cut to rank r; B = U, A = V^T, R = S; the model starts at W0 + B R A."""
    batch, eta = tiny.batch(kind), 1e-3
    model = tiny.lora(tiny.base(kind))
    gradients = mean_gradients(model, tiny.loss[kind], [batch])
    basis = lora_sb(model, gradients, step_size=eta, access="public")
    by_hand = tiny.base(kind).eval()
    for name, layer in lora_layers(model).items():
        A, B, R0 = basis.factors[name]
        update = -eta * torch.sign(gradients[name])
        U, S, Vh = torch.linalg.svd(update.double(), full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        start = (B @ R0 @ A).double()
        torch.testing.assert_close(torch.diag(R0).double(), S[:4], rtol=1e-5, atol=1e-9)
        assert torch.equal(R0, torch.diag(torch.diag(R0)))
        distance = float((update.double() - start).norm())
        assert distance == pytest.approx(float(S[4:].norm()), rel=1e-5)  # no rank-r matrix is closer
        if float(S[3] - S[4]) > 1e-3 * float(S[0]):  # unique
            assert tiny.distance(start, best) <= 1e-4
        weight = by_hand.get_submodule(name.removeprefix("base_model.model.")).weight
        with torch.no_grad():
            weight += (start.T if getattr(layer, "fan_in_fan_out", False) else start).float()
    attach(model, basis, allow=("classifier",))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        assert tiny.distance(model.eval()(**inputs).logits, by_hand(**inputs).logits) <= 1e-5


def test_lora_sb_from_private_gradients_needs_a_word(tiny):
    """Peers' fault: a basis from un-noised private gradients, published in A, B, R0 and charged to nobody."""
    model = tiny.lora(tiny.base("llama"))
    gradients = mean_gradients(model, tiny.loss["llama"], [tiny.batch("llama")])
    with pytest.raises(ValueError, match="publishes them"):
        lora_sb(model, gradients, step_size=1e-3, access="non_private")
    allowed = lora_sb(model, gradients, step_size=1e-3, access="non_private", allow_non_private_basis=True)
    assert allowed.provenance.access == "non_private"
    with pytest.raises(ValueError, match="access='data_free'"):
        lora_sb(model, gradients, step_size=1e-3, access="data_free")
    with pytest.raises(ValueError, match="step_size=0"):
        lora_sb(model, gradients, step_size=0, access="public")


def test_access_is_never_assumed(tiny):
    with pytest.raises(TypeError, match="access"):
        lora_sb(tiny.lora(tiny.base("llama")), {}, step_size=1e-3)
