"""What carrying a federation costs beside its training: the mail example, in one process and through Flower's engine.

    python tests/benchmarks/federated_overhead.py --rounds 60 --json

In both engines the silos train in this process, one at a time, so that the time between the end of the first round's
training and the end of the last's is training, or what it costs to carry messages, write ledgers and checkpoints, and
wait. Overhead = that time / the time inside the silos' private steps - 1: of one run, so that a load on the machine is
in both. What comes before (imports, probes, Flower's start) and after (report) is left out. The processor time of this
process and its children, Flower's among them, is measured around the whole run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpsb.federated.config import read_federation
from dpsb.federated.simulate import ENGINES, simulate
from dpsb.federated.trainer import Trainer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "federated_mail" / "fed.toml"
_SUBREAPER = 36


@contextmanager
def stamped() -> Iterator[list[tuple[float, float]]]:
    """When each silo's private steps of a round began and ended."""
    stamps: list[tuple[float, float]] = []
    steps = Trainer._private_steps

    def timed(self: Trainer, *arguments: Any) -> None:
        began = time.perf_counter()
        steps(self, *arguments)
        stamps.append((began, time.perf_counter()))

    Trainer._private_steps = timed  # type: ignore[method-assign]
    try:
        yield stamps
    finally:
        Trainer._private_steps = steps  # type: ignore[method-assign]


def processor_seconds() -> float:
    """Of this process and of those children, also adopted ones, that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(engine: str, rounds: int, config_file: Path) -> dict[str, Any]:
    """One federation of the example with so many rounds."""
    with tempfile.TemporaryDirectory(prefix="dpsb-overhead-") as scratch, stamped() as stamps:
        config = read_federation(config_file, str(Path(scratch) / "fed"))
        config = replace(config, federation=replace(config.federation, rounds=rounds))
        began, used = time.perf_counter(), processor_seconds()
        simulate(config, engine=engine)
        whole, used = time.perf_counter() - began, processor_seconds() - used
    silos = len(config.silos)
    if len(stamps) != silos * rounds:
        raise RuntimeError(f"{len(stamps)} rounds of silos, not {silos} x {rounds}.")
    later = stamps[silos:]
    training = sum(end - start for start, end in later)
    carried = later[-1][1] - stamps[silos - 1][1]
    return {
        "engine": engine,
        "rounds": rounds,
        "silos": silos,
        "local_steps": config.federation.local_steps,
        "training_seconds": round(training, 1),
        "seconds_of_rounds": round(carried, 1),
        "overhead": round(carried / training - 1, 4),
        "overhead_per_round_seconds": round((carried - training) / (rounds - 1), 3),
        "whole_run_seconds": round(whole, 1),
        "processor_seconds": round(used, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=EXAMPLE, help="federation to run (default: the mail example)")
    parser.add_argument("--rounds", type=int, default=60, help="aggregations; 60 are about 10 minutes on 2 cores")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its default")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)  # what Flower starts and leaves is waited for here, and counted
    for engine in options.engines.split(","):
        found = measure(engine, options.rounds, options.config)
        print(json.dumps(found) if options.json else "  ".join(f"{k} {v}" for k, v in found.items()), flush=True)


if __name__ == "__main__":
    main()
