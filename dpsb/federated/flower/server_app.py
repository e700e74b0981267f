"""The ServerApp: the core's coordinator over Flower's grid. Its folder holds the run, begun or interrupted."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from dpsb.federated.coordinator import Coordinator
from dpsb.federated.flower.transport import FlowerTransport
from dpsb.federated.paid_layout import read_wide, shapes_of
from dpsb.federated.report import copy_of_ledger
from dpsb.federated.server import RoundRecord, ServerError, load_state
from dpsb_accounting import LedgerError
from dpsb_accounting.chain import read_chain
from dpsb_accounting.files import write_whole

ENDED = "ended.json"
PATIENCE, TIMEOUT = 120.0, 3600.0
"""Seconds to wait for silos to appear, and for a round's replies."""


def coordinate(grid: Grid, out: Path, *, token: str, patience: float, timeout: float) -> None:
    """Does all rounds that are left of the run in ``out``; fetches the silos' ledgers after the first, and at the end.

    How it ended is left in ``out/ended.json``, because Flower tells whoever waits only that an app failed.

    Raises:
      ServerError: If there is no run, or a round could not be closed.
    """
    (out / ENDED).unlink(missing_ok=True)
    reason: str | None = "the ServerApp was stopped"
    try:
        state = load_state(out)
        if state is None:
            raise ServerError(f"{out} holds no federation; begin one with `dpsb federate init`.")
        transport = FlowerTransport(grid, [name for name in state.terms.silos if name not in state.left], timeout)
        transport.find(patience)
        first = state.round

        def fetch(record: RoundRecord) -> None:
            if record.round == first:  # the plan is in it; a silo that dies later has been heard
                _keep_ledgers(out, transport.ledgers(run_id))

        run_id = state.run_id
        shapes, wide = (_shapes(out), read_wide(out)) if state.terms.basis_is_paid else (None, None)
        coordinator = Coordinator(
            out, state.terms, state.theta, state.basis_sha256, transport, on_round=fetch, shapes=shapes, wide=wide
        )
        done = coordinator.run()
        if not all(copy_of_ledger(out, name).exists() for name in done.receipts):
            transport.find(patience)  # a silo that was away when they were fetched
        _keep_ledgers(out, transport.ledgers(run_id))
        reason = None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise
    finally:
        write_whole(out / ENDED, json.dumps({"error": reason, "token": token}).encode())


def ended(out: Path, token: str) -> tuple[bool, str | None]:
    """Whether the ServerApp that was started with a token has ended, and why, if it was an error."""
    try:
        content = json.loads((out / ENDED).read_text())
    except FileNotFoundError:
        return False, None
    return content["token"] == token, content["error"]


def _shapes(out: Path) -> dict[str, tuple[int, int, int]]:
    from dpsb.start import START_NAME  # imports the model's libraries, which a run on a public basis does not need

    return shapes_of(out / START_NAME)


def _keep_ledgers(out: Path, ledgers: Mapping[str, bytes]) -> None:
    """Keeps what silos handed out of their ledgers; what is none, or shorter than before, replaces nothing."""
    for name, content in ledgers.items():
        try:
            read_chain(BytesIO(content))
        except LedgerError:
            continue
        path = copy_of_ledger(out, name)
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.stat().st_size < len(content):
            write_whole(path, content)


def end_with(starter: int) -> None:
    """Ends this process soon after the one that started the run: Flower lets a ServerApp outlive its SuperLink.

    Killed at any moment a coordinator goes on where its checkpoint is, so that it may be killed here.
    """

    def watch() -> None:
        while True:
            try:
                os.kill(starter, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(1.0)

    threading.Thread(target=watch, daemon=True).start()


def make_server_app(out: Path | None = None, token: str = "", patience: float = PATIENCE) -> ServerApp:
    """A ServerApp for the run in a folder; without one, as the Flower run's configuration says."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        if out is None:
            end_with(int(config["starter"]))
        coordinate(
            grid,
            out or Path(str(config["federation"])),
            token=str(config.get("token", token)),
            patience=float(config.get("patience", patience)),
            timeout=float(config.get("timeout", TIMEOUT)),
        )

    return server


app = make_server_app()
