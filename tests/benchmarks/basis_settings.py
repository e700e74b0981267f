"""Settings of the paid bases: how much of the private data's mean gradient the basis of each holds.

    python tests/benchmarks/basis_settings.py --data-dir DIR --out DIR --set banking77 --targets top2 --iterate
    python tests/benchmarks/basis_settings.py --data-dir DIR --out DIR --set qnli5k --targets all --rows 1500

The figure is sum_l ||P_l g_l||^2 / sum_l ||g_l||^2, where g is the mean gradient of *test* rows, which no basis saw,
at the start of training with the head that a run draws; for a few rows also the mean of test rows as clipped in
training (`judged_by`). Mean and standard deviation over draws of the noise.
**It is a measurement and claims no epsilon**: it reads the private rows as often as it likes, charges nothing and takes
its noise from a seeded generator. The bases are made by the very functions that a run calls (`hybrid`, `private`,
`gradient_basis`), from clipped sums by `add_clipped_sum`, with the noise that `basis_noise_multiplier` names.

hybrid     frames from 512 near public rows, 512 far ones and the weights; five widths K; six shares; epsilon 1, 3, 8;
           `kept` is `turn` for the library's rule, `plain` for the SVD of the same noisy cores without it. Shares and
           widths are varied one at a time around the defaults; with --full each width has each share.
private    whole gradients; with --iterate also noisy subspace iteration of one and two rounds.
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
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from utility import EPSILONS, ROWS, TARGETS, TASKS, write_parts

from dpsb.adapter import Factors, Provenance, lora_layers
from dpsb.basis import weight_svd
from dpsb.basis.budget import basis_noise_multiplier, default_share
from dpsb.basis.choose import gradient_basis, held_energy
from dpsb.basis.gradient import mean_gradients
from dpsb.basis.hybrid import TIMES_RANK, Frames, frames_of, hybrid, hybrid_provenance, sketches_of
from dpsb.basis.per_example import WHOLE, Batch, Sketch, add_clipped_sum, example_norms, watched, zeros_for
from dpsb.basis.private import factors_of, private, private_provenance, releases_for
from dpsb.basis.release import Clip
from dpsb.basis.sources import EXAMPLES, public_gradients, public_sample
from dpsb.config import RunConfig
from dpsb.data import Table, read_table, tokenize_classification
from dpsb.inputs import Inputs, read_inputs
from dpsb.mechanism import Mechanism
from dpsb.prepare import columns_of
from dpsb.probe import Example, without_dropout
from dpsb.sampling import length_buckets, microbatches, padded_lengths

DELTA = 1e-5
TIMES = (2, 3, 4, 6, 8)
SHARES = {"hybrid": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2), "private": (0.05, 0.1, 0.2, 0.4)}
NO_NOISE = 1e-9
"""Noise multiplier of the rows that say what a setting would hold without noise."""
AUTOMATIC = Clip(l2_clip_norm=1.0, clipping="automatic", share=0.0)
_PUBLIC = Provenance(kind="public", access="public")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Stands where the private examples stand in a release: known clipped sums, and seeded noise. Charges nothing."""

    model: nn.Module
    layers: Mapping[str, Any]
    mechanism: Mechanism
    clean: Callable[[Mapping[str, Sketch], bool], Tensors]
    generator: torch.Generator
    released: Tensors = field(default_factory=dict)

    def release(self, sketches: Mapping[str, Sketch]) -> Tensors:
        clean = self.clean(sketches, not self.released)
        self.released.clear()
        for name, total in clean.items():
            noise = torch.randn(total.shape, generator=self.generator, dtype=torch.float64)
            self.released[name] = total + self.mechanism.noise_std * noise
        return dict(self.released)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One data set and model: what bases are made from and judged by."""

    inputs: Inputs
    layers: Mapping[str, Any]
    out: Path
    facts: dict[str, Any]
    draws: int

    @property
    def rank(self) -> int:
        return self.inputs.config.rank

    def kept(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """Tensors from a file, made first if they are not there."""
        file = self.out / f"{name}.safetensors"
        if not file.exists():
            say(f"making {file.name}")
            save_file({key: value.cpu().contiguous() for key, value in make().items()}, file)
        return load_file(file)

    def batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """Microbatches padded as a run pads them."""
        lengths = padded_lengths(examples, length_buckets(self.inputs.prepared.max_length))
        for positions, length in microbatches(np.arange(len(examples)), lengths, self.inputs.config.token_budget):
            yield self.inputs.collate([examples[i] for i in positions], length)


class Judge(NamedTuple):
    """A gradient of test rows: their `mean`, or that of rows `clipped` to one length as AUTO-S training sums them."""

    name: str
    gradient: Tensors

    def held(self, factors: Mapping[str, Factors]) -> float:
        return held_energy(factors, self.gradient)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def read_bench(options: argparse.Namespace) -> tuple[Bench, dict[str, Tensors]]:
    """The set as `utility.py` cuts it, and gradients: near, far, leak and test, this one also of clipped rows."""
    task = TASKS[options.set]
    out = options.out / f"{options.set}-{options.targets}-{options.rows}"
    parts = write_parts(task, options.data_dir, out / "data", options.rows)
    labels = sorted(set(pq.read_table(parts["private"])["label"].to_pylist()))
    config = RunConfig(
        model="minilm",
        data=str(parts["private"]),
        out=str(out),
        basis=f"public:{parts['near']},{parts['far']}",
        labels=",".join(labels),
        epsilon=3.0,
        delta=DELTA,
        steps=40,
        max_length=task.max_length,
        targets=TARGETS[options.targets],
        rank=options.rank,
        token_budget=2048,
    )
    inputs = read_inputs(config, warm=False)
    inputs.model.eval()
    facts = {"set": options.set, "targets": options.targets, "rows": len(inputs.prepared.examples)}
    bench = Bench(inputs=inputs, layers=lora_layers(inputs.model), out=out, facts=facts, draws=options.draws)
    return bench, gradients_of(bench, config, read_table(str(parts["test"])))


def gradients_of(bench: Bench, config: RunConfig, test: Table) -> dict[str, Tensors]:
    inputs, prepared = bench.inputs, bench.inputs.prepared
    rest = (inputs.collate, prepared.max_length, config.token_budget, config.head_init_std)

    def mean(examples: Sequence[Example]) -> Tensors:
        return mean_gradients(inputs.model, inputs.loss_fn, bench.batches(examples))

    held_out = tokenize_classification(test, columns_of(config), inputs.tokenizer, prepared.labels, prepared.max_length)

    def clipped() -> Tensors:
        whole = dict.fromkeys(bench.layers, WHOLE)
        totals = zeros_for(bench.layers, whole, torch.device("cpu"))
        for batch in bench.batches(held_out):
            mechanism = mechanism_of(AUTOMATIC, 1.0)
            add_clipped_sum(inputs.model, inputs.loss_fn, batch, bench.layers, whole, mechanism, totals)
        return {name: (total / len(held_out)).float() for name, total in totals.items()}

    found = {"test": bench.kept("gradient-test", lambda: mean(held_out))}
    found["test-clipped"] = bench.kept("gradient-test-clipped", clipped)
    found["leak"] = bench.kept("gradient-leak", lambda: mean(public_sample(prepared.examples, EXAMPLES)))
    for name, entry in zip(("near", "far"), prepared.public, strict=True):
        say(f"{name}: {entry.note}")
        found[name] = bench.kept(
            f"gradient-{name}", lambda entry=entry: public_gradients(inputs.model, inputs.loss_fn, entry, *rest)
        )
    return found


# --- the sums


def recorded(bench: Bench, batch: Batch) -> Batch:
    """What each target weight received of a microbatch, and the gradient of what it returned."""
    found: Tensors = {}

    def on_pair(name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        found[f"{name} x"], found[f"{name} g"] = x, g

    with watched(bench.layers, bench.inputs.model, len(next(iter(batch.values())))) as watch:
        watch.on_pair = on_pair
        bench.inputs.loss_fn(bench.inputs.model, batch).sum().backward()
        watch.finish()
    return found


class _Replay(torch.autograd.Function):
    """A loss of 0 for each example, whose gradient in ``output`` is the recorded one."""

    @staticmethod
    def forward(context: Any, output: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(g)
        return output.new_zeros(len(output))

    @staticmethod
    def backward(context: Any, *_g: Any) -> Any:
        return context.saved_tensors[0], None


@contextmanager
def silent(layers: Mapping[str, Any]) -> Iterator[None]:
    """The frozen weights answer with zeros meanwhile: a replay needs only who received what."""
    bases = [layer.get_base_layer() for layer in layers.values()]
    for base in bases:
        base.forward = lambda x, width=base.out_features: x.new_zeros(()).expand(*x.shape[:-1], width)
    try:
        yield
    finally:
        for base in bases:
            del base.forward


def replayed(bench: Bench) -> Callable[[nn.Module, Batch], torch.Tensor]:
    """A loss whose gradients in every target weight's output are the recorded ones."""

    def loss_fn(_model: nn.Module, batch: Batch) -> torch.Tensor:
        outputs = {name: layer.get_base_layer()(batch[f"{name} x"]) for name, layer in bench.layers.items()}
        return torch.stack([_Replay.apply(out, batch[f"{name} g"]) for name, out in outputs.items()]).sum(dim=0)

    return loss_fn


