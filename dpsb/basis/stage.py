"""From the settings of a run to its basis: at once where it is public, or as a plan for a private release."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load, save

from dpsb.adapter import Adapter, Basis, Factors, Provenance, attach, detach, lora_layers
from dpsb.basis._common import public_generator
from dpsb.basis.budget import basis_phase, default_share
from dpsb.basis.choose import choice_provenance, choose_privately, gradient_basis, rank_public
from dpsb.basis.data_free import DATA_FREE
from dpsb.basis.figures import CANNOT_TELL, nearest
from dpsb.basis.gradient import mean_gradients
from dpsb.basis.hybrid import Frames, check_width, frames_of, hybrid, hybrid_provenance
from dpsb.basis.lora_sb import lora_sb
from dpsb.basis.private import private, private_provenance, releases_for, rounds_for, sampling_prob_for
from dpsb.basis.random import random
from dpsb.basis.release import Clip, PrivateExamples
from dpsb.basis.setup import Setup, from_public_rows, train_on_public_rows
from dpsb.basis.sources import (
    EXAMPLES,
    PublicSet,
    batches_of,
    digests,
    public_gradients,
    public_sample,
    sha256_of,
    stated,
)
from dpsb.basis.trained import trained
from dpsb.basis_spec import PHASE, parse_basis
from dpsb.config import RunConfig
from dpsb.data import DataError
from dpsb.frozen_prefix import whole_model
from dpsb.models import HEAD_NAMES
from dpsb_accounting import Ledger, LedgerError, LedgerRecord, NonPrivate, Phase
from dpsb_accounting.files import write_whole

BASIS_NAME = "basis.safetensors"
CHOICE_NAME = "basis_choice.json"
"""Which public file private examples chose: a released number, kept with the finished run."""


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
    if spec.kind == "trained":
        return _trained(setup)
    layers = lora_layers(setup.model)
    if spec.kind == "public":
        return _public(setup)
    clip = _clip(config, spec.kind)
    if spec.kind == "private":
        rounds = rounds_for(layers, config.basis_rounds)
        provenance = private_provenance(clip, rounds)
        phase = _phase(setup, clip.share, releases_for(rounds), sampling_prob_for(rounds))
        return _stand_in(setup, provenance, phase, lambda examples: private(examples, provenance))
    frames, width, said = wide_frames(setup)
    provenance = hybrid_provenance(clip, width, said)
    make = partial(hybrid, provenance=provenance, frames=frames)
    return _stand_in(setup, provenance, _phase(setup, clip.share), make)


def wide_frames(setup: Setup) -> tuple[dict[str, Frames], int, dict[str, str | int | float]]:
    """The wide public basis of a hybrid, its width, and what a plan says of its source. Public.

    Raises:
      WidthError, DataError: If the settings do not fit the model or the public data.
    """
    layers = lora_layers(setup.model)
    width = check_width(layers, setup.config.rank, setup.config.basis_width)
    if not setup.public:
        return frames_of(layers, width), width, {"source": "weight"}
    chosen, said = _nearest(setup)
    return frames_of(layers, width, _gradients(setup, chosen)), width, said


def _clip(config: RunConfig, kind: str) -> Clip:
    share = config.basis_share or default_share(kind, config.epsilon)
    if config.basis_clip_norm is None:
        return Clip(l2_clip_norm=1.0, clipping="automatic", share=share)
    return Clip(l2_clip_norm=config.basis_clip_norm, clipping="flat", share=share)


def _phase(setup: Setup, share: float, releases: int = 1, usual_sampling_prob: float = 1.0) -> Phase:
    return basis_phase(
        epsilon=setup.config.epsilon,
        delta=setup.delta,
        share=share,
        releases=releases,
        sampling_prob=setup.config.basis_sampling_prob or usual_sampling_prob,
        neighboring=setup.neighboring,
    )


def _stand_in(setup: Setup, provenance: Provenance, phase: Phase, make: Callable[[PrivateExamples], Basis]) -> Planned:
    return Planned(basis=random(setup.model), provenance=provenance, phases=(phase,), make=make)


def _unpaid(setup: Setup, kind: str) -> Planned:
    config = setup.config
    if kind == "lora-sb" and setup.public:
        gradients, access, source = _gradients(setup, setup.public[0]), "public", parse_basis(config.basis).sources[0]
    else:
        chosen = public_sample(setup.examples, EXAMPLES)
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
    if access == "public":
        detail = {**basis.provenance.detail, **sha256_of(source)}
        basis = replace(basis, provenance=replace(basis.provenance, detail=detail))
    return Planned(basis=basis, provenance=basis.provenance)


def _gradients(setup: Setup, public_set: PublicSet) -> dict[str, torch.Tensor]:
    config = setup.config
    return public_gradients(
        setup.model,
        setup.loss_fn,
        public_set,
        setup.collate,
        setup.max_length,
        config.token_budget,
        config.head_init_std,
    )


def _public(setup: Setup) -> Planned:
    if len(setup.public) > 1 and setup.config.basis_choice == "private":
        clip = _clip(setup.config, "choice")
        sets = dict(zip(parse_basis(setup.config.basis).sources, setup.public, strict=True))
        provenance = choice_provenance(clip, {source: entry.note for source, entry in sets.items()})
        factors = {
            source: gradient_basis(setup.model, _gradients(setup, entry), provenance).factors
            for source, entry in sets.items()
        }
        make = partial(choose_privately, provenance=provenance, factors=factors)
        return _stand_in(setup, provenance, _phase(setup, clip.share), make)
    chosen, said = _nearest(setup)
    provenance = Provenance(kind="public", access="public", detail=said)
    return Planned(basis=gradient_basis(setup.model, _gradients(setup, chosen), provenance), provenance=provenance)


def _trained(setup: Setup) -> Planned:
    """Trains LoRA, and the head with it; the head stays as that leaves it."""
    train_on_public_rows(setup, [parameter for parameter in setup.model.parameters() if parameter.requires_grad])
    provenance = Provenance(kind="trained", access="public", detail=from_public_rows(setup.config))
    return Planned(basis=trained(setup.model, provenance), provenance=provenance)


def new_factors(setup: Setup, provenance: Provenance) -> Callable[[int], Mapping[str, Factors]]:
    """Directions for re-basing: other random ones, or those of the run's public file at the weights as they then are.

    Args:
      setup: With the model as it is trained.
      provenance: Of the run's basis, ``"random"`` or ``"public"``.

    Raises:
      DataError: If the public file is not the one whose SHA-256 the plan holds: it has changed since the run began.
    """
    if provenance.kind == "random":
        return lambda window: random(setup.model, generator=public_generator(window)).factors
    source = str(provenance.detail["source"])
    if sha256_of(source).get("source_sha256") != provenance.detail.get("source_sha256"):
        raise DataError(f"{source} is not the file that the run began with and takes directions from; put it back.")
    position = parse_basis(setup.config.basis).sources.index(source)

    def factors(_window: int) -> Mapping[str, Factors]:
        with whole_model():
            return gradient_basis(setup.model, _gradients(setup, setup.public[position]), provenance).factors

    return factors


def _nearest(setup: Setup) -> tuple[PublicSet, dict[str, str | int | float]]:
    """The public set to use, and what the plan says about it; nothing of the private data is asked.

    Sets whose rows carry the run's own labels come before all others; those of equal standing are ranked by each other.
    """
    sets = dict(zip(parse_basis(setup.config.basis).sources, setup.public, strict=True))
    rivals = [source for source, entry in sets.items() if entry.run_labels] or list(sets)
    best, choice = rivals[0], "the only file whose rows carry the run's labels"
    if len(rivals) > 1:
        scores = _scores(setup, [sets[source] for source in rivals])
        position, tells = nearest(scores)
        best = rivals[position]
        listed = ", ".join(f"{Path(source).name} {score:.4f}" for source, score in zip(rivals, scores, strict=True))
        choice = f"ranked by the energy held of the others' gradients, over what a basis of their own holds: {listed}"
        if not tells:
            choice += f"; less than {CANNOT_TELL} apart, which does not tell, so the first named of them is used"
            choice += (
                "; --basis-choice private asks the private data" if setup.config.basis.startswith("public") else ""
            )
    said: dict[str, str] = {}
    if len(sets) > 1:
        said = {"choice": choice, **digests(sets)}
    return sets[best], {**stated(best, sets[best].note), **said}


def _scores(setup: Setup, sets: Sequence[PublicSet]) -> list[float]:
    """How the sets rank: a basis of one half of each, judged on the other halves of the others."""
    factors, judging = [], []
    for entry in sets:
        half = len(entry.examples) // 2
        if not half:
            raise DataError(f"{entry.name} holds a single row; to be ranked, each public file needs at least 2.")
        fit, other = (
            _gradients(setup, replace(entry, examples=part)) for part in (entry.examples[:half], entry.examples[half:])
        )
        factors.append(gradient_basis(setup.model, fit, _RANKED).factors)
        judging.append(other)
    return rank_public(factors, judging)


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
        content = _read_bound(out, BASIS_NAME, bound)
        detach(adapter)
    elif make is None or ledger.charged(PHASE):
        raise _spent(out, ledger)
    else:
        detach(adapter)
        basis = make(examples)
        _record_choice(out, ledger, basis.provenance)
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


def _record_choice(out: Path, ledger: Ledger, provenance: Provenance) -> None:
    """Writes down which public file a charged release chose, bound to the ledger: the plan was frozen before it."""
    said = {name: provenance.detail[name] for name in ("chosen", "scores") if name in provenance.detail}
    if said:
        content = (json.dumps(said, indent=1) + "\n").encode()
        write_whole(out / CHOICE_NAME, content)
        ledger.bind_file(CHOICE_NAME, sha256(content).hexdigest())


def chosen_file(out: Path, ledger: LedgerRecord) -> str | None:
    """The public file that private examples chose for the run in ``out``; None if there was no such choice. Released.

    Raises:
      LedgerError: If the file that says so is gone, or is not the one that the ledger binds.
    """
    bound = ledger.files.get(CHOICE_NAME)
    return None if bound is None else str(json.loads(_read_bound(out, CHOICE_NAME, bound))["chosen"])


def _read_bound(out: Path, name: str, bound: str) -> bytes:
    try:
        content = (out / name).read_bytes()
    except OSError:
        raise LedgerError(f"{out / name} is gone, and what it cost is spent; start a new run elsewhere.") from None
    if sha256(content).hexdigest() != bound:
        raise LedgerError(f"{out / name} is not the one that the ledger binds; put it back or start a new run.")
    return content
