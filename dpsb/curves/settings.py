"""What one sweep is: the settings that all its runs share, and what it varies. All of it is public."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpsb.config import RunConfig, make_config
from dpsb.curves.entries import CurveError, Entry, labels_of, parse_entries, parse_epsilons, parse_rates, rates_text
from dpsb.parts import Part, part_of, same_data

DEMO = "demo"
"""``data`` of a sweep on the mail that the package brings along."""

VARIED = ("out", "epsilon", "method", "basis", "part_of_sweep", "insecure_seed")
"""Settings of a run that a sweep sets for every cell, whatever a file of settings says."""
MACHINE = ("token_budget", "checkpoint_every", "remember_frozen_blocks")
_CHECKPOINT_EVERY = 5
"""Steps between checkpoints: what a kill can cost a cell in updates, and so in accuracy."""


@dataclass(frozen=True, kw_only=True)
class CurveSettings:
    """A sweep.

    Args:
      shared: Settings of :class:`dpsb.config.RunConfig` that every cell has.
      entries: Methods, each with its basis.
      epsilons: Targets, ascending; the last may be infinite.
      repeats: Runs of each (method, epsilon), each with fresh randomness of the operating system.
      rates: Learning rates to choose from, by the entry's text; one means no tuning.
      tuning_repeats: Runs of each learning rate that is tried.
      validation_data: Where learning rates are chosen; None: on a part of the data.
      test_share: Share of the data held out for the curve where ``shared`` has no ``eval_data``.
      validation_share: Share of the data held out for tuning where there is no ``validation_data``.
      split_seed: Public seed of these parts.
    """

    shared: Mapping[str, Any]
    entries: tuple[Entry, ...]
    epsilons: tuple[float, ...]
    repeats: int
    rates: Mapping[str, tuple[float, ...]]
    tuning_repeats: int
    validation_data: str | None
    test_share: float
    validation_share: float
    split_seed: int

    @property
    def tunes(self) -> bool:
        """Whether some method has more than one learning rate to choose from."""
        return any(len(rates) > 1 for rates in self.rates.values())

    @property
    def task(self) -> str:
        return str(self.shared.get("task", "classification"))

    def split(self) -> Part | None:
        """The split of the data file, seen from its training side; None where every file is given."""
        test = self.test_share if self.shared.get("eval_data") is None and self.shared["data"] != DEMO else 0.0
        validation = self.validation_share if self.tunes and self._validation_file() is None else 0.0
        if not test and not validation:
            return None
        by = self.shared.get("unit_column")
        return Part(
            source=self._files()["data"], side="train", test=test, validation=validation, seed=self.split_seed, by=by
        )

    def run(self, entry: Entry, epsilon: float, learning_rate: float, out: Path, *, tuning: bool = False) -> RunConfig:
        """The settings of one cell.

        Raises:
          ConfigError: If they contradict each other.
        """
        files, split = self._files(), self.split()
        held_out: str | None = files.get("eval_data")
        if tuning:
            held_out = self._validation_file()
        if split is not None:
            files["data"] = str(split)
            held_out = held_out or str(split.other("validation" if tuning else "test"))
        config = make_config(
            {
                "checkpoint_every": _CHECKPOINT_EVERY,
                **self.shared,
                **files,
                "eval_data": held_out,
                "num_examples": self._num_examples(split),
                "method": entry.method,
                "epsilon": epsilon,
                "learning_rate": learning_rate,
                "out": str(out),
                "part_of_sweep": True,
            }
        )
        return config if entry.basis is None else replace(config, basis=entry.basis)

    def _num_examples(self, split: Part | None) -> int | None:
        """A declared N, less the expected share of the held-out parts: a public number still."""
        declared: int | None = self.shared.get("num_examples")
        if declared is None or split is None:
            return declared
        return max(1, round(declared * (1 - split.test - split.validation)))

    def _files(self) -> dict[str, Any]:
        if self.shared["data"] != DEMO:
            return {name: self.shared[name] for name in ("data", "eval_data") if self.shared.get(name) is not None}
        from dpsb.demo import mail_file

        return {"data": str(mail_file("train")), "eval_data": str(self.shared.get("eval_data") or mail_file("test"))}

    def _validation_file(self) -> str | None:
        if self.validation_data is None and self.shared["data"] == DEMO:
            from dpsb.demo import mail_file

            return str(mail_file("validation"))
        return self.validation_data

    def check(self) -> None:
        """Raises one sentence on the first thing that cannot be run, before anything is."""
        for name in ("repeats", "tuning_repeats"):
            if getattr(self, name) < 1:
                raise CurveError(f"Expected {name}={getattr(self, name)!r} of at least 1.")
        if not any(entry.has_cell(epsilon) for entry in self.entries for epsilon in self.epsilons):
            names = ",".join(entry.text for entry in self.entries)
            raise CurveError(
                f"methods={names!r} have no run at epsilons='inf': a paid basis "
                "takes a share of epsilon. Give a finite epsilon, or a method without a paid basis."
            )
        self.split()
        self._check_judged()
        if self.validation_data is not None and not self.tunes:
            raise CurveError(
                f"validation_data={self.validation_data!r} is not used: no method has more than one of learning_rates."
            )
        public = {name: self.shared.get(name) for name in ("warm_start", "precondition")}
        files = [*self._files().items(), ("validation_data", self.validation_data), *public.items()]
        files += [(f"methods={entry.text!r}: file", source) for entry in self.entries for source in entry.sources]
        for name, file in files:
            if file is not None and Path(file).suffix and not Path(file).exists() and part_of(file) is None:
                raise CurveError(f"{name}={file!r} does not exist.")
        eval_data = self._files().get("eval_data")
        if self.validation_data is not None and eval_data is not None and same_data(self.validation_data, eval_data):
            raise CurveError(
                f"validation_data={self.validation_data!r} is eval_data too: a curve on what it was tuned on flatters."
            )
        for entry in self.entries:
            for epsilon in self.epsilons:
                if entry.has_cell(epsilon):
                    self.run(entry, epsilon, self.rates[entry.text][0], Path("cell"), tuning=False)
                    self.run(entry, epsilon, self.rates[entry.text][0], Path("cell"), tuning=self.tunes)

    def _check_judged(self) -> None:
        """Every run is judged on rows: without any it would be charged for nothing."""
        if self.shared["data"] == DEMO:
            return
        for name, file, needed in (
            ("test_share", self.shared.get("eval_data"), True),
            ("validation_share", self._validation_file(), self.tunes),
        ):
            if needed and file is None and not getattr(self, name):
                raise CurveError(f"{name}=0 leaves no rows to judge runs on, and no file of such rows is given.")

    def left_out(self) -> str:
        """Which methods have no run without privacy although that is asked for; empty if all have."""
        labels = labels_of(self.entries)
        names = [labels[e.text] for e in self.entries if not all(e.has_cell(epsilon) for epsilon in self.epsilons)]
        if not names:
            return ""
        have, their = ("has", "its basis takes") if len(names) == 1 else ("have", "their bases take")
        return f"{' and '.join(names)} {have} no run at ε = ∞: {their} a share of ε."

    def to_json(self) -> dict[str, Any]:
        """What must be the same when a sweep goes on; settings of the machine are left out."""
        varied = {
            "methods": [entry.text for entry in self.entries],
            "epsilons": ["inf" if math.isinf(value) else value for value in self.epsilons],
            "repeats": self.repeats,
            "learning_rates": rates_text(self.rates),
            "tuning_repeats": self.tuning_repeats,
            "validation_data": self.validation_data,
            "test_share": self.test_share,
            "validation_share": self.validation_share,
            "split_seed": self.split_seed,
        }
        shared = {name: value for name, value in sorted(self.shared.items()) if name not in MACHINE}
        return {**varied, **shared}


def curve_settings(
    given: Mapping[str, Any],
    *,
    methods: str,
    epsilons: str,
    repeats: int,
    learning_rates: str | None,
    tuning_repeats: int,
    validation_data: str | None,
    test_share: float,
    validation_share: float,
    split_seed: int,
) -> CurveSettings:
    """The sweep that a command line asks for, checked.

    Args:
      given: Settings of a run, as for :func:`dpsb.config.make_config`; without ``data`` (or with ``"demo"``) the
        embedded mail and settings that suit it. Epsilon, method and folder in them are not used.
      methods: See :func:`dpsb.curves.entries.parse_entries`.
      epsilons: See :func:`dpsb.curves.entries.parse_epsilons`.
      learning_rates: See :func:`dpsb.curves.entries.parse_rates`.
      repeats, tuning_repeats, validation_data, test_share, validation_share, split_seed: See :class:`CurveSettings`.

    Raises:
      ValueError: With one sentence that names the argument; ``CurveError``, ``ConfigError``, ``MethodError`` and
        ``BasisSpecError`` are such.
    """
    if given.get("insecure_seed") is not None:
        raise CurveError("insecure_seed is refused: the repeats of a curve draw fresh noise from the operating system.")
    shared = {name: value for name, value in given.items() if name not in VARIED}
    entries = parse_entries(methods, str(given.get("basis") or "weight"))
    usual = dict.fromkeys(
        (entry.text for entry in entries), float(shared.pop("learning_rate", RunConfig.learning_rate))
    )
    if shared.setdefault("data", DEMO) == DEMO:
        from dpsb.curves.example import LEARNING_RATES, example_settings

        shared = {**example_settings(), **shared}
        if "learning_rate" not in given:
            usual = {entry.text: LEARNING_RATES.get(entry.method, usual[entry.text]) for entry in entries}
    settings = CurveSettings(
        shared=shared,
        entries=entries,
        epsilons=parse_epsilons(epsilons),
        repeats=repeats,
        rates=parse_rates(learning_rates, entries, usual),
        tuning_repeats=tuning_repeats,
        validation_data=validation_data,
        test_share=test_share,
        validation_share=validation_share,
        split_seed=split_seed,
    )
    settings.check()
    return settings
