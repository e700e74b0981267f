"""A private loop of one's own, with the evaluation one likes between the steps; nothing is wrapped.

    python examples/plain_loop.py --out run
    accelerate launch --num_processes 1 --cpu examples/plain_loop.py --out run

Trains a tiny random Llama on random tokens, so that it runs anywhere in seconds: put your model and examples in.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import dpsb
from dpsb.basis import weight_svd
from dpsb.data import Collator, synthetic_examples
from dpsb.models import add_lora
from dpsb_accounting import Ledger, make_report

VOCAB, LONGEST = 50, 16


def texts(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Random token sequences; every token counts in the loss."""
    source = random.Random(seed)
    rows = [[source.randrange(3, VOCAB) for _ in range(source.randint(3, LONGEST))] for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    device = Accelerator().device  # nothing goes through prepare(): model and optimizer stay what they are
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **size)), "causal-lm", rank=4).to(device)
    private, held_out, collate = texts(400, 1), texts(40, 2), Collator(0, device)
    out.mkdir(parents=True)

    adapter = dpsb.attach(model, weight_svd(model))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=0.0)
    plan = dpsb.make_plan(epsilon=8, delta=1e-4, num_examples=400, expected_batch_size=50, steps=6)
    with Ledger.create(out / "ledger.jsonl", plan) as ledger:
        for progress, _ in dpsb.private_steps(
            adapter,
            private,
            ledger=ledger,
            optimizer=optimizer,
            loss_fn=dpsb.causal_lm_loss,
            collate=collate,
            synthetic=synthetic_examples("causal-lm", VOCAB, 0, LONGEST),
            max_length=LONGEST,
        ):
            model.eval()
            with torch.no_grad():
                loss = float(dpsb.causal_lm_loss(model, collate(held_out, LONGEST)).mean())
            print(f"step {progress.step}/{progress.steps}, held-out loss {loss:.3f}")

    model.save_pretrained(out)
    report = make_report(ledger)
    report.write(out / "report.json")
    print(report.content["statement"])


if __name__ == "__main__":
    main()
