"""Ledger: the append-only file in which every step is charged, on disk, before its data is drawn."""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import os
import platform
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from dpsb_accounting import _checks
from dpsb_accounting.chain import (
    SCHEMA,
    BudgetSpent,
    Chain,
    LedgerError,
    Tail,
    Taint,
    read_chain,
)
from dpsb_accounting.plan import Plan

__all__ = ["BudgetSpent", "Ledger", "LedgerError", "LedgerRecord", "Taint"]

_RECORDED = (
    "dpsb",
    "dp-accounting",
    "numpy",
    "scipy",
    "torch",
    "transformers",
    "peft",
    "opacus",
)


class LedgerRecord:
    """What a ledger says: its plan, its charges, its taints; read-only.

    Made by `Ledger.read`. A line that a crash left unfinished is tolerated: `torn` says so, and if it was a
    charge then `charged` counts it, because a reader cannot know whether the step went on.
    """

    def __init__(self, path: Path, chain: Chain, tail: Tail | None = None) -> None:
        self._path = path
        self._chain = chain
        self._tail = tail

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def plan(self) -> Plan:
        """The plan: the ledger's first line."""
        return self._chain.plan

    @property
    def run_id(self) -> str:
        """Random name of the run."""
        return self._chain.run_id

    @property
    def created_utc(self) -> str:
        """When the ledger was created, ISO 8601."""
        return self._chain.created_utc

    @property
    def software(self) -> Mapping[str, str]:
        """The versions of the programs that made the ledger."""
        return dict(self._chain.software)

    @property
    def taints(self) -> tuple[Taint, ...]:
        """What voids the claim of this run; empty for an honest one."""
        return tuple(self._chain.taints)

    @property
    def torn(self) -> bool:
        """Whether the last line is unfinished, as a crash leaves it."""
        return self._tail is not None

    @property
    def repairs(self) -> int:
        """How often an unfinished line was dropped when the run was continued."""
        return self._chain.repairs

    @property
    def length(self) -> int:
        """The number of whole lines."""
        return self._chain.length

    @property
    def head(self) -> str:
        """The hash of the last whole line, hexadecimal."""
        return self._chain.head

    def hash_at(self, index: int) -> str:
        """Returns the hash of line `index`, counted from 0; LedgerError if there is none."""
        return self._chain.hash_at(index)

    def charged(self, phase: str) -> int:
        """Returns how many steps of the phase are charged, an unfinished line counted; ValueError if unknown."""
        torn = self._tail is not None and self._tail.phase == phase
        return self._chain.charged(phase) + int(torn)

    def remaining(self, phase: str) -> int:
        """Returns how many steps of the phase the plan still allows."""
        planned = self.plan.phase(phase)
        phases = self.plan.phases
        if any(self.charged(later.name) for later in phases[phases.index(planned) + 1 :]):
            return 0
        return planned.count - self.charged(phase)

    def check_not_behind(self, length: int, head: str) -> None:
        """Refuses a ledger that was rolled back to before a state that a checkpoint or a report has seen.

        Args:
            length: The number of lines seen then, at least 1.
            head: The hash of the last line seen then.

        Raises:
            LedgerError: If the ledger is shorter, or its line `length` - 1 is another one.
        """
        _checks.whole(at_least=1, length=length)
        if self.length < length:
            raise LedgerError(
                f"{self._path} is behind: it has {self.length} lines, but {length} were there before; "
                "charged steps are missing"
            )
        if self.hash_at(length - 1) != head:
            raise LedgerError(f"{self._path} is another ledger than the one seen before: line {length} differs")


