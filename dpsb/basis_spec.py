"""Which basis a user may ask for. Needs no torch, so that settings can be checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KINDS = {
    "weight": "leading singular directions of the frozen weight (data-free)",
    "random": "random orthonormal directions (data-free)",
    "complementary": "random directions outside the weight's leading ones (data-free)",
    "hadamard": "fixed Walsh-Hadamard directions (data-free)",
    "public": "gradient of public data; of several files the nearest one",
    "trained": "LoRA as it was trained on the public rows of warm_start; R starts at its size",
    "private": "noisy clipped gradient of the private data, charged to the ledger",
    "hybrid": "wide basis from public data, or from the weight, turned by a small charged release",
    "lora-sb": "LoRA-SB's start as published, from a public file; from the private data only with epsilon inf",
    "leak": "raw gradient of the private data, as a reference: every epsilon is infinite",
}
DATA_FREE_KINDS = ("weight", "random", "complementary", "hadamard")
"""Kinds that need nothing but the weights."""

RELEASED = ("private", "hybrid")
"""Kinds that always pay for a private release."""

PHASE = "basis"
"""Name of the phase of a plan that pays for it."""

LARGEST_SHARE = 0.9
"""The most of a budget that a basis may take; the rest is for training."""

SMALLEST_SHARE = 1e-4
"""The least: it costs training 0.005 % more noise, so less saves nothing, and its own noise is 100 times that of the
whole budget: seven times what share 0.005 has, at which 4,000 rows turned no public direction (banking77 at epsilon 1,
docs/benchmarks/paid_bases.md)."""

BASIS_CLIP_NORMS = (1e-6, 1e6)
"""Least and largest clip norm of its release: beyond them float32 norms and sums underflow or overflow by the data."""

_PAID = "a basis that is paid for"
BASIS_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "basis_share": ((None,), _PAID),
    "basis_clip_norm": ((None,), _PAID),
    "basis_sampling_prob": ((None, 1.0), _PAID),
    "basis_width": ((None,), "'hybrid'"),
    "basis_rounds": ((None,), "'private'"),
    "basis_choice": (("public",), "'public' with several files"),
    "rebase_every": ((None,), "'random' and 'public' (chosen without the private data)"),
}
"""Settings of a run that only some bases read: values that say nothing, the usual one first, and what they are for."""

_TAKE_FILES = {"public": "FILE[,FILE...]", "hybrid": "[FILE[,FILE...]]", "lora-sb": "[FILE]"}


class BasisSpecError(ValueError):
    """A basis that does not exist or lacks something; the message says which there are."""


@dataclass(frozen=True)
class BasisSpec:
    """A basis as the user asked for it.

    Args:
      kind: One of ``KINDS``.
      sources: Public files.
    """

    kind: str
    sources: tuple[str, ...] = ()


def parse_basis(text: str) -> BasisSpec:
    """The basis that ``KIND`` or ``KIND:FILE,FILE`` names.

    Raises:
      BasisSpecError: If there is no such kind, or its files are missing or not wanted.

    Example:
      >>> parse_basis("public:a.csv,b.csv")
      BasisSpec(kind='public', sources=('a.csv', 'b.csv'))
    """
    kind, _, rest = text.partition(":")
    sources = tuple(part.strip() for part in rest.split(",") if part.strip())
    if kind not in KINDS:
        raise BasisSpecError(f"Expected basis={text!r} to be one of {', '.join(map(_usage, KINDS))}.")
    if sources and kind not in _TAKE_FILES:
        raise BasisSpecError(f"basis={kind!r} takes no file, got {text!r}.")
    if kind == "public" and not sources:
        raise BasisSpecError(f"basis={text!r} needs a file of public data: {_usage('public')}.")
    if kind == "lora-sb" and len(sources) > 1:
        raise BasisSpecError(f"basis='lora-sb' takes one public file, got {text!r}.")
    if len(set(sources)) != len(sources):
        raise BasisSpecError(f"basis={text!r} names a file twice.")
    return BasisSpec(kind, sources)


def check_share(share: float) -> None:
    """Refuses a share of the budget that leaves nothing to train with, or a release that holds nothing.

    Raises:
      BasisSpecError: If it is not between ``SMALLEST_SHARE`` and ``LARGEST_SHARE``.
    """
    if SMALLEST_SHARE <= share <= LARGEST_SHARE:
        return
    why = "more leaves no budget to train with"
    if not share > LARGEST_SHARE:
        why = "less saves training nothing, and gives the release over 100 times the noise of the whole budget"
    raise BasisSpecError(
        f"Expected basis_share={share!r} from {SMALLEST_SHARE} to {LARGEST_SHARE}: {why}; 0.02 to 0.1 is usual."
    )


def settings_for(spec: BasisSpec, choice: str) -> set[str]:
    """Which of ``BASIS_SETTINGS`` a basis reads.

    Args:
      spec: The basis.
      choice: ``basis_choice`` of the run.
    """
    several = spec.kind == "public" and len(spec.sources) > 1
    paid = spec.kind in RELEASED or (several and choice == "private")
    used = {"basis_share", "basis_clip_norm", "basis_sampling_prob"} if paid else set()
    used |= {"rebase_every"} if spec.kind in ("random", "public") and not paid else set()
    own = {"hybrid": "basis_width", "private": "basis_rounds", "public": "basis_choice"}
    return used | ({own[spec.kind]} if spec.kind in RELEASED or several else set())


def _usage(kind: str) -> str:
    files = _TAKE_FILES.get(kind, "")
    return kind + (f"[:{files[1:]}" if files.startswith("[") else f":{files}" * bool(files))
