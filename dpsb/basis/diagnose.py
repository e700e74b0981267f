"""Which basis to use, from public data alone: what each one holds of the gradient, and what it would cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from dpsb.adapter import Factors, Provenance
from dpsb.basis._common import public_generator, truncated_svd
from dpsb.basis.choose import gradient_basis, held_energy, sketches_of
from dpsb.basis.data_free import DATA_FREE
from dpsb.basis.figures import BasisFigures, Diagnosis, SetFigures, advice_on_head, mean_of, recommend
from dpsb.basis.gradient import mean_gradients
from dpsb.basis.hybrid import check_width, frames_of, hybrid, hybrid_provenance
from dpsb.basis.per_example import Batch
from dpsb.basis.private import private, private_provenance
from dpsb.basis.rehearsal import Budget, Noise, Rehearsal, noise_of
from dpsb.basis.release import Clip
from dpsb.basis.row_norms import row_norms
from dpsb.basis.sources import PublicSet, own_head
from dpsb.data import DataError
from dpsb.losses import LossFn
from dpsb.mechanism import Mechanism
from dpsb.probe import Collate, without_dropout

FEWEST = 8
"""Examples that a public set must have: a half to fit on, and two quarters to judge on."""

_PUBLIC = Provenance(kind="public", access="public")

FactorsByLayer = Mapping[str, Factors]
Gradients = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Halves:
    """A public set, cut: bases are fitted on one half and judged on the two quarters of the other.

    Args:
      name: Of its file.
      note: What was done about its labels.
      own_labels, run_labels: As in :class:`dpsb.basis.sources.PublicSet`.
      fit: Batches to fit on.
      quarters: Batches to judge on, twice.
    """

    name: str
    note: str
    own_labels: int
    run_labels: bool
    fit: Sequence[Batch]
    quarters: tuple[Sequence[Batch], Sequence[Batch]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The gradients of a public set's parts, on the CPU. Public."""

    fit: Gradients
    first: Gradients
    second: Gradients

    @property
    def coherence(self) -> float:
        """The cosine between the gradients of the two judging quarters."""
        length = _dot(self.first, self.first) * _dot(self.second, self.second)
        return _dot(self.first, self.second) / length**0.5 if length else 0.0

    def energy_held(self, factors: FactorsByLayer) -> float:
        """The share of the judging gradient's energy that a basis holds, sampling noise cancelled, in [0, 1]."""
        if self.coherence > 0:
            share = held_energy(factors, self.first, self.second)
        else:
            share = held_energy(factors, {n: self.first[n] + self.second[n] for n in self.first})
        return min(1.0, max(0.0, share))

    def length_held(self, factors: FactorsByLayer) -> float:
        """The length of the mean gradient as R sees it."""
        sketches = sketches_of(factors)
        seen = ({n: s.of(part[n]) for n, s in sketches.items()} for part in (self.first, self.second))
        return max(0.0, _dot(*seen)) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What candidates are made from and judged with. All of it is public."""

    model: nn.Module
    layers: Mapping[str, LoraLayer]
    loss_fn: LossFn
    head_std: float
    halves: Sequence[Halves]
    measured: Sequence[Measured]
    rank: int
    width: int
    budget: Budget | None

    @property
    def numbers(self) -> int:
        return len(self.layers) * self.rank**2


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A basis; ``made_from`` is the index of a public set or None, ``factors`` None if the basis is paid for."""

    basis: str
    kind: str
    made_from: int | None = None
    factors: FactorsByLayer | None = None
    source: Gradients | None = None


