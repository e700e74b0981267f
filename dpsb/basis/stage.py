"""From the settings of a run to its basis: at once where it is public, or as a plan for a private release."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

from dpsb.adapter import Adapter, Basis, Factors, Provenance, attach, detach, lora_layers
from dpsb.basis.budget import basis_phase, default_share
from dpsb.basis.choose import choice_provenance, choose_privately, gradient_basis, rank_public
from dpsb.basis.data_free import DATA_FREE
from dpsb.basis.gradient import mean_gradients
from dpsb.basis.hybrid import Frames, check_width, frames_of, hybrid, hybrid_provenance
from dpsb.basis.lora_sb import lora_sb
from dpsb.basis.private import private, private_provenance, releases_for, rounds_for
from dpsb.basis.random import random
from dpsb.basis.release import Clip, PrivateExamples
from dpsb.basis.sources import EXAMPLES, PublicSet, batches_of, public_gradients
from dpsb.basis_spec import PHASE, parse_basis
from dpsb.config import RunConfig
from dpsb.data import DataError
from dpsb.losses import LossFn
from dpsb.models import HEAD_NAMES
from dpsb.probe import Collate, Example
from dpsb_accounting import Ledger, LedgerError, NonPrivate, Phase
from dpsb_accounting.files import write_whole

BASIS_NAME = "basis.safetensors"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a basis may be computed from before the run has a plan. Only ``examples`` is sensitive.

    Args:
      config: Settings.
      model: With PEFT LoRA layers, before :func:`dpsb.attach`.
      loss_fn: Per-example loss.
      collate: Examples to model inputs.
      examples: Private examples; read only for a basis that makes every epsilon infinite.
      public: The public sets that ``config.basis`` names, in order.
      max_length: Largest number of tokens.
      delta: Of the run.
      neighboring: Of the run.
    """

    config: RunConfig
    model: nn.Module
    loss_fn: LossFn
    collate: Collate
    examples: Sequence[Example]
    public: Sequence[PublicSet]
    max_length: int
    delta: float
    neighboring: str


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A basis, or what stands in for it until it is released.

    Args:
      basis: What the model begins with. Public, unless its provenance says otherwise.
      provenance: What the plan states.
      phases: What the plan pays for it.
      make: Computes the basis from private examples once the ledger is open; None where ``basis`` is the basis.
    """

    basis: Basis
    provenance: Provenance
    phases: tuple[Phase, ...] = ()
    make: Callable[[PrivateExamples], Basis] | None = None


def plan_basis(setup: Setup) -> Planned:
    """The basis of a run as far as it may be computed before the ledger exists.

    Raises:
      BudgetError, WidthError, DataError: If the settings do not fit the model or the public data.
    """
    config, spec = setup.config, parse_basis(setup.config.basis)
    if spec.kind in DATA_FREE:
        basis = DATA_FREE[spec.kind](setup.model)
        return Planned(basis=basis, provenance=basis.provenance)
    if spec.kind in ("lora-sb", "leak"):
        return _unpaid(setup, spec.kind)
    layers = lora_layers(setup.model)
    gradients = [_gradients(setup, public_set) for public_set in setup.public]
    if spec.kind == "public":
        return _public(setup, gradients)
    clip = _clip(config, spec.kind)
    if spec.kind == "private":
        rounds = rounds_for(layers, config.basis_rounds)
        provenance = private_provenance(clip, rounds)
        phase = _phase(setup, clip.share, releases_for(rounds))
        return _stand_in(setup, provenance, phase, lambda examples: private(examples, provenance))
    frames, width, said = wide_frames(setup, gradients)
    provenance = hybrid_provenance(clip, width, said)
    make = partial(hybrid, provenance=provenance, frames=frames)
    return _stand_in(setup, provenance, _phase(setup, clip.share, 1), make)


def wide_frames(
    setup: Setup, gradients: Sequence[Mapping[str, torch.Tensor]] | None = None
) -> tuple[dict[str, Frames], int, dict[str, str | int | float]]:
    """The wide public basis of a hybrid, its width, and what a plan says of its source. Public.

    Raises:
      WidthError, DataError: If the settings do not fit the model or the public data.
    """
    layers = lora_layers(setup.model)
    width = check_width(layers, setup.config.rank, setup.config.basis_width)
    if gradients is None:
        gradients = [_gradients(setup, public_set) for public_set in setup.public]
    if not gradients:
        return frames_of(layers, width), width, {"source": "weight"}
    chosen, said = _nearest(setup, gradients)
    return frames_of(layers, width, gradients[chosen]), width, said


def _clip(config: RunConfig, kind: str) -> Clip:
    share = config.basis_share or default_share(kind, config.epsilon)
    if config.basis_clip_norm is None:
        return Clip(l2_clip_norm=1.0, clipping="automatic", share=share)
    return Clip(l2_clip_norm=config.basis_clip_norm, clipping="flat", share=share)


def _phase(setup: Setup, share: float, releases: int) -> Phase:
    return basis_phase(
        epsilon=setup.config.epsilon,
        delta=setup.delta,
        share=share,
        releases=releases,
        sampling_prob=setup.config.basis_sampling_prob,
        neighboring=setup.neighboring,
    )


def _stand_in(setup: Setup, provenance: Provenance, phase: Phase, make: Callable[[PrivateExamples], Basis]) -> Planned:
    return Planned(basis=random(setup.model), provenance=provenance, phases=(phase,), make=make)


def _unpaid(setup: Setup, kind: str) -> Planned:
    config = setup.config
    if kind == "lora-sb" and setup.public:
        gradients, access, source = _gradients(setup, setup.public[0]), "public", parse_basis(config.basis).sources[0]
    else:
        chosen = setup.examples[:EXAMPLES]
        batches = batches_of(chosen, setup.collate, setup.max_length, config.token_budget)
        gradients = mean_gradients(setup.model, setup.loss_fn, batches)
        access, source = "non_private", config.data
    if kind == "leak":
        provenance = Provenance(kind="leak", access=access, detail={"source": source})
        reason = "the basis is the raw gradient of private examples"
        event = Phase(PHASE, NonPrivate(reason=reason), 1)
        return Planned(basis=gradient_basis(setup.model, gradients, provenance), provenance=provenance, phases=(event,))
    basis = lora_sb(
        setup.model,
        gradients,
        step_size=config.learning_rate,
        access=access,
        source=source,
        allow_non_private_basis=config.epsilon == float("inf"),
    )
    return Planned(basis=basis, provenance=basis.provenance)


def _gradients(setup: Setup, public_set: PublicSet) -> dict[str, torch.Tensor]:
    config = setup.config
    gradients = public_gradients(
        setup.model,
        setup.loss_fn,
        public_set,
        setup.collate,
        setup.max_length,
        config.token_budget,
        config.head_init_std,
    )
    size = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
    if not 0 < size < float("inf"):
        raise DataError(f"{public_set.name} gives no gradient to compute a basis from: no row has a usable label.")
    return gradients


def _public(setup: Setup, gradients: Sequence[Mapping[str, torch.Tensor]]) -> Planned:
    if len(gradients) > 1 and setup.config.basis_choice == "private":
        clip = _clip(setup.config, "choice")
        sources = parse_basis(setup.config.basis).sources
        notes = {source: entry.note for source, entry in zip(sources, setup.public, strict=True)}
        provenance = choice_provenance(clip, notes)
        factors = [gradient_basis(setup.model, entry, provenance).factors for entry in gradients]
        make = partial(_chosen, provenance=provenance, factors=factors)
        return _stand_in(setup, provenance, _phase(setup, clip.share, 1), make)
    chosen, said = _nearest(setup, gradients)
    provenance = Provenance(kind="public", access="public", detail=said)
    return Planned(basis=gradient_basis(setup.model, gradients[chosen], provenance), provenance=provenance)


def _chosen(examples: PrivateExamples, provenance: Provenance, factors: Sequence[Mapping[str, Factors]]) -> Basis:
    return choose_privately(examples, provenance, factors)[0]


def _nearest(setup: Setup, gradients: Sequence[Mapping[str, torch.Tensor]]) -> tuple[int, dict[str, str | int | float]]:
    """The public set to use, and what the plan says about it; several are ranked without the private data."""
    best, said = 0, {}
    if len(gradients) > 1:
        scores = rank_public([gradient_basis(setup.model, g, _RANKED).factors for g in gradients], gradients)
        best = max(range(len(scores)), key=scores.__getitem__)
        listed = ", ".join(f"{entry.name} {score:.4f}" for entry, score in zip(setup.public, scores, strict=True))
        said = {"choice": f"ranked by the energy that each holds of the others' gradients: {listed}"}
    chosen = setup.public[best]
    source = parse_basis(setup.config.basis).sources[best]
    return best, {"source": source, "labels": chosen.note, **said}


_RANKED = Provenance(kind="public", access="public")


def release_basis(
    out: Path, adapter: Adapter, make: Callable[[PrivateExamples], Basis] | None, examples: PrivateExamples
) -> Adapter:
    """The adapter on the released basis: released now, or read back if this run released it before.

    The released basis is on disk, and bound to the ledger by its hash, before training begins. A charge whose basis was
    not saved is spent and never drawn again.

    Args:
      out: Folder of the run.
      adapter: On the public stand-in; it is taken off the model.
      make: Computes the basis; None on a resumed run.
      examples: Private examples and the ledger that pays.

    Returns:
      The adapter on the released basis, theta where it was.

    Raises:
      LedgerError: If the basis was charged and is gone, or is not the one that the ledger binds.
    """
    ledger, theta = examples.ledger, adapter.state()
    bound = ledger.files.get(BASIS_NAME)
    if bound is not None:
        content = _read_bound(out, bound)
        detach(adapter)
    elif make is None or ledger.charged(PHASE):
        raise _spent(out, ledger)
    else:
        detach(adapter)
        basis = make(examples)
        tensors = {f"{name}.A": factors.A.cpu() for name, factors in basis.factors.items()}
        tensors |= {f"{name}.B": factors.B.cpu() for name, factors in basis.factors.items()}
        content = bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        write_whole(out / BASIS_NAME, content)
        ledger.bind_file(BASIS_NAME, sha256(content).hexdigest())
    saved = load(content)
    names = sorted({key.removesuffix(".A") for key in saved if key.endswith(".A")})
    factors = {name: Factors(A=saved[f"{name}.A"], B=saved[f"{name}.B"]) for name in names}
    provenance = Provenance.from_json(ledger.plan.basis)
    again = attach(adapter.model, Basis(factors=factors, provenance=provenance), allow=HEAD_NAMES)
    again.load_state(theta)
    return again


def charge_leak(ledger: Ledger) -> None:
    """Puts a basis from raw private gradients on record, if the plan has one; epsilon is infinite either way."""
    first = ledger.plan.phases[0]
    if first.name == PHASE and isinstance(first.event, NonPrivate) and ledger.remaining(PHASE):
        ledger.charge(PHASE)


def _spent(out: Path, ledger: Ledger) -> LedgerError:
    charged = ledger.charged(PHASE)
    if not charged:
        return LedgerError(
            f"The run in {out} was cut off before its basis was released; delete the folder, start anew."
        )
    return LedgerError(
        f"The run in {out} was cut off after {charged} of {ledger.plan.phase(PHASE).count} charges for its basis and "
        "before the basis was saved: they are spent and are not drawn again. Start a new run in another folder; its "
        "epsilon adds to what this one spent."
    )


def _read_bound(out: Path, bound: str) -> bytes:
    try:
        content = (out / BASIS_NAME).read_bytes()
    except OSError:
        raise LedgerError(
            f"{out / BASIS_NAME} is gone, and what it cost is spent; start a new run elsewhere."
        ) from None
    if sha256(content).hexdigest() != bound:
        raise LedgerError(f"{out / BASIS_NAME} is not the one that the ledger binds; put it back or start a new run.")
    return content
