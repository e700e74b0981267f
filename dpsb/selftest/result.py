"""What a self-test found: one line per check, with the figure that was measured and the limit it was held against."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

ERROR_RATE = 1e-6
"""Probability with which a statistical check fails a correct implementation. The others cannot fail one."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check.

    Args:
      name: Stable name, such as ``"remove_one"``.
      passed: Whether it held; None if the step gives no means to tell.
      figure: What was measured; None where there is no number.
      limit: What it was held against, such as ``"<= 1"``.
      detail: What it means, in a sentence.
    """

    name: str
    passed: bool | None
    figure: float | None
    limit: str
    detail: str

    def to_json(self) -> dict[str, object]:
        figure = self.figure if self.figure is None or math.isfinite(self.figure) else str(self.figure)
        return {
            "name": self.name,
            "passed": self.passed,
            "figure": figure,
            "limit": self.limit,
            "detail": self.detail,
        }


@dataclass(frozen=True)
class SelfTest:
    """All checks of one self-test.

    Args:
      subject: What was tested.
      checks: In the order in which they ran.
      tainted: Whether private examples were used: figures and messages are then sensitive, for the operator's screen.
    """

    subject: str
    checks: tuple[Check, ...]
    tainted: bool = False

    @property
    def ok(self) -> bool:
        """Whether no check failed. Checks that could not be made do not count as failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.passed is False)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_json(self) -> dict[str, object]:
        """The result for a report.

        Raises:
          ValueError: If it is tainted: there is no report of a self-test on private examples.
        """
        if self.tainted:
            raise ValueError("A self-test on private examples writes no report: its figures depend on them.")
        content = {
            "subject": self.subject,
            "passed": self.ok,
            "false_alarm_rate": ERROR_RATE * len(self.checks),
            "checks": [check.to_json() for check in self.checks],
        }
        result: dict[str, object] = json.loads(json.dumps(content))
        return result


def at_most(name: str, figure: float, limit: float, detail: str) -> Check:
    """A check that a measured number does not exceed a limit; NaN exceeds everything."""
    return Check(name=name, passed=figure <= limit, figure=figure, limit=f"<= {limit:.4g}", detail=detail)


def not_tested(name: str, detail: str) -> Check:
    return Check(name=name, passed=None, figure=None, limit="", detail=detail)
