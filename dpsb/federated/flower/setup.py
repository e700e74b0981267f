"""A deployment's folders: the server's, and one to carry to each silo. And what a silo runs from its own."""

from __future__ import annotations

import json
import shutil
import threading
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpsb.data import read_table
from dpsb.federated.building import build, build_without_data
from dpsb.federated.calibrate import policy_text, terms_of
from dpsb.federated.checks import FederatedError, check_whole, checked_fields
from dpsb.federated.config import SETTINGS_NAME, FederateConfig, settings_in
from dpsb.federated.coordinator import Coordinator
from dpsb.federated.flower.deployment import LOOPBACK, NODES, TLS, supernode
from dpsb.federated.flower.keys import CA, make_certificates, make_node_key
from dpsb.federated.local import LocalTransport
from dpsb.federated.messages import Reply
from dpsb.federated.paid_layout import FRAMES_NAME
from dpsb.federated.secure.keys import check_peers, known_key
from dpsb.federated.secure.masks import public_of
from dpsb.federated.silo import Silo
from dpsb.federated.spec import POLICY_NAME, read_policy
from dpsb.federated.trainer import Trainer
from dpsb.federated.worker import serve
from dpsb.folders import check_new, new_folder
from dpsb.frozen_prefix import remember_frozen_prefix
from dpsb.start import START_NAME
from dpsb_accounting.files import write_whole

FOR_SILOS, NODE = "for-silos", "node"
"""Where a server keeps what silos need, and where a silo's SuperNode has its key and logs."""

SILO_FILE, NODE_FILE = "silo.toml", "node.toml"
PARTS = ("all", "worker", "node")

_DAYS, _NODE_PORT = 825, 9100
_SILO_TOML = """# This silo's own settings; no message can change them. Limits on what may be asked are in policy.toml.
data = {data}  # the training file, on this machine
"""
_NODE_TOML = """# How this silo's SuperNode reaches the server.
server = "{server}"  # host:port of the SuperLink
port = {port}  # of the SuperNode's own interface, on loopback only
"""

Status = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SiloFile:
    """``silo.toml``: the training file."""

    data: str


@dataclass(frozen=True, kw_only=True)
class NodeFile:
    """``node.toml``: ``host:port`` of the SuperLink, and the SuperNode's own port on loopback."""

    server: str
    port: int

    def __post_init__(self) -> None:
        host, _, port = self.server.rpartition(":")
        if not host or not port.isdigit():
            raise FederatedError(f"Expected server={self.server!r} to be host:port.")
        check_whole(1, port=self.port)


def initialize(config: FederateConfig, hosts: Sequence[str], port: int, on_status: Status) -> Path:
    """Makes the server's folder, and in it one for each silo, from settings alone: no private row is read.

    The server's keeps the run (terms, public start, checkpoint), certificates and the silos' public keys. What is under
    ``for-silos/NAME`` goes to that silo, over a channel that you trust, and is then deleted here: it holds the silo's
    secret key. A silo that makes its own key (``ssh-keygen -t ecdsa -b 384``) sends ``NAME.pub`` instead.

    Args:
      config: Every silo declares num_examples.
      hosts: Names and addresses under which silos reach the server; the first stands in their files.
      port: Of the SuperLink.
      on_status: Told what is being done.

    Returns:
      The server's folder.

    Raises:
      FederatedError, ModelError, DataError, FileExistsError: With one sentence.
    """
    out = Path(config.run.out)
    check_new(out)
    undeclared = [name for name, silo in config.silos.items() if silo.num_examples is None]
    if undeclared:
        raise FederatedError(f"Declare num_examples under [silos.{undeclared[0]}]: the server reads no silo's data.")
    if config.run.task == "classification" and config.run.labels is None:
        raise FederatedError("Declare labels: each silo would take them from its own file's schema, in its own order.")
    sizes = {name: int(silo.num_examples or 0) for name, silo in config.silos.items()}
    with new_folder(out, last=SETTINGS_NAME) as folder:
        _write_deployment(config, folder, hosts, port, sizes, on_status)
    return out


