"""How fast is the accountant? Ratios to peers within one run; prints JSON.

    python tests/benchmarks/accountant_speed.py            # about five minutes on two quiet cores
    python tests/benchmarks/accountant_speed.py --only ledger,import

* epsilon, calibration: `dpsb_accounting` beside dp-accounting's PLD accountant as it comes, Opacus' PRV and RDP
  accountants and prv-accountant, one after the other on every setting. Processor time of this process, the least of
  `--repetitions`, caches of ours emptied before each. What fails is named; who took over a minute for a call is not
  asked again.
* ledger: a chain of 10^6 charges is made, then verified and accounted in a process of its own; its peak memory is read.
* live: what showing the epsilon spent adds to a whole training run, per step.
* import: `import dpsb_accounting` in a fresh process, the least of five.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "2")

SETTINGS = {  # noise multiplier, sampling probability, steps, delta
    "sigma 1, q 0.01, T 1e3, delta 1e-5": (1.0, 0.01, 1_000, 1e-5),
    "sigma 0.8, q 1e-3, T 1e4, delta 1e-5": (0.8, 1e-3, 10_000, 1e-5),
    "sigma 2, q 1e-3, T 1e5, delta 1e-6": (2.0, 1e-3, 100_000, 1e-6),
    "sigma 1, q 0.01, T 1e5, delta 1e-5": (1.0, 0.01, 100_000, 1e-5),
    "sigma 4, q 0.1, T 1e4, delta 1e-5": (4.0, 0.1, 10_000, 1e-5),
}
TARGETS = {  # target epsilon, sampling probability, steps, delta
    "epsilon 1, q 0.01, T 1e3, delta 1e-5": (1.0, 0.01, 1_000, 1e-5),
    "epsilon 8, q 0.01, T 1e3, delta 1e-5": (8.0, 0.01, 1_000, 1e-5),
    "epsilon 3, q 1e-3, T 2e4, delta 1e-6": (3.0, 1e-3, 20_000, 1e-6),
    "epsilon 0.1, q 0.01, T 1e3, delta 1e-6": (0.1, 0.01, 1_000, 1e-6),
}
LONGEST = 60.0  # seconds a call, after which a peer is left out
CHARGES = 1_000_000

Peer = Callable[[float, float, int, float], float]


def ours(noise: float, prob: float, steps: int, delta: float) -> float:
    """Upper end of our bounds."""
    import dpsb_accounting as accounting

    _forget()
    return accounting.epsilon(
        [(accounting.PoissonGaussian(noise_multiplier=noise, sampling_prob=prob), steps)], delta
    ).upper


def our_noise(target: float, prob: float, steps: int, delta: float) -> float:
    """Our calibrated noise multiplier."""
    import dpsb_accounting as accounting

    _forget()
    return accounting.noise_multiplier_for(target_epsilon=target, delta=delta, sampling_prob=prob, steps=steps)


def _forget() -> None:
    """Empties every cache of the package, so that a repetition computes again."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dpsb_accounting"):
            for value in list(vars(module).values()):
                clear = getattr(value, "cache_clear", None)
                if clear is not None:
                    clear()


def google_pld(noise: float, prob: float, steps: int, delta: float) -> float:
    """dp-accounting's PLD accountant with its default mesh."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    event = SelfComposedDpEvent(PoissonSampledDpEvent(prob, GaussianDpEvent(noise)), steps)
    return float(PLDAccountant().compose(event).get_epsilon(delta))


def google_noise(target: float, prob: float, steps: int, delta: float) -> float:
    """dp-accounting's calibration of its PLD accountant, to 1e-3."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.mechanism_calibration import ExplicitBracketInterval, calibrate_dp_mechanism
    from dp_accounting.pld import PLDAccountant

    def event(noise: float) -> Any:
        return SelfComposedDpEvent(PoissonSampledDpEvent(prob, GaussianDpEvent(noise)), steps)

    bracket = ExplicitBracketInterval(0.4, 20.0)
    return float(calibrate_dp_mechanism(PLDAccountant, event, target, delta, bracket, tol=1e-3))