class Ledger(LedgerRecord):
    """The writer of a ledger; at most one per file, enforced by a lock.

    Guarantees:
        * when `charge` has returned, its line is on disk; when it raises, training must not draw;
        * charges never exceed the plan, across any number of crashes and resumptions;
        * the file holds no drawn size, no data, no loss and no per-step time.

    Example:
        >>> ledger = Ledger.create("run/ledger.jsonl", plan)       # doctest: +SKIP
        >>> number = ledger.charge("train")                        # doctest: +SKIP
    """

    def __init__(self, path: Path, chain: Chain, descriptor: int, size: int) -> None:
        super().__init__(path, chain)
        self._descriptor: int | None = descriptor
        self._size = size
        self._broken = ""
        self._lock = threading.Lock()

    @classmethod
    def create(cls, path: str | os.PathLike[str], plan: Plan) -> Ledger:
        """Creates the file with the plan as its first line, durably, and locks it.

        Raises:
            LedgerError: If the file exists, is in use, or cannot be written.
        """
        if not isinstance(plan, Plan):
            raise ValueError(f"plan must be a Plan, not {plan!r}")
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            raise LedgerError(f"{path} exists already; open it to continue that run, or choose another path") from None
        except OSError as error:
            raise LedgerError(f"cannot create {path}: {error.strerror}") from None
        ledger = cls(path, Chain(), descriptor, 0)
        content = {
            "schema": SCHEMA,
            "run_id": secrets.token_hex(16),
            "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "software": _software(),
            "plan": plan.to_json(),
        }
        try:
            _lock(descriptor, path)
            ledger._write(ledger._chain.next_line("plan", content))
            _sync_directory(path)
        except (LedgerError, OSError) as error:
            ledger.close()
            path.unlink(missing_ok=True)
            raise LedgerError(f"cannot create {path}: {error}") from None
        return ledger

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Ledger:
        """Locks an existing ledger, verifies the whole of it, and continues it.

        An unfinished last line is dropped and a repair line recorded: `charge` never returned for it, so no
        data was drawn. A last line that lacks only its newline is kept.

        Raises:
            LedgerError: If the file is missing, in use, or wrong in any other way.
        """
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise LedgerError(f"cannot open {path}: {error.strerror}") from None
        try:
            _lock(descriptor, path)
            with os.fdopen(os.dup(descriptor), "rb") as file:
                chain, tail, newline_lacks = _read(path, file)
            size = os.fstat(descriptor).st_size
            ledger = cls(path, chain, descriptor, size)
            if newline_lacks:
                ledger._append_bytes(b"\n")
            if tail is not None:
                ledger._truncate(tail.start)
            if newline_lacks or tail is not None:
                dropped = 0 if tail is None else tail.size
                ledger._write(chain.next_line("repair", {"dropped_bytes": dropped}))
            _sync_directory(path)
        except (LedgerError, OSError) as error:
            os.close(descriptor)
            if isinstance(error, LedgerError):
                raise
            raise LedgerError(f"cannot open {path}: {error.strerror}") from None
        return ledger

    @staticmethod
    def read(path: str | os.PathLike[str]) -> LedgerRecord:
        """Reads and verifies a ledger without locking or changing it; also while its run is going on.

        Raises:
            LedgerError: If the file is missing or wrong; only an unfinished last line is tolerated (see
                `torn`).
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                chain, tail, _ = _read(path, file)
        except OSError as error:
            raise LedgerError(f"cannot read {path}: {error.strerror}") from None
        return LedgerRecord(path, chain, tail)

    def charge(self, phase: str) -> int:
        """Charges one step of the phase; only when this has returned may its data be drawn.

        Args:
            phase: Name of a phase of the plan, which also gives the event. Public.

        Returns:
            The number of this charge within its phase, from 0. Public.

        Raises:
            BudgetSpent: If the plan allows no further charge of the phase.
            LedgerError: If the line could not be made durable; nothing may be drawn.
            ValueError: If the plan has no such phase.
        """
        planned = self.plan.phase(phase)
        with self._lock:
            self._require_writable()
            number = self._chain.charged(phase)
            self._write(self._chain.charge_line(planned))
            return number

    def taint(self, name: str, reason: str) -> None:
        """Records that the claim of this run is void, and why; recording the same again changes nothing."""
        taint = Taint(name=_checks.text(name=name), reason=_checks.text(reason=reason))
        with self._lock:
            self._require_writable()
            if taint not in self._chain.taints:
                self._write(self._chain.next_line("taint", {"name": name, "reason": reason}))

    def close(self) -> None:
        """Releases the lock; the ledger can then be read but not written."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_writable(self) -> None:
        if self._broken:
            raise LedgerError(f"{self._path} can no longer be written ({self._broken}); no data may be drawn")
        if self._descriptor is None:
            raise LedgerError(f"{self._path} is closed; open it again to continue")
        if os.fstat(self._descriptor).st_size != self._size:
            self._broken = "another program changed the file"
            raise LedgerError(
                f"{self._path} was changed by another program; training stopped before any data was drawn"
            )

    def _write(self, line: bytes) -> None:
        """Makes the line durable, then takes it into the chain."""
        before = self._size
        try:
            self._append_bytes(line)
        except OSError as error:
            self._broken = error.strerror or str(error)
            try:
                self._truncate(before)
            except OSError:
                self._broken += ", and the unfinished line could not be removed"
            raise LedgerError(
                f"cannot write {self._path} ({self._broken}); training stopped before any data was drawn"
            ) from None
        self._chain.append(line)

    def _append_bytes(self, line: bytes) -> None:
        descriptor = self._open_descriptor()
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(28, f"only {written} of {len(line)} bytes written, the disk is probably full")
        _sync(descriptor)
        self._size += len(line)

    def _truncate(self, size: int) -> None:
        descriptor = self._open_descriptor()
        os.ftruncate(descriptor, size)
        _sync(descriptor)
        self._size = size

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise LedgerError(f"{self._path} is closed; open it again to continue")
        return self._descriptor


def _read(path: Path, file: object) -> tuple[Chain, Tail | None, bool]:
    try:
        return read_chain(file)  # type: ignore[arg-type]
    except LedgerError as error:
        raise LedgerError(f"{path}: {error}") from None


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LedgerError(f"{path} is in use by another run; only one may write it") from None
    there = os.stat(path)
    here = os.fstat(descriptor)
    if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
        raise LedgerError(f"{path} was replaced while it was being opened")


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)  # on macOS fsync alone stops at the drive's cache
    if full_sync is not None:
        fcntl.fcntl(descriptor, full_sync)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
