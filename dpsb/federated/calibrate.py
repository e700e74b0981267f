"""From a simulation's budgets to what each silo is asked, and to policies that allow just that. Reads no data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

from dpsb.basis.budget import basis_noise_multiplier, default_share
from dpsb.basis_spec import PHASE
from dpsb.federated.checks import FederatedError
from dpsb.federated.config import FederateConfig
from dpsb.federated.paid_layout import Wide
from dpsb.federated.secure.whole_numbers import clip_steps_for
from dpsb.federated.spec import PaidBasis, PrivacyModel, SiloPolicy
from dpsb.federated.terms import SiloTerms, Terms
from dpsb.plan import noise_multiplier_for, relation_for
from dpsb_accounting import Gaussian, Phase, PoissonSkellam, ResourceLimit
from dpsb_accounting import epsilon as epsilon_of

_CLOSE = 1.001  # calibrated noise of whole numbers is within that factor of the least
_MOST_NOISE = 1e4


def terms_of(
    config: FederateConfig, sizes: Mapping[str, int], dimension: int, wide: Wide | None = None
) -> tuple[Terms, dict[str, SiloPolicy]]:
    """What each silo is asked, with noise calibrated to its own budget; and its policy.

    Args:
      config: Settings.
      sizes: The silos' true numbers of examples; public where no N is declared, else not used.
      dimension: Of theta.
      wide: The wide public basis of a hybrid that silos pay for.

    Raises:
      FederatedError: If a batch is larger than its silo.
      CalibrationInfeasible: If no noise keeps to a budget.
    """
    run, federation = config.run, config.federation
    model = PrivacyModel(federation.model)
    sizes = {name: config.silos[name].num_examples or sizes[name] for name in config.silos}
    delta, relation = _delta(config, sizes, model), _relation(config, model)
    asked = {name: _asked(config, name, size, delta, relation, model, wide) for name, size in sizes.items()}
    clip_steps = 0
    if federation.noise == "skellam":
        clip_steps = _clip_steps(asked, dimension)
        steps = federation.rounds + federation.spare_rounds
        asked = {
            name: replace(
                each,
                noise_multiplier=whole_noise_multiplier(
                    each,
                    target_epsilon=config.epsilon(name),
                    delta=delta,
                    steps=steps,
                    neighboring=relation,
                    clip_steps=clip_steps,
                    dimension=dimension,
                ),
            )
            for name, each in asked.items()
        }
    if model is not PrivacyModel.SILO_LOCAL:  # one noise for all: the largest that any silo needs
        noise = max(terms.noise_multiplier for terms in asked.values())
        asked = {name: replace(terms, noise_multiplier=noise) for name, terms in asked.items()}
    terms = Terms(
        silos=asked,
        rounds=federation.rounds,
        model=model,
        local_steps=federation.local_steps,
        l2_clip_norm=run.l2_clip_norm,
        learning_rate=run.learning_rate,
        head_learning_rate=run.head_learning_rate or run.learning_rate,
        optimizer=run.optimizer,
        momentum=run.momentum if run.optimizer == "sgd" else 0.0,
        schedule=run.schedule,
        server_optimizer=federation.server_optimizer,
        server_learning_rate=federation.server_learning_rate,
        min_silos=config.min_silos,
        dropouts=federation.dropouts,
        colluders=federation.colluders,
        clip_steps=clip_steps,
    )
    terms.specs("0" * 32, 0, {}, "0" * 64)  # what no round could ask for is refused before anything is begun
    policies = {
        name: SiloPolicy(
            silo=name,
            max_epsilon=config.epsilon(name),
            delta=delta,
            num_examples=config.silos[name].num_examples,
            neighboring=relation,
            min_noise_multiplier=_least_noise(asked[name]),
            max_sampling_prob=asked[name].sampling_prob,
            max_rounds=federation.rounds,
            max_local_steps=federation.local_steps,
            spare_rounds=federation.spare_rounds,
            models=(model.value,),
            clients=len(sizes) if model is PrivacyModel.SECAGG else None,
            min_clients=max(2, len(sizes) - federation.dropouts),
            min_colluders=federation.colluders,
        )
        for name in sizes
    }
    return terms, policies


def _least_noise(asked: SiloTerms) -> float:
    """What the policy allows at least: the usual limit, or what is asked where that is less."""
    basis = math.inf if asked.basis is None else asked.basis.noise_multiplier
    return min(0.3, asked.noise_multiplier, basis)


def _delta(config: FederateConfig, sizes: Mapping[str, int], model: PrivacyModel) -> float:
    """One delta for all: below one over the number of units, which are silos in ``client_level``."""
    units = len(sizes) if model is PrivacyModel.CLIENT_LEVEL else max(sizes.values())
    delta = config.run.delta
    if delta is not None and delta >= 1 / units:
        whose = "silos" if model is PrivacyModel.CLIENT_LEVEL else "examples of the largest silo"
        raise FederatedError(f"Expected delta={delta!r} below one over the {units} {whose}; more promises nothing.")
    return 0.1 / units if delta is None else delta


def _relation(config: FederateConfig, model: PrivacyModel) -> str:
    if model is PrivacyModel.CLIENT_LEVEL:
        return "zero_out"
    declared = next(iter(config.silos.values())).num_examples is not None
    return relation_for(config.run.neighboring, declared)


def _asked(
    config: FederateConfig,
    name: str,
    size: int,
    delta: float,
    relation: str,
    model: PrivacyModel,
    wide: Wide | None,
) -> SiloTerms:
    batch, federation = config.expected_batch_size(name), config.federation
    if batch > size:
        raise FederatedError(f"expected_batch_size={batch} exceeds the {size} examples of silo {name!r}.")
    rounds = federation.rounds + federation.spare_rounds
    whole = model is PrivacyModel.CLIENT_LEVEL
    paid = _paid_basis(config, name, delta, relation, wide) if config.basis_is_paid else None
    before = () if paid is None else (Phase(PHASE, Gaussian(noise_multiplier=paid.noise_multiplier), 1),)
    noise = noise_multiplier_for(
        target_epsilon=config.epsilon(name),
        delta=delta,
        sampling_prob=1.0 if whole else batch / size,
        steps=rounds if whole else rounds * federation.local_steps,
        neighboring=relation,
        before=before,
    )
    return SiloTerms(sampling_prob=batch / size, noise_multiplier=noise, expected_batch_size=batch, basis=paid)


def _paid_basis(config: FederateConfig, name: str, delta: float, relation: str, wide: Wide | None) -> PaidBasis:
    """The silo's release for the basis: the share of its own budget that a run of its own would give it."""
    run, epsilon = config.run, config.epsilon(name)
    share = run.basis_share or default_share("private" if wide is None else "hybrid", epsilon)
    noise = basis_noise_multiplier(epsilon=epsilon, delta=delta, share=share, neighboring=relation)
    clip, clipping = (1.0, "automatic") if run.basis_clip_norm is None else (run.basis_clip_norm, "flat")
    paid = PaidBasis(noise_multiplier=noise, l2_clip_norm=clip, clipping=clipping, share=share)
    if wide is None:
        return paid
    return replace(paid, width=wide.width, source=wide.source, frames_sha256=wide.sha256)


