"""Settings of the paid bases: how much of the private data's mean gradient the basis of each holds.

    python tests/benchmarks/basis_settings.py --data-dir DIR --out DIR --set banking77 --targets top2 --iterate
    python tests/benchmarks/basis_settings.py --data-dir DIR --out DIR --set qnli5k --targets all --rows 1500

The figure is sum_l ||P_l g_l||^2 / sum_l ||g_l||^2, where g is the mean gradient of *test* rows, which no basis saw,
at the start of training with the head that a run draws (--warm-head: with the one of `--warm-start` on the near rows);
for a few rows also the mean of test rows as clipped in training (`judged_by`). Mean and standard deviation over draws
of the noise.
**It is a measurement and claims no epsilon**: it reads the private rows as often as it likes, charges nothing and takes
its noise from a seeded generator. The bases are made by the very functions that a run calls (`hybrid`, `private`,
`gradient_basis`), from clipped sums by `add_clipped_sum`, with the noise that `basis_noise_multiplier` names.

hybrid     frames from 512 near public rows, 512 far ones and the weights; five widths K; six shares; epsilon 1, 3, 8;
           `kept` is `turn` for the library's rule, `plain` for the SVD of the same noisy cores without it. Shares and
           widths are varied one at a time around the defaults; with --full each width has each share.
private    whole gradients; with --iterate also noisy subspace iteration of one and two rounds, and two rounds whose
           releases read a Poisson draw of half or a quarter of the rows each. With --only-iterate nothing else.
reference  the public bases alone, the weights, the leak (raw gradient of 512 private rows, epsilon infinite), and what
           the judging gradient would choose itself (`test`), which is the most that any basis of this rank holds.

A clipped sum depends neither on noise nor on share, so there is one forward and backward pass over the private rows:
what each weight received and the gradient of what it returned is passed on to every sum. Sums, gradients and rows are
kept in --out, so that a second start goes on. Writes `basis_settings.csv` with the rows of every set in --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv as pcsv
import torch
from basis_sums import (
    AUTOMATIC,
    DELTA,
    Bench,
    Look,
    Sums,
    Tensors,
    add_bench_options,
    add_recorded,
    clipped_sums,
    mechanism_of,
    median_norms,
    read_bench,
    say,
)
from utility import EPSILONS

from dpsb.adapter import Factors, Provenance
from dpsb.basis import weight_svd
from dpsb.basis.budget import basis_noise_multiplier, default_share
from dpsb.basis.choose import gradient_basis, held_energy
from dpsb.basis.hybrid import TIMES_RANK, Frames, frames_of, hybrid, hybrid_provenance, sketches_of
from dpsb.basis.per_example import WHOLE, Batch, Sketch, zeros_for
from dpsb.basis.private import factors_of, private, private_provenance, releases_for
from dpsb.basis.release import Clip
from dpsb.probe import without_dropout

TIMES = (2, 3, 4, 6, 8)
SHARES = {"hybrid": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2), "private": (0.05, 0.1, 0.2, 0.4)}
SAMPLED = (0.5, 0.25)
"""Of subspace iteration: the probability with which a release reads a row, besides 1."""
NO_NOISE = 1e-9
"""Noise multiplier of the rows that say what a setting would hold without noise."""
_PUBLIC = Provenance(kind="public", access="public")


class Judge(NamedTuple):
    """A gradient of test rows: their `mean`, or that of rows `clipped` to one length as AUTO-S training sums them."""

    name: str
    gradient: Tensors

    def held(self, factors: Mapping[str, Factors]) -> float:
        return held_energy(factors, self.gradient)


def measured(
    bench: Bench, name: str, judge: Judge, facts: dict[str, Any], make: Callable[[int], list[dict[str, Any]]]
) -> None:
    """Rows of one setting, from a file or made: the figures of all draws by what is kept, averaged."""
    file = bench.out / "rows" / f"{name}-{judge.name}.json"
    if file.exists():
        return
    found: dict[str, list[float]] = {}
    for draw in range(1 if facts["noise_multiplier"] in (0.0, NO_NOISE) else bench.draws):
        for one in make(draw):
            found.setdefault(one["kept"], []).append(one["energy"])
    rows = [
        {
            **bench.facts,
            **facts,
            "judged_by": judge.name,
            "kept": kept,
            "energy": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
            "draws": len(values),
        }
        for kept, values in found.items()
    ]
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(rows))
    say(f"{name}: " + ", ".join(f"{row['kept']} {row['energy']:.4f}" for row in rows))


def noise_of(share: float | None, epsilon: str, releases: int = 1, sampling_prob: float = 1.0) -> float:
    if share is None:
        return NO_NOISE
    return basis_noise_multiplier(
        epsilon=float(epsilon), delta=DELTA, share=share, releases=releases, sampling_prob=sampling_prob
    )


def measure_hybrid(
    bench: Bench, source: str, frames: Mapping[str, Frames], clip: Clip, totals: Tensors, judge: Judge, given: Any
) -> None:
    """The library's turned basis and the plain SVD of the same noisy cores, at one share and epsilon."""
    (share, epsilon), width = given, next(iter(frames.values())).values.numel()
    mechanism = mechanism_of(clip, noise_of(share, epsilon))
    provenance = hybrid_provenance(clip, width, {})
    ranks = dict.fromkeys(bench.layers, bench.rank)

    def make(draw: int) -> list[dict[str, Any]]:
        sums = Sums(
            model=bench.inputs.model,
            layers=bench.layers,
            mechanism=mechanism,
            clean=lambda *_: totals,
            generator=torch.Generator().manual_seed(draw),
        )
        turned = hybrid(sums, provenance, frames).factors
        inner = factors_of(dict(sums.released), ranks)
        plain = {n: Factors(A=f.A @ frames[n].right.T, B=frames[n].left @ f.B) for n, f in inner.items()}
        return [{"kept": kept, "energy": judge.held(factors)} for kept, factors in (("turn", turned), ("plain", plain))]

    facts = {"basis": "hybrid", "frames": source, "times_rank": width / bench.rank, "clipping": clip.clipping}
    facts |= {"clip_norm": clip.l2_clip_norm, "share": share, "epsilon": epsilon if share else "no noise"}
    name = f"hybrid-{source}-{width}-{clip.clipping}-{clip.l2_clip_norm:.4g}-{share}-{epsilon}"
    measured(bench, name, judge, facts | {"noise_multiplier": mechanism.noise_multiplier}, make)