def cut(public_set: PublicSet, collate: Collate, count: int, token_budget: int) -> Halves:
    """The first ``count`` examples of a set, in parts. The set is in random order, so that each part has every label;
    copies within a file may then stand in two parts, and flatter what its own basis holds of it.

    Raises:
      DataError: If there are fewer than eight.
    """
    chosen = list(public_set.examples[:count])
    if len(chosen) < FEWEST:
        raise DataError(f"{public_set.name} holds {len(chosen)} rows; a diagnosis needs at least {FEWEST}.")
    half, quarter = len(chosen) // 2, 3 * len(chosen) // 4
    padded = max(len(example["input_ids"]) for example in chosen)
    size = max(1, token_budget // padded)

    def batches(start: int, stop: int) -> list[Batch]:
        return [collate(chosen[i : min(i + size, stop)], padded) for i in range(start, stop, size)]

    return Halves(
        name=public_set.name,
        note=public_set.note,
        own_labels=public_set.own_labels,
        run_labels=public_set.run_labels,
        fit=batches(0, half),
        quarters=(batches(half, quarter), batches(quarter, len(chosen))),
    )


def diagnose_bases(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    loss_fn: LossFn,
    halves: Sequence[Halves],
    *,
    rank: int,
    head_std: float,
    width: int | None = None,
    budget: Budget | None = None,
    on_status: Callable[[str], None] = lambda _message: None,
) -> Diagnosis:
    r"""Judges every basis on the same public examples, none of which it was computed from.

    Where some sets have the run's labels, they alone judge, otherwise all do. A set judges its own basis too, by its
    other half: then each judging set stands in turn for the private data, whatever else is among the files.

    The share of energy is :math:`\langle P g_1, P g_2\rangle / \langle g_1, g_2\rangle` with the mean gradients of two
    separate quarters, :math:`\rho = \mathrm{median}_i\|P g_i\| / \mathrm{median}_i\|g_i\|` with all examples of both,
    the signal over the noise :math:`(M/\sigma)\,\|P g\| / (C_P\sqrt d)` with :math:`C_P` the median
    :math:`\|P g_i\|` and d the cores' numbers, the head left out.

    Args:
      model: A PEFT LoRA model; the rank is the one of its config.
      layers: Its target layers by name.
      loss_fn: Per-example loss.
      halves: Public sets from :func:`cut`, at least one.
      rank: r.
      head_std: Of the random head of a set with labels of its own.
      width: K of a hybrid; by default six times the rank.
      budget: Without it nothing is said of noise, and paid bases have no forecast.
      on_status: Told what is being computed.

    Raises:
      ValueError: ``WidthError``, ``DataError`` or ``BudgetError``, in one sentence.
    """
    width = check_width(layers, rank, width)
    noise = noise_of(budget, layers) if budget is not None else {}
    model.eval()
    with without_dropout(model):
        measured = []
        for part in halves:
            on_status(f"gradients of {part.name}")
            measured.append(_measure(model, loss_fn, part, head_std))
        judging = Judging(
            model=model,
            layers=layers,
            loss_fn=loss_fn,
            head_std=head_std,
            halves=halves,
            measured=measured,
            rank=rank,
            width=width,
            budget=budget,
        )
        candidates = _candidates(judging)
        own = {
            candidate.made_from: measured[candidate.made_from].energy_held(candidate.factors)
            for candidate in candidates
            if candidate.made_from is not None and candidate.factors is not None
        }
        told = any(part.run_labels for part in halves)
        found: dict[str, list[BasisFigures]] = {candidate.basis: [] for candidate in candidates}
        sets = []
        for j, part in enumerate(halves):
            entry = SetFigures(
                name=part.name,
                labels=part.note,
                examples=sum(len(next(iter(b.values()))) for some in (part.fit, *part.quarters) for b in some),
                coherence=measured[j].coherence,
                own_half=own[j],
                run_labels=part.run_labels,
                judges=part.run_labels or not told,
            )
            if entry.judges:
                on_status(f"judging on {part.name}")
                figures, entry = _judge(judging, candidates, j, entry, noise)
                for one in figures:
                    found[one.basis].append(one)
            sets.append(entry)
    bases = tuple(mean_of(figures) for figures in found.values())
    recommended, reason = recommend(bases, sets)
    return Diagnosis(
        rank=rank,
        layers=len(layers),
        numbers=judging.numbers,
        width=width,
        sets=tuple(sets),
        bases=bases,
        recommended=recommended,
        reason=reason,
        advice=advice_on_head(next(b for b in bases if b.basis == recommended), sets, judging.numbers),
    )


def _dot(one: Gradients, other: Gradients) -> float:
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one)


def _measure(model: nn.Module, loss_fn: LossFn, part: Halves, head_std: float) -> Measured:
    with own_head(model, part.own_labels, head_std):
        fit, first, second = (
            {name: gradient.cpu() for name, gradient in mean_gradients(model, loss_fn, batches).items()}
            for batches in (part.fit, *part.quarters)
        )
    measured = Measured(fit=fit, first=first, second=second)
    for size in (_dot(part, part) for part in (fit, first, second)):
        if not 0 < size < float("inf"):
            raise DataError(f"{part.name} gives no gradient to judge a basis by: too few rows have a usable label.")
    return measured


