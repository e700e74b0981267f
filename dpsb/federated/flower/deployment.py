"""A deployment over TLS: the server's SuperLink and run, and a silo's SuperNode beside its worker."""

from __future__ import annotations

import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dpsb.federated.channel import WorkerError
from dpsb.federated.flower.app import write_app
from dpsb.federated.flower.keys import CA, CA_KEY, CERTIFICATE, KEY, NODE_KEY, make_certificates
from dpsb.federated.flower.processes import checked, environment, program, running, supervised
from dpsb.federated.flower.server_app import ended
from dpsb.federated.server import ServerError, load_state

TLS, NODES, FLOWER = "tls", "nodes", "flower"
"""Folders of a server: certificates, the silos' public keys, and Flower's home, app, database and logs."""

_CONNECTION = "dpsb"
_START, _AFTER_STREAM = 90.0, 60.0
_AT_ONCE = 4
RUN_LOG = "run.log"
_LOCAL = "127.0.0.1"
LOOPBACK = (_LOCAL, "localhost")


@contextmanager
def superlink(out: Path, host: str, port: int) -> Iterator[Path]:
    """Flower's SuperLink over TLS, which lets only registered nodes in; yields the folder of its files.

    Its Control API, on the same port, is not authenticated in the open-source build: whoever reaches it and has the
    certificate authority can submit code. Let silos reach ``/v1/fleet/`` only; see docs/federated.md.
    """
    tls, flower = out / TLS, out / FLOWER
    flower.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_app(flower / "app")
    (flower / "config.toml").write_text(
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\naddress = "{_LOCAL}:{port}"\n'
        f'root-certificates = "{(tls / CA).resolve()}"\n'
    )
    command = [
        *(program("flower-superlink"), "--host", host, "--port", str(port), "--isolation", "subprocess"),
        *_certificates(tls),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--database", str((flower / "superlink.db").resolve())),
    ]
    with running(command, environment(flower), flower / "superlink.log") as process:
        _wait_for(port, flower / "superlink.log", lambda: process.poll() is None)
        yield flower


def register(flower: Path, keys: Sequence[Path]) -> None:
    """Lets the nodes with these public keys in; those that are known already stay."""

    def let_in(key: Path) -> None:
        try:
            command = [program("flwr"), "supernode", "register", str(key.resolve()), _CONNECTION]
            checked(command, environment(flower), f"Registering {key.name}")
        except WorkerError as error:
            if "already in use" not in str(error):
                raise

    with ThreadPoolExecutor(max_workers=_AT_ONCE) as several:
        list(several.map(let_in, keys))


def run_rounds(out: Path, flower: Path, *, patience: float, timeout: float) -> None:
    """Submits the app and waits until it has ended.

    Raises:
      ServerError: If the run stopped earlier; the message says why, as far as the coordinator could.
    """
    token = secrets.token_hex(8)
    where = f'federation="{out.resolve()}" token="{token}" starter={os.getpid()}'
    config = f"{where} patience={float(patience)} timeout={float(timeout)}"
    command = [program("flwr"), "run", str(flower / "app"), _CONNECTION, "--stream", "--run-config", config]
    with running(command, environment(flower), flower / RUN_LOG) as process:
        over, reason = ended(out, token)
        last = math.inf
        while not over and time.monotonic() < last:
            if process.poll() is not None and last == math.inf:
                last = time.monotonic() + _AFTER_STREAM  # the log's stream may end before the app has
            time.sleep(0.2)
            over, reason = ended(out, token)
    if not over or reason:
        state = load_state(out)
        done = 0 if state is None else state.round
        raise ServerError(f"The run stopped after {done} rounds: {reason or f'see {flower / RUN_LOG}'}")


def supernode(
    folder: Path,
    server: str,
    *,
    silo_folder: Path,
    port: int,
    stop: Callable[[], bool],
    on_restart: Callable[[int], None] = lambda _code: None,
) -> None:
    """A silo's SuperNode, started again when it ends, until ``stop`` says so. The silo's worker runs beside it.

    Args:
      folder: The node's own, with ``ca.pem`` of the server and ``node.key``.
      server: ``host:port`` of the SuperLink.
      silo_folder: Where the silo's worker listens.
      port: Of the SuperNode's own interface on loopback, where its ClientApps connect.
      stop: Asked several times a second.
      on_restart: Told the exit code of a SuperNode that ended.
    """
    flower, tls = folder / FLOWER, folder / FLOWER / TLS
    flower.mkdir(mode=0o700, parents=True, exist_ok=True)
    make_certificates(tls, LOOPBACK, days=3650)
    (tls / CA_KEY).unlink(missing_ok=True)
    command = [
        *(program("flower-supernode"), "--superlink", server, "--root-certificates", str(folder / CA)),
        *("--auth-supernode-private-key", str(folder / NODE_KEY)),
        *("--node-config", f'silo-folder="{silo_folder.resolve()}"', "--isolation", "subprocess"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *_certificates(tls),
    ]
    supervised(command, environment(flower), flower / "supernode.log", stop=stop, on_restart=on_restart)


def _certificates(tls: Path) -> list[str]:
    """The options with which a program serves over TLS."""
    files = (("ca-certfile", CA), ("certfile", CERTIFICATE), ("keyfile", KEY))
    return [part for option, name in files for part in (f"--ssl-{option}", str(tls / name))]


def _wait_for(port: int, log: Path, alive: Callable[[], bool]) -> None:
    """Waits until the SuperLink listens, which it does once it can answer."""
    last = time.monotonic() + _START
    while True:
        try:
            socket.create_connection((_LOCAL, port), timeout=1.0).close()
        except OSError:
            if not alive() or time.monotonic() > last:
                raise WorkerError(f"The SuperLink does not start; see {log}.") from None
            time.sleep(0.2)
        else:
            return
