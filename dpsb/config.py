"""Everything a user may set for a run, in one frozen object; from TOML or from the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

from dpsb.baselines.methods import MethodError, method_named
from dpsb.basis_spec import BASIS_CLIP_NORMS, BASIS_SETTINGS, BasisSpecError, check_share, parse_basis, settings_for
from dpsb.parts import part_of, same_data
from dpsb.public_rows import warm_start_fault

_SCHEDULES = ("constant", "linear", "cosine")
_OPTIMIZERS = ("adam", "adamw", "adam-corrected", "sgd")
TASKS = ("classification", "causal-lm")
_POOLINGS = ("auto", "native", "mean")
_DTYPES = ("float32", "bfloat16")
_CHOICES = ("public", "private")


class ConfigError(ValueError):
    """A setting that is unknown, missing or out of range; the message names it."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of one private fine-tune. All of them are public: they go into the ledger.

    Args:
      model: Folder, Hub id, ``"minilm"`` (embedded) or ``"smollm2"`` (see :mod:`dpsb.packaged`).
      data: Training file, data set folder or Hub id. Sensitive content, public name.
      out: Folder of the run.
      task: ``"classification"`` or ``"causal-lm"``.
      eval_data: Held-out file for metrics that lie outside the guarantee.
      epsilon: Target; ``inf`` trains without clipping and noise and claims nothing.
      delta: By default 1 / (10 * N).
      num_examples: A declared public N. Without it the true number of rows counts as public.
      neighboring: Relation; by default add_or_remove_one if N is declared, otherwise zero_out.
      steps: Number of steps T, or
      epochs: expected passes over the data (10 if neither is given).
      expected_batch_size: Public M; q = M / N.
      l2_clip_norm: C.
      auto_clip: AUTO-S instead of flat clipping.
      adaptive_clip: Let C follow this quantile of the rows' norms, privately: each step also releases a noisy count,
        which the plan's event accounts for. C is then where it starts.
      head_share: Share of C squared that is the classification head's own: head and adapter are then clipped apart, so
        that neither crowds out the other. By default a row is clipped as a whole.
      unit_column: Protect people, not examples: the column that says whose an example is. N then counts people.
      examples_per_unit: With ``unit_column``: at most so many examples of a person are read in a step.
      method: ``"sb"`` (this package's R-only), or a baseline: see ``dpsb.baselines.methods``; ``"peft:eva:FILE"`` and
        ``"peft:lora_ga:FILE"`` start from a public file.
      lora_plus_ratio: For ``"lora-plus"``: learning rate of B divided by that of A.
      rank: r of the cores.
      basis: ``"weight"``, ``"random"``, ``"public:FILE,..."``, ``"private"``, ``"hybrid:FILE"`` ...; see
        :mod:`dpsb.basis_spec`.
      basis_share: Share of the budget for a private release of the basis, 0.0001 to 0.9; by default 0.1 (0.05 from
        epsilon 3) for ``"private"``, 0.02 for ``"hybrid"``, 0.01 for a private choice.
      basis_width: K of ``"hybrid"``, 6 times the rank by default.
      basis_rounds: Rounds of subspace iteration for ``"private"``; by default 0, or 2 for weights wider than 1,024.
      basis_clip_norm: Clip norm of the basis release; by default every example's gradient is normalized.
      basis_sampling_prob: Probability with which an example is in a basis release; by default all are, or half of them
        in each release of subspace iteration.
      basis_choice: Of several public files: ``"public"`` (ranked by each other) or ``"private"`` (a charged score).
      rebase_every: For ``"random"`` and ``"public"``: every so many steps the update goes into the frozen weights and
        new directions are taken (:mod:`dpsb.rebasing`). Costs no epsilon.
      allow_non_private_basis: Must be set for ``"leak"``; the run then claims nothing.
      targets: ``"all-linear"``, names of modules separated by commas, or ``"re:"`` and a regular expression for whole
        module names.
      pooling: Classification: ``"auto"``, ``"native"`` (transformers' own class) or ``"mean"`` over the tokens.
      head_init_std: Standard deviation of the new head's weights.
      warm_start: Public file with rows of the run's labels: the head starts as a logistic regression on them.
      warm_start_epochs: Passes over the rows of ``warm_start``, without privacy, of all that the method trains, before
        the first private step; of a LoRA adapter for the basis ``"trained"``. Costs no epsilon.
      warm_start_learning_rate: Of these passes (Adam, linear decay, 64 rows a step).
      precondition: Public file: every row is scaled by the second moments of its rows before it is clipped.
      learning_rate: For the cores.
      head_learning_rate: For the classification head; the cores' by default.
      schedule: ``"constant"``, ``"linear"`` or ``"cosine"`` decay over the plan's steps.
      optimizer: ``"adam"``, ``"adamw"``, ``"adam-corrected"`` (its second moment freed from the noise) or ``"sgd"``.
      momentum: For ``"sgd"``.
      weight_decay: For ``"adamw"``, decoupled.
      dtype: Compute type of the frozen weights.
      max_length: Tokens per example; longer ones are cut.
      labels: ``"ham,spam"``, ``"from-data"`` (a statement that the set is public), or ``None`` (schema or model).
      text_column: Column names, found by their usual names if not given.
      text_pair_column: As above.
      label_column: As above.
      prompt_column: As above.
      completion_column: As above.
      chat_template: Causal LM: put prompts into the tokenizer's chat template.
      tokens_per_example: Causal LM: divide an example's loss by this constant instead of by its own token count.
      token_budget: Tokens per microbatch: memory and speed only.
      remember_frozen_blocks: Run the blocks below the lowest trained one, with a head alone all of them, once per
        example and keep what they return in memory: speed and memory only.
      shard_base: Under torchrun: cut the frozen weights over the processes (FSDP2) instead of a copy on each of them.
      checkpoint_every: Steps between checkpoints.
      allow_dropout: Leave the model's dropout on.
      part_of_sweep: The run is one of several on the same data (``dpsb curve``); its report says so.
      insecure_seed: Repeatable noise for tests; the run then claims nothing.
    """

    model: str
    data: str
    out: str
    task: str = "classification"
    eval_data: str | None = None
    epsilon: float = 3.0
    delta: float | None = None
    num_examples: int | None = None
    neighboring: str | None = None
    steps: int | None = None
    epochs: float | None = None
    expected_batch_size: int = 256
    l2_clip_norm: float = 1.0
    auto_clip: bool = False
    adaptive_clip: float | None = None
    head_share: float | None = None
    unit_column: str | None = None
    examples_per_unit: int = 4
    method: str = "sb"
    lora_plus_ratio: float = 16.0
    rank: int = 16
    basis: str = "weight"
    basis_share: float | None = None
    basis_width: int | None = None
    basis_rounds: int | None = None
    basis_clip_norm: float | None = None
    basis_sampling_prob: float | None = None
    basis_choice: str = "public"
    rebase_every: int | None = None
    allow_non_private_basis: bool = False
    targets: str = "all-linear"
    pooling: str = "auto"
    head_init_std: float = 0.3
    warm_start: str | None = None
    warm_start_epochs: int = 0
    warm_start_learning_rate: float = 0.005
    precondition: str | None = None
    learning_rate: float = 0.02
    head_learning_rate: float | None = None
    schedule: str = "linear"
    optimizer: str = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    dtype: str = "float32"
    max_length: int = 256
    labels: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    chat_template: bool = False
    tokens_per_example: int | None = None
    token_budget: int = 4096
    remember_frozen_blocks: bool = False
    shard_base: bool = False
    checkpoint_every: int = 25
    allow_dropout: bool = False
    part_of_sweep: bool = False
    insecure_seed: int | None = None

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            number_for_float = isinstance(value, int) and isinstance(1.0, hint) and not isinstance(value, bool)
            if not ((isinstance(value, hint) and (hint is bool or not isinstance(value, bool))) or number_for_float):
                raise ConfigError(f"Expected {name}={value!r} to be of type {getattr(hint, '__name__', hint)}.")
        for name, allowed in (
            ("task", TASKS),
            ("schedule", _SCHEDULES),
            ("optimizer", _OPTIMIZERS),
            ("dtype", _DTYPES),
            ("pooling", _POOLINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"Expected {name}={getattr(self, name)!r} to be one of {', '.join(allowed)}.")
        self._check_numbers()
        self._check_head_share()
        if self.targets.startswith("re:"):
            try:
                re.compile(self.targets.removeprefix("re:"))
            except re.error as error:
                raise ConfigError(f"targets={self.targets!r} is no regular expression: {error}.") from None
        if self.eval_data and same_data(self.eval_data, self.data):
            raise ConfigError(
                f"eval_data={self.eval_data!r} is the training data: metrics on it would leak it unnoised."
            )
        if self.neighboring == "replace_one" and self.num_examples is None and part_of(self.data) is not None:
            raise ConfigError(
                f"data={self.data!r} with neighboring='replace_one' needs num_examples: which part a row is of, and "
                "so how many rows this one has, depends on what it says."
            )
        self._check_method()
        self._check_basis()
        self._check_basis_numbers()
        self._check_public_files()
        if fault := warm_start_fault(self):
            raise ConfigError(fault)

    def _check_numbers(self) -> None:
        if not self.epsilon > 0:
            raise ConfigError(f"Expected epsilon={self.epsilon!r} > 0 (or inf).")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"Expected steps={self.steps!r} or epochs={self.epochs!r}, not both.")
        counts = ("rank", "max_length", "token_budget", "expected_batch_size", "num_examples", "steps")
        none = ("checkpoint_every", "warm_start_epochs")
        for name in (*counts, "tokens_per_example", "examples_per_unit", "rebase_every", *none):
            value, least = getattr(self, name), int(name not in none)
            if value is not None and value < least:
                raise ConfigError(f"Expected {name}={value!r} of at least {least}.")
        positive = ("learning_rate", "head_learning_rate", "l2_clip_norm", "head_init_std", "epochs")
        for name in (*positive, "warm_start_learning_rate", "lora_plus_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"Expected {name}={value!r} to be positive and finite.")

        for name in ("momentum", "adaptive_clip"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < 1 and (name == "momentum" or value > 0)):
                raise ConfigError(f"Expected {name}={value!r} between 0 and 1.")
        if not 0 <= self.weight_decay < math.inf or (self.weight_decay and self.optimizer != "adamw"):
            raise ConfigError(
                f"Expected weight_decay={self.weight_decay!r} to be at least 0, and 0 unless optimizer is 'adamw'."
            )
        if self.adaptive_clip is not None and (self.auto_clip or self.optimizer == "adam-corrected"):
            raise ConfigError(
                f"adaptive_clip={self.adaptive_clip!r} goes neither with auto_clip (one rule for C) nor with the "
                "optimizer 'adam-corrected' (which needs noise that stays the same)."
            )

    def _check_head_share(self) -> None:
        if self.head_share is None:
            return
        if not 0 < self.head_share < 1:
            raise ConfigError(f"Expected head_share={self.head_share!r} between 0 and 1.")
        if self.task != "classification" or self.method == "head-only" or self.adaptive_clip is not None:
            raise ConfigError(
                f"head_share={self.head_share!r} is for a classification head that is trained beside an adapter, "
                "without adaptive_clip."
            )

    def _check_method(self) -> None:
        try:
            method = method_named(self.method)
        except MethodError as error:
            raise ConfigError(str(error)) from None
        if not method.has_basis and self.basis != "weight":
            raise ConfigError(f"method={self.method!r} has no basis to choose, got basis={self.basis!r}.")
        if self.remember_frozen_blocks and self.allow_dropout:
            raise ConfigError("remember_frozen_blocks does not go with allow_dropout: it would remember a mask too.")
        if self.shard_base and self.remember_frozen_blocks:
            raise ConfigError("shard_base does not go with remember_frozen_blocks: every pass must be everybody's.")
        if method.kind == "model" and self.dtype != "float32":
            raise ConfigError(
                f"method={self.method!r} trains the model's own tensors, so dtype={self.dtype!r} must be float32."
            )

    def _check_basis(self) -> None:
        try:
            spec = parse_basis(self.basis)
            if self.basis_share is not None:
                check_share(self.basis_share)
        except BasisSpecError as error:
            raise ConfigError(str(error)) from None
        released = "basis_share" in settings_for(spec, self.basis_choice)
        if spec.kind == "lora-sb" and not spec.sources and not math.isinf(self.epsilon):
            raise ConfigError(
                f"basis='lora-sb' without a public file publishes raw gradients of the training data, so epsilon="
                f"{self.epsilon} cannot hold. Use 'weight', 'public:FILE' or 'lora-sb:FILE', or epsilon=inf."
            )
        if spec.kind == "leak" and not self.allow_non_private_basis:
            raise ConfigError(
                "basis='leak' publishes raw gradients of the training data, so every epsilon of the run is infinite; "
                "for a reference say so with allow_non_private_basis (--allow-non-private-basis)."
            )
        if released and math.isinf(self.epsilon):
            raise ConfigError(f"basis={self.basis!r} takes a share of epsilon, which is infinite; use 'lora-sb'.")
        if released and self.unit_column is not None:
            raise ConfigError(
                f"basis={self.basis!r} is released per example, so it does not protect the units of "
                f"unit_column={self.unit_column!r}; use 'weight' or 'public:FILE'."
            )

    def _check_public_files(self) -> None:
        chosen_by = "basis" if method_named(self.method).has_basis else "method"
        named = [(chosen_by, source) for source in self.public_sources]
        named += [(name, getattr(self, name)) for name in ("warm_start", "precondition") if getattr(self, name)]
        for name, source in named:
            given = f"{name}={getattr(self, name)!r}"
            if same_data(source, self.data):
                raise ConfigError(f"{given} names the private training data as public.")
            if self.eval_data and same_data(source, self.eval_data):
                raise ConfigError(
                    f"{given} is evaluated on too (eval_data={self.eval_data!r}): metrics on rows that the run has "
                    "learned from flatter it."
                )
        if self.chat_template and self.task != "causal-lm":
            raise ConfigError(f"chat_template is for causal-lm; task is {self.task!r}.")

    def _check_basis_numbers(self) -> None:
        if self.basis_choice not in _CHOICES:
            raise ConfigError(f"Expected basis_choice={self.basis_choice!r} to be one of {', '.join(_CHOICES)}.")
        if self.basis_sampling_prob is not None and not 0 < self.basis_sampling_prob <= 1:
            raise ConfigError(f"Expected basis_sampling_prob={self.basis_sampling_prob!r} above 0 and at most 1.")
        low, high = BASIS_CLIP_NORMS
        if self.basis_clip_norm is not None and not low <= self.basis_clip_norm <= high:
            raise ConfigError(f"Expected basis_clip_norm={self.basis_clip_norm!r} between {low:g} and {high:g}.")
        for name, least in (("basis_rounds", 0), ("basis_width", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigError(f"Expected {name}={getattr(self, name)!r} of at least {least}.")
        if self.rebases and (self.dtype != "float32" or self.precondition or self.shard_base):
            raise ConfigError(
                f"rebase_every={self.rebase_every!r} adds to the frozen weights: it takes dtype 'float32', no "
                "shard_base, and no precondition (whose scale is that of the first directions)."
            )
        if not self.part_of_sweep:  # what a sweep shares may be for another of its methods
            self._check_basis_settings_used()

    def _check_basis_settings_used(self) -> None:
        used = settings_for(parse_basis(self.basis), self.basis_choice)
        for name, (unset, purpose) in BASIS_SETTINGS.items():
            if name not in used and getattr(self, name) not in unset:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is for {purpose}, so basis={self.basis!r} would ignore it: leave "
                    f"out {name}."
                )

    @property
    def rebases(self) -> bool:
        """Whether new directions are taken during training."""
        spec = parse_basis(self.basis)
        return self.rebase_every is not None and "rebase_every" in settings_for(spec, self.basis_choice)

    @property
    def public_sources(self) -> tuple[str, ...]:
        """The public files that the basis is computed from, or what the method trains instead of a basis."""
        source = method_named(self.method).source
        return parse_basis(self.basis).sources if source is None else (source,)

    @property
    def clipping(self) -> str:
        if self.adaptive_clip is not None:
            return "adaptive"
        return "automatic" if self.auto_clip else "flat"

    def with_changes(self, changes: Mapping[str, Any]) -> RunConfig:
        """A copy with some settings changed.

        Raises:
          ConfigError: If a key is unknown.
        """
        check_keys(changes, "setting")
        return replace(self, **changes)

    def with_basis(self, basis: str) -> RunConfig:
        """A copy on another basis; settings that only some bases read say nothing again."""
        return replace(self, basis=basis, **{name: unset[0] for name, (unset, _) in BASIS_SETTINGS.items()})

    def to_json(self) -> dict[str, Any]:
        """Settings as JSON; an infinite epsilon is the string ``"inf"``."""
        return {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}


def make_config(settings: Mapping[str, Any]) -> RunConfig:
    """A :class:`RunConfig` from a mapping.

    Raises:
      ConfigError: If a key is unknown, or ``model``, ``data`` or ``out`` is missing.
    """
    check_keys(settings, "setting")
    missing = [name for name in ("model", "data", "out") if not settings.get(name)]
    if missing:
        options, verb = ", ".join(f"--{name}" for name in missing), "is" if len(missing) == 1 else "are"
        raise ConfigError(f"{', '.join(missing)} {verb} missing: give {options}, or the same in a file for --config.")
    return RunConfig(**settings)


def check_keys(settings: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError if a key is no setting of a run."""
    known = {field.name for field in fields(RunConfig)}
    for name in settings:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name!r}; known are {', '.join(sorted(known))}.")
