"""What a server may ask of a silo, and the limits that a silo keeps, whatever is asked.

The server's :class:`RoundSpec` is executed exactly or refused, never bent. The silo's :class:`SiloPolicy` is a file on
the silo's own disk that no message can change: the server may be stricter, never laxer.
"""

from __future__ import annotations

import enum
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from dpsb.basis_spec import BASIS_CLIP_NORMS
from dpsb.federated.checks import (
    FederatedError,
    check_choice,
    check_match,
    check_positive,
    check_whole,
    checked_fields,
)

POLICY_NAME = "policy.toml"
RUN_ID = re.compile(r"[0-9a-f]{32}")
SHA256 = re.compile(r"[0-9a-f]{64}")
SOURCE_LENGTH = 500
_NOTHING, _SOURCE = re.compile(""), re.compile(rf"[ -~]{{1,{SOURCE_LENGTH}}}")
SILO_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
OPTIMIZERS = ("sgd", "adam")
RELATIONS = ("add_or_remove_one", "zero_out", "replace_one")
_FASTEST = 1e38  # a rate that no float32 holds would be charged for and fail


class SpecRefused(FederatedError):
    """A round that a silo's policy does not allow. Nothing was charged and no data were read."""


class PrivacyModel(enum.StrEnum):
    """Who is trusted with what; the names are those of ``dpsb_accounting.federated``.

    ``silo_local``: each silo adds its own noise, nobody else is trusted. ``secagg``: noise in shares, only sums are
    opened. ``client_level``: whole silos are hidden. ``trusted_server``: the server sees sums and adds the noise.
    """

    SILO_LOCAL = "silo_local"
    SECAGG = "secagg"
    CLIENT_LEVEL = "client_level"
    TRUSTED_SERVER = "trusted_server"


@dataclass(frozen=True, kw_only=True)
class PaidBasis:
    """One release of noisy clipped gradients by each silo, for a basis of all; see :mod:`dpsb.federated.paid_basis`.

    Args:
      noise_multiplier: Of that release.
      l2_clip_norm: Of the gradients of all weights together; ``clipping`` is ``"flat"`` or ``"automatic"``.
      share: Of the silo's budget, as it was asked for.
      width: K of the wide public basis whose cores are released; 0: whole gradients.
      source: What that basis was made from, for the plan; ``frames_sha256`` is its digest.
    """

    noise_multiplier: float
    l2_clip_norm: float = 1.0
    clipping: str = "automatic"
    share: float = 0.1
    width: int = 0
    source: str = ""
    frames_sha256: str = ""

    def __post_init__(self) -> None:
        check_positive(noise_multiplier=self.noise_multiplier, l2_clip_norm=self.l2_clip_norm, share=self.share)
        check_choice(("flat", "automatic"), clipping=self.clipping)
        low, high = BASIS_CLIP_NORMS
        if not low <= self.l2_clip_norm <= high:
            raise FederatedError(
                f"Expected the basis' l2_clip_norm={self.l2_clip_norm!r} between {low:g} and {high:g}."
            )
        check_whole(0, width=self.width)
        check_match(SHA256 if self.width else _NOTHING, frames_sha256=self.frames_sha256)
        check_match(_SOURCE if self.width else _NOTHING, source=self.source)