def _candidates(judging: Judging) -> list[_Candidate]:
    """Data-free bases, one from the fitting half of each set, and the paid ones."""
    model = judging.model
    found = [
        _Candidate(basis=kind, kind="free", factors=_on_cpu(made(model).factors)) for kind, made in DATA_FREE.items()
    ]
    hybrids = [_Candidate(basis="hybrid", kind="hybrid")]
    for i, (part, entry) in enumerate(zip(judging.halves, judging.measured, strict=True)):
        factors = gradient_basis(model, entry.fit, _PUBLIC).factors
        found.append(_Candidate(basis=f"public:{part.name}", kind="free", made_from=i, factors=factors))
        hybrids.append(_Candidate(basis=f"hybrid:{part.name}", kind="hybrid", made_from=i, source=entry.fit))
    return [*found, _Candidate(basis="private", kind="private"), *hybrids]


def _on_cpu(factors: FactorsByLayer) -> FactorsByLayer:
    return {name: Factors(A=f.A.cpu(), B=f.B.cpu()) for name, f in factors.items()}


def _judge(
    judging: Judging, candidates: Sequence[_Candidate], j: int, entry: SetFigures, noise: Mapping[str, Noise]
) -> tuple[list[BasisFigures], SetFigures]:
    """The figures of every candidate on set j, and those of the set itself."""
    part, measured = judging.halves[j], judging.measured[j]
    figures, looked_at = [], []
    with own_head(judging.model, part.own_labels, judging.head_std):
        for candidate in candidates:
            factors, visible = candidate.factors, None
            if factors is None and noise:
                factors, visible = _rehearsed(judging, candidate, j, noise[candidate.kind])
            looked_at.append(factors)
            energy = None if factors is None else measured.energy_held(factors)
            figures.append(
                BasisFigures(
                    basis=candidate.basis,
                    paid=candidate.factors is None,
                    energy=energy,
                    energies=() if energy is None else (energy,),
                    of_own=energy / entry.own_half if entry.own_half and energy is not None else None,
                    at_most=_at_most(judging, candidate.source, measured) if candidate.kind == "hybrid" else None,
                    visible_layers=visible,
                    share=noise[candidate.kind].share if noise else None,
                )
            )
        batches = [batch for quarter in part.quarters for batch in quarter]
        bases = [factors for factors in looked_at if factors is not None]
        rows = row_norms(judging.model, judging.loss_fn, batches, judging.layers, bases)
    whole, medians = float(rows.whole.median()), iter(rows.cores.median(dim=0).values.tolist())
    heads = iter(rows.head_shares())
    done = []
    for one, candidate, factors in zip(figures, candidates, looked_at, strict=True):
        if factors is not None:
            median, snr = next(medians), None
            if noise and judging.budget is not None:
                step_noise = noise[candidate.kind].train / judging.budget.expected_batch_size
                length = step_noise * median * judging.numbers**0.5
                snr = measured.length_held(factors) / length if length else None
                snr = snr or None  # the quarters do not agree on a direction: its length is not known
            one = replace(one, rho=median / whole if whole else None, snr_per_step=snr, head_share=next(heads))
        done.append(one)
    return done, replace(entry, median_norm=whole, head_numbers=rows.head_numbers)


def _rehearsed(judging: Judging, candidate: _Candidate, j: int, noise: Noise) -> tuple[FactorsByLayer, float]:
    """The basis that the budget would find if N examples like the fitting half of set j were the private data."""
    if judging.budget is None:
        raise ValueError("Expected a budget for a forecast.")
    mechanism = Mechanism(l2_clip_norm=1.0, noise_multiplier=noise.basis, clipping="automatic")
    rehearsal = Rehearsal(
        model=judging.model,
        layers=judging.layers,
        loss_fn=judging.loss_fn,
        batches=judging.halves[j].fit,
        num_examples=round(noise.sampling_prob * judging.budget.num_examples),
        mechanism=mechanism,
    )
    clip = Clip(l2_clip_norm=1.0, clipping="automatic", share=noise.share or 0.0)
    if candidate.kind == "private":
        found = private(rehearsal, private_provenance(clip, noise.rounds))
    else:
        frames = frames_of(judging.layers, judging.width, candidate.source)
        found = hybrid(rehearsal, hybrid_provenance(clip, judging.width, {}), frames)
    return found.factors, rehearsal.visible[-1]


def _at_most(judging: Judging, source: Gradients | None, measured: Measured) -> float:
    """What r x r cores inside a frame of width K could hold if the judging gradient itself turned them."""
    factors, generator = {}, public_generator()
    for name, f in frames_of(judging.layers, judging.width, source).items():
        left, right = f.left.cpu(), f.right.cpu()
        core = left.T @ (measured.first[name] + measured.second[name]).float() @ right
        U, _, Vh = truncated_svd(core, judging.rank, generator)
        factors[name] = Factors(A=(right @ Vh.T).T.contiguous(), B=left @ U)
    return measured.energy_held(factors)
