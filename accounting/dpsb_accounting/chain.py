"""The lines of a ledger: their exact bytes, their hash chain, and the rules that every next line must obey.

A ledger is a text file of JSON lines. Each line is canonical JSON (keys sorted, no spaces, ASCII) and holds
`index` (its number), `kind`, `prev` (the hash of the line before; 64 zeros in the first) and `hash` (SHA-256
of the canonical JSON of the line without `hash`). Kinds:

* "plan": the first line and only there: `schema`, `run_id`, `created_utc`, `software`, `plan`.
* "charge": one step, written before its data is drawn: `phase`, `number` (from 0 within the phase), `event`.
* "taint": `name` and `reason` of something that voids the claim.
* "file": the name and SHA-256 of a file that charged releases produced, such as a private basis; once for a name.
* "repair": the writer that opened the file after a crash dropped `dropped_bytes` of an unfinished line.

The chain shows that the lines are consistent with each other, not that an honest program wrote them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dpsb_accounting import _checks
from dpsb_accounting.events import event_to_json, refuse_other_fields
from dpsb_accounting.plan import Phase, Plan

SCHEMA = "dpsb-ledger/1"
NO_HASH = "0" * 64
LONGEST_LINE = 1 << 24  # bytes; only a plan is longer than a few hundred
_PLAN_BEGINS = b'{"created_utc":'
_LONGEST_FILE_NAME = 255
_COMMON = {"index", "kind", "prev", "hash"}
_FIELDS = {
    "plan": {"schema", "run_id", "created_utc", "software", "plan"},
    "charge": {"phase", "number", "event"},
    "taint": {"name", "reason"},
    "file": {"name", "sha256"},
    "repair": {"dropped_bytes"},
}


class LedgerError(Exception):
    """A ledger is damaged, edited, in use by another writer, or cannot be written."""


class BudgetSpent(LedgerError):
    """Every charge that the plan allows in this phase has been made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taint:
    """Something that voids the claim of a run, such as a seeded source of randomness."""

    name: str
    reason: str


