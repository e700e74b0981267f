"""The accountant against every other engine on a grid: do they overlap, and how tight are the bounds?

Noise multipliers {0.5, 0.8, 1, 2, 4, 10} x sampling probabilities {1e-4, 1e-3, 1e-2, 0.1, 1} x steps {1, 10, 1e3, 1e4,
1e5} x deltas {1e-5, 1e-6, 1e-9}, add_or_remove_one. Every answer becomes a line of a CSV file as soon as it is there; a
second run goes on where the first one stopped. Each engine gets 30 seconds and 2 GB for an answer, in a process of its
own; over that, or where it refuses, the line says so and why.

    nice -n 19 python tests/benchmarks/accountant_grid.py --out grid.csv      # hours; may be interrupted
    python tests/benchmarks/accountant_grid.py --out grid.csv --summary       # only the summary, as JSON
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

NOISE = (0.5, 0.8, 1.0, 2.0, 4.0, 10.0)
PROBS = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
STEPS = (1, 10, 1_000, 10_000, 100_000)
DELTAS = (1e-5, 1e-6, 1e-9)
ENGINES = ("dpsb", "quadrature", "rdp", "gdp_clt", "prv")
SECONDS = 30
MEMORY = 2 << 30
_IMPORTS = 10  # seconds that a fresh process may need before it starts
TOLERANCE = 1e-6  # of epsilon, by which two intervals may miss each other: quadrature's own is 1e-6
FIELDS = (
    "noise_multiplier",
    "sampling_prob",
    "steps",
    "delta",
    "engine",
    "lower",
    "upper",
    "rigorous",
    "seconds",
    "note",
)


class Row(NamedTuple):
    """One question."""

    noise_multiplier: float
    sampling_prob: float
    steps: int
    delta: float


def grid() -> list[Row]:
    """All 450 questions, in a fixed random order, so that the first ones are a fair sample."""
    rows = [Row(*values) for values in itertools.product(NOISE, PROBS, STEPS, DELTAS)]
    return random.Random(0).sample(rows, len(rows))


def ask(row: Row, engine: str) -> tuple[float, float, bool, str]:
    """Lower end, upper end, whether they are bounds, and how; raises where the engine has no answer."""
    from dpsb_accounting import PoissonGaussian, engines
    from dpsb_accounting.composition import Composition
    from dpsb_accounting.engines import clt, prv, quadrature, rdp

    event = PoissonGaussian(noise_multiplier=row.noise_multiplier, sampling_prob=row.sampling_prob)
    composition, relation = Composition.of([(event, row.steps)]), "add_or_remove_one"
    if engine == "dpsb":
        low, high, method = engines.epsilon(composition, row.delta, relation)
        return low, high, True, method
    if engine == "rdp":
        return 0.0, rdp.epsilon(composition, row.delta, relation), True, "best Renyi order"
    if engine == "prv":
        answer = prv.epsilon(composition, row.delta, relation, prv.MOST_CELLS)
    else:
        answer = {"quadrature": quadrature, "gdp_clt": clt}[engine].epsilon(composition, row.delta, relation)
    return answer.lower, answer.upper, answer.rigorous, answer.method


def _work(channel: Connection) -> None:
    """Answers questions until the channel closes; its memory is limited beyond what the imports took."""
    import dp_accounting
    import prv_accountant  # noqa: F401

    dp_accounting.get_epsilon_gaussian(1.0, 0.1)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    while True:
        try:
            row, engine = channel.recv()
        except EOFError:
            return
        started = time.process_time()
        try:
            low, high, rigorous, note = ask(row, engine)
        except Exception as error:  # noqa: BLE001 whatever goes wrong is the answer
            low, high, rigorous, note = math.nan, math.nan, False, f"unavailable: {error or type(error).__name__}"
        channel.send((low, high, rigorous, time.process_time() - started, note))


class Worker:
    """A process that answers with one engine, and is replaced when it takes too long or dies."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._channel: Connection | None = None

    def answer(self, row: Row, engine: str) -> tuple[float, float, bool, float, str]:
        """What `ask` says, within the limits."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._channel, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self._channel.send((row, engine))
        note, spent = f"unavailable: more than {SECONDS} s", _processor_seconds(self._process.pid)
        try:
            # Processor time, since other programs may keep the machine busy.
            while _processor_seconds(self._process.pid) - spent <= SECONDS + _IMPORTS:
                if self._channel.poll(0.2):
                    found = self._channel.recv()
                    if found[3] <= SECONDS:
                        return found
                    return math.nan, math.nan, False, found[3], note
        except EOFError:
            note = "unavailable: its process died"
        self.stop()
        return math.nan, math.nan, False, float(SECONDS), note

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _processor_seconds(process: int) -> float:
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read(path: Path) -> dict[tuple[Row, str], dict[str, Any]]:
    """The lines that are there already."""
    found: dict[tuple[Row, str], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                row = Row(*(float(line[name]) for name in FIELDS[:2]), int(line["steps"]), float(line["delta"]))
                numbers = {name: float(line[name]) for name in ("lower", "upper", "seconds")}
                found[row, line["engine"]] = {**line, **numbers, "rigorous": line["rigorous"] == "True"}
    return found


def measure(path: Path, engines: Iterable[str], most_rows: int) -> None:
    """Asks what was not asked yet, row by row, and appends each answer."""
    done, workers = read(path), {engine: Worker() for engine in engines}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        for row in grid()[:most_rows]:
            for engine, worker in workers.items():
                if (row, engine) not in done:
                    low, high, rigorous, seconds, note = worker.answer(row, engine)
                    writer.writerow((*row, engine, repr(low), repr(high), rigorous, f"{seconds:.3f}", note))
                    file.flush()
    for worker in workers.values():
        worker.stop()


def summary(lines: dict[tuple[Row, str], dict[str, Any]]) -> dict[str, Any]:
    """What the file shows: answers and times per engine, overlaps, gaps, and how far off the estimates are."""
    by_row: dict[Row, dict[str, dict[str, Any]]] = defaultdict(dict)
    for (row, engine), line in lines.items():
        by_row[row][engine] = line
    rigorous = [
        (row, one, other)
        for row, found in by_row.items()
        for one, other in itertools.combinations(sorted(found), 2)
        if all(_answered(found[name]) and name != "gdp_clt" for name in (one, other))
    ]
    apart = [(row, one, other) for row, one, other in rigorous if not _overlap(by_row[row][one], by_row[row][other])]
    return {
        "rows": len(by_row),
        "engines": {engine: _engine(engine, by_row) for engine in ENGINES},
        "pairs_compared": len(rigorous),
        "pairs_apart": [[*row, one, other] for row, one, other in apart],
        "gap": _gaps(by_row),
        "full_batch": _full_batch(by_row),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _answered(line: dict[str, Any]) -> bool:
    return not math.isnan(line["upper"])


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    slack = 1e-9 + TOLERANCE * min(one["upper"], other["upper"])
    return one["lower"] <= other["upper"] + slack and other["lower"] <= one["upper"] + slack


def _engine(name: str, by_row: dict[Row, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    lines = [found[name] for found in by_row.values() if name in found]
    times = sorted(line["seconds"] for line in lines if _answered(line))
    reasons: dict[str, int] = defaultdict(int)
    for line in lines:
        if not _answered(line):
            reasons[_kind(line["note"])] += 1
    # Against the quadrature, where both answer: how far above (or below) it the upper end lies, relatively.
    over = sorted(_over(name, by_row))
    return {
        "asked": len(lines),
        "answered": len(times),
        "unavailable": dict(reasons),
        "seconds": {"median": _at(times, 0.5), "p95": _at(times, 0.95), "max": _at(times, 1)},
        "upper_over_quadrature": {
            "min": _at(over, 0),
            "median": _at(over, 0.5),
            "p95": _at(over, 0.95),
            "max": _at(over, 1),
        },
        "below_quadrature": sum(value < -TOLERANCE for value in over),
        "compared": len(over),
    }


def _over(name: str, by_row: dict[Row, dict[str, dict[str, Any]]]) -> Iterator[float]:
    for found in by_row.values():
        line, reference = found.get(name), found.get("quadrature")
        if line and reference and _answered(line) and _answered(reference) and 0.05 <= reference["upper"] <= 20:
            yield line["upper"] / reference["lower"] - 1


def _kind(note: str) -> str:
    """A reason without its numbers, so that equal ones can be counted."""
    return "".join(letter for letter in note.removeprefix("unavailable: ") if not letter.isdigit())[:80]


def _gaps(by_row: dict[Row, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Upper minus lower of the default, where 0.05 <= epsilon <= 20: at most 1 % of epsilon or 0.005."""
    inside, wide = [], []
    for row, found in by_row.items():
        line = found.get("dpsb")
        if line and _answered(line) and 0.05 <= line["upper"] <= 20:
            gap = line["upper"] - line["lower"]
            inside.append(gap / line["upper"])
            if gap > max(0.01 * line["upper"], 0.005):
                wide.append([*row, line["lower"], line["upper"], line["note"]])
    inside.sort()
    return {
        "rows": len(inside),
        "median": _at(inside, 0.5),
        "p95": _at(inside, 0.95),
        "max": _at(inside, 1),
        "wider": wide,
    }


