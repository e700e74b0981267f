"""What a command is asked about: a ledger, an event file, or flags; told apart by their content."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from dpsb_accounting import strict
from dpsb_accounting._checks import RELATIONS, one_of, whole
from dpsb_accounting.accountant import Schedule
from dpsb_accounting.dp_event import event_from_dp_json
from dpsb_accounting.events import EVENT_TYPES, Event, PoissonGaussian, event_from_json
from dpsb_accounting.ledger import Ledger, LedgerRecord, in_use

_MOST_BYTES = 64 << 20  # of an event file


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A schedule with what its source already says of delta, relation and unit; None where it says nothing.

    `notes` are sentences that whoever reads the answer should see beside it.
    """

    schedule: Schedule
    delta: float | None
    neighboring: str | None
    unit: str
    notes: tuple[str, ...] = ()


def ask(
    ledger: Path | None,
    event: Path | None,
    noise_multiplier: float | None,
    sampling_prob: float | None,
    steps: int | None,
) -> Question:
    """Returns the question that exactly one of a ledger, an event file or the flags states."""
    flags = {"--noise-multiplier": noise_multiplier, "--sampling-prob": sampling_prob, "--steps": steps}
    given = [name for name, value in flags.items() if value is not None]
    sources = [*(["LEDGER"] if ledger else []), *(["--event"] if event else []), *given[:1]]
    if len(sources) != 1:
        raise ValueError(
            f"give a LEDGER, --event FILE.json, or --noise-multiplier with --sampling-prob and --steps: exactly one of "
            f"them, not {' and '.join(sources) if sources else 'none'}"
        )
    if ledger is not None:
        return read_source(ledger)
    if event is not None:
        return read_source(event)
    missing = [name for name, value in flags.items() if value is None]
    if missing or noise_multiplier is None or sampling_prob is None or steps is None:
        raise ValueError(f"{', '.join(missing)} must be given with {given[0]}")
    release = PoissonGaussian(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob)
    count = whole(at_least=1, steps=steps)
    return Question(schedule=[(release, count)], delta=None, neighboring=None, unit="example")


def read_source(path: Path) -> Question:
    """Returns the question that a file states: a ledger, or an event as JSON; a tainted ledger is refused."""
    content = _content(path)
    first = content.lstrip()[:1]
    if first != b"{":
        raise ValueError(f"{path} is neither a ledger nor an event file: it does not begin with a JSON object")
    data = _whole_json(path, content)
    if isinstance(data, dict) and "type" in data:
        return Question(schedule=[(_event(path, data), 1)], delta=None, neighboring=None, unit="example")
    if isinstance(data, dict) and "kind" not in data:
        raise ValueError(f"{path} is neither a ledger nor an event file: its object has no 'type'")
    if data is None and not _looks_like_ledger(content):
        raise ValueError(f"{path} is not valid JSON: {_json_error(content)}")
    record: LedgerRecord = Ledger.read(path)
    if record.taints:
        names = ", ".join(taint.name for taint in record.taints)
        raise ValueError(f"{path} is tainted ({names}): nothing can be claimed of this run")
    notes = []
    if record.torn:
        notes.append(f"{path}: its last line is unfinished, as a crash leaves it; it counts as charged")
    if in_use(path):
        notes.append(f"{path}: a run is still writing it; this is what its plan may cost, and a taint may follow")
    plan = record.plan
    return Question(schedule=record, delta=plan.delta, neighboring=plan.neighboring, unit=plan.unit, notes=tuple(notes))


def relation(question: Question, asked: str | None) -> str:
    """Returns the relation of the answer: the one asked for, else that of the source, else add_or_remove_one."""
    own = question.neighboring or "add_or_remove_one"
    return one_of(choices=RELATIONS, neighboring=own if asked is None else asked)


def _event(path: Path, data: dict[str, object]) -> Event:
    tag = data.get("type")
    try:
        return event_from_json(data) if tag in EVENT_TYPES else event_from_dp_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: events are nested too deep") from None


def _content(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, not a ledger or an event file")
        if os.path.getsize(path) == 0:
            raise ValueError(f"{path} is empty: neither a ledger nor an event file")
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _whole_json(path: Path, content: bytes) -> object:
    """The content as one JSON value; None if it is not one, as a ledger of several lines is not."""
    try:
        return strict.loads(content, infinite=True)  # one field may be infinite; every other refuses it by name
    except json.JSONDecodeError:
        return None
    except RecursionError:
        raise ValueError(f"{path} is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _json_error(content: bytes) -> str:
    try:
        json.loads(content)
    except ValueError as error:
        return str(error)
    return "unknown"


def _looks_like_ledger(content: bytes) -> bool:
    """Whether the first line is a JSON object by itself."""
    try:
        return isinstance(json.loads(content.split(b"\n", 1)[0]), dict)
    except ValueError:
        return b'"schema"' in content[:4096]