def _write_deployment(
    config: FederateConfig, out: Path, hosts: Sequence[str], port: int, sizes: Mapping[str, int], on_status: Status
) -> None:
    built = build_without_data(config, out, on_status)
    on_status("calibrating the silos' noise")
    dimension = sum(tensor.numel() for tensor in built.trainer.start.values())
    terms, policies = terms_of(config, sizes, dimension, built.trainer.wide)
    Coordinator(out, terms, built.trainer.start, built.trainer.basis_sha256, LocalTransport({})).begin()
    make_certificates(out / TLS, list(dict.fromkeys((*hosts, *LOOPBACK))), _DAYS)  # the server asks its own SuperLink
    (out / NODES).mkdir()
    for number, (name, policy) in enumerate(policies.items()):
        folder = out / FOR_SILOS / name
        (folder / NODE).mkdir(parents=True)
        for file in (SETTINGS_NAME, START_NAME, FRAMES_NAME):
            if (out / file).exists():
                shutil.copyfile(out / file, folder / file)
        shutil.copyfile(out / TLS / CA, folder / NODE / CA)
        write_whole(folder / POLICY_NAME, policy_text(policy).encode())
        own = _SILO_TOML.format(data=json.dumps(config.silos[name].data or "FILE"))
        write_whole(folder / SILO_FILE, own.encode())
        node = _NODE_TOML.format(server=f"{hosts[0]}:{port}", port=_NODE_PORT + number)
        write_whole(folder / NODE / NODE_FILE, node.encode())
        write_whole(out / NODES / f"{name}.pub", make_node_key(folder / NODE))


def open_silo(
    folder: Path, *, on_status: Status, on_problem: Callable[[str], None] = lambda _reason: None
) -> tuple[Silo, Trainer]:
    """Loads a silo from its folder: model, public start, policy, and the data that ``silo.toml`` names.

    Raises:
      FederatedError, DataError, ModelError, ProbeError: With one sentence.
    """
    config, policy = settings_in(folder), read_policy(folder / POLICY_NAME)
    own = SiloFile(**_toml(folder / SILO_FILE, SiloFile))
    if policy.silo not in config.silos:
        raise FederatedError(f"{folder / POLICY_NAME} is for silo {policy.silo!r}, which the federation does not know.")
    if config.federation.noise == "skellam":
        public = public_of(known_key(folder))
        on_status(f"public key of silo {policy.silo!r}: {public.hex()}")
        for name, key in sorted(check_peers(policy, public, config.silos).items()):
            on_status(f"it masks for silo {name!r}, whose public key by {POLICY_NAME} is {key}")
    run = config.run.with_basis("weight")
    run = replace(run, data=own.data, eval_data=None, num_examples=policy.num_examples, neighboring=policy.neighboring)
    built = build(config, {policy.silo: read_table(own.data)}, {policy.silo: run}, folder, on_status)
    examples = built.prepared[policy.silo].examples
    return Silo(folder, policy, built.trainer, examples, on_problem=on_problem), built.trainer


def run_silo(
    folder: Path,
    *,
    part: str = "all",
    node_folder: Path | None = None,
    group: str | None = None,
    stop: threading.Event | None = None,
    on_status: Status = lambda _message: None,
    on_problem: Callable[[str], None] = lambda _reason: None,
    on_reply: Callable[[Reply], None] = lambda _reply: None,
) -> None:
    """A silo's two parts, until ``stop`` is set: the worker, which has the data, and the SuperNode, which has not.

    Flower's SuperNode runs code that the server submits. As one user with the worker, that code could read the data. So
    on a real silo run the parts as two users: ``part="worker"`` with a ``group`` as the owner of the data, and
    ``part="node"`` as a member of that group, with ``node`` moved to a ``node_folder`` of its own.

    Raises:
      FederatedError, DataError, ModelError, ProbeError: With one sentence.
    """
    if part not in PARTS:
        raise FederatedError(f"Expected part={part!r} to be one of {', '.join(PARTS)}.")
    stop = stop or threading.Event()
    beside = (folder, node_folder or folder / NODE, stop, on_status)
    if part == "node":
        _run_node(*beside)
        return
    node = threading.Thread(target=_run_node, args=beside)
    try:
        silo, trainer = open_silo(folder, on_status=on_status, on_problem=on_problem)
        remember = settings_in(folder).run.remember_frozen_blocks
        with remember_frozen_prefix(trainer.adapter.model) if remember else nullcontext():
            on_status("checking the model on synthetic examples")
            trainer.check()

            def ready() -> None:
                on_status(f"silo {silo.name!r} is ready")
                if part == "all":
                    node.start()

            serve(silo, stop=stop, group=group, on_ready=ready, on_reply=on_reply)
    finally:
        stop.set()
        if node.ident is not None:
            node.join()


def _run_node(folder: Path, node_folder: Path, stop: threading.Event, on_status: Status) -> None:
    own = NodeFile(**_toml(node_folder / NODE_FILE, NodeFile))
    on_status(f"connecting to {own.server}")
    supernode(
        node_folder,
        own.server,
        silo_folder=folder,
        port=own.port,
        stop=stop.is_set,
        on_restart=lambda code: on_status(f"the SuperNode ended with code {code}; it is started again"),
    )


def _toml(path: Path, kind: type[Any]) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FederatedError(f"{path} cannot be read as settings: {error}") from None
    return checked_fields(kind, content, str(path))
