"""Claim: somebody's statement about the privacy of a training run, as small frozen facts.

Every field may be left out: what a claim does not say is a finding, not a reading error. What it does say must make
sense, or reading it stops with one sentence. `FIELDS` is the one list of the fields; the reader, the example and the
test of the documentation use it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dpsb_accounting import _checks

MOST_CLIENTS = 1000
PARTS = ("adapter", "head", "embeddings", "norms", "whole_model", "other")


class ClaimError(ValueError):
    """A claim that cannot be read; one sentence."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a claim: its name, a check that returns the value, what it means, and other names for it."""

    name: str
    check: Callable[[str, object], object]
    meaning: str
    synonyms: tuple[str, ...] = ()


def _positive(name: str, value: object) -> object:
    return _checks.positive(infinite=False, **{name: value})


def _epsilon(name: str, value: object) -> object:
    return _checks.nonnegative(infinite=True, **{name: math.inf if value in ("inf", "infinity") else value})


def _delta(name: str, value: object) -> object:
    result = _checks.nonnegative(infinite=False, **{name: value})
    if result >= 1:
        raise ValueError(f"{name} must be below 1, not {value!r}")
    return result


def _noise(name: str, value: object) -> object:
    return _checks.nonnegative(infinite=False, **{name: value})


def _probability(name: str, value: object) -> object:
    return _checks.probability(open_interval=False, **{name: value})


def _count(name: str, value: object) -> object:
    result = _checks.whole(at_least=1, **{name: value})
    if result > 10**15:
        raise ValueError(f"{name} must be at most 10**15, not {str(value)[:40]}")
    return result


def _text(name: str, value: object) -> object:
    if isinstance(value, str) and len(value) > 500:
        raise ValueError(f"{name} must be at most 500 characters long, not {len(value)}")
    return _checks.text(**{name: value})


def _flag(name: str, value: object) -> object:
    return _checks.flag(**{name: value})


def _whole_number(name: str, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {str(value)[:40]!r}")
    return value


def _one_of(*choices: str, **aliases: str) -> Callable[[str, object], object]:
    def check(name: str, value: object) -> object:
        word = value.strip().lower().replace("-", "_").replace(" ", "_") if isinstance(value, str) else value
        word = aliases.get(word, word) if isinstance(word, str) else word
        return _checks.one_of(choices=choices, **{name: word if word in choices else value})

    return check


def _parts(name: str, value: object) -> object:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"{name} must be a list of parts, not {str(value)[:60]!r}")
    return tuple(str(_checks.one_of(choices=PARTS, **{name: entry})) for entry in entries)


def _taints(name: str, value: object) -> object:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of names, not {str(value)[:60]!r}")
    return tuple(str(_text(name, entry)) for entry in value)


