"""The report's content: every number from one ledger, one JSON object.

Schema "dpsb-report/1" has revisions. A later one only adds (2: keys; 3: the assumption that names the files declared
public), and says so in `revision` (absent means 1); the words of a revision never change. `verify` makes a report
again under the revision that it states.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpsb_accounting import _checks, accountant, noise
from dpsb_accounting.agreement import CrossCheck, cross_check
from dpsb_accounting.bound import Bound
from dpsb_accounting.events import event_to_json
from dpsb_accounting.files import write_whole
from dpsb_accounting.plan import Phase, Plan, number_to_json
from dpsb_accounting.record import LedgerRecord
from dpsb_accounting.report import page, words

SCHEMA = "dpsb-report/1"
REVISION = 3
HELD_OUT_NOTE = "outside the guarantee"
_FIRST_REASON = (  # of revision 1, which knew no second engine
    "one rigorous engine computes the upper bound; the lower bound is computed by separate code, and the two were "
    "checked to be in order, but no second upper bound was computed"
)
_SINCE_2 = ("revision", "cross_check_engine", "cross_check_epsilon", "attackers", "disclosure", "noise_on_weights")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one ledger supports claiming; made by `make_report`.

    Args:
        epsilon: The bounds on epsilon of the plan's whole schedule; `upper` is the claim, if there is one.
            Public.
        spent: The bounds on epsilon of the steps charged: information. Public.
        claim: Whether a claim may be made: no taint, and a finite upper bound.
        content: The whole report as JSON holds it.
    """

    epsilon: Bound
    spent: Bound
    claim: bool
    content: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        """Returns the report as a new JSON object; an infinite number is the text "inf"."""
        result: dict[str, object] = json.loads(json.dumps(self.content))
        return result

    def to_text(self) -> str:
        """Returns the report as plain text, at most 100 columns wide: the claim first, then the mathematics."""
        return page.text(self.to_json())

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON form atomically: another process sees the old file or the whole new one."""
        write_whole(Path(path), (json.dumps(self.content, indent=2, allow_nan=False) + "\n").encode())


def make_report(
    ledger: LedgerRecord,
    *,
    held_out: Mapping[str, object] | None = None,
    audits: Sequence[Mapping[str, object]] | None = None,
) -> Report:
    """Returns the report of a ledger or its record.

    Guarantees: every number comes from the ledger; the claim is the epsilon of the plan's whole schedule, whatever
    made the run stop, or the larger one that a second engine gives where the two disagree; there is none for a
    tainted or non-private run.

    Args:
        ledger: A `Ledger` or a `LedgerRecord`.
        held_out: Metrics on private held-out data, if they must be shown; marked as outside the guarantee.
        audits: Lower bounds on epsilon that attacks on the model gave: objects with `method`, `epsilon_lower`,
            `confidence` and `delta`. Left out, the report says that the model was not audited.

    Returns:
        The report. Public, except for what `held_out` brings.

    Raises:
        ValueError: If an audit is malformed, or its lower bound exceeds the claim: then one of the two is wrong.
    """
    content, whole, spent = report_content(ledger)
    if held_out is not None:
        content["held_out"] = {"note": HELD_OUT_NOTE, "metrics": dict(held_out)}
    if audits is not None:
        content["audits"] = [checked_audit(audit, whole.upper, ledger.plan.delta) for audit in audits]
    return Report(epsilon=whole, spent=spent, claim=content["claim"] is True, content=content)


def report_content(ledger: LedgerRecord, revision: int = REVISION) -> tuple[dict[str, object], Bound, Bound]:
    """Returns what a ledger's report holds under a revision, the claimed bound and what is spent."""
    plan = ledger.plan
    whole, spent = accountant.epsilon(ledger), accountant.spent(ledger)
    second = _second(tuple(plan.phases), plan.delta, plan.neighboring)
    whole = dataclasses.replace(whole, upper=max(whole.upper, second.claimed))
    claim = whole.is_finite and not ledger.taints
    ends = second.to_json()
    content: dict[str, object] = {
        "schema": SCHEMA,
        "revision": revision,
        "epsilon": _ends(whole),
        "delta": plan.delta,
        "unit": plan.unit,
        "neighboring": plan.neighboring,
        "claim": claim,
        "taints": [{"name": taint.name, "reason": taint.reason} for taint in ledger.taints],
        "target_epsilon": number_to_json(plan.target_epsilon),
        "spent": {"epsilon": _ends(spent), "steps": ledger.charged("train"), "of": plan.steps},
        "attackers": words.attackers(whole.upper, plan.delta) if claim else [],
        "mechanism": _mechanism(plan),
        "phases": [{**phase.to_json(), "charged": ledger.charged(phase.name)} for phase in plan.phases],
        "num_examples": plan.num_examples,
        "num_examples_declared": plan.num_examples_declared,
        "basis": dict(plan.basis),
        "accounting": [_tool(whole)],
        "cross_check": second.status,
        "cross_check_reason": second.reason,
        "cross_check_engine": second.engine,
        "cross_check_epsilon": ends["epsilon"],
        "statement": words.statement(ledger, whole.upper, claim),
        "assumptions": [line.replace("{unit}", plan.unit) for line in _assumptions(plan, revision)],
        "not_covered": list(words.NOT_COVERED),
        "disclosure": words.disclosure(plan),
        "noise_on_weights": _noise_on_weights(plan),
        "ledger": {
            "file": ledger.path.name,
            "head": ledger.head,
            "length": ledger.length,
            "run_id": ledger.run_id,
            "torn": ledger.torn,
        },
        "software": dict(ledger.software),
    }
    if revision == 1:
        content = {name: value for name, value in content.items() if name not in _SINCE_2}
        content |= {"cross_check": "none", "cross_check_reason": _FIRST_REASON}
    return content, whole, spent


