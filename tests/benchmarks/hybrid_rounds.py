"""Whether the hybrid's release is worth making in two rounds: a wide one that narrows the frame, then one inside it.

    python tests/benchmarks/hybrid_rounds.py --data-dir DIR --out DIR --set banking77 --targets top2

One round is the library's: cores of width K = 6r, turned and cut to r. Two rounds share the same budget (each has the
noise of two releases at half of it): the first turns the frame and cuts it to K1 of 2r or 3r, the second releases cores
of width K1 in there, each row bounded anew, and cuts to r. The figure is `basis_settings.py`'s: the share of the energy
of test rows' mean gradient that the basis holds; rounds "none" are gradients of public rows, of 512 private ones (leak)
and of the judging rows (test, and test-clipped as AUTO-S sums them) alone. **It is a measurement and claims no
epsilon.** Prints a Markdown table and writes `hybrid_rounds.csv` into a folder of --out, one for each set and head;
gradients and sums are kept there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import torch
from basis_settings import noise_of
from basis_sums import (
    AUTOMATIC,
    Bench,
    Look,
    Tensors,
    add_bench_options,
    add_recorded,
    clipped_sums,
    mechanism_of,
    noisy,
    read_bench,
    say,
)
from utility import EPSILONS

from dpsb.adapter import Provenance
from dpsb.basis.choose import gradient_basis, held_energy
from dpsb.basis.hybrid import TIMES_RANK, Frames, frames_of, sketches_of, turn, turned
from dpsb.basis.per_example import Batch, zeros_for
from dpsb.probe import without_dropout

SHARES = (0.02, 0.1)
PUBLIC = Provenance(kind="public", access="public")
NARROW = (2, 3)
"""Width of the second round's frame, times the rank."""


def narrowed(cores: Tensors, frames: Mapping[str, Frames], noise_std: float, width: int) -> dict[str, Frames]:
    """The frame that a first release leaves: its directions, and what the public set predicts along each."""
    values = {name: frame.values.double() for name, frame in frames.items()}
    kept = turn(cores, values, noise_std, dict.fromkeys(frames, width))
    found = {}
    for name, (left, right) in kept.items():
        frame = frames[name]
        along = (left.T @ torch.diag(values[name]) @ right).diagonal().abs()
        found[name] = Frames(frame.left @ left.float(), along.float(), frame.right @ right.float())
    return found


def sums_in(bench: Bench, frames: Mapping[str, Frames], records: Sequence[Batch]) -> Tensors:
    """The clipped sum of all rows' cores in a frame."""
    sketches = sketches_of(frames, bench.inputs.model)
    totals = zeros_for(bench.layers, sketches, torch.device("cpu"))
    for record in records:
        add_recorded(bench, record, sketches, mechanism_of(AUTOMATIC, 1.0), totals)
    return totals


def energies(
    bench: Bench, frames: Mapping[str, Frames], totals: Tensors, records: Sequence[Batch], judge: Tensors, given: Any
) -> dict[str, list[float]]:
    """Energy held after one round and after two, by draw of the noise."""
    share, epsilon = given
    ranks = dict.fromkeys(bench.layers, bench.rank)
    one, two = noise_of(share, epsilon), noise_of(share, epsilon, releases=2)
    found: dict[str, list[float]] = {}
    for draw in range(bench.draws):
        generator = torch.Generator().manual_seed(draw)
        kept = turned(noisy(totals, one, generator), frames, one, ranks)
        found.setdefault("one round", []).append(held_energy(kept, judge))
        first = noisy(totals, two, generator)
        for times in NARROW:
            inner = narrowed(first, frames, two, times * bench.rank)
            kept = turned(noisy(sums_in(bench, inner, records), two, generator), inner, two, ranks)
            found.setdefault(f"two, {times}r", []).append(held_energy(kept, judge))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_bench_options(parser, draws=5)
    options = parser.parse_args()
    if options.draws < 2:
        parser.error(f"argument --draws: expected at least 2, for a standard deviation, got {options.draws}")
    bench, gradients = read_bench(options)
    rows: list[dict[str, Any]] = []
    with without_dropout(bench.inputs.model):
        width = TIMES_RANK * bench.rank
        frames = {source: frames_of(bench.layers, width, gradients[source]) for source in ("near", "far")}
        looks = {
            f"{source}-{TIMES_RANK}-automatic": Look(sketches_of(found, bench.inputs.model), AUTOMATIC)
            for source, found in frames.items()
        }
        for source, gradient in gradients.items():
            energy = held_energy(gradient_basis(bench.inputs.model, gradient, PUBLIC).factors, gradients["test"])
            say(f"{source} alone: {energy:.4f}")
            rows.append({**bench.facts, "frames": source, "rounds": "none", "energy": energy, "draws": 1})
        totals, records = clipped_sums(bench, looks, True)
        for source in frames:
            for share in SHARES:
                for epsilon in EPSILONS:
                    sums = totals[f"{source}-{TIMES_RANK}-automatic"]
                    found = energies(bench, frames[source], sums, records, gradients["test"], (share, epsilon))
                    for rounds, values in found.items():
                        facts = {"frames": source, "share": share, "epsilon": epsilon, "rounds": rounds}
                        spread = {"energy": statistics.fmean(values), "deviation": statistics.stdev(values)}
                        rows.append({**bench.facts, **facts, **spread, "draws": len(values)})
                        say(f"{facts}: {spread['energy']:.4f} +- {spread['deviation']:.4f}")
    names = list(rows[-1])
    filled = [{name: row.get(name) for name in names} for row in rows]
    pcsv.write_csv(pa.Table.from_pylist(filled), bench.out / "hybrid_rounds.csv")
    print("| frames | share | epsilon | rounds | energy held, % |\n|---|---|---|---|---|")
    for row in rows:
        spread = f" ± {100 * row['deviation']:.1f}" if "deviation" in row else ""
        share, epsilon = row.get("share", "–"), row.get("epsilon", "–")
        print(f"| {row['frames']} | {share} | {epsilon} | {row['rounds']} | {100 * row['energy']:.1f}{spread} |")


if __name__ == "__main__":
    main()