def measure_private(
    bench: Bench,
    rounds: int,
    clean: Callable[..., Tensors],
    judge: Judge,
    given: tuple[float | None, str],
    sampling_prob: float = 1.0,
) -> None:
    share, epsilon = given
    mechanism = mechanism_of(AUTOMATIC, noise_of(share, epsilon, releases_for(rounds), sampling_prob))
    provenance = private_provenance(AUTOMATIC, rounds)

    def make(draw: int) -> list[dict[str, Any]]:
        sums = Sums(
            model=bench.inputs.model,
            layers=bench.layers,
            mechanism=mechanism,
            clean=clean,
            generator=torch.Generator().manual_seed(draw),
        )
        return [{"kept": "SVD", "energy": judge.held(private(sums, provenance).factors)}]

    facts = {"basis": "private", "rounds": rounds, "clipping": "automatic", "clip_norm": 1.0, "share": share}
    facts |= {"epsilon": epsilon if share else "no noise", "noise_multiplier": mechanism.noise_multiplier}
    name = f"private-{rounds}-{share}-{epsilon}" + (f"-q{sampling_prob:g}" if sampling_prob < 1 else "")
    measured(bench, name, judge, facts | {"sampling_prob": sampling_prob}, make)


def iterate(bench: Bench, records: Sequence[Batch], judge: Judge) -> None:
    """Subspace iteration over the records: three shares at epsilon 3, the default share at the others, and draws."""

    first: Tensors = {}
    chance = torch.Generator().manual_seed(0)

    def clean(sketches: Mapping[str, Sketch], is_first: bool, sampling_prob: float = 1.0) -> Tensors:
        is_first = is_first and sampling_prob == 1.0
        if is_first and first:  # of G V with V from the weights: no noise yet
            return dict(first)
        totals = zeros_for(bench.layers, sketches, torch.device("cpu"))
        for record in records:
            drawn = torch.rand(len(next(iter(record.values()))), generator=chance) < sampling_prob
            rows = record if sampling_prob == 1.0 else {name: value[drawn] for name, value in record.items()}
            if drawn.any():
                add_recorded(bench, rows, sketches, mechanism_of(AUTOMATIC, 1.0), totals)
        if is_first:
            first.update(totals)
        return totals

    settings: list[tuple[float | None, str]] = [(default_share("private", float(e)), e) for e in EPSILONS]
    settings += [(share, "3") for share in SHARES["private"][:3]] + [(None, "3")]
    for given in dict.fromkeys(settings):
        for rounds in (1, 2):
            measure_private(bench, rounds, clean, judge, given)
    for given in settings[: len(EPSILONS)]:
        for prob in SAMPLED:
            measure_private(bench, 2, partial(clean, sampling_prob=prob), judge, given, prob)


