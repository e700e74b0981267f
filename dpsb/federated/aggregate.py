r"""Averages of adapters: pure functions on tensors, unweighted, exact where they say so.

A client's adapter of a weight W (m, n) is a factor pair A (r, n), B (m, r), or a core R (r, r) between factors that all
clients share. What counts is :math:`\Delta W_i = B_i A_i` (or :math:`B R_i A`), and an average is *exact* if it gives
:math:`\frac1c \sum_i \Delta W_i`:

==============  ==============================================  =======================================
method          aggregate                                       :math:`\Delta W` against the mean
==============  ==============================================  =======================================
fed_sb          mean of R                                       exact: linear in R
fedit           mean of A, mean of B                            off by mean of (B_i - B)(A_i - A)
ffa_lora        mean of B, A frozen and shared                  exact: linear in B
fedex_lora      mean of A and of B, and the residual that       exact, rank of the residual (c - 1) r
                goes into W
flora           all B side by side, all A / c on top of         exact, also where ranks differ
                each other
fedsvd          mean of B, then B A turned into B' A' with      exact: the factorization loses nothing
                orthonormal rows of A'
==============  ==============================================  =======================================

Weights by data size are left out on purpose: a weight that one example changes breaks the sensitivity of the average,
and it tells how many examples a silo has. Sums are in float64 and come back in the tensors' own type.

References:
  Singhal et al. (2025), arXiv:2502.15436 (Fed-SB); Zhang et al. (2024), arXiv:2305.05644 (FedIT); Sun et al. (2024),
  arXiv:2403.12313 (FFA-LoRA); Singhal et al. (2024), arXiv:2410.09432 (FedEx-LoRA); Wang et al. (2024),
  arXiv:2409.05976 (FLoRA); Lee et al. (2025), arXiv:2505.12805 (FedSVD).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dpsb.federated.checks import FederatedError

State = Mapping[str, torch.Tensor]
A, B = ".A", ".B"


def mean(states: Sequence[State]) -> dict[str, torch.Tensor]:
    """The unweighted mean of tensors by name.

    Args:
      states: At least one; the same names, shapes and types. Released.

    Raises:
      FederatedError: If there is none, or names, shapes or types differ.
    """
    _check_alike(states)
    return {
        name: torch.stack([state[name].to(torch.float64) for state in states]).mean(dim=0).to(first.dtype)
        for name, first in states[0].items()
    }


def fed_sb(states: Sequence[State]) -> dict[str, torch.Tensor]:
    r"""Fed-SB: the mean of R (and of a head), :math:`\frac1c\sum_i B R_i A = B (\frac1c \sum_i R_i) A` exactly.

    Args:
      states: Per client R by name. Released.
    """
    return mean(states)


def fedit(states: Sequence[State]) -> dict[str, torch.Tensor]:
    """FedIT: the means of A and of B, each apart. Not exact; see :func:`aggregation_error`.

    Args:
      states: Per client tensors named ``NAME.A`` and ``NAME.B``. Released.
    """
    _pairs(states)
    return mean(states)


def ffa_lora(states: Sequence[State]) -> dict[str, torch.Tensor]:
    """FFA-LoRA: the mean of B under an A that is the same in every client. Exact.

    Raises:
      FederatedError: If a client's A differs.
    """
    for name in _pairs(states):
        if any(not torch.equal(state[name + A], states[0][name + A]) for state in states):
            raise FederatedError(f"FFA-LoRA needs the same frozen A in every client; that of {name} differs.")
    return {**mean(states), **_only(states[0], A)}


def fedex_lora(states: Sequence[State]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    r"""FedEx-LoRA: FedIT's means, and by weight what they miss.

    Returns:
      The means, and :math:`E = \frac1c\sum_i B_i A_i - \bar B \bar A` of shape ``(m, n)`` in float64, which goes into
      the frozen weight: then the average is exact.
    """
    means = fedit(states)
    residual = {}
    for name in _pairs(states):
        exact = torch.stack([_product(state, name) for state in states]).mean(dim=0)
        residual[name] = exact - _product(means, name)
    return means, residual


def flora(states: Sequence[State]) -> dict[str, torch.Tensor]:
    r"""FLoRA: :math:`B = [B_1 \dots B_c]` and :math:`A = [A_1; \dots; A_c] / c`. Exact, and ranks may differ.

    Returns:
      Per weight B of shape ``(m, sum of r_i)`` and A of shape ``(sum of r_i, n)``.

    Raises:
      FederatedError: If clients have different weights, or sides of different length.
    """
    stacked: dict[str, torch.Tensor] = {}
    for name in _pairs(states):
        sides = {(state[name + A].shape[1], state[name + B].shape[0]) for state in states}
        if len(sides) > 1:
            raise FederatedError(f"The clients' factors of {name} belong to weights of different shapes.")
        stacked[name + A] = torch.cat([state[name + A] for state in states], dim=0) / len(states)
        stacked[name + B] = torch.cat([state[name + B] for state in states], dim=1)
    return stacked


def fedsvd(states: Sequence[State]) -> dict[str, torch.Tensor]:
    r"""FedSVD: the mean of B under a shared A, turned into an equal product whose A has orthonormal rows.

    With thin QR decompositions :math:`\bar B = Q_B T_B`, :math:`A^\top = Q_A T_A` and the SVD :math:`T_B T_A^\top = U S
    V^\top`, the result is :math:`B' = Q_B U S`, :math:`A' = V^\top Q_A^\top`: the product is :math:`\bar B A`, and
    :math:`A'` is orthonormal also where B is 0, so the noise of the next round is not amplified by it.

    Raises:
      FederatedError: If a client's A differs.
    """
    means = ffa_lora(states)
    turned: dict[str, torch.Tensor] = {}
    for name in _pairs([means]):
        q_b, t_b = torch.linalg.qr(means[name + B].to(torch.float64))
        q_a, t_a = torch.linalg.qr(means[name + A].to(torch.float64).T)
        u, s, vh = torch.linalg.svd(t_b @ t_a.T)
        turned[name + A] = (vh @ q_a.T).to(means[name + A].dtype)
        turned[name + B] = (q_b @ (u * s)).to(means[name + B].dtype)
    return turned


def aggregation_error(states: Sequence[State], aggregate: State) -> float:
    r"""The Frobenius norm of :math:`BA - \frac1c\sum_i B_i A_i` over all weights, relative to that of the mean."""
    missed, size = 0.0, 0.0
    for name in _pairs(states):
        exact = torch.stack([_product(state, name) for state in states]).mean(dim=0)
        missed += float((_product(aggregate, name) - exact).square().sum())
        size += float(exact.square().sum())
    return (missed / size) ** 0.5 if size else float(missed > 0)


def _pairs(states: Sequence[State]) -> list[str]:
    """The weights that every client has both factors of."""
    if not states:
        raise FederatedError("There is nothing to aggregate: no client replied.")
    names = sorted(key.removesuffix(A) for key in states[0] if key.endswith(A))
    wanted = {name + part for name in names for part in (A, B)}
    for state in states:
        if set(state) != wanted or not names:
            raise FederatedError("Expected every client to have the tensors NAME.A and NAME.B of the same weights.")
    return names


def _product(state: State, name: str) -> torch.Tensor:
    return state[name + B].to(torch.float64) @ state[name + A].to(torch.float64)


def _only(state: State, part: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.endswith(part)}


def _check_alike(states: Sequence[State]) -> None:
    if not states:
        raise FederatedError("There is nothing to aggregate: no client replied.")
    for state in states:
        if set(state) != set(states[0]):
            raise FederatedError("The clients' tensors have different names.")
        for name, tensor in state.items():
            if tensor.shape != states[0][name].shape or tensor.dtype != states[0][name].dtype:
                raise FederatedError(f"The clients' tensors {name} differ in shape or type.")
