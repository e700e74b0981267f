"""A ledger from its first line to an auditor's verdict, without torch: written, reported, verified, forged, caught.

    python examples/audit_a_ledger.py --out audited

A private mean of ages in ten noisy steps stands for a training run; the ledger, the report and the checks are those of
real ones. Ends with an error if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from dpsb_accounting import Ledger, Phase, Plan, PoissonGaussian, epsilon, make_report, noise_multiplier_for, verify

PEOPLE, STEPS, SAMPLING_PROB, DELTA = 1000, 10, 0.1, 1e-4


def plan(target_epsilon: float) -> Plan:
    """All that the run may do, made before any data is read."""
    noise = noise_multiplier_for(target_epsilon=target_epsilon, delta=DELTA, sampling_prob=SAMPLING_PROB, steps=STEPS)
    return Plan(
        phases=(Phase("train", PoissonGaussian(noise_multiplier=noise, sampling_prob=SAMPLING_PROB), STEPS),),
        delta=DELTA,
        target_epsilon=target_epsilon,
        neighboring="add_or_remove_one",
        num_examples=PEOPLE,
        num_examples_declared=True,
        expected_batch_size=int(PEOPLE * SAMPLING_PROB),
        sampling_prob=SAMPLING_PROB,
        l2_clip_norm=1.0,
        clipping="flat",
        basis={"kind": "none", "access": "data_free"},
        details={"task": "a mean of ages"},
    )


def write_run(out: Path, made: Plan) -> None:
    """Charges every step; a program that trains would draw and release after each charge."""
    out.mkdir(parents=True)
    with Ledger.create(out / "ledger.jsonl", made) as ledger:
        for _ in range(STEPS):
            ledger.charge("train")
    make_report(Ledger.read(out / "ledger.jsonl")).write(out / "report.json")


def check(fact: bool, what: str) -> None:
    """Ends the program if something does not hold."""
    print(f"{'ok' if fact else 'WRONG'}: {what}")
    if not fact:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    made = plan(target_epsilon=2.0)
    write_run(out / "run", made)
    bound = epsilon(made)
    check(1.99 < bound.lower <= bound.upper <= 2.0, f"epsilon in [{bound.lower:.4f}, {bound.upper:.4f}], never above 2")
    check(verify(out / "run" / "ledger.jsonl").ok, "ledger and report verify")

    for name, old, new in (
        ("cheaper", '"noise_multiplier":', '"noise_multiplier":9'),  # more noise than there was
        ("shorter", "", ""),  # the last charge dropped
    ):
        shutil.copytree(out / "run", out / name)
        ledger = out / name / "ledger.jsonl"
        lines = ledger.read_text().splitlines()
        lines = lines[:-1] if name == "shorter" else [line.replace(old, new) for line in lines]
        ledger.write_text("\n".join(lines) + "\n")
        failures = verify(ledger).failures
        check(bool(failures), f"a {name} ledger is caught: {'; '.join(failure.name for failure in failures)}")


if __name__ == "__main__":
    main()