def checked_audit(audit: object, upper: float, delta: float) -> dict[str, object]:
    """Returns an audit's facts; ValueError if one is missing or wrong, or the lower bound exceeds the claim.

    Epsilon falls as delta grows, so a lower bound at a smaller delta than the claim's contradicts nothing.
    """
    if not isinstance(audit, Mapping) or set(audit) != {"method", "epsilon_lower", "confidence", "delta"}:
        raise ValueError(f"an audit must hold method, epsilon_lower, confidence and delta, not {audit!r}")
    lower = _checks.nonnegative(epsilon_lower=audit["epsilon_lower"])
    at = _checks.probability(open_interval=True, delta=audit["delta"])
    if lower > upper and at >= delta:
        raise ValueError(
            f"the audit by {audit['method']!r} shows that epsilon is at least {lower:g}, but the ledger supports "
            f"{upper:g}: the run did not do what its ledger says, or the audit is wrong"
        )
    return {
        "method": _checks.text(method=audit["method"]),
        "epsilon_lower": lower,
        "confidence": _checks.probability(open_interval=True, confidence=audit["confidence"]),
        "delta": at,
    }


@functools.lru_cache(maxsize=64)
def _second(phases: tuple[Phase, ...], delta: float, neighboring: str) -> CrossCheck:
    """What a second engine says; a run asks several times for the same plan."""
    return cross_check(phases, delta, neighboring)


def _ends(bound: Bound) -> dict[str, object]:
    return {"lower": number_to_json(bound.lower), "upper": number_to_json(bound.upper)}


def _assumptions(plan: Plan, revision: int) -> tuple[str, ...]:
    moving = (words.MOVING_CLIP,) if plan.clipping == "adaptive" else ()
    half = (words.HALF_PRECISION,) if plan.details.get("dtype") == "bfloat16" and revision > 1 else ()
    sweep = (words.PART_OF_SWEEP,) if plan.details.get("part_of_sweep") is True and revision > 1 else ()
    files = _declared_public(plan) if revision > 2 else ()
    public = (words.DECLARED_PUBLIC.format(files=", ".join(files)),) if files else ()
    return (*words.ASSUMPTIONS, *moving, *half, *sweep, *public)


def _declared_public(plan: Plan) -> tuple[str, ...]:
    """The files that the plan says were read as public: for the basis, the head's start, the scale of rows."""
    basis = plan.basis
    named = [plan.details.get("warm_start"), plan.details.get("precondition")]
    if basis["access"] != "non_private":
        named += [basis.get("source"), basis.get("candidates")]
    return tuple(dict.fromkeys(name for name in named if isinstance(name, str) and name not in ("", "weight")))


def _mechanism(plan: Plan) -> dict[str, object]:
    return {
        "type": event_to_json(plan.train.event)["type"],
        "noise_multiplier": plan.noise_multiplier,
        "sampling_prob": plan.sampling_prob,
        "steps": plan.steps,
        "l2_clip_norm": number_to_json(plan.l2_clip_norm),
        "noise_std": plan.noise_std,
        "expected_batch_size": plan.expected_batch_size,
        "clipping": plan.clipping,
    }


def _tool(bound: Bound) -> dict[str, object]:
    version = importlib.metadata.version("dp-accounting")
    return {"tool": "dp-accounting", "version": version, "method": bound.method, "epsilon": _ends(bound)}


def _noise_on_weights(plan: Plan) -> dict[str, object] | None:
    """R-only beside the methods that multiply noise, if the plan tells the shapes of the target weights."""
    try:
        rows = noise.comparison_for(plan)
    except (TypeError, ValueError):  # shapes that somebody else wrote otherwise
        return None
    if not rows:
        return None
    kept = ("method", "energy", "ratio_to_r_only", "dimension", "bytes_released")
    found = [{name: _six_digits(row.to_json()[name]) for name in kept} for row in rows]
    return {"note": words.NOISE_NOTE, "methods": found}


def _six_digits(value: object) -> object:
    """Rounds a float, so that the last digit of another machine's arithmetic makes no difference."""
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