def add_recorded(
    bench: Bench, record: Batch, sketches: Mapping[str, Sketch], mechanism: Mechanism, totals: Tensors
) -> None:
    with silent(bench.layers):
        add_clipped_sum(bench.inputs.model, replayed(bench), record, bench.layers, sketches, mechanism, totals)


@dataclass(frozen=True)
class Look:
    """What is summed of the private rows' gradients, and how each row is clipped."""

    sketches: Mapping[str, Sketch]
    clip: Clip

    @property
    def mechanism(self) -> Mechanism:
        return mechanism_of(self.clip, 1.0)


def mechanism_of(clip: Clip, noise_multiplier: float) -> Mechanism:
    return Mechanism(l2_clip_norm=clip.l2_clip_norm, noise_multiplier=noise_multiplier, clipping=clip.clipping)


def clipped_sums(bench: Bench, looks: Mapping[str, Look], keep: bool) -> tuple[dict[str, Tensors], list[Batch]]:
    """The sum of each look over the private rows, and with ``keep`` the records themselves."""
    files = {name: bench.out / f"sums-{name}.safetensors" for name in looks}
    missing = {name: look for name, look in looks.items() if not files[name].exists()}
    records = []
    totals = {name: zeros_for(bench.layers, look.sketches, torch.device("cpu")) for name, look in missing.items()}
    for number, batch in enumerate(bench.batches(bench.inputs.prepared.examples) if missing or keep else ()):
        if not number % 10:
            say(f"private rows, microbatch {number}, {len(missing)} sums")
        record = recorded(bench, batch)
        for name, look in missing.items():
            add_recorded(bench, record, look.sketches, look.mechanism, totals[name])
        if keep:
            records.append(record)
    for name, total in totals.items():
        save_file(total, files[name])
    return {name: load_file(file) for name, file in files.items()}, records


