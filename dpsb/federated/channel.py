"""The way to a silo's worker: a socket in the silo's own folder. No torch: engines start this for every message."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpsb.federated.checks import FederatedError

SOCKET_NAME = "worker.sock"
NAME, ROUND, LEDGER = b"name", b"rund", b"ledg"
"""What may be asked: the silo's name, a round, and the public ledger of a run."""

_LONGEST_ADDRESS = 100
_OPEN_FOLDERS = Path("/proc/self/fd")
_MOST = 1 << 40


class WorkerError(FederatedError):
    """The silo's worker cannot be reached or started; the message says what to do."""


class ChannelError(FederatedError):
    """Bytes on the socket that are no request or reply."""


def ask(folder: Path, kind: bytes, content: bytes = b"") -> bytes:
    """Sends one request to the worker in a folder and returns its reply.

    Raises:
      WorkerError: If no worker answers.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection, address_of(folder) as address:
            connection.connect(address)
            send(connection, kind, content)
            return receive(connection, _MOST)[1]
    except OSError as error:
        raise WorkerError(
            f"No worker answers at {socket_path(folder)} ({error.strerror or error}); "
            "start it with `dpsb federate silo`."
        ) from None


def socket_path(folder: Path) -> Path:
    """Where a folder's worker listens."""
    return folder.resolve() / SOCKET_NAME


@contextmanager
def address_of(folder: Path) -> Iterator[str]:
    """What ``bind`` and ``connect`` are told of a folder's socket.

    The operating system takes about 100 bytes; on Linux a longer path is named through the opened folder.

    Raises:
      OSError: If the path is long and its folder cannot be opened.
      WorkerError: If the path is too long for a socket of this operating system.
    """
    path = socket_path(folder)
    size = len(os.fsencode(path))
    if size <= _LONGEST_ADDRESS:
        yield str(path)
        return
    if not _OPEN_FOLDERS.is_dir():
        raise WorkerError(
            f"{path} is too long for a socket ({size} bytes, at most {_LONGEST_ADDRESS}); use a shorter folder."
        )
    opened = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield str(_OPEN_FOLDERS / str(opened) / SOCKET_NAME)
    finally:
        os.close(opened)


def send(connection: socket.socket, kind: bytes, content: bytes) -> None:
    """One message: its kind (4 bytes), its length (8) and its content."""
    connection.sendall(kind + len(content).to_bytes(8, "big") + content)


def receive(connection: socket.socket, largest: int) -> tuple[bytes, bytes]:
    """The next message: kind and content.

    Raises:
      ChannelError: If it is larger than ``largest`` bytes.
      ConnectionError: If it is cut off.
    """
    head = _exactly(connection, 12)
    size = int.from_bytes(head[4:], "big")
    if size > largest:
        raise ChannelError(f"A request of {size} bytes is larger than any round's.")
    return head[:4], _exactly(connection, size)


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        part = connection.recv(min(1 << 20, count - len(found)))
        if not part:
            raise ConnectionError("the other side closed the connection")
        found += part
    return bytes(found)
