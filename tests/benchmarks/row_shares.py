"""How a row's squared norm is shared between head and cores where training starts, by basis: what a joint clip divides.

    python tests/benchmarks/row_shares.py --public near.parquet

Reads public rows only: the second half of the file's first 1,024 rows, where gradient bases are made from the first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from utility import TARGETS

from dpsb.adapter import Provenance, attach, detach
from dpsb.basis import random, weight_svd
from dpsb.basis.choose import gradient_basis
from dpsb.basis.gradient import mean_gradients
from dpsb.basis.sources import batches_of
from dpsb.capture import adapter_train_mode, per_example_gradients
from dpsb.data import Collator, Columns, read_table, tokenize_classification
from dpsb.losses import classification_loss
from dpsb.models import HEAD_NAMES, add_lora, in_head, load_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", type=Path, required=True, help="rows with text and label")
    parser.add_argument("--examples", type=int, default=256, help="rows for a basis, and as many for the shares")
    parser.add_argument("--max-length", type=int, default=48, help="default 48")
    options = parser.parse_args()
    table = read_table(str(options.public))
    labels = sorted({str(label) for label in table.column("label")})
    base, tokenizer = load_base("minilm", "classification", labels)
    collate = Collator(tokenizer.pad_token_id)
    rows = tokenize_classification(table, Columns(), tokenizer, labels, options.max_length)
    first, second = rows[: options.examples], rows[options.examples : 2 * options.examples]
    model = add_lora(base, "classification", 16, TARGETS["top2"].removeprefix("re:"))
    gradients = mean_gradients(model, classification_loss, batches_of(first, collate, options.max_length, 2048))
    near = gradient_basis(model, gradients, Provenance(kind="public", access="public"))
    for name, basis in (("random", random(model)), ("weight", weight_svd(model)), ("public", near)):
        adapter = attach(model, basis, allow=HEAD_NAMES)
        model.train()
        adapter_train_mode(adapter)
        heads = torch.cat([torch.full((p.numel(),), in_head(n)) for n, p in adapter.named_parameters()])
        head, whole = [], []
        for batch in batches_of(second, collate, options.max_length, 2048):
            with per_example_gradients(adapter, len(batch["labels"])) as captured:
                classification_loss(model, batch).sum().backward()
                squares = captured.get().double().square()
            head.append(squares[:, heads].sum(dim=1))
            whole.append(squares.sum(dim=1))
        share = torch.cat(head) / torch.cat(whole)
        facts = {
            "basis": name,
            "head_share": share.median().item(),
            "row_norm": torch.cat(whole).sqrt().median().item(),
        }
        print(json.dumps(facts))
        detach(adapter)


if __name__ == "__main__":
    main()