def opacus(kind: str, noise: float, prob: float, steps: int, delta: float) -> float:
    """One of Opacus' accountants."""
    from opacus.accountants import create_accountant

    accountant = create_accountant(mechanism=kind)
    accountant.history = [(noise, prob, steps)]
    return float(accountant.get_epsilon(delta=delta))


def opacus_noise(kind: str, target: float, prob: float, steps: int, delta: float) -> float:
    """Opacus' calibration of the same, to 1e-3 of epsilon."""
    from opacus.accountants.utils import get_noise_multiplier

    return float(
        get_noise_multiplier(
            target_epsilon=target,
            target_delta=delta,
            sample_rate=prob,
            steps=steps,
            accountant=kind,
            epsilon_tolerance=1e-3 * target,
        )
    )


def microsoft_prv(noise: float, prob: float, steps: int, delta: float) -> float:
    """Upper end of prv-accountant's answer with an error of 0.01, as its documentation has it."""
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    mechanism = PoissonSubsampledGaussianMechanism(noise_multiplier=noise, sampling_probability=prob)
    accountant = PRVAccountant(
        prvs=[mechanism], max_self_compositions=[steps], eps_error=0.01, delta_error=delta / 1000
    )
    return float(accountant.compute_epsilon(delta=delta, num_self_compositions=[steps])[2])


EPSILON: dict[str, Peer] = {
    "dpsb": ours,
    "dp-accounting PLD": google_pld,
    "Opacus PRV": functools.partial(opacus, "prv"),
    "Opacus RDP": functools.partial(opacus, "rdp"),
    "prv-accountant": microsoft_prv,
}
CALIBRATION: dict[str, Peer] = {
    "dpsb": our_noise,
    "dp-accounting PLD": google_noise,
    "Opacus PRV": functools.partial(opacus_noise, "prv"),
    "Opacus RDP": functools.partial(opacus_noise, "rdp"),
}


def compared(peers: dict[str, Peer], questions: dict[str, tuple[Any, ...]], repetitions: int) -> dict[str, Any]:
    """Seconds and answers of every peer on every question, and the ratio to ours."""
    left_out: dict[str, str] = {}
    found: dict[str, Any] = {}
    for peer in peers.values():  # imports are not timed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                peer(1.0, 0.01, 10, 1e-5)
            except Exception as error:  # noqa: BLE001 shown when it is timed
                print(f"{error}", file=sys.stderr)
    for question, values in questions.items():
        rows: dict[str, Any] = {}
        for name, peer in peers.items():
            if name in left_out:
                continue
            try:
                seconds, answer = timed(peer, values, repetitions)
            except Exception as error:  # noqa: BLE001 what a peer cannot do is a result
                rows[name] = {"fails": f"{type(error).__name__}: {error}"[:120]}
                continue
            rows[name] = {"seconds": round(seconds, 4), "answer": float(f"{answer:.6g}")}
            if seconds > LONGEST:
                left_out[name] = f"took {seconds:.0f} s on {question}"
        own = rows["dpsb"].get("seconds", math.nan)
        for name, row in rows.items():
            if name != "dpsb" and "seconds" in row:
                row["times ours"] = float(f"{row['seconds'] / own:.3g}")
        found[question] = rows
        print(question, rows, file=sys.stderr, flush=True)
    return {**found, "left_out": left_out}


def timed(peer: Peer, values: tuple[Any, ...], repetitions: int) -> tuple[float, float]:
    """Least processor time of some calls, fewer if they are long; and the answer."""
    best, answer = math.inf, math.nan
    for _ in range(repetitions):
        gc.collect()
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = peer(*values)
        best = min(best, time.process_time() - started)
        if best > 5:
            break
    return best, answer