def canonical(data: Mapping[str, object]) -> bytes:
    """Returns the one JSON text of `data` that is hashed and stored: sorted keys, no spaces, ASCII."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def sealed_line(data: Mapping[str, object]) -> bytes:
    """Returns the whole line of `data` (which has no hash yet), with its hash and the newline."""
    digest = hashlib.sha256(canonical(data)).hexdigest()
    return canonical({**data, "hash": digest}) + b"\n"


class Chain:
    """What the lines read so far say; `append` accepts only a line that may come next.

    Memory is 32 bytes a line, so that a ledger of a million steps can be held.
    """

    def __init__(self) -> None:
        self.plan: Plan
        self.run_id = ""
        self.created_utc = ""
        self.software: dict[str, str] = {}
        self.taints: list[Taint] = []
        self.files: dict[str, str] = {}
        self.repairs = 0
        self._counts: dict[str, int] = {}
        self._phase = 0  # the phase charged last; an earlier one is closed
        self._hashes = bytearray()
        self._texts: dict[str, tuple[bytes, bytes]] = {}

    @property
    def length(self) -> int:
        """The number of lines."""
        return len(self._hashes) // 32

    @property
    def head(self) -> str:
        """The hash of the last line."""
        return self.hash_at(self.length - 1)

    def hash_at(self, index: int) -> str:
        """Returns the hash of line `index`, counted from 0."""
        if not 0 <= _checks.whole(at_least=0, index=index) < self.length:
            raise LedgerError(f"the ledger has {self.length} lines, so there is no line {index}")
        return bytes(self._hashes[32 * index : 32 * index + 32]).hex()

    def charged(self, phase: str) -> int:
        """Returns how many charges of the phase there are."""
        return self._counts.get(self.plan.phase(phase).name, 0)

    def next_line(self, kind: str, content: Mapping[str, object]) -> bytes:
        """Returns the sealed line that would come next with this kind and content."""
        prev = self.head if self.length else NO_HASH
        return sealed_line({**content, "index": self.length, "kind": kind, "prev": prev})

    def charge_line(self, phase: Phase) -> bytes:
        """Returns the sealed line of the next charge of a phase; BudgetSpent if the plan allows none."""
        self.require_budget(phase)
        return self._next_charge(phase)[0]

    def _next_charge(self, phase: Phase) -> tuple[bytes, bytes]:
        """The next charge's line and hash: the same bytes as `sealed_line` gives, but many times faster."""
        if phase.name not in self._texts:
            name = json.dumps(phase.name).encode("ascii")
            self._texts[phase.name] = (b'{"event":' + canonical(event_to_json(phase.event)), name)
        event, name = self._texts[phase.name]
        numbers = (self.length, self._counts.get(phase.name, 0), name, self.head.encode("ascii"))
        rest = b'"index":%d,"kind":"charge","number":%d,"phase":%b,"prev":"%b"}' % numbers
        digest = hashlib.sha256(b"%b,%b" % (event, rest))
        return b'%b,"hash":"%b",%b\n' % (event, digest.hexdigest().encode("ascii"), rest), digest.digest()

    def require_budget(self, phase: Phase) -> None:
        """Raises BudgetSpent unless one more charge of the phase keeps to the plan."""
        if self._counts.get(phase.name, 0) >= phase.count:
            raise BudgetSpent(f"all {phase.count} charges that the plan allows in phase {phase.name!r} are spent")
        if self.plan.phases.index(phase) < self._phase:
            later = self.plan.phases[self._phase].name
            raise BudgetSpent(f"phase {phase.name!r} is closed, because phase {later!r} has begun")

    def append(self, line: bytes) -> None:
        """Checks a whole line, with its newline, against the chain and the plan, and takes it in.

        Raises:
            LedgerError: If the line may not come next; the message names it, counted from 1, and says why.
        """
        if self._took_next_charge(line):
            return
        try:
            data = self._parse(line)
            content = {name: value for name, value in data.items() if name not in _COMMON}
            getattr(self, f"_take_{data['kind']}")(content)
        except (ValueError, RecursionError, LedgerError) as error:
            raise LedgerError(f"line {self.length + 1} of the ledger is wrong: {error}") from None
        self._hashes += bytes.fromhex(str(data["hash"]))

    def _took_next_charge(self, line: bytes) -> bool:
        """Takes the line in if it is, byte for byte, the next charge of the phase that is being charged."""
        if not self.length:
            return False
        phase = self.plan.phases[self._phase]
        count = self._counts.get(phase.name, 0)
        if count >= phase.count:
            return False
        expected, digest = self._next_charge(phase)
        if line != expected:
            return False
        self._counts[phase.name] = count + 1
        self._hashes += digest
        return True

    def may_follow(self, line: bytes) -> bool:
        """Whether the line has the form and the hash of a next line; its content is not looked at."""
        try:
            self._parse(line)
        except (ValueError, RecursionError):
            return False
        return True

    def _parse(self, line: bytes) -> dict[str, object]:
        data = _json_object(line)
        kind = _checks.one_of(choices=_FIELDS, kind=data.get("kind"))
        if (kind == "plan") != (self.length == 0):
            raise ValueError("the first line, and no other, must be the plan")
        if kind == "plan" and data.get("schema") != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA!r}, not {data.get('schema')!r}")
        refuse_other_fields(f"a {kind} line", data, _COMMON | _FIELDS[kind])
        if type(data["index"]) is not int or data["index"] != self.length:
            raise ValueError(f"index must be {self.length}, not {data['index']!r}")
        if data["prev"] != (self.head if self.length else NO_HASH):
            raise ValueError("prev is not the hash of the line before; a line was edited, removed or moved")
        if sealed_line({name: value for name, value in data.items() if name != "hash"}) != line:
            raise ValueError("its hash or its form does not match its content; it was edited")
        return data

    def _take_plan(self, content: Mapping[str, object]) -> None:
        self.run_id = _checks.text(run_id=content["run_id"])
        self.created_utc = _checks.text(created_utc=content["created_utc"])
        software = content["software"]
        if not isinstance(software, dict):
            raise ValueError(f"software must be a JSON object, not {software!r}")
        self.software = {str(name): _checks.text(software=version) for name, version in software.items()}
        self.plan = Plan.from_json(content["plan"])

    def _take_charge(self, content: Mapping[str, object]) -> None:
        phase = self.plan.phase(str(content["phase"]))
        self.require_budget(phase)
        number = self._counts.get(phase.name, 0)
        if content["event"] != event_to_json(phase.event):
            raise ValueError(f"its event {content['event']!r} is not the one planned, {event_to_json(phase.event)!r}")
        if type(content["number"]) is not int or content["number"] != number:
            raise ValueError(f"its number in phase {phase.name!r} must be {number}, not {content['number']!r}")
        self._counts[phase.name] = number + 1
        self._phase = self.plan.phases.index(phase)

    def _take_taint(self, content: Mapping[str, object]) -> None:
        name = _checks.text(name=content["name"])
        self.taints.append(Taint(name=name, reason=_checks.text(reason=content["reason"])))

    def _take_file(self, content: Mapping[str, object]) -> None:
        name, digest = self.checked_file(content["name"], content["sha256"])
        self.files[name] = digest

    def checked_file(self, given: object, sha256: object) -> tuple[str, str]:
        """The name and the hash of a file that may be bound next; ValueError if it may not."""
        name, digest = _checks.text(name=given), _checks.text(sha256=sha256)
        if not name.isprintable() or name in (".", "..") or set(name) & set("/\\:"):
            raise ValueError(f"name must be that of a file beside the ledger, without a folder, not {name!r}")
        if len(name.encode()) > _LONGEST_FILE_NAME:
            raise ValueError(f"name must have at most {_LONGEST_FILE_NAME} bytes, as file systems allow")
        if name in self.files:
            raise ValueError(f"the file {name!r} is bound already")
        if len(digest) != len(NO_HASH) or set(digest) - set("0123456789abcdef"):
            raise ValueError(f"sha256 must be 64 hexadecimal digits, not {digest!r}")
        return name, digest

    def _take_repair(self, content: Mapping[str, object]) -> None:
        _checks.whole(at_least=0, dropped_bytes=content["dropped_bytes"])
        self.repairs += 1


