"""A silo that stays up: it loads its model once and answers over a socket in its own folder.

Engines start a new process for every message; it connects here, so that neither the base model is loaded again nor any
code that came with the message touches the data.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from dpsb.federated.budget import run_folder
from dpsb.federated.channel import (
    LEDGER,
    NAME,
    ROUND,
    ChannelError,
    WorkerError,
    address_of,
    ask,
    receive,
    send,
    socket_path,
)
from dpsb.federated.messages import Reply, RoundMessage
from dpsb.federated.silo import Silo
from dpsb.federated.spec import RUN_ID
from dpsb.federated.wire import WireError, pack, unpack
from dpsb_accounting.ledger import LEDGER_NAME

_SLACK = 1 << 17
_PATIENCE = 600.0


def serve(
    silo: Silo,
    *,
    on_ready: Callable[[], None] = lambda: None,
    on_reply: Callable[[Reply], None] = lambda _reply: None,
    stop: threading.Event | None = None,
    group: str | None = None,
) -> None:
    """Answers one request after the other, until ``stop`` is set or the process ends.

    The socket lies in the silo's folder, which only its owner may enter from then on; with ``group`` its members may
    connect, and see nothing else in the folder. Whoever can connect may ask for rounds, and gets what policy and ledger
    allow, no more; and the ledgers, which hold nothing private.

    Args:
      silo: With its folder.
      on_ready: Called when requests can come.
      on_reply: Told each reply, before it is sent.
      stop: Looked at between requests.
      group: A group of the operating system, for an engine that runs as another user than the worker.

    Raises:
      WorkerError: If another worker answers there already.
    """
    path = socket_path(silo.folder)
    silo.folder.mkdir(parents=True, exist_ok=True)
    for inside in silo.folder.iterdir():  # a group that may pass through must find nothing open
        if group is not None and not inside.is_socket():
            os.chmod(inside, stat.S_IMODE(inside.stat().st_mode) & 0o700)
    _open_to(group, silo.folder, stat.S_IRWXU, stat.S_IXGRP)
    if path.exists():
        try:
            ask(silo.folder, NAME)
        except WorkerError:
            path.unlink()  # left by a worker that was killed
        else:
            raise WorkerError(f"A worker answers at {path} already.")
    stop = stop or threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        with address_of(silo.folder) as address:
            listener.bind(address)
        _open_to(group, path, stat.S_IRUSR | stat.S_IWUSR, stat.S_IRGRP | stat.S_IWGRP)
        listener.listen(4)
        listener.settimeout(0.2)
        on_ready()
        try:
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(_PATIENCE)
                    try:
                        _answer(connection, silo, on_reply)
                    except (OSError, WireError, ChannelError):
                        continue  # the other side is gone, or speaks another language; nothing was charged for that
        finally:
            path.unlink(missing_ok=True)


def _answer(connection: socket.socket, silo: Silo, on_reply: Callable[[Reply], None]) -> None:
    largest = sum(tensor.numel() * tensor.element_size() for tensor in silo.start.values()) + silo.basis_bytes + _SLACK
    kind, content = receive(connection, largest)
    if kind == NAME:
        send(connection, NAME, silo.name.encode())
    elif kind == LEDGER:
        send(connection, LEDGER, _ledger(silo.folder, content))
    elif kind == ROUND:
        message = unpack(content, silo.start)
        if not isinstance(message, RoundMessage):
            raise WireError("The request is no round.")
        reply = silo.answer(message)
        on_reply(reply)
        send(connection, ROUND, pack(reply))


def _open_to(group: str | None, path: Path, own: int, of_group: int) -> None:
    """Gives the owner their rights and, with a group, its members theirs; nobody else any."""
    os.chmod(path, own)
    if group is None:
        return
    try:
        shutil.chown(path, group=group)
    except (LookupError, PermissionError) as error:
        raise WorkerError(f"The socket cannot be given to the group {group!r}: {error}.") from None
    os.chmod(path, own | of_group)


def _ledger(folder: Path, run_id: bytes) -> bytes:
    """The ledger of a run, as it is; nothing where there is none."""
    name = run_id.decode("ascii", "replace")
    path = run_folder(folder, name) / LEDGER_NAME
    return path.read_bytes() if RUN_ID.fullmatch(name) and path.exists() else b""
