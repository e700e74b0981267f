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

from dpsb.adapter import Provenance, lora_layers
from dpsb.basis import random, weight_svd
from dpsb.basis.choose import gradient_basis
from dpsb.basis.gradient import mean_gradients
from dpsb.basis.row_norms import row_norms
from dpsb.basis.sources import batches_of
from dpsb.data import Collator, Columns, read_table, tokenize_classification
from dpsb.losses import classification_loss
from dpsb.models import add_lora, load_base
from dpsb.probe import without_dropout


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
    model.eval()
    bases = {"random": random(model).factors, "weight": weight_svd(model).factors, "public": near.factors}
    judged = batches_of(second, collate, options.max_length, 2048)
    with without_dropout(model):
        lengths = row_norms(model, classification_loss, judged, lora_layers(model), list(bases.values()))
    head = torch.zeros(()) if lengths.head is None else lengths.head
    for name, share, cores in zip(bases, lengths.head_shares(), lengths.cores.T, strict=True):
        row_norm = (head.square() + cores.square()).sqrt().median().item()
        print(json.dumps({"basis": name, "head_share": share, "row_norm": row_norm}))


if __name__ == "__main__":
    main()