def median_norms(bench: Bench, looks: Mapping[str, Mapping[str, Sketch]]) -> dict[str, float]:
    """The median length of a near public row's gradient in each look: a clip norm that a user could name."""
    examples = bench.inputs.prepared.public[0].examples[:EXAMPLES]

    def norms() -> Tensors:
        model, loss_fn = bench.inputs.model, bench.inputs.loss_fn
        rows = [example_norms(model, loss_fn, b, bench.layers, list(looks.values())) for b in bench.batches(examples)]
        return {"median": torch.cat(rows).median(dim=0).values}

    return dict(zip(looks, bench.kept("norms", norms)["median"].tolist(), strict=True))


# --- the bases


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


def noise_of(share: float | None, epsilon: str, releases: int = 1) -> float:
    if share is None:
        return NO_NOISE
    return basis_noise_multiplier(epsilon=float(epsilon), delta=DELTA, share=share, releases=releases)


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


def measure_private(bench: Bench, rounds: int, clean: Callable[..., Tensors], judge: Judge, given: Any) -> None:
    share, epsilon = given
    mechanism = mechanism_of(AUTOMATIC, noise_of(share, epsilon, releases_for(rounds)))
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
    measured(bench, f"private-{rounds}-{share}-{epsilon}", judge, facts, make)


def iterate(bench: Bench, records: Sequence[Batch], judge: Judge) -> None:
    """Subspace iteration over the records: three shares at epsilon 3, the default share at the others."""

    first: Tensors = {}

    def clean(sketches: Mapping[str, Sketch], is_first: bool) -> Tensors:
        if is_first and first:  # of G V with V from the weights: no noise yet
            return dict(first)
        totals = zeros_for(bench.layers, sketches, torch.device("cpu"))
        for record in records:
            add_recorded(bench, record, sketches, mechanism_of(AUTOMATIC, 1.0), totals)
        if is_first:
            first.update(totals)
        return totals

    settings: list[tuple[float | None, str]] = [(default_share("private", float(e)), e) for e in EPSILONS]
    settings += [(share, "3") for share in SHARES["private"][:3]] + [(None, "3")]
    for given in dict.fromkeys(settings):
        for rounds in (1, 2):
            measure_private(bench, rounds, clean, judge, given)


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
    """The rows of every set below a folder."""
    columns = (
        "set,targets,rows,basis,frames,times_rank,clipping,clip_norm,rounds,share,epsilon,noise_multiplier,judged_by"
    )
    names = [*columns.split(","), "kept", "energy", "deviation", "draws"]
    found = [row for file in sorted(out.glob("*/rows/*.json")) for row in json.loads(file.read_text())]
    return [{name: row.get(name) for name in names} for row in found]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a line for every setting: energy held in percent, with its standard deviation."""
    names = ["set", "targets", "basis", "frames", "times_rank", "clipping", "clip_norm", "rounds", "share", "epsilon"]
    names += ["judged_by"]
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
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with NAME.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--set", choices=[name for name, task in TASKS.items() if task.has_head], default="banking77")
    parser.add_argument("--targets", choices=list(TARGETS), default="top2", help="blocks that are adapted")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"private rows at most; default {ROWS}")
    parser.add_argument("--rank", type=int, default=16, help="default 16")
    parser.add_argument("--draws", type=int, default=10, help="draws of the noise; default 10")
    parser.add_argument("--full", action="store_true", help="each width with each share")
    parser.add_argument("--iterate", action="store_true", help="also subspace iteration; keeps a pass in memory")
    options = parser.parse_args()
    bench, gradients = read_bench(options)
    with without_dropout(bench.inputs.model):
        run(bench, gradients, options)
    rows = rows_in(options.out)
    pcsv.write_csv(pa.Table.from_pylist(rows), options.out / "basis_settings.csv")
    print(table(rows))


if __name__ == "__main__":
    main()
