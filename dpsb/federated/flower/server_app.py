"""The ServerApp: the core's coordinator over Flower's grid. Its folder holds the run, begun or interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from dpsb.federated.budget import LEDGER_NAME, run_folder
from dpsb.federated.coordinator import Coordinator
from dpsb.federated.flower.transport import FlowerTransport
from dpsb.federated.report import SILOS
from dpsb.federated.server import RoundRecord, ServerError, load_state
from dpsb_accounting.files import write_whole

STOPPED = "stopped.txt"
PATIENCE, TIMEOUT = 120.0, 3600.0
"""Seconds to wait for silos to appear, and for a round's replies."""


def coordinate(
    grid: Grid,
    out: Path,
    *,
    patience: float = PATIENCE,
    timeout: float = TIMEOUT,
    on_round: Callable[[RoundRecord], None] = lambda _record: None,
) -> None:
    """Does all rounds that are left of the run in ``out``, then fetches the ledgers that silos hand out.

    Why it stopped early, if it did, is left in ``out/stopped.txt``: Flower tells whoever waits only that it failed.

    Raises:
      ServerError: If there is no run, or a round could not be closed.
    """
    (out / STOPPED).unlink(missing_ok=True)
    try:
        state = load_state(out)
        if state is None:
            raise ServerError(f"{out} holds no federation; begin one with `dpsb federate init`.")
        transport = FlowerTransport(grid, [name for name in state.terms.silos if name not in state.left], timeout)
        transport.find(patience)
        coordinator = Coordinator(out, state.terms, state.theta, state.basis_sha256, transport, on_round=on_round)
        state = coordinator.run()
        for name, content in transport.ledgers(state.run_id).items():
            folder = run_folder(out / SILOS / name, state.run_id)
            if not (folder / LEDGER_NAME).exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / LEDGER_NAME, content)
    except Exception as error:
        write_whole(out / STOPPED, f"{' '.join(str(error).split())}\n".encode())
        raise


def make_server_app(out: Path | None = None, patience: float = PATIENCE) -> ServerApp:
    """A ServerApp for the run in a folder; without one, in the folder that the Flower run's configuration names."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        folder = out or Path(str(config["federation"]))
        coordinate(
            grid,
            folder,
            patience=float(config.get("patience", patience)),
            timeout=float(config.get("timeout", TIMEOUT)),
        )

    return server


app = make_server_app()
