"""Record: what a ledger says, read-only, and how its file is read."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from dpsb_accounting import _checks
from dpsb_accounting.chain import LONGEST_LINE, Chain, LedgerError, Tail, Taint, read_chain
from dpsb_accounting.plan import Plan


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
    def files(self) -> Mapping[str, str]:
        """SHA-256 by name of the files that charged releases produced."""
        return dict(self._chain.files)

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


def in_use(path: str | os.PathLike[str]) -> bool:
    """Returns whether a run is writing the ledger now: its writer holds a lock until it ends, however it ends.

    A lock is seen on the machine that holds it (and over most network file systems), not in a copy of the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def read_file(path: Path, file: BinaryIO) -> tuple[Chain, Tail | None, bool]:
    """Returns what `read_chain` says of a file; a LedgerError names the file."""
    try:
        return read_chain(_lines(file))
    except LedgerError as error:
        raise LedgerError(f"{path}: {error}") from None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, none of them much longer than a ledger's may be, whatever the file is."""
    return iter(lambda: file.readline(LONGEST_LINE + 1), b"")
