"""A sweep's summary for machines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dpsb.curves import words
from dpsb.curves.sweep import Curve
from dpsb.curves.table import FAILED

FILES = ("curve.html", "curve.png", "curve.svg", "curve.csv", "curve.parquet", "summary.csv", "curve.json")


def summary(curve: Curve, out: Path) -> dict[str, Any]:
    """One JSON object: points, composed epsilon, findings, failures; infinite numbers are the text "inf"."""
    points = [
        {
            name: "inf" if isinstance(value, float) and math.isinf(value) else value
            for name, value in vars(point).items()
        }
        for point in curve.points
    ]
    return {
        "out": str(out),
        "metric": curve.metric,
        "points": points,
        "findings": words.findings(curve),
        "tuning": words.tuning(curve),
        "composed": curve.price.to_json(),
        "held_out": words.OUTSIDE,
        "cells": len(curve.rows),
        "failed": [{"folder": row.folder, "reason": FAILED} for row in curve.failures],
        "files": list(FILES),
    }