def ledger() -> dict[str, Any]:
    """Makes a ledger of a million charges, then reads, verifies and accounts it elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        started = time.perf_counter()
        _make_ledger(path)
        made = time.perf_counter() - started
        done = subprocess.run(
            [sys.executable, "-c", _ACCOUNT, str(path)], capture_output=True, text=True, check=False, env=os.environ
        )
        if done.returncode:
            return {"fails": done.stderr[-500:]}
        return {
            "lines": CHARGES + 1,
            "bytes": path.stat().st_size,
            "made_in_s": round(made, 1),
            **json.loads(done.stdout),
        }


_ACCOUNT = """
import json, resource, sys, time
wall, cpu = time.perf_counter(), time.process_time()
from dpsb_accounting import Ledger, epsilon, make_report, spent, verify
path = sys.argv[1]
outcome = verify(path)
verified = time.process_time() - cpu
assert not [check for check in outcome.failures if check.name in ("chain", "ledger", "schema")], outcome.failures
record = Ledger.read(path)
bounds = epsilon(record), spent(record)
print(json.dumps({
    "verify_cpu_s": round(verified, 2),
    "cpu_s": round(time.process_time() - cpu, 2),
    "wall_s": round(time.perf_counter() - wall, 2),
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    "epsilon": [bounds[0].lower, bounds[0].upper],
    "charged": record.charged("train"),
}))
"""


def _make_ledger(path: Path) -> None:
    """The lines that the writer would write, without its fsync for each."""
    from dpsb_accounting import Phase, Plan, PoissonGaussian
    from dpsb_accounting.chain import SCHEMA, Chain

    step = PoissonGaussian(noise_multiplier=2.0, sampling_prob=1e-3)
    plan = Plan(
        phases=(Phase("train", step, CHARGES),),
        delta=1e-6,
        target_epsilon=8.0,
        neighboring="add_or_remove_one",
        num_examples=200_000,
        num_examples_declared=True,
        expected_batch_size=200,
        sampling_prob=1e-3,
        l2_clip_norm=1.0,
        clipping="flat",
        basis={"kind": "weight_svd", "access": "data_free"},
        details={},
    )
    chain = Chain()
    content = {
        "schema": SCHEMA,
        "run_id": "0" * 32,
        "created_utc": "2026-01-01T00:00:00+00:00",
        "software": {},
        "plan": plan.to_json(),
    }
    with path.open("wb") as file:
        line = chain.next_line("plan", content)
        chain.append(line)
        file.write(line)
        for _ in range(CHARGES):
            line = chain.charge_line(plan.phase("train"))
            chain.append(line)
            file.write(line)


def live() -> dict[str, Any]:
    """Processor seconds of the epsilon shown during training, spread over its steps (the display computes 20 marks)."""
    import dpsb_accounting as accounting

    ours(1.0, 0.01, 10, 1e-5)  # imports are not counted: the plan was calibrated with them
    found = {}
    for name, (noise, prob, steps) in {
        "demo: 48 steps": (1.0, 0.0423, 48),
        "1000 steps": (1.0, 0.01, 1_000),
        "20000 steps": (0.8, 1e-3, 20_000),
    }.items():
        step = accounting.PoissonGaussian(noise_multiplier=noise, sampling_prob=prob)
        _forget()
        started = time.process_time()
        for mark in range(1, 21):
            accounting.epsilon([(step, -(-steps * mark // 20))], 1e-5, "zero_out")
        total = time.process_time() - started
        found[name] = {"cpu_s": round(total, 3), "ms_per_step": float(f"{1000 * total / steps:.3g}")}
    return found


def imports() -> dict[str, Any]:
    """Seconds of `import dpsb_accounting`, without starting Python."""
    code = (
        "import time; w, c = time.perf_counter(), time.process_time(); import dpsb_accounting; "
        "print(time.perf_counter() - w, time.process_time() - c)"
    )
    times = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append([float(word) for word in done.stdout.split()])
    return {"wall_s": round(min(w for w, _ in times), 3), "cpu_s": round(min(c for _, c in times), 3)}


def machine() -> dict[str, Any]:
    """What a timing means nothing without."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "python": sys.version.split()[0]}
    found["load_average"] = [round(load, 1) for load in os.getloadavg()]
    for name in ("dpsb", "dp-accounting", "prv-accountant", "opacus", "numpy", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    """Runs what was asked for and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", default="import,live,epsilon,calibration,ledger", help="which parts, with commas")
    given = parser.parse_args()
    parts: dict[str, Callable[[], Any]] = {
        "import": imports,
        "live": live,
        "epsilon": lambda: compared(EPSILON, SETTINGS, given.repetitions),
        "calibration": lambda: compared(CALIBRATION, TARGETS, given.repetitions),
        "ledger": ledger,
    }
    found = {name: parts[name]() for name in given.only.split(",")}
    json.dump({"machine": machine(), **found}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
