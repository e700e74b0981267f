"""Runs the demo and its baselines several times and records the figures that `dpsb demo` shows next to a run.

    python examples/record_baselines.py --runs 3

Writes dpsb/mail/baselines.json: mean and standard deviation of the test accuracy. The settings are those of
dpsb/demo.py; they were chosen on the validation split (docs/benchmarks/demo.md says how), and the test split is used
only here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dpsb.demo import FROZEN_SETTINGS, SETTINGS, frozen_features_baseline, non_private_baseline, run_demo

TARGET = Path(__file__).parent.parent / "dpsb" / "mail" / "baselines.json"


def private_run() -> float:
    """Test accuracy of one run of the demo itself."""
    with tempfile.TemporaryDirectory() as scratch:
        return run_demo(Path(scratch) / "run").held_out["accuracy"]


def measured(label: str, epsilon: str, run: Callable[[], float], runs: int) -> dict[str, object]:
    start = time.monotonic()
    values = [run() for _ in range(runs)]
    print(f"{label}: {values} ({time.monotonic() - start:.0f} s)", flush=True)
    spread = statistics.stdev(values) if runs > 1 else 0.0
    return {
        "label": label,
        "epsilon": epsilon,
        "mean": statistics.mean(values),
        "std": spread,
        "runs": runs,
        "values": values,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="repetitions of every method")
    runs = parser.parse_args().runs
    methods = {
        "r_only": measured("R-only, private", "3", private_run, runs),
        "frozen_features": measured("frozen features, logistic regression", "3", frozen_features_baseline, runs),
        "non_private": measured("R-only, not private", "inf", non_private_baseline, runs),
    }
    content = {"settings": {"r_only": dict(SETTINGS), "frozen_features": dict(FROZEN_SETTINGS)}, "methods": methods}
    TARGET.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