def looks_of(
    bench: Bench, gradients: Mapping[str, Tensors]
) -> tuple[dict[str, dict[int, dict[str, Frames]]], dict[str, Look]]:
    """Frames by source and times the rank, and what is summed for them; a narrower frame is the start of the widest."""
    frames: dict[str, dict[int, dict[str, Frames]]] = {}
    for source in ("near", "far", "weight"):
        widest = frames_of(bench.layers, max(TIMES) * bench.rank, gradients.get(source))
        frames[source] = {
            t: {
                n: Frames(f.left[:, : t * bench.rank], f.values[: t * bench.rank], f.right[:, : t * bench.rank])
                for n, f in widest.items()
            }
            for t in TIMES
        }
    sketches = {(s, t): sketches_of(f, bench.inputs.model) for s, by in frames.items() for t, f in by.items()}
    medians = median_norms(bench, {source: sketches[source, TIMES_RANK] for source in frames})
    say("median lengths of a near row's cores: " + json.dumps(medians))
    looks = {f"{source}-{t}-automatic": Look(sketches[source, t], AUTOMATIC) for source, t in sketches}
    for source, median in medians.items():
        for name, norm in (("one", 1.0), ("median", median)):
            clip = Clip(l2_clip_norm=norm, clipping="flat", share=0.0)
            looks[f"{source}-{TIMES_RANK}-{name}"] = Look(sketches[source, TIMES_RANK], clip)
    return frames, {**looks, "whole": Look(dict.fromkeys(bench.layers, WHOLE), AUTOMATIC)}


def measure_references(bench: Bench, gradients: Mapping[str, Tensors], judge: Judge) -> None:
    model = bench.inputs.model
    bases = {name: gradient_basis(model, gradient, _PUBLIC) for name, gradient in gradients.items()}
    for name, basis in {**bases, "weight": weight_svd(model)}.items():
        facts = {"basis": "reference", "frames": name, "noise_multiplier": 0.0}
        measured(
            bench,
            f"reference-{name}",
            judge,
            facts,
            lambda _draw, basis=basis: [{"kept": "SVD", "energy": judge.held(basis.factors)}],
        )


def run(bench: Bench, gradients: Mapping[str, Tensors], options: argparse.Namespace) -> None:
    mean, clipped = Judge("mean", gradients["test"]), Judge("clipped", gradients["test-clipped"])
    if options.only_iterate:
        iterate(bench, clipped_sums(bench, {}, True)[1], mean)
        return
    frames, looks = looks_of(bench, gradients)
    totals, records = clipped_sums(bench, looks, options.iterate)
    by_kind = {kind: [(share, e) for share in SHARES[kind] for e in EPSILONS] for kind in SHARES}
    few = {kind: [*((default_share(kind, float(e)), e) for e in EPSILONS), (None, "3")] for kind in SHARES}
    for judge in (mean, clipped):
        measure_references(bench, gradients, judge)
        for name, look in looks.items():
            source, _, rest = name.partition("-")
            times, _, clip = rest.partition("-")
            is_default = clip == "automatic" and int(times) == TIMES_RANK
            if source == "whole" or (judge is clipped and not is_default):
                continue
            has_each = judge is mean and (is_default or (options.full and clip == "automatic"))
            for given in [*(by_kind["hybrid"] if has_each else []), *few["hybrid"]]:
                measure_hybrid(bench, source, frames[source][int(times)], look.clip, totals[name], judge, given)
        for given in [*(by_kind["private"] if judge is mean else []), *few["private"]]:
            measure_private(bench, 0, lambda *_: totals["whole"], judge, given)
    if options.iterate:
        iterate(bench, records, mean)


def rows_in(out: Path) -> list[dict[str, Any]]:
    """The rows of every set below a folder, with six digits after the point."""
    columns = (
        "set,targets,rows,head,basis,frames,times_rank,clipping,clip_norm,rounds,sampling_prob,share,epsilon,noise_multiplier,"
        "judged_by"
    )
    names = [*columns.split(","), "kept", "energy", "deviation", "draws"]
    found = [row for file in sorted(out.glob("*/rows/*.json")) for row in json.loads(file.read_text())]
    values = ({name: row.get(name) for name in names} for row in found)
    return [{name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()} for row in values]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a line for every setting: energy held in percent, with its standard deviation."""
    names = ["set", "targets", "head", "basis", "frames", "times_rank", "clipping", "clip_norm", "rounds"]
    names += ["sampling_prob", "share", "epsilon", "judged_by"]
    lines = ["| " + " | ".join([*names, "kept", "energy held, %"]) + " |", "|" + "---|" * (len(names) + 2)]
    for row in rows:
        said = [
            f"{row[n]:.4g}" if isinstance(row[n], float) else "–" if row[n] is None else str(row[n])
            for n in [*names, "kept"]
        ]
        spread = f" ± {100 * row['deviation']:.2f}" if row["deviation"] is not None else ""
        lines.append("| " + " | ".join([*said, f"{100 * row['energy']:.2f}{spread}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_bench_options(parser, draws=10)
    parser.add_argument("--full", action="store_true", help="each width with each share")
    parser.add_argument("--iterate", action="store_true", help="also subspace iteration; keeps a pass in memory")
    parser.add_argument("--only-iterate", action="store_true", help="subspace iteration alone")
    options = parser.parse_args()
    bench, gradients = read_bench(options)
    with without_dropout(bench.inputs.model):
        run(bench, gradients, options)
    rows = rows_in(options.out)
    pcsv.write_csv(pa.Table.from_pylist(rows), options.out / "basis_settings.csv")
    print(table(rows))


if __name__ == "__main__":
    main()
