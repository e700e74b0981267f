"""Ledger: the append-only file in which every step is charged, on disk, before its data is drawn."""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import os
import platform
import secrets
import threading
import time
from pathlib import Path
from types import TracebackType

from dpsb_accounting import _checks
from dpsb_accounting.chain import (
    SCHEMA,
    BudgetSpent,
    Chain,
    LedgerError,
    Taint,
)
from dpsb_accounting.files import flush
from dpsb_accounting.plan import Plan
from dpsb_accounting.record import LedgerRecord, in_use, read_file

__all__ = ["LEDGER_NAME", "BudgetSpent", "Ledger", "LedgerError", "LedgerRecord", "Taint", "in_use"]

LEDGER_NAME = "ledger.jsonl"
"""What a run's ledger is called in its folder."""

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
            flush(path.parent)
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
                chain, tail, newline_lacks = read_file(path, file)
            size = os.fstat(descriptor).st_size
            ledger = cls(path, chain, descriptor, size)
            if newline_lacks:
                ledger._append_bytes(b"\n")
            if tail is not None:
                ledger._truncate(tail.start)
            if newline_lacks or tail is not None:
                dropped = 0 if tail is None else tail.size
                ledger._write(chain.next_line("repair", {"dropped_bytes": dropped}))
            flush(path.parent)
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
        if path.is_dir():
            raise LedgerError(f"{path} is a directory; name the ledger in it, such as {path / 'ledger.jsonl'}")
        try:
            with path.open("rb") as file:
                chain, tail, _ = read_file(path, file)
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

    def bind_file(self, name: str, sha256: str) -> None:
        """Records the hash of a file that charged releases produced, so that no other can take its place.

        Raises:
            LedgerError: If the name is bound already, name or hash are none, or the line could not be made durable.
        """
        with self._lock:
            self._require_writable()
            try:
                self._chain.checked_file(name, sha256)
            except ValueError as error:
                raise LedgerError(f"{self._path} cannot bind a file: {error}") from None
            self._write(self._chain.next_line("file", {"name": name, "sha256": sha256}))

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


def _lock(descriptor: int, path: Path) -> None:
    for wait in (0.02, 0.1, 0.0):  # `in_use` may hold the lock for an instant
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not wait:
                raise LedgerError(f"{path} is in use by another run; only one may write it") from None
            time.sleep(wait)
    there = os.stat(path)
    here = os.fstat(descriptor)
    if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
        raise LedgerError(f"{path} was replaced while it was being opened")


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)  # on macOS fsync alone stops at the drive's cache
    if full_sync is not None:
        fcntl.fcntl(descriptor, full_sync)


def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
