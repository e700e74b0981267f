"""Products of fp32 matrices made in fp32, whatever a caller has set for speed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BACKENDS: tuple[Any, ...] = tuple(
    backend
    for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if hasattr(backend, "fp32_precision")  # torch 2.9 and later
)
_lock = threading.Lock()
_users = 0
_undo: list[Callable[[], None]] = []  # one entry while there are users


@contextmanager
def exact_products() -> Iterator[None]:
    """No TensorFloat-32, no bf16 inside products and no autocast around them; an autocast that begins inside holds.

    A norm by coarse products could be too small by half a percent, and clipping by it would be no bound. Torch's
    precision is one setting for all threads: it stays exact until the last of several blocks is left, and then is what
    it was before the first.
    """
    global _users
    with _lock:
        if not _users:
            _undo.append(_make_exact())
        _users += 1
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _undo.pop()()


def _make_exact() -> Callable[[], None]:
    """Makes products exact, by the older and the newer of torch's settings; returns what puts both back."""
    before = [(backend, backend.fp32_precision) for backend in _BACKENDS]
    try:
        older: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # it says so where the newer ones alone were used; then it is at its default, which is exact
        older = None
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    for backend in _BACKENDS:
        backend.fp32_precision = "ieee"

    def undo() -> None:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in before:
            backend.fp32_precision = precision

    return undo