def _full_batch(by_row: dict[Row, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Sampling probability 1 against the exact Gaussian, found by bisection with 40 digits."""
    off = []
    for row, found in by_row.items():
        line = found.get("dpsb")
        if row.sampling_prob == 1 and line and _answered(line):
            exact = exact_gaussian(row.noise_multiplier / math.sqrt(row.steps), row.delta)
            off.append(max(abs(line[end] / exact - 1) for end in ("lower", "upper")) if exact else line["upper"])
    return {"rows": len(off), "largest_relative_error": max(off, default=None)}


def exact_gaussian(noise: float, delta: float) -> float:
    """Epsilon of one Gaussian of sensitivity 1 by its closed form (Balle and Wang 2018), by bisection in mpmath."""
    from mpmath import mp, mpf, ncdf

    with mp.workdps(40):
        sigma, goal = mpf(noise), mpf(delta)

        def excess(epsilon: Any) -> Any:
            half, shift = 1 / (2 * sigma), epsilon * sigma
            return ncdf(half - shift) - mp.exp(epsilon) * ncdf(-half - shift) - goal

        if excess(mpf(0)) <= 0:
            return 0.0
        low, high = mpf(0), mpf(1)
        while excess(high) > 0:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return float(high)


def _at(values: list[float], share: float) -> float | None:
    return float(f"{values[min(len(values) - 1, int(share * len(values)))]:.4g}") if values else None


def main() -> None:
    """Measures, then prints the summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("accountant_grid.csv"), help="the CSV file; gone on with")
    parser.add_argument("--rows", type=int, default=10_000, help="at most so many of the 450 rows")
    parser.add_argument("--engines", default=",".join(ENGINES), help="which, separated by commas")
    parser.add_argument("--summary", action="store_true", help="only summarize what is there")
    given = parser.parse_args()
    if not given.summary:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = "1"
        measure(given.out, given.engines.split(","), given.rows)
    json.dump(summary(read(given.out)), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