def _clip_steps(asked: Mapping[str, SiloTerms], dimension: int) -> int:
    """One grid for all silos; it has room for four times the noise that would do if it were Gaussian."""
    batch = sum(each.expected_batch_size for each in asked.values())
    return clip_steps_for(dimension, batch, 4 * max(each.noise_multiplier for each in asked.values()))


def whole_noise_multiplier(
    asked: SiloTerms,
    *,
    target_epsilon: float,
    delta: float,
    steps: int,
    neighboring: str,
    clip_steps: int,
    dimension: int,
) -> float:
    """The noise with which Skellam noise in whole numbers keeps to a budget, by its own bound; at most 0.1 % too much.

    Args:
      asked: With the sampling probability, and the noise that would do if it were Gaussian: the search begins there.
      target_epsilon: The budget.
      delta: Of the budget.
      steps: How many releases there are.
      neighboring: Relation.
      clip_steps: How many whole numbers C is long.
      dimension: Of theta.

    Raises:
      FederatedError: If no noise keeps to it.
    """

    def upper(noise: float) -> float:
        event = PoissonSkellam(
            noise_multiplier=noise, sampling_prob=asked.sampling_prob, clip_steps=clip_steps, dimension=dimension
        )
        try:
            return epsilon_of([(event, steps)], delta, neighboring).upper
        except ResourceLimit:
            return math.inf

    low = high = asked.noise_multiplier
    while upper(high) > target_epsilon:
        low, high = high, 1.25 * high
        if high > _MOST_NOISE:
            raise FederatedError(f"No Skellam noise keeps to epsilon={target_epsilon!r} over {steps} rounds.")
    while high > low * _CLOSE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if upper(middle) <= target_epsilon else (middle, high)
    return high


def policy_text(policy: SiloPolicy) -> str:
    """A policy as the TOML file that :func:`dpsb.federated.spec.read_policy` reads."""
    lines = ["# What this silo allows at most; see docs/federated.md. A server can only ask for less."]
    content = policy.to_json()
    peers = content.pop("peers", {})
    lines += [f"{name} = {json.dumps(value)}" for name, value in content.items()]
    if policy.examples_together:
        lines.append("# above: only where the server's theta is trusted, as in a simulation; a real silo leaves it out")
    if peers:
        lines += ["", "[peers]", *(f"{name} = {json.dumps(key)}" for name, key in peers.items())]
    return "\n".join(lines) + "\n"
