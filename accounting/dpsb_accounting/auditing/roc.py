"""The ROC of an attack: how many members it finds at how many false alarms."""

from __future__ import annotations

from dataclasses import dataclass

from dpsb_accounting import _checks
from dpsb_accounting.auditing.bounds import clopper_pearson
from dpsb_accounting.auditing.scores import CanaryScores

LOW_RATES = (0.01, 0.001)


@dataclass(frozen=True, kw_only=True, slots=True)
class RocPoint:
    """How many members an attack finds while calling at most a share `fpr` of non-members members.

    Args:
        fpr: The false positive rate that was allowed.
        tpr: True positive rate at the lowest threshold that keeps to it.
        low: Lower end of the Clopper–Pearson interval of `tpr` at 95 %. The threshold was read off the non-members,
            so the interval describes these scores; it is no privacy bound.
        high: Upper end.
    """

    fpr: float
    tpr: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Roc:
    """The curve and its summary. A description of one attack, not a bound on epsilon.

    Args:
        fpr: False positive rates, ascending from 0 to 1.
        tpr: True positive rates at them.
        auc: Area under the curve; 0.5 for an attack that knows nothing.
        points: True positive rates at low false positive rates.
        members: Number of members scored.
        non_members: Number of non-members scored.
    """

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]
    auc: float
    points: tuple[RocPoint, ...]
    members: int
    non_members: int

    def to_json(self) -> dict[str, object]:
        """Returns the summary, without the curve."""
        return {
            "auc": self.auc,
            "members": self.members,
            "non_members": self.non_members,
            "tpr_at_fpr": [{"fpr": p.fpr, "tpr": p.tpr, "low": p.low, "high": p.high} for p in self.points],
        }


def roc(scores: CanaryScores, rates: tuple[float, ...] = LOW_RATES) -> Roc:
    """Returns the ROC of the rule "member if the score is at least t" over all t.

    Args:
        scores: Scores of members and non-members.
        rates: Low false positive rates at which the true positive rate is wanted, each in (0, 1).

    References:
        Carlini et al. (2022), arXiv:2112.03570: why low false positive rates matter.

    Example:
        >>> curve = roc(CanaryScores([3, 2, 1, 0], [1, 1, 0, 0]))
        >>> curve.auc, curve.points[0].tpr
        (1.0, 1.0)
    """
    import numpy

    inserted, left_out = numpy.sort(scores.inserted), numpy.sort(scores.left_out)
    thresholds = numpy.unique(scores.values)[::-1]
    tpr = 1 - numpy.searchsorted(inserted, thresholds, side="left") / len(inserted)
    fpr = 1 - numpy.searchsorted(left_out, thresholds, side="left") / len(left_out)
    tpr, fpr = numpy.concatenate([[0.0], tpr]), numpy.concatenate([[0.0], fpr])
    area = float(numpy.sum(numpy.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
    points = []
    for rate in rates:
        _checks.probability(open_interval=True, rate=rate)
        found = float(tpr[int(numpy.searchsorted(fpr, rate + 1e-12, side="right")) - 1])
        low, high = clopper_pearson(round(found * len(inserted)), len(inserted), 0.05)
        points.append(RocPoint(fpr=rate, tpr=found, low=low, high=high))
    return Roc(
        fpr=tuple(fpr.tolist()),
        tpr=tuple(tpr.tolist()),
        auc=area,
        points=tuple(points),
        members=len(inserted),
        non_members=len(left_out),
    )
