"""What a diagnosis of bases found, and the recommendation that follows from it. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

WORTH_PAYING = 1.25
"""A paid basis is recommended only if its forecast is this many times the best free one's energy, on every set that
judges: which of several files the private data are like can be found out for less than a basis costs."""
BETTER = 1.1
"""A free basis that needs a public file is recommended only if it holds this many times what the best other holds."""
CANNOT_TELL = 0.1
"""Public sets whose bases stand in for the others' own this nearly alike (shares of the best) are not told apart by it:
two random parts of one set differed by up to 0.12 with 128 rows a half (MiniLM; QNLI, Banking77)."""
HARDLY_AGREE = 0.1
"""Below this cosine between the judging quarters the figures are mostly chance."""
SMALL_HEAD_SHARE = 0.25
"""With less of a row's squared norm one clip leaves the head less than half of C. Measured on Banking77 at epsilon 3:
half of C squared for the head gained 8 points where it had 10 %, cost 7 where it had 86 to 88 %; nothing is measured
between."""


@dataclass(frozen=True, kw_only=True)
class SetFigures:
    """What was measured of one public set.

    Args:
      name: Of its file.
      labels: What was done about its labels.
      examples: Both halves together.
      coherence: Cosine of its judging quarters.
      own_half: The share of energy that a basis from one half of it holds of the other half.
      run_labels: Whether its rows carry the run's own labels.
      judges: Whether bases are judged on it.
      median_norm: Median length of an example's gradient, where it judges.
      head_numbers: How many numbers the head has that is trained on it; 0 for none, or where it does not judge.
    """

    name: str
    labels: str
    examples: int
    coherence: float
    own_half: float | None = None
    run_labels: bool = False
    judges: bool = True
    median_norm: float | None = None
    head_numbers: int = 0


@dataclass(frozen=True, kw_only=True)
class BasisFigures:
    """One basis beside the others. Figures are means over the sets that judge, the same for every basis.

    Args:
      basis: As for ``--basis``.
      paid: Whether it takes a share of the budget; its figures are then a forecast, None without a budget.
      energy: Share of the mean gradient's energy that r x r cores hold.
      energies: The same on each set that judges, in their order.
      at_most: For a hybrid: what it would hold if its release had no noise and every example were known.
      of_own: ``energy`` over what a basis of the judging set's own other half holds: so a set whose gradient is easy to
        hold counts no more than another one.
      rho: Median length of an example's gradient in the cores over that in the weights.
      head_share: Median share of an example's squared norm, in head and cores together, that is the head's.
      snr_per_step: Length of the mean gradient over that of the noise in one step of the budget's plan; None where
        the judging quarters do not agree on a gradient.
      visible_layers: For a paid basis: share of the layers whose strongest direction stands above the release's noise.
      share: Of the budget that a paid basis takes.
    """

    basis: str
    paid: bool
    energy: float | None
    energies: tuple[float, ...] = ()
    at_most: float | None = None
    of_own: float | None = None
    rho: float | None = None
    head_share: float | None = None
    snr_per_step: float | None = None
    visible_layers: float | None = None
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Every basis' figures, which one to use and why, and perhaps what to try with it."""

    rank: int
    layers: int
    numbers: int
    width: int
    sets: tuple[SetFigures, ...]
    bases: tuple[BasisFigures, ...]
    recommended: str
    reason: str
    advice: str = ""

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

    Every basis is judged by the same sets, each of which stands in turn for the private data. With several, figures are
    taken over what the sets' own bases hold. Of files that are not told apart the first named is used, those with the
    run's labels before others.

    Args:
      bases: Every basis judged.
      sets: The public sets, of which at least one judges.
    """
    judges = [entry for entry in sets if entry.judges]
    known = [b for b in bases if b.energy is not None]
    relative = len(judges) > 1 and all(b.of_own is not None for b in known)

    def held(figures: BasisFigures) -> float:
        return (figures.of_own if relative else figures.energy) or 0.0

    frees = [b for b in known if not b.paid]
    data_free = max((b for b in frees if ":" not in b.basis), key=held)
    with_labels = {f"public:{entry.name}" for entry in sets if entry.run_labels}
    files = sorted((b for b in frees if ":" in b.basis), key=lambda b: b.basis not in with_labels)
    most = max(map(held, files), default=0.0) or 1.0
    position, tells = nearest([held(b) / most for b in files]) if files else (0, True)
    public = files[position] if files else data_free
    by_forecast = sorted((b for b in known if b.paid), key=held, reverse=True)
    worth = next((b for b in by_forecast if _worth_paying(b, frees)), None)
    paid = worth or next(iter(by_forecast), None)
    free = public if held(public) > BETTER * held(data_free) else data_free
    best = worth or free
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
        reason += "; others come within a tenth, which does not tell them apart, so it is the first of them"
        if len(judges) < len(sets):
            reason += ", those with the run's labels before others"
    reason += _who_judged(best, judges, all_of_them=len(judges) == len(sets))
    if min(entry.coherence for entry in judges) < HARDLY_AGREE:
        reason += "; but the examples hardly agree on a gradient, so take more of them before you believe it"
    return best.basis, reason + "."


def _worth_paying(paid: BasisFigures, frees: Sequence[BasisFigures]) -> bool:
    best = [max(energies) for energies in zip(*(b.energies for b in frees), strict=True)]
    return all(held > WORTH_PAYING * free for held, free in zip(paid.energies, best, strict=True))


def _who_judged(best: BasisFigures, judges: Sequence[SetFigures], *, all_of_them: bool) -> str:
    """Which rows stood for the private data, and how far that favours the basis."""
    names = [entry.name for entry in judges]
    said = f"; judged on held-out rows of {', '.join(names)}" + (
        "" if all_of_them else ", as the other files' labels are not the run's"
    )
    source = best.basis.partition(":")[2]
    if source not in names:
        return said + (", too kind if the private data are unlike them" if best.paid else "")
    if len(names) == 1:
        return said + ", its own file, too kind if the private data are unlike it"
    elsewhere = [energy for name, energy in zip(names, best.energies, strict=True) if name != source]
    held = _percent(sum(elsewhere) / len(elsewhere))
    said += ", its own file among them, too kind if the private data are unlike it"
    return said + f" (it holds {held} of the others' gradient energy)"


def advice_on_head(best: BasisFigures, sets: Sequence[SetFigures], core_numbers: int) -> str:
    """What to try if one clip for head and cores starves the head: a sentence, or nothing.

    Only where the head is the larger part: SNLI's, with 1,155 numbers beside 4,608 of the cores, gained nothing.

    Args:
      best: The basis to use.
      sets: The public sets.
      core_numbers: How many numbers the cores have.
    """
    numbers = min(entry.head_numbers for entry in sets if entry.judges)
    share = best.head_share
    if share is None or share >= SMALL_HEAD_SHARE or numbers <= core_numbers:
        return ""
    return (
        f"With it the head, {numbers:,} numbers beside {core_numbers:,} of the cores, has {_percent(share)} of a row's "
        "squared norm, so one clip for both may starve it: try --head-share 0.5."
    )


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
        energy=mean([one.energy for one in figures]),
        energies=tuple(energy for one in figures for energy in one.energies),
        at_most=mean([one.at_most for one in figures]),
        of_own=mean([one.of_own for one in figures]),
        rho=mean([one.rho for one in figures]),
        head_share=mean([one.head_share for one in figures]),
        snr_per_step=mean([one.snr_per_step for one in figures]),
        visible_layers=mean([one.visible_layers for one in figures]),
        share=figures[0].share,
    )