@dataclass(frozen=True, kw_only=True)
class RoundSpec:
    r"""One round as the server asks one silo for it. Public, all of it.

    In model ``silo_local`` the silo does ``local_steps`` steps on its own data from the theta that the message holds:
    :math:`\theta \leftarrow \mathrm{opt}(\theta, (\sum_{i \in \text{draw}} \mathrm{clip}_C(g_i) + N(0, (\sigma C)^2
    I)) / M)` with every draw Poisson(q), and sends the theta it arrives at.

    Args:
      run_id: The federation's run, 32 hexadecimal digits.
      round: Number of the round, from 0.
      rounds: How many rounds the run has.
      theta_sha256: :func:`~dpsb.federated.messages.theta_digest` of the theta to start from.
      basis_sha256: :func:`~dpsb.federated.messages.basis_digest` of the frozen factors; silos on another basis refuse.
      model: Who is trusted with what.
      local_steps: Steps between two aggregations.
      sampling_prob: q in (0, 1], of each example in each step.
      l2_clip_norm: C.
      noise_multiplier: sigma, noise standard deviation divided by C: of the silo's own noise in ``silo_local``, of the
        server's in ``trusted_server`` and ``client_level``, and in ``secagg`` of what is certainly in an opened sum.
      learning_rate: Of the cores in the local steps.
      head_learning_rate: Of a head in the local steps.
      optimizer: ``"sgd"`` or ``"adam"``; its state begins anew in each round.
      momentum: Of ``"sgd"``.
      clients: K, how many silos a sum has; of use in ``secagg`` and ``client_level``.
      dropouts: t, how many of them may be missing in a sum that is opened; ``secagg``.
      colluders: k, how many may tell the server their share of the noise, at least 1; ``secagg``.
      clip_steps: How many whole numbers C is long, where ``secagg`` adds Skellam noise in whole numbers under masks; 0:
        Gaussian noise, and whoever adds up is trusted.
      basis: The release that pays for the basis, in every round of the run; None where it is public. ``silo_local``.
      stage: ``"train"``, or ``"basis"``: that release, before round 0.

    Raises:
      FederatedError: If a field is out of range.
    """

    run_id: str
    round: int
    rounds: int
    theta_sha256: str
    basis_sha256: str
    model: PrivacyModel = PrivacyModel.SILO_LOCAL
    local_steps: int = 1
    sampling_prob: float
    l2_clip_norm: float = 1.0
    noise_multiplier: float
    learning_rate: float = 0.05
    head_learning_rate: float = 0.1
    optimizer: str = "adam"
    momentum: float = 0.0
    clients: int = 1
    dropouts: int = 0
    colluders: int = 1
    clip_steps: int = 0
    basis: PaidBasis | None = None
    stage: str = "train"

    def __post_init__(self) -> None:
        check_match(RUN_ID, run_id=self.run_id)
        check_match(SHA256, theta_sha256=self.theta_sha256, basis_sha256=self.basis_sha256)
        object.__setattr__(self, "model", model_named(self.model))
        check_whole(1, rounds=self.rounds, local_steps=self.local_steps)
        check_whole(0, round=self.round)
        if self.round >= self.rounds:
            raise FederatedError(f"Expected round={self.round!r} below rounds={self.rounds!r}.")
        positive = ("sampling_prob", "l2_clip_norm", "noise_multiplier", "learning_rate", "head_learning_rate")
        check_positive(**{name: getattr(self, name) for name in positive})
        for name, most in (("sampling_prob", 1), ("learning_rate", _FASTEST), ("head_learning_rate", _FASTEST)):
            if getattr(self, name) > most:
                raise FederatedError(f"Expected {name}={getattr(self, name)!r} of at most {most:g}.")
        check_choice(OPTIMIZERS, optimizer=self.optimizer)
        if not isinstance(self.momentum, (int, float)) or not 0 <= self.momentum < 1:
            raise FederatedError(f"Expected momentum={self.momentum!r} between 0 and 1.")
        check_whole(1, clients=self.clients, colluders=self.colluders)
        check_whole(0, dropouts=self.dropouts, clip_steps=self.clip_steps)
        if self.model in (PrivacyModel.TRUSTED_SERVER, PrivacyModel.SECAGG) and self.local_steps != 1:
            raise FederatedError(
                f"In model {self.model.value} a round is one gradient release, not local_steps={self.local_steps!r}: "
                "after a second step the noise of the sum no longer bounds what an example changes."
            )
        if self.model is PrivacyModel.SECAGG and self.honest < 1:
            raise FederatedError(
                f"Of clients={self.clients!r} none is left that certainly adds noise, with dropouts={self.dropouts!r} "
                f"and colluders={self.colluders!r}."
            )
        if self.clip_steps:
            self._check_whole_numbers()
        check_choice(("train", "basis"), stage=self.stage)
        if self.basis is not None and self.model is not PrivacyModel.SILO_LOCAL:
            raise FederatedError(f"A paid basis is of silo_local, not of model {self.model.value}.")
        if self.stage == "basis" and (self.basis is None or self.round):
            raise FederatedError("The stage of the basis comes before round 0 of a run that pays for one.")
        if self.model is PrivacyModel.CLIENT_LEVEL and self.clients < 2:
            raise FederatedError(f"Model client_level hides one of several clients, not of clients={self.clients!r}.")

    def _check_whole_numbers(self) -> None:
        if self.model is not PrivacyModel.SECAGG:
            raise FederatedError(f"clip_steps={self.clip_steps!r} is of secagg, not of model {self.model.value}.")
        if 2 * (self.clients - self.dropouts) <= self.clients + self.colluders:
            raise FederatedError(
                f"With clients={self.clients!r}, dropouts={self.dropouts!r} and colluders={self.colluders!r} a server "
                "could have two different sums of the same vectors opened: 2 (clients - dropouts) must exceed clients "
                "+ colluders."
            )

    @property
    def position(self) -> int:
        """What receipts call the round; the release for the basis has a number of its own, past the last."""
        return self.rounds if self.stage == "basis" else self.round

    @property
    def honest(self) -> int:
        """c - t - k: how many shares of the noise are certainly in an opened sum and unknown."""
        return self.clients - self.dropouts - self.colluders

    @property
    def charges(self) -> int:
        """What a round costs a silo: one charge for each step, or for the whole update where that is clipped."""
        return 1 if self.model is PrivacyModel.CLIENT_LEVEL or self.stage == "basis" else self.local_steps

    @property
    def digest(self) -> str:
        """SHA-256 of all fields."""
        return sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The specification as JSON."""
        return {**asdict(self), "model": self.model.value}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RoundSpec:
        """The inverse of :meth:`to_json`; refuses unknown and missing fields."""
        values = checked_fields(cls, content, "a round's specification")
        if values.get("basis") is not None:
            values["basis"] = PaidBasis(**checked_fields(PaidBasis, values["basis"], "a paid basis"))
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class SiloPolicy:
    """What a silo allows at most, whoever asks; read from a local TOML file with these keys.

    Args:
      silo: The silo's public name.
      max_epsilon: Largest epsilon for one example over *all* runs that the silo's folder has ledgers of.
      delta: At which that holds; below 1 / N.
      num_examples: A declared public N. Without it the silo's true number of examples counts as public.
      neighboring: Relation; by default ``add_or_remove_one`` where N is declared, else ``zero_out``.
      min_noise_multiplier: Least sigma of a step, and of the release for a paid basis.
      max_sampling_prob: Largest q.
      max_rounds: Most rounds of a run.
      max_local_steps: Most steps in a round.
      spare_rounds: Rounds' worth of steps that the silo plans and pays for besides, to make up for rounds that a
        crash, or a server that asks twice, wastes.
      models: Privacy models the silo takes part in. Only ``silo_local`` protects it against the server.
      clients: K of ``secagg``, which the silo must know from elsewhere: a server that says there are more silos than
        there are would make every silo's share of the noise too small.
      min_clients: Least K - t, the parties of an opened sum, in ``secagg``.
      min_colluders: Least k in ``secagg``.
      runs: Ids of the runs that it takes part in; empty: any, within ``max_epsilon``.
      examples_together: Whether several examples may pass through the model at once. Faster, and what one example
        changes is then C only as far as rounding lets it: the theta of a lying server can blow rounding up until
        removing an example moves its neighbours' rows too. Without it no theta can.
      peers: By name the public keys, 64 hexadecimal digits, of the other silos of a secure sum (``secagg`` with integer
        noise), which the silo must have from these and not from the server: who gives it other keys, reads its vector.
        With peers, ``secagg`` without masks is refused.

    Raises:
      FederatedError: If a field is out of range.
    """

    silo: str
    max_epsilon: float
    delta: float
    num_examples: int | None = None
    neighboring: str | None = None
    min_noise_multiplier: float = 0.3
    max_sampling_prob: float = 1.0
    max_rounds: int = 1000
    max_local_steps: int = 1000
    spare_rounds: int = 0
    models: tuple[str, ...] = (PrivacyModel.SILO_LOCAL.value,)
    clients: int | None = None
    min_clients: int = 3
    min_colluders: int = 1
    runs: tuple[str, ...] = ()
    examples_together: bool = False
    peers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_match(SILO_NAME, silo=self.silo)
        check_positive(
            max_epsilon=self.max_epsilon,
            delta=self.delta,
            min_noise_multiplier=self.min_noise_multiplier,
            max_sampling_prob=self.max_sampling_prob,
        )
        for name in ("delta", "max_sampling_prob"):
            if getattr(self, name) > 1 or (name == "delta" and self.delta == 1):
                raise FederatedError(f"Expected {name}={getattr(self, name)!r} to be a probability.")
        check_whole(1, max_rounds=self.max_rounds, max_local_steps=self.max_local_steps)
        check_whole(1, min_colluders=self.min_colluders)
        check_whole(2, min_clients=self.min_clients)
        check_whole(0, spare_rounds=self.spare_rounds)
        for least, name in ((2, "clients"), (1, "num_examples")):
            if getattr(self, name) is not None:
                check_whole(least, **{name: getattr(self, name)})
        check_choice((None, *RELATIONS), neighboring=self.neighboring)
        if not isinstance(self.examples_together, bool):
            raise FederatedError(f"Expected examples_together={self.examples_together!r} to be true or false.")
        for name in ("models", "runs"):
            if isinstance(getattr(self, name), str) or not isinstance(getattr(self, name), (tuple, list)):
                raise FederatedError(f"Expected {name}={getattr(self, name)!r} to be a list of texts.")
        object.__setattr__(self, "models", tuple(model_named(model).value for model in self.models))
        for run in self.runs:
            check_match(RUN_ID, runs=run)
        object.__setattr__(self, "runs", tuple(self.runs))
        if not isinstance(self.peers, Mapping):
            raise FederatedError(f"Expected peers={self.peers!r} to be a table of names and public keys.")
        object.__setattr__(self, "peers", dict(self.peers))
        for name, key in self.peers.items():
            check_match(SILO_NAME, peers=name)
            check_match(SHA256, **{f"peers.{name}": key})

    @property
    def relation(self) -> str:
        """The relation of the silo's guarantee."""
        return self.neighboring or ("zero_out" if self.num_examples is None else "add_or_remove_one")

    @property
    def lets_examples_together(self) -> bool:
        """Whether several examples may go through the model at once: always where the server sees raw sums anyway."""
        return self.examples_together or set(self.models) <= {PrivacyModel.TRUSTED_SERVER, PrivacyModel.CLIENT_LEVEL}

    def check(self, spec: RoundSpec) -> None:
        """Refuses a round that is laxer than the policy. What the round would cost is checked by the silo's ledgers.

        Raises:
          SpecRefused: Naming the field, what was asked and what is allowed.
        """
        basis_noise = math.inf if spec.basis is None else spec.basis.noise_multiplier
        for asked, value, limit, wrong in (
            ("noise_multiplier", spec.noise_multiplier, self.min_noise_multiplier, "at least"),
            ("a basis' noise_multiplier", basis_noise, self.min_noise_multiplier, "at least"),
            ("sampling_prob", spec.sampling_prob, self.max_sampling_prob, "at most"),
            ("rounds", spec.rounds, self.max_rounds, "at most"),
            ("local_steps", spec.local_steps, self.max_local_steps, "at most"),
        ):
            if value < limit if wrong == "at least" else value > limit:
                raise SpecRefused(f"Silo {self.silo!r} wants {asked} of {wrong} {limit:g}, not {value:g}.")
        if spec.model.value not in self.models:
            raise SpecRefused(
                f"The policy of silo {self.silo!r} allows the models {', '.join(self.models)}, not {spec.model.value}."
            )
        if spec.model is PrivacyModel.SECAGG:
            self._check_sum(spec)
        if self.runs and spec.run_id not in self.runs:
            raise SpecRefused(f"The policy of silo {self.silo!r} does not allow the run {spec.run_id}.")

    def _check_sum(self, spec: RoundSpec) -> None:
        least = spec.clients - spec.dropouts
        if self.clients is None or spec.clients != self.clients:
            raise SpecRefused(
                f"The policy of silo {self.silo!r} knows of clients={self.clients!r} in a sum, not of {spec.clients}; "
                "its share of the noise depends on that number."
            )
        if least < self.min_clients:
            raise SpecRefused(f"Silo {self.silo!r} wants sums of at least {self.min_clients} parties, not {least}.")
        if spec.colluders < self.min_colluders:
            raise SpecRefused(
                f"Silo {self.silo!r} wants colluders of at least {self.min_colluders}, not {spec.colluders}."
            )
        if self.peers and not spec.clip_steps:
            raise SpecRefused(
                f"The policy of silo {self.silo!r} has other silos' public keys, so it is in secure sums alone: "
                "without clip_steps its vector would leave it without masks, with a share of the noise for all."
            )
        if spec.clip_steps and len(set(self.peers) | {self.silo}) != spec.clients:
            raise SpecRefused(
                f"The policy of silo {self.silo!r} has the public keys of {len(set(self.peers) - {self.silo})} other "
                f"silos; a secure sum of {spec.clients} takes those of all others, got from these themselves."
            )

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON, without what is not set."""
        content = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {name: value for name, value in content.items() if value is not None and value != {}}


def read_policy(path: Path) -> SiloPolicy:
    """The policy in a TOML file.

    Raises:
      FederatedError: If the file is missing or malformed, or a key is unknown, missing or out of range.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise FederatedError(f"{path} cannot be read as a silo's policy: {error}") from None
    return SiloPolicy(**checked_fields(SiloPolicy, content, str(path)))


def model_named(name: Any) -> PrivacyModel:
    """The privacy model of a name."""
    try:
        return PrivacyModel(name)
    except ValueError:
        known = ", ".join(model.value for model in PrivacyModel)
        raise FederatedError(f"Expected model={name!r} to be one of {known}.") from None
