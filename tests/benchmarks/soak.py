"""Kills a run at random times, again and again, and holds its ledger against what it released.

A driver forks a worker, kills it with SIGKILL after a random number of charges, and forks the next, until the plan's
steps are charged. The worker trains a tiny model by ``fit`` with the ledger, the checkpoints and noise of any run; a
witness writes down every draw and every release as it happens. At the end:

* the ledger verifies, holds exactly the plan's T charges, none of them twice, in order;
* every release belongs to a charge that was on disk before its draw; no charge has two draws or two releases;
* the releases are those of the charges, but for at most one charge for each kill, which is spent and released nothing;
* no two releases have the same noise.

    python tests/benchmarks/soak.py --steps 10000 --charges 200
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import tempfile
import time
import traceback
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from dpsb import clipped_sums
from dpsb.adapter import attach
from dpsb.basis import random as random_basis
from dpsb.data import Collator, synthetic_examples
from dpsb.losses import classification_loss
from dpsb.mechanism import Mechanism
from dpsb.plan import make_plan
from dpsb.train import Knobs, fit
from dpsb_accounting import Ledger, verify

STEPS, CHECKPOINT_EVERY = 10_000, 25
BATCH, ROWS, LENGTH, VOCAB = 4, 40, 8, 30


def witness(path: Path, kind: str, number: int, digest: str = "") -> None:
    """One line, whole or not at all: written before anything else can happen."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{kind} {number} {digest}\n".encode())
    os.close(descriptor)


def work(folder: Path, steps: int) -> None:
    """Starts or resumes the run in ``folder``."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    base = BertForSequenceClassification(BertConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **shape))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["query", "value"], init_lora_weights=True)
    model = get_peft_model(base.requires_grad_(False), config)
    adapter = attach(model, random_basis(model))
    path, seen = folder / "ledger.jsonl", folder / "witness"
    plan = make_plan(
        epsilon=99.0,
        delta=1e-3,
        num_examples=ROWS,
        expected_batch_size=BATCH,
        steps=steps,
        noise_multiplier=5.0,
        basis=adapter.provenance.to_json(),
    )
    draw, release = clipped_sums.poisson_draw, Mechanism.release

    def drawn(*arguments):
        witness(seen, "draw", counted())
        return draw(*arguments)

    def released(self, total, randomness):
        found = release(self, total, randomness)
        witness(seen, "release", counted(), hashlib.sha256((found - total).numpy().tobytes()).hexdigest()[:32])
        return found

    clipped_sums.poisson_draw, Mechanism.release = drawn, released
    data = [{"input_ids": [3 + (i * k) % 20 for k in range(1, 3 + i % 5)], "labels": i % 2} for i in range(ROWS)]
    fresh = not path.exists() or not path.stat().st_size
    if fresh:
        path.unlink(missing_ok=True)
    with Ledger.create(path, plan) if fresh else Ledger.open(path) as ledger:

        def counted() -> int:
            return ledger.charged("train")

        fit(
            adapter,
            data,
            ledger=ledger,
            optimizer=torch.optim.SGD(adapter.parameters(), lr=1e-3),
            loss_fn=classification_loss,
            collate=Collator(0),
            synthetic=synthetic_examples("classification", VOCAB, 2, LENGTH),
            max_length=LENGTH,
            knobs=Knobs(checkpoint_every=CHECKPOINT_EVERY),
        )


def in_a_fork(folder: Path, steps: int) -> int:
    """The pid of a worker; a fork of this process, which has imported what takes long."""
    pid = os.fork()
    if pid == 0:
        try:
            work(folder, steps)
        except BaseException:  # noqa: BLE001 - a fork must not go on into its parent
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def written(folder: Path) -> int:
    """Lines of the ledger."""
    path = folder / "ledger.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def soak(folder: Path, steps: int, charges: int, seed: int = 0) -> dict[str, float]:
    """Runs and kills until the plan is spent; returns what happened. Raises AssertionError if anything is wrong."""
    torch.set_num_threads(1)
    source, kills, began = random.Random(seed), 0, time.perf_counter()
    while True:
        pid, status = in_a_fork(folder, steps), None
        last = written(folder) + source.randint(0, 2 * charges)  # a fifth and more die while they start
        early = time.perf_counter() + source.expovariate(0.5) if source.random() < 0.2 else None
        while status is None and written(folder) < last and (early is None or time.perf_counter() < early):
            time.sleep(0.002)
            done, found = os.waitpid(pid, os.WNOHANG)
            status = found if done else None
        time.sleep(source.uniform(0.0, 0.02))
        if status is None:
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            break
        assert code == -signal.SIGKILL, f"the worker ended with {code}"
        kills += 1
    return {**check(folder, steps, kills), "kills": kills, "seconds": round(time.perf_counter() - began, 1)}


def check(folder: Path, steps: int, kills: int) -> dict[str, float]:
    """Holds the ledger against what the witness saw."""
    record = Ledger.read(folder / "ledger.jsonl")
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    numbers = [line["number"] for line in lines if line["kind"] == "charge"]
    assert numbers == list(range(steps)), "T charges, each once, in order"
    assert record.charged("train") == steps
    assert verify(folder / "ledger.jsonl").ok
    events = [line.split() for line in (folder / "witness").read_text().splitlines()]
    draws = [int(event[1]) for event in events if event[0] == "draw"]
    releases = [int(event[1]) for event in events if event[0] == "release"]
    assert len(draws) == len(set(draws)), "no charge was drawn twice"
    assert len(releases) == len(set(releases)), "no charge was released twice"
    assert set(releases) <= set(draws) <= set(range(1, steps + 1)), "whatever was drawn or released was charged before"
    noises = [event[2] for event in events if event[0] == "release"]
    assert len(set(noises)) == len(noises), "no noise twice"
    assert steps - len(releases) <= kills, "at most one charge for each kill released nothing"
    return {"steps": steps, "releases": len(releases), "spent_without_release": steps - len(releases)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--charges", type=int, default=200, help="mean number of charges between two kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dpsb-soak-") as folder:
        print(json.dumps(soak(Path(folder), options.steps, options.charges, options.seed), indent=1))


if __name__ == "__main__":
    main()