def _json_object(line: bytes) -> dict[str, object]:
    try:
        data = json.loads(line.decode("ascii"))
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON in ASCII; it was damaged, or the file is no ledger") from None
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    return data


@dataclass(frozen=True, kw_only=True, slots=True)
class Tail:
    """The end of a file whose writer crashed inside a line.

    Args:
        start: Offset in the file at which the unfinished line begins, in bytes.
        size: Its bytes.
        phase: The phase of the charge that was being written; None if it was no charge.
    """

    start: int
    size: int
    phase: str | None


def read_chain(lines: Iterable[bytes]) -> tuple[Chain, Tail | None, bool]:
    """Returns the chain of a file's lines, its unfinished tail if any, and whether only the last newline
    lacks.

    An unfinished last line is tolerated only if it can be what a crash leaves: the beginning of a line that
    could come next, perhaps with zero bytes where the disk was not written. A last line that is whole but for
    its newline is taken as a line, since whoever wrote it may have gone on.

    Raises:
        LedgerError: If any line is wrong in any other way, or there is no plan line.
    """
    chain, offset, iterator = Chain(), 0, iter(lines)
    pending = next(iterator, b"")
    while pending:
        if len(pending) > LONGEST_LINE:
            raise LedgerError(
                f"line {chain.length + 1} of the ledger is wrong: it has more than {LONGEST_LINE} bytes, so this is no "
                "ledger"
            )
        following = next(iterator, b"")
        if not following and (not pending.endswith(b"\n") or b"\0" in pending):
            return _read_tail(chain, pending, offset)
        chain.append(pending)
        offset += len(pending)
        pending = following
    if not chain.length:
        raise LedgerError("the file is empty: its plan was never written, so no data was drawn")
    return chain, None, False


def _read_tail(chain: Chain, tail: bytes, offset: int) -> tuple[Chain, Tail | None, bool]:
    try:
        chain.append(tail + b"\n")
        return chain, None, True
    except LedgerError as error:
        written = tail.rstrip(b"\0")
        if not chain.length:
            if not written.startswith(_PLAN_BEGINS[: len(written)]):
                raise
            raise LedgerError(f"the plan, its first line, is unfinished, so no data was drawn ({error})") from None
        for phase in chain.plan.phases[chain._phase :]:
            if chain.charged(phase.name) < phase.count and _begins(chain.charge_line(phase), written):
                return chain, Tail(start=offset, size=len(tail), phase=phase.name), False
        if _begins_other_line(chain, written):
            return chain, Tail(start=offset, size=len(tail), phase=None), False
        raise


def _begins(line: bytes, tail: bytes) -> bool:
    """Whether the tail is what a torn write of the line leaves; zero bytes are blocks never written."""
    return len(tail) <= len(line) and all(got in (0, want) for got, want in zip(tail, line, strict=False))


def _begins_other_line(chain: Chain, written: bytes) -> bool:
    """Whether this is the beginning of a taint, file or repair line, most of whose text cannot be foretold."""
    openings = (b'{"hash":"', b'{"dropped_bytes":')
    if not any(written.startswith(opening) or opening.startswith(written) for opening in openings):
        return False
    if written.endswith(b"}"):  # whole but for its newline, or something was added to a line
        return chain.may_follow(written + b"\n")
    return b"\n" not in written