FIELDS: tuple[Field, ...] = (
    Field("title", _text, "what the claim is about, in a few words", ("name", "model")),
    Field("epsilon", _epsilon, 'the epsilon that is claimed; "inf" for none', ("eps", "claimed_epsilon")),
    Field("delta", _delta, "the delta that is claimed", ("claimed_delta",)),
    Field("calibrated_delta", _delta, "the delta for which the noise was chosen, if it is another one"),
    Field("neighboring", _one_of(*_checks.RELATIONS, add_remove="add_or_remove_one", add_or_remove="add_or_remove_one",
          unbounded="add_or_remove_one", replace="replace_one", substitution="replace_one", bounded="replace_one",
          replace_special="zero_out"),
          "add_or_remove_one, zero_out or replace_one", ("adjacency", "neighbouring", "neighboring_relation")),
    Field("unit", _one_of("example", "user", "client", record="example", sample="example", person="user"),
          "what is protected: example, user or client", ("privacy_unit", "unit_of_privacy")),
    Field("examples_per_unit", _count,
          "most examples that one unit has in the data; 1 where all of a unit's examples are drawn and clipped as one",
          ("examples_per_user",)),
    Field("group_charged", _flag, "whether epsilon already accounts for all examples of a unit"),
    Field("num_examples", _count, "number of records in the training data", ("n", "dataset_size", "num_records")),
    Field("batch_size", _positive, "records in a noisy step: expected number with Poisson sampling, else the number",
          ("expected_batch_size", "logical_batch_size")),
    Field("sampling_prob", _probability, "probability with which the sampler drew each record in a step",
          ("sample_rate", "sampling_rate", "sampling_probability", "q")),
    Field("epochs", _positive, "passes over the data", ("num_epochs", "num_train_epochs")),
    Field("steps", _count, "number of noisy steps charged", ("num_steps", "max_steps", "iterations")),
    Field("planned_steps", _count, "number of steps planned, if the run stopped before"),
    Field("stopped", _one_of("as_planned", "data_dependent", early_stopping="data_dependent"),
          "as_planned, or data_dependent if the data decided when to stop"),
    Field("noise_multiplier", _noise, "standard deviation of the noise on the sum, divided by the clip norm",
          ("sigma", "noise_scale")),
    Field("noise_std", _noise, "standard deviation of the noise on the clipped sum"),
    Field("l2_clip_norm", _positive, "L2 norm to which each record's gradient is clipped",
          ("clip_norm", "max_grad_norm", "clipping_norm", "clipping_threshold")),
    Field("sampler", _one_of("poisson", "shuffle", "fixed_order", "without_replacement", "unknown", shuffled="shuffle",
          sequential="fixed_order"),
          "how batches were really drawn: poisson, shuffle, fixed_order, without_replacement (a fresh fixed-size "
          "batch each step) or unknown", ("sampling", "batch_sampling")),
    Field("reshuffled", _flag, "with shuffle: whether each epoch had a new order (assumed if left out)"),
    Field("drop_last", _flag, "whether the last incomplete batch of an epoch was dropped"),
    Field("max_batch_size", _count, "cap on the size of a Poisson batch, beyond which records were left out",
          ("truncated_batch_size",)),
    Field("microbatches_drawn", _count, "how many micro-batches, each with a Poisson draw of its own at sampling_prob, "
          "were summed in one noisy step"),
    Field("empty_batches", _one_of("step", "skipped", "invented_example", "unhandled"),
          "what an empty draw does: step (noise only), skipped, invented_example or unhandled"),
    Field("accountant", _one_of("pld", "prv", "rdp", "gaussian", "gdp_clt", "moments", "other", gdp="gdp_clt",
          glw="prv", clt="gdp_clt", moments_accountant="moments", renyi="rdp", exact_gaussian="gaussian"),
          "what computed epsilon: pld, prv, rdp, moments, gaussian, gdp_clt or other", ("accounting",)),
    Field("tuning_runs", _count, "training runs on these data in all, the published one included",
          ("runs", "num_runs", "training_runs")),
    Field("tuning_charged", _flag, "whether epsilon covers all of these runs"),
    Field("model_selection", _one_of("none", "public_data", "held_out_private", "training_data"),
          "on what settings or checkpoints were chosen: none, public_data, held_out_private or training_data"),
    Field("basis", _one_of("none", "data_free", "public", "private_release", "private_raw", released="private_release",
          non_private="private_raw", random="data_free", weight_svd="data_free"),
          "where the initial (frozen) factors come from: none, data_free, public, private_release (noised) or "
          "private_raw (un-noised private data)", ("init", "init_data")),
    Field("basis_computed_by", _one_of("client", "server_on_pooled_data", "server_on_public_data"),
          "who saw the data of the basis: client, server_on_pooled_data or server_on_public_data"),
    Field("basis_noise_multiplier", _noise, "noise multiplier of a private_release"),
    Field("basis_sampling_prob", _probability, "sampling probability of a private_release (1 if left out)"),
    Field("basis_count", _count, "number of such releases (1 if left out)"),
    Field("basis_charged", _flag, "whether epsilon covers the basis"),
    Field("noise_source", _one_of("operating_system", "secure_generator", "global_generator", "seeded", "unknown"),
          "randomness of noise and draws: operating_system, secure_generator, global_generator (a framework's "
          "default), seeded or unknown"),
    Field("seed", _whole_number, "the seed, where noise or draws came from one", ("noise_seed", "random_seed")),
    Field("noise_shared_between_clients", _flag, "whether clients drew the same noise"),
    Field("noise_added", _one_of("once_per_step", "per_microbatch", "none"),
          "once_per_step, per_microbatch or none"),
    Field("clipping", _one_of("per_unit", "per_microbatch", "whole_batch", "none", per_example="per_unit",
          flat="per_unit", automatic="per_unit", per_user="per_unit"),
          "what is clipped: per_unit (each example or user), per_microbatch, whole_batch or none"),
    Field("divisor", _one_of("expected_batch_size", "drawn_size", "num_examples"),
          "by what the noisy sum is divided: expected_batch_size, drawn_size, or num_examples times the rate"),
    Field("loss", _one_of("per_example", "token_mean", "batch_coupled"),
          "per_example, token_mean (mean over all tokens of a batch) or batch_coupled (contrastive and such)"),
    Field("batch_norm", _flag, "whether a layer uses statistics of the batch"),
    Field("trained", _parts, f"parts that were trained: {', '.join(PARTS)}"),
    Field("clipped", _parts, "parts whose gradients were clipped and noised"),
    Field("raw_metrics", _one_of("none", "kept_local", "released"),
          "un-noised training losses, sizes and such: none, kept_local or released (a tracking service counts)"),
    Field("rounds", _count, "federated: number of rounds"),
    Field("rounds_charged", _count, "federated: number of rounds that `steps` or `epochs` cover (all if left out)"),
    Field("silos_per_person", _count, "federated: in how many clients one person may have records"),
    Field("reported_client", _text, "federated: whose epsilon is claimed: maximum, last, first, mean or a name"),
    Field("taints", _taints, "what voids the run, by its own report"),
    Field("makes_claim", _flag, "false if the report itself says that no claim can be made"),
)  # fmt: skip
CLIENT_FIELDS = (
    "epsilon", "delta", "num_examples", "batch_size", "sampling_prob", "epochs", "steps", "noise_multiplier",
    "examples_per_unit",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """One client of a federated claim; what it leaves out is as in the claim. See `CLIENT_FIELDS`."""

    name: str
    epsilon: float | None = None
    delta: float | None = None
    num_examples: int | None = None
    batch_size: float | None = None
    sampling_prob: float | None = None
    epochs: float | None = None
    steps: int | None = None
    noise_multiplier: float | None = None
    examples_per_unit: int | None = None

    def __post_init__(self) -> None:
        _text("name of a client", self.name)
        _check_all(self, [field for field in FIELDS if field.name in CLIENT_FIELDS], f"client {self.name!r}: ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What somebody says about a training run; a field left out is None. `FIELDS` says what each one means.

    Raises:
        ClaimError: If a value makes no sense; the message names the field and shows the value.

    Example:
        >>> Claim(epsilon=3, delta=1e-5).epsilon
        3.0
    """

    title: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    calibrated_delta: float | None = None
    neighboring: str | None = None
    unit: str | None = None
    examples_per_unit: int | None = None
    group_charged: bool | None = None
    num_examples: int | None = None
    batch_size: float | None = None
    sampling_prob: float | None = None
    epochs: float | None = None
    steps: int | None = None
    planned_steps: int | None = None
    stopped: str | None = None
    noise_multiplier: float | None = None
    noise_std: float | None = None
    l2_clip_norm: float | None = None
    sampler: str | None = None
    reshuffled: bool | None = None
    drop_last: bool | None = None
    max_batch_size: int | None = None
    microbatches_drawn: int | None = None
    empty_batches: str | None = None
    accountant: str | None = None
    tuning_runs: int | None = None
    tuning_charged: bool | None = None
    model_selection: str | None = None
    basis: str | None = None
    basis_computed_by: str | None = None
    basis_noise_multiplier: float | None = None
    basis_sampling_prob: float | None = None
    basis_count: int | None = None
    basis_charged: bool | None = None
    noise_source: str | None = None
    seed: int | None = None
    noise_shared_between_clients: bool | None = None
    noise_added: str | None = None
    clipping: str | None = None
    divisor: str | None = None
    loss: str | None = None
    batch_norm: bool | None = None
    trained: tuple[str, ...] | None = None
    clipped: tuple[str, ...] | None = None
    raw_metrics: str | None = None
    rounds: int | None = None
    rounds_charged: int | None = None
    silos_per_person: int | None = None
    reported_client: str | None = None
    taints: tuple[str, ...] | None = None
    makes_claim: bool | None = None
    clients: tuple[Client, ...] = ()

    def __post_init__(self) -> None:
        _check_all(self, FIELDS, "")
        if not isinstance(self.clients, tuple) or not all(isinstance(client, Client) for client in self.clients):
            raise ClaimError("clients must be a tuple of Client")
        if len(self.clients) > MOST_CLIENTS:
            raise ClaimError(f"clients must be at most {MOST_CLIENTS}, not {len(self.clients)}")
        if len({client.name for client in self.clients}) != len(self.clients):
            raise ClaimError("clients must have different names")

    def of_client(self, client: Client) -> Claim:
        """Returns the claim as it stands for one client, whose own facts come before the common ones."""
        own = {name: getattr(client, name) for name in CLIENT_FIELDS if getattr(client, name) is not None}
        if {"batch_size", "num_examples"} & set(own):  # a common rate or step count is not this client's
            own.setdefault("sampling_prob", None)
            if "epochs" in own or self.epochs is not None:
                own.setdefault("steps", None)
        return dataclasses.replace(self, clients=(), **own)


def _check_all(owner: Claim | Client, fields: tuple[Field, ...] | list[Field], where: str) -> None:
    for field in fields:
        value = getattr(owner, field.name)
        if value is not None:
            try:
                object.__setattr__(owner, field.name, field.check(field.name, value))
            except ValueError as error:
                raise ClaimError(f"{where}{_short(str(error))}") from None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


def example() -> str:
    """Returns a template of a claim in TOML, with an honest run filled in."""
    values: Mapping[str, object] = _EXAMPLE
    meanings = {field.name: field.meaning for field in FIELDS}
    lines = ["# A claim for `dpsb-accounting lint`: leave out what nobody told you.", ""]
    for name, value in values.items():
        shown = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
        lines.append(f"{name} = {shown}".ljust(38) + f" # {meanings[name]}")
    return "\n".join(lines) + "\n"


_EXAMPLE: Mapping[str, object] = {
    "title": "support-chat adapter",
    "epsilon": 2.13,
    "delta": 1e-06,
    "neighboring": "add_or_remove_one",
    "unit": "example",
    "examples_per_unit": 1,
    "num_examples": 100000,
    "batch_size": 1000,
    "sampling_prob": 0.01,
    "epochs": 10,
    "steps": 1000,
    "noise_multiplier": 1.0,
    "l2_clip_norm": 1.0,
    "sampler": "poisson",
    "empty_batches": "step",
    "accountant": "pld",
    "tuning_runs": 1,
    "model_selection": "none",
    "basis": "data_free",
    "noise_source": "operating_system",
    "noise_added": "once_per_step",
    "clipping": "per_unit",
    "divisor": "expected_batch_size",
    "loss": "per_example",
    "batch_norm": False,
    "trained": ["adapter"],
    "clipped": ["adapter"],
    "raw_metrics": "none",
    "stopped": "as_planned",
}
