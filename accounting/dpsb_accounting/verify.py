"""Verification: recompute everything a report says from its ledger, trusting neither."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpsb_accounting import strict
from dpsb_accounting.bound import Bound
from dpsb_accounting.chain import LedgerError
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.ledger import Ledger
from dpsb_accounting.positions import Check, check_files
from dpsb_accounting.record import LedgerRecord, in_use
from dpsb_accounting.report import REVISION, SCHEMA, report_content
from dpsb_accounting.signature import SIGNATURE_NAME, SignatureError, check_signature
from dpsb_accounting.stated import compare

__all__ = ["REPORT_NAME", "Check", "Verification", "verify"]

REPORT_NAME = "report.json"
_GOING_ON = (
    "a run is writing this ledger now, so it is not final: steps and taints may follow, and a report of it would be "
    "behind; verify again when the run has ended"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The outcome of `verify`.

    Args:
        ledger: The ledger file.
        report: The report file that was compared; None if there was none beside the ledger.
        checks: Everything that was checked, in order.
        epsilon: The bounds recomputed from the ledger; None if the ledger could not be read.
        claim: Whether the ledger supports a claim: it was read, has no taint, and epsilon is finite.
    """

    ledger: Path
    report: Path | None
    checks: tuple[Check, ...]
    epsilon: Bound | None
    claim: bool = False

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.ok)

    def to_json(self) -> dict[str, object]:
        """Returns the outcome as a JSON object."""
        checks = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in self.checks]
        report = None if self.report is None else str(self.report)
        return {"ok": self.ok, "claim": self.claim, "ledger": str(self.ledger), "report": report, "checks": checks}


def verify(
    ledger_path: str | os.PathLike[str],
    report_path: str | os.PathLike[str] | None = None,
    *,
    public_key: str | os.PathLike[str] | None = None,
    signature_path: str | os.PathLike[str] | None = None,
) -> Verification:
    """Verifies a ledger, and what lies beside it, by recomputing every number from the ledger.

    Guarantees: a report is confirmed only if its epsilon is at least the upper bound recomputed (but for a relative
    1e-6), every other key is what `make_report` gives for this ledger now under the revision that the report states,
    and no key occurs twice. A ledger is refused if it is shorter than, or differs from, what the report, a checkpoint
    or a tensor file beside it saw, or if a run is still writing it. Only the values of held-out metrics and of audits,
    which no ledger knows, and the accounting tool's version and mesh, which may be others now, are taken as they are
    stated; the lower bound and the second engine's ends may differ as little as engines do.

    Args:
        ledger_path: The ledger, JSON lines.
        report_path: The report, JSON. Left out, it is report.json beside the ledger, if there is one.
        public_key: The signer's ed25519 key, PEM; with it there must be a valid signature.
        signature_path: The signature. Left out, it is signature.json beside the ledger.

    Returns:
        Each check with what was found; nothing is raised for a bad file.
    """
    ledger_path = Path(ledger_path)
    beside = ledger_path.parent / REPORT_NAME
    report: Path | None = Path(report_path) if report_path is not None else (beside if beside.exists() else None)
    signature = Path(signature_path) if signature_path is not None else ledger_path.parent / SIGNATURE_NAME
    checks: list[Check] = []
    epsilon, claim = None, False
    try:
        if in_use(ledger_path):
            checks.append(Check("run has ended", False, _GOING_ON))
        record = Ledger.read(ledger_path)
        checks += _check_ledger(record)
        checks += check_files(record)
        stated = None if report is None else _load(report)
        content, epsilon, _ = report_content(record, REVISION if stated is None else _revision(stated))
        claim = content["claim"] is True
        if stated is None or report is None:
            checks.append(Check("report", True, f"there is no {REPORT_NAME} to compare; the ledger alone was verified"))
        else:
            checks.append(Check("report", True, f"{report.name} has schema {SCHEMA}, revision {_revision(stated)}"))
            checks += compare(record, stated, content)
        if public_key is not None:
            checks += check_signature(record, stated, public_key, signature)
        elif signature.exists() or signature_path is not None:
            detail = "there is one, not checked: name the signer's public key with --check-signature"
            checks.append(Check("signature", signature.exists(), detail if signature.exists() else "there is none"))
    except LedgerError as error:
        checks.append(Check("ledger", False, str(error)))
    except ResourceLimit as error:
        checks.append(Check("epsilon", False, f"cannot be recomputed: {error}"))
    except SignatureError as error:
        checks.append(Check("signature", False, str(error)))
    except strict.StrictError as error:
        checks.append(Check("report", False, str(error)))
    except (ValueError, ArithmeticError, TypeError, MemoryError) as error:  # numbers that no engine can compute with
        checks.append(Check("epsilon", False, f"cannot be recomputed ({type(error).__name__}: {error})"))
    return Verification(ledger=ledger_path, report=report, checks=tuple(checks), epsilon=epsilon, claim=claim)


def _check_ledger(record: LedgerRecord) -> list[Check]:
    """What holds of a ledger that was read: its reader has checked every line against the plan."""
    charged = ", ".join(f"{record.charged(phase.name)} of {phase.count} {phase.name}" for phase in record.plan.phases)
    detail = f"{record.length} lines, chain and plan hold, charged: {charged}; head {record.head[:16]}"
    checks = [Check("ledger", True, detail)]
    if record.torn:
        detail = "the last line is unfinished, as a crash leaves it; it is counted as a charged step"
        checks.append(Check("last line", True, detail))
    if record.repairs:
        detail = f"{record.repairs} times a line that a crash left unfinished was dropped when the run went on"
        checks.append(Check("repairs", True, detail))
    return checks


def _load(path: Path) -> Mapping[str, object]:
    data = strict.load(path)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise strict.StrictError(f"{path} must have schema {SCHEMA!r}, not {found!r}")
    if type(data.get("revision", 1)) is not int or not 1 <= _revision(data) <= REVISION:
        raise strict.StrictError(f"{path} must have a revision up to {REVISION}, not {data.get('revision')!r}")
    return data


def _revision(stated: Mapping[str, object]) -> int:
    revision = stated.get("revision", 1)
    return revision if isinstance(revision, int) else 0
