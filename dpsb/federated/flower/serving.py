"""The server of a deployment, from its folder. The model's libraries are imported only when the rounds are over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dpsb.federated.config import settings_in
from dpsb.federated.flower.deployment import NODES, register, run_rounds, superlink
from dpsb.federated.report import REPORT_NAME, Federation, federation_report
from dpsb.federated.server import ServerError


def serve_federation(
    out: Path, host: str, port: int, *, patience: float, timeout: float, on_status: Callable[[str], None]
) -> Federation:
    """Runs or goes on with the rounds of a deployment, then writes adapter and report.

    Args:
      out: Folder of the server, made by :func:`dpsb.federated.flower.setup.initialize`.
      host: Address to listen on.
      port: Of the SuperLink.
      patience: Seconds to wait for silos to appear.
      timeout: Seconds to wait for a round's replies.
      on_status: Told what is being done.

    Raises:
      ServerError: If the run stopped early; start it again to go on at the round that is open.
    """
    config = settings_in(out)
    if (out / REPORT_NAME).exists():
        raise ServerError(f"The federation in {out} is finished; look at it with `dpsb federate report {out}`.")
    with superlink(out, host, port) as flower:
        keys = sorted((out / NODES).glob("*.pub"))
        register(flower, keys)
        on_status(f"waiting for silos at {host}:{port}; {len(keys)} node keys are registered")
        run_rounds(out, flower, patience=patience, timeout=timeout)
    from dpsb.federated.building import build_without_data, finish

    federation = federation_report(out)
    finish(out, build_without_data(config, out, on_status), config, federation)
    return federation
