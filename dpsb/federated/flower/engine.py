"""Rounds by Flower's simulation engine, with the silos of this process behind their sockets."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dpsb.federated.channel import WorkerError
from dpsb.federated.flower.processes import environment, python_module, running
from dpsb.federated.flower.server_app import ended
from dpsb.federated.messages import Reply
from dpsb.federated.server import ServerError, ServerState, load_state
from dpsb.federated.silo import Silo
from dpsb.federated.worker import serve

_PATIENCE = 120.0


def simulate_rounds(
    out: Path,
    silos: Mapping[str, Silo],
    *,
    on_reply: Callable[[Reply], None] = lambda _reply: None,
    on_status: Callable[[str], None] = lambda _message: None,
) -> ServerState:
    """Does the rounds that are left of the run in ``out``.

    Raises:
      ServerError: If the run stopped early; Flower's log is in ``out/flower``.
    """
    flower = out / "flower"
    flower.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = flower / "simulation.log"
    on_status("starting Flower's simulation")
    token = secrets.token_hex(8)
    with workers(silos, on_reply):
        command = python_module("dpsb.federated.flower.simulation", str(out), token, str(_PATIENCE))
        with running(command, environment(flower), log) as process:
            while process.poll() is None:
                time.sleep(0.1)
    over, reason = ended(out, token)
    state = load_state(out)
    if not over or reason or state is None:
        raise ServerError(f"Flower's simulation stopped before the last round: {reason or f'see {log}'}")
    return state


@contextmanager
def workers(silos: Mapping[str, Silo], on_reply: Callable[[Reply], None] = lambda _reply: None) -> Iterator[None]:
    """The silos' workers, a thread each; one round at a time where they share a model.

    Raises:
      WorkerError: If one cannot start.
    """
    stop = threading.Event()
    failed: list[BaseException] = []
    threads = []

    def work(silo: Silo, ready: threading.Event) -> None:
        try:
            serve(silo, on_ready=ready.set, stop=stop, on_reply=on_reply)
        except BaseException as error:  # noqa: BLE001 - told below
            failed.append(error)
            ready.set()

    try:
        for silo in silos.values():
            ready = threading.Event()
            threads.append(threading.Thread(target=work, args=(silo, ready), daemon=True))
            threads[-1].start()
            ready.wait()
        if failed:
            raise failed[0] if isinstance(failed[0], WorkerError) else WorkerError("A silo's worker cannot start.")
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
