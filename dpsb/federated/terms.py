"""What a coordinator runs: the terms of a federation, the same for all its rounds. All of it is public."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dpsb.federated.checks import FederatedError, check_choice, check_match, check_positive, check_whole, checked_fields
from dpsb.federated.messages import State, theta_digest
from dpsb.federated.spec import OPTIMIZERS, SILO_NAME, PaidBasis, PrivacyModel, RoundSpec, model_named
from dpsb.optimizers import SCHEDULES

SERVER_OPTIMIZERS = ("none", *OPTIMIZERS)


@dataclass(frozen=True, kw_only=True)
class SiloTerms:
    """What is asked of one silo.

    Args:
      sampling_prob: q.
      noise_multiplier: sigma; of the silo's own noise, or in ``trusted_server`` of the server's, the same for all.
      expected_batch_size: M, the silo's part of the divisor where sums are added up; of no use in ``silo_local``.
      basis: Its release for a basis that all silos pay for; None where the basis is public.
    """

    sampling_prob: float
    noise_multiplier: float
    expected_batch_size: int = 1
    basis: PaidBasis | None = None

    def __post_init__(self) -> None:
        check_positive(sampling_prob=self.sampling_prob, noise_multiplier=self.noise_multiplier)
        check_whole(1, expected_batch_size=self.expected_batch_size)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of a federation.

    Args:
      silos: Who may take part, by name; replies of others are never used.
      rounds: Number of rounds.
      model: Who is trusted with what.
      local_steps: Steps of each silo between two averages.
      l2_clip_norm: C.
      learning_rate: Of the cores: in the local steps, or in ``trusted_server`` on the server.
      head_learning_rate: Of a head.
      optimizer: Of the local steps, its state new in each round.
      momentum: Of ``"sgd"``.
      schedule: ``"constant"``, ``"linear"`` or ``"cosine"``: how learning rates fall from round to round: the
        server's where it has an optimizer, else those of the local steps.
      server_optimizer: ``"none"``: the next theta is the mean, which is Fed-SB. ``"sgd"`` or ``"adam"``: a step on the
        difference to the mean (in ``trusted_server``: on the noisy mean gradient), its state kept over the rounds.
      server_learning_rate: Of ``server_optimizer`` on the difference to the mean.
      min_silos: With fewer replies the round is not closed and the run stops; it can be resumed.
      attempts: How often a silo is asked in a round before it counts as lost.
      dropouts: t of ``secagg``: how many silos may be missing in a sum that is opened.
      colluders: k of ``secagg``: how many silos may help the server, at least 1.
      clip_steps: Of ``secagg`` with Skellam noise in whole numbers: how many of these C is long; 0: Gaussian noise.
      max_update_norm: Of ``silo_local``: replies that are further from theta than this are not used. A vector without
        noise of its own is not judged by its size, which would tell something of it.
    """

    silos: Mapping[str, SiloTerms]
    rounds: int
    model: PrivacyModel = PrivacyModel.SILO_LOCAL
    local_steps: int = 1
    l2_clip_norm: float = 1.0
    learning_rate: float = 0.05
    head_learning_rate: float = 0.1
    optimizer: str = "adam"
    momentum: float = 0.0
    schedule: str = "constant"
    server_optimizer: str = "none"
    server_learning_rate: float = 1.0
    min_silos: int = 2
    attempts: int = 2
    dropouts: int = 0
    colluders: int = 1
    clip_steps: int = 0
    max_update_norm: float = 1000.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "silos", dict(self.silos))
        object.__setattr__(self, "model", model_named(self.model))
        for name in self.silos:
            check_match(SILO_NAME, silo=name)
        check_whole(1, rounds=self.rounds, local_steps=self.local_steps, min_silos=self.min_silos)
        check_whole(1, attempts=self.attempts)
        check_positive(max_update_norm=self.max_update_norm, server_learning_rate=self.server_learning_rate)
        check_choice(SERVER_OPTIMIZERS, server_optimizer=self.server_optimizer)
        check_choice(tuple(SCHEDULES), schedule=self.schedule)
        check_whole(1, colluders=self.colluders)
        check_whole(0, dropouts=self.dropouts)
        if not 1 <= self.min_silos <= len(self.silos):
            raise FederatedError(f"Expected min_silos={self.min_silos!r} between 1 and the {len(self.silos)} silos.")
        if self.model is not PrivacyModel.SILO_LOCAL:
            self._check_summed()
        if len({terms.basis is None for terms in self.silos.values()}) > 1:
            raise FederatedError("Either all silos pay for the basis or none does.")
        if len({(b.width, b.source, b.frames_sha256) for each in self.silos.values() if (b := each.basis)}) > 1:
            raise FederatedError("All silos pay for the same basis, so that what they name must not differ.")
        for name in self.silos:
            self.spec(name, "0" * 32, 0, "0" * 64, "0" * 64)  # the other fields are checked there

    def _check_summed(self) -> None:
        if self.server_optimizer == "none":
            raise FederatedError(f"Model {self.model.value} needs server_optimizer 'sgd' or 'adam': the server steps.")
        if self.model is PrivacyModel.SECAGG and self.min_silos != len(self.silos) - self.dropouts:
            raise FederatedError(
                f"Model secagg opens sums of at least clients - dropouts = {len(self.silos) - self.dropouts} silos, so "
                f"min_silos={self.min_silos!r} must be just that."
            )
        noise = {terms.noise_multiplier for terms in self.silos.values()}
        if len(noise) != 1:
            raise FederatedError(f"Model {self.model.value} has one noise, not noise_multiplier={sorted(noise)}.")

    def spec(
        self, silo: str, run_id: str, number: int, theta_sha256: str, basis_sha256: str, stage: str = "train"
    ) -> RoundSpec:
        """A round as it is asked of a silo; or its release for the basis."""
        asked = self.silos[silo]
        factor = self.factor(number) if self.server_optimizer == "none" else 1.0
        return RoundSpec(
            run_id=run_id,
            round=number,
            rounds=self.rounds,
            theta_sha256=theta_sha256,
            basis_sha256=basis_sha256,
            model=self.model,
            local_steps=self.local_steps,
            sampling_prob=asked.sampling_prob,
            l2_clip_norm=self.l2_clip_norm,
            noise_multiplier=asked.noise_multiplier,
            learning_rate=self.learning_rate * factor,
            head_learning_rate=self.head_learning_rate * factor,
            optimizer=self.optimizer,
            momentum=self.momentum,
            clients=len(self.silos),
            dropouts=self.dropouts,
            colluders=self.colluders,
            clip_steps=self.clip_steps,
            basis=asked.basis,
            stage=stage,
        )

    def factor(self, number: int) -> float:
        """What the learning rates of a round are multiplied with."""
        return SCHEDULES[self.schedule](number / self.rounds)

    def specs(
        self, run_id: str, number: int, theta: State, basis_sha256: str, stage: str = "train"
    ) -> dict[str, RoundSpec]:
        """A round as it is asked of all silos."""
        digest = theta_digest(theta)
        return {silo: self.spec(silo, run_id, number, digest, basis_sha256, stage) for silo in self.silos}

    @property
    def basis_is_paid(self) -> bool:
        """Whether the silos' releases make the basis."""
        return any(terms.basis is not None for terms in self.silos.values())

    @property
    def noise_multiplier(self) -> float:
        """Of the noise of a sum, in the models that have sums."""
        return next(iter(self.silos.values())).noise_multiplier

    def to_json(self) -> dict[str, Any]:
        """The terms as JSON."""
        return {**asdict(self), "model": self.model.value}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Terms:
        """The inverse of :meth:`to_json`; refuses unknown and missing fields."""
        values = checked_fields(cls, content, "the terms of a federation")
        silos = {name: _silo_terms(name, terms) for name, terms in values["silos"].items()}
        return cls(**{**values, "silos": silos})


def _silo_terms(name: str, content: Mapping[str, Any]) -> SiloTerms:
    values = checked_fields(SiloTerms, content, f"silo {name!r}")
    if values.get("basis") is not None:
        values["basis"] = PaidBasis(**checked_fields(PaidBasis, values["basis"], "a paid basis"))
    return SiloTerms(**values)


def differing(one: Terms, other: Terms) -> list[str]:
    """The names of the fields in which terms differ."""
    return [field.name for field in fields(Terms) if getattr(one, field.name) != getattr(other, field.name)]
