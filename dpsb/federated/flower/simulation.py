"""Flower's simulation around workers: `python -m dpsb.federated.flower.simulation OUT TOKEN PATIENCE`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "UV_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
"""No telemetry, no look for updates, no installation at run time; Ray listens on loopback only (what the name with OSX
really does), and Flower looks for work five times a second instead of once."""


def main(out: Path, token: str, patience: float) -> None:
    """Runs the federation whose state is in ``out``, with silos whose workers are up within ``patience`` seconds.

    Raises:
      ServerError: If there is no federation in ``out``, or a round could not be closed.
    """
    os.environ.update(SETTINGS)
    from flwr.simulation import run_simulation

    from dpsb.federated.flower.client_app import make_client_app
    from dpsb.federated.flower.server_app import make_server_app
    from dpsb.federated.report import SILOS
    from dpsb.federated.server import ServerError, load_state

    state = load_state(out)
    if state is None:
        raise ServerError(f"{out} holds no federation.")
    folders = [(out / SILOS / name).resolve() for name in state.terms.silos]
    run_simulation(
        server_app=make_server_app(out, token, patience),
        client_app=make_client_app(lambda context: folders[int(context.node_config["partition-id"])]),
        num_supernodes=len(folders),
        backend_config={"client_resources": {"num_cpus": 1.0}, "init_args": {"num_cpus": len(folders)}},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
