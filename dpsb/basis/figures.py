"""What a diagnosis of bases found, and the recommendation that follows from it. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

WORTH_PAYING = 1.25
"""A paid basis is recommended only if its forecast is this many times the best free one's energy."""
BETTER = 1.1
"""A free basis that needs a public file is recommended only if it holds this many times what the best other holds."""
CANNOT_TELL = 0.1
"""Public sets whose bases stand in for the others' own this nearly alike are not told apart by it: two random parts of
one set differed by up to 0.12 with 128 rows a half (MiniLM; QNLI, Banking77)."""
HARDLY_AGREE = 0.1
"""Below this cosine between the judging quarters the figures are mostly chance."""


@dataclass(frozen=True, kw_only=True)
class SetFigures:
    """What was measured of one public set: examples, cosine of its judging quarters, median gradient length.

    ``run_labels`` says whether its rows carry the run's own labels.
    """

    name: str
    labels: str
    examples: int
    coherence: float
    median_norm: float
    run_labels: bool = False


@dataclass(frozen=True, kw_only=True)
class BasisFigures:
    """One basis beside the others. Figures are means over the public sets that it is judged on.

    Args:
      basis: As for ``--basis``.
      paid: Whether it takes a share of the budget; its figures are then a forecast, None without a budget.
      judged_on: Names of the sets: all others, where there are several and the basis comes from one of them.
      energy: Share of the mean gradient's energy that r x r cores hold.
      own_half: For a public basis, the same on the other half of its own file.
      at_most: For a hybrid: what it would hold if its release had no noise and every example were known.
      of_own: ``energy`` over what a basis of the judging set's own other half holds: sets differ in how much of them
        any basis holds, so this compares bases that were judged on different sets.
      rho: Median length of an example's gradient in the cores over that in the weights.
      snr_per_step: Length of the mean gradient over that of the noise in one step of the budget's plan; None where
        the judging quarters do not agree on a gradient.
      visible_layers: For a paid basis: share of the layers whose strongest direction stands above the release's noise.
      share: Of the budget that a paid basis takes.
    """

    basis: str
    paid: bool
    judged_on: tuple[str, ...]
    energy: float | None
    own_half: float | None = None
    at_most: float | None = None
    of_own: float | None = None
    rho: float | None = None
    snr_per_step: float | None = None
    visible_layers: float | None = None
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Every basis' figures, and which one to use."""

    rank: int
    layers: int
    numbers: int
    width: int
    sets: tuple[SetFigures, ...]
    bases: tuple[BasisFigures, ...]
    recommended: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def nearest(scores: Sequence[float]) -> tuple[int, bool]:
    """Which of several public sets to take by their scores, and whether the scores tell.

    Scores less than ``CANNOT_TELL`` below the best one do not; then it is the first named of those.
    """
    equals = [i for i, score in enumerate(scores) if max(scores) - score < CANNOT_TELL]
    return equals[0], len(equals) == 1


def recommend(bases: Sequence[BasisFigures], sets: Sequence[SetFigures]) -> tuple[str, str]:
    """The basis to use and why, in one sentence: the one that holds most energy, free ones before paid ones.

    With several sets, bases were judged on different ones, so each figure is taken over what the judging sets' own
    bases hold. Files whose rows carry the run's labels come before all others.

    Args:
      bases: Every basis judged.
      sets: The public sets that they were judged on.
    """
    others = [entry.name for entry in sets if not entry.run_labels and any(one.run_labels for one in sets)]
    known = [b for b in bases if b.energy is not None and b.basis.partition(":")[2] not in others]
    relative = len(sets) > 1 and all(b.of_own is not None for b in known)

    def held(figures: BasisFigures) -> float:
        return (figures.of_own if relative else figures.energy) or 0.0

    data_free = max((b for b in known if not b.paid and ":" not in b.basis), key=held)
    files = [b for b in known if not b.paid and ":" in b.basis]
    position, tells = nearest([held(b) for b in files]) if files else (0, True)
    public = files[position] if files else data_free
    paid = max((b for b in known if b.paid), key=held, default=None)
    free = public if held(public) > BETTER * held(data_free) else data_free
    best = paid if paid is not None and held(paid) > WORTH_PAYING * held(free) else free
    reason = f"it holds {_percent(held(best))} of " + (
        "what a public set's own basis holds of its gradient" if relative else "the gradient's energy"
    )
    if best is not data_free:
        reason += f", the best data-free basis ({data_free.basis}) {_percent(held(data_free))}"
    if best is paid:
        reason = f"forecast for the budget: {reason}, the best public one {_percent(held(public))}"
    elif paid is not None:
        reason += f"; no paid one is forecast to be worth its price ({paid.basis}: {_percent(held(paid))}"
        reason += (
            ")" if paid.visible_layers is None else f", {_percent(paid.visible_layers)} of its layers above noise)"
        )
    if best is data_free and public is not data_free:
        reason += f"; the nearest public file holds no more than {_percent(held(public))}"
    if best is public and not tells:
        reason += "; others come within a tenth, which does not tell them apart, so it is the first named of them"
    if others:
        reason += f"; not considered, as their labels are not the run's: {', '.join(others)}"
    if len(sets) == 1 and best is not data_free:
        reason += f"; this supposes that the private data are like {sets[0].name}"
    if min(entry.coherence for entry in sets) < HARDLY_AGREE:
        reason += "; but the examples hardly agree on a gradient, so take more of them before you believe it"
    return best.basis, reason + "."


def _percent(share: float | None) -> str:
    return "nothing" if share is None else f"{100 * share:.3g} %"


def mean_of(figures: Sequence[BasisFigures]) -> BasisFigures:
    """One basis' figures over the sets that it was judged on."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return BasisFigures(
        basis=figures[0].basis,
        paid=figures[0].paid,
        judged_on=tuple(name for one in figures for name in one.judged_on),
        energy=mean([one.energy for one in figures]),
        own_half=figures[0].own_half,
        at_most=mean([one.at_most for one in figures]),
        of_own=mean([one.of_own for one in figures]),
        rho=mean([one.rho for one in figures]),
        snr_per_step=mean([one.snr_per_step for one in figures]),
        visible_layers=mean([one.visible_layers for one in figures]),
        share=figures[0].share,
    )
