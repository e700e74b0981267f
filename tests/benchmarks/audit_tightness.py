"""How much of the true epsilon the audits prove on an exact Gaussian mechanism, and how often they prove too much.

    python tests/benchmarks/audit_tightness.py

One JSON line for each epsilon and method: the mean bound over the trials, and over `--coverage` repetitions the share
of bounds that exceed the truth (at confidence 95 %, at most 5 % should). Canaries are independent, each put in by a
fair coin; the threshold is mu / 2 and the number of guesses the package's default, both fixed before any score.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from dpsb_accounting import auditing, gaussian
from dpsb_accounting.auditing import METHODS, CanaryScores, FixedThresholds


def scores(mu: float, count: int, source: np.random.Generator) -> CanaryScores:
    """Scores of canaries of one mechanism that is exactly mu-GDP."""
    coins = source.random(count) < 0.5
    return CanaryScores(source.normal(size=count) + mu * coins, coins)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=10_000)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--coverage", type=int, default=1000)
    parser.add_argument("--delta", type=float, default=1e-5)
    options = parser.parse_args()
    for epsilon in (1.0, 2.0, 4.0, 8.0):
        mu = 1 / gaussian.noise_multiplier(epsilon, options.delta)
        half = FixedThresholds((mu / 2,))
        for method in METHODS:
            source = np.random.default_rng(1)
            started = time.perf_counter()
            found = []
            for _ in range(max(options.trials, options.coverage)):
                one = scores(mu, options.canaries, source)
                found.append(auditing.audit(one, method, delta=options.delta, thresholds=half).epsilon)
            seconds = (time.perf_counter() - started) / len(found)
            trials = np.array(found[: options.trials])
            facts = {
                "epsilon": epsilon,
                "method": method,
                "mean": round(float(trials.mean()), 4),
                "std": round(float(trials.std(ddof=1)), 4),
                "share": round(float(trials.mean()) / epsilon, 4),
                "too much": round(float(np.mean(np.array(found) > epsilon)), 4),
                "repetitions": len(found),
                "seconds each": round(seconds, 4),
            }
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
