"""Norms and sums for a basis do not follow what a caller has set to make products fast and coarse."""

import threading
from contextlib import contextmanager

import pytest
import torch

from dpsb.adapter import lora_layers
from dpsb.basis import exact_products as module
from dpsb.basis.exact_products import exact_products
from dpsb.basis.per_example import WHOLE, add_clipped_sum, example_norms, zeros_for
from dpsb.losses import classification_loss
from dpsb.mechanism import Mechanism


def settings():
    """All that torch holds about the precision of products, the older setting where it can be read."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "unreadable"
    return older, [backend.fp32_precision for backend in module._BACKENDS]


@contextmanager
def changed(older=None, newer=None):
    """Sets one or both for a test, and puts everything back."""
    before = settings()
    try:
        if older:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(module._BACKENDS, newer or (), strict=False):
            backend.fp32_precision = precision
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        for backend, precision in zip(module._BACKENDS, before[1], strict=True):
            backend.fp32_precision = precision


AROUND = {
    "older setting": lambda: changed("medium"),
    "newer settings": lambda: changed(newer=("tf32", "bf16")),
    "both": lambda: changed("medium", ("tf32", "bf16")),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_norms_and_sums_are_the_same_in_a_coarse_setting(tiny, around):
    """On a processor without bf16 products the settings move nothing anyway; ``seen`` says that they were undone."""
    model, batch = tiny.lora(tiny.base("bert")), tiny.batch("bert", lengths=(9, 4, 12))
    layers, seen = lora_layers(model), []
    whole = dict.fromkeys(layers, WHOLE)
    mechanism = Mechanism(l2_clip_norm=0.2, noise_multiplier=1.0, clipping="flat")

    def loss_fn(model, batch):
        seen.append((*settings()[1], torch.is_autocast_enabled("cpu")))
        return classification_loss(model, batch)

    def found():
        totals = zeros_for(layers, whole, torch.device("cpu"))
        add_clipped_sum(model, loss_fn, batch, layers, whole, mechanism, totals)
        return example_norms(model, loss_fn, batch, layers, [whole]), totals

    norms, sums = found()
    with around():
        inside = settings()
        again, sums_again = found()
        assert settings() == inside
    assert torch.equal(norms, again)
    assert all(torch.equal(sums[name], sums_again[name]) for name in sums)
    assert seen == [(*["ieee"] * len(module._BACKENDS), False)] * 4


def test_the_setting_stays_exact_until_the_last_thread_is_done():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with exact_products():
            entered.set()
            leave.wait(10)

    with changed("high"):
        outside = settings()
        thread = threading.Thread(target=other)
        with exact_products():
            thread.start()
            assert entered.wait(10)
        assert torch.get_float32_matmul_precision() == "highest", "the other is still inside"
        leave.set()
        thread.join(10)
        assert settings() == outside


def test_it_is_put_back_after_an_error():
    with changed("medium"):
        outside = settings()
        with pytest.raises(ZeroDivisionError), exact_products():
            1 / 0  # noqa: B018
        assert settings() == outside
