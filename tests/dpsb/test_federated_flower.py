"""The real engine: rounds through Flower's simulation, on Ray, with silos in workers of their own."""

import json
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from federation import NAMES, Federation, check_ledger, terms, trainer
from test_federated_simulate import SPLIT, settings, split_file
from test_federated_wire import at_work

from dpsb.demo import mail_file
from dpsb.federated.checks import FederatedError
from dpsb.federated.config import read_federation
from dpsb.federated.flower.deployment import NODES, TLS, register, run_rounds, superlink, supernode
from dpsb.federated.flower.keys import make_certificates, make_node_key
from dpsb.federated.report import federation_report
from dpsb.federated.server import load_state
from dpsb.federated.simulate import Callbacks
from dpsb.federated.simulate import simulate as run_simulation
from dpsb_accounting import verify

pytest.importorskip("flwr")

PROGRAM = (sys.executable, "-m", "dpsb.federated.flower.simulation")


@pytest.fixture
def federation(tiny, tmp_path):
    return Federation(tmp_path, trainer(tiny))


def simulate(federation, silos, patience=240, **options):
    with ExitStack() as stack:
        for silo in silos:
            stack.enter_context(at_work(silo, **options.get(silo.name, {})))
        return subprocess.run(
            [*PROGRAM, str(federation.out), "token", str(patience)],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


def test_only_ledgers_replace_the_servers_copies(federation):
    from dpsb.federated.flower.server_app import _keep_ledgers

    federation.coordinator().run()
    whole = federation.ledger("north").path.read_bytes()
    early = b"".join(whole.splitlines(keepends=True)[:3])
    copy = federation.out / "ledgers" / "north.jsonl"
    for handed_out, kept in ((b"rubbish", None), (early, early), (whole * 2, early), (whole, whole), (early, whole)):
        _keep_ledgers(federation.out, {"north": handed_out})
        assert (copy.read_bytes() if copy.exists() else None) == kept


def tiny_hybrid(tmp_path, monkeypatch):
    """A hybrid basis on a tiny model; calibration and the probe have tests of their own."""
    monkeypatch.setattr("dpsb.federated.calibrate.noise_multiplier_for", lambda **_facts: 2.0)
    monkeypatch.setattr("dpsb.federated.trainer.check_before_run", lambda *_args: None)
    return read_federation(settings(tmp_path, f'{split_file(tmp_path)}\nbasis = "hybrid"\nbasis_width = 8', SPLIT))


def mail_private(tmp_path, _monkeypatch):
    """The example on a part of its mail, two weights and fewer steps, with a basis from the silos' gradients."""
    example = read_federation(Path(__file__).resolve().parents[2] / "examples" / "federated_mail" / "fed.toml")
    data = tmp_path / "mail.parquet"
    pq.write_table(pq.read_table(mail_file("train")).slice(0, 900), data)
    run = replace(
        example.run,
        data=str(data),
        eval_data=None,
        out=str(tmp_path / "out"),
        basis="private",
        targets=r"re:.*layer\.5\..*(query|value)",
        max_length=64,
        remember_frozen_blocks=False,
        expected_batch_size=16,
    )
    return replace(example, run=run, federation=replace(example.federation, rounds=2, local_steps=2))


@pytest.mark.slow
@pytest.mark.parametrize("asked", [tiny_hybrid, mail_private])
def test_a_simulation_through_the_engine_is_that_of_plain_calls(tmp_path, monkeypatch, asked):
    """Same settings, same folder, same report; every message went through a grid, a ClientApp and a worker's socket."""
    config, replies = asked(tmp_path, monkeypatch), []
    done = run_simulation(config, engine="flower", callbacks=Callbacks(on_reply=replies.append))
    report = json.loads((done.out / "report.json").read_text())
    assert report["claim"] is True
    assert report["basis"]["silos"] == ["silo-1", "silo-2", "silo-3"]
    assert report["rounds"]["done"] == 2
    assert [len(entry["silos"]) for entry in report["rounds"]["history"]] == [3, 3]
    assert all(row["charged"] == row["planned"] == 4 for row in report["silos"])
    assert len(replies) == 3 * (1 + 2), "the release for the basis, and two rounds"
    assert (done.out / "adapter" / "adapter_model.safetensors").exists()
    for name in ("silo-1", "silo-2", "silo-3"):
        (ledger,) = (done.out / "silos" / name).glob("runs/*/ledger.jsonl")
        assert verify(ledger).ok
        assert not (done.out / "silos" / name / "worker.sock").exists()


@pytest.mark.slow
def test_a_secure_sum_through_the_engine(tmp_path, monkeypatch):
    """Four phases a round, each through a grid, a ClientApp and a socket; silos' secrets stay in their workers."""
    monkeypatch.setattr("dpsb.federated.calibrate.noise_multiplier_for", lambda **_facts: 1.0)
    monkeypatch.setattr("dpsb.federated.trainer.check_before_run", lambda *_args: None)
    replies = []
    summed = f'{SPLIT}\nmodel = "secagg"\nnoise = "skellam"\nserver_optimizer = "adam"\nlocal_steps = 1'
    path = settings(tmp_path, split_file(tmp_path), summed)
    path.write_text(path.read_text().replace("local_steps = 2\n", ""))
    done = run_simulation(read_federation(path), engine="flower", callbacks=Callbacks(on_reply=replies.append))
    report = json.loads((done.out / "report.json").read_text())
    assert report["claim"] is True
    assert [len(entry["silos"]) for entry in report["rounds"]["history"]] == [3, 3]
    assert all(row["charged"] == row["planned"] == 2 for row in report["silos"])
    assert len(replies) == 2 * 3 * 4


def test_an_engine_that_does_not_exist_is_refused(tmp_path):
    config = read_federation(settings(tmp_path, split_file(tmp_path), SPLIT))
    with pytest.raises(FederatedError, match="engine='nvflare' to be one of local, flower"):
        run_simulation(config, engine="nvflare")


@pytest.mark.slow
def test_a_silo_that_dies_in_its_round_is_lost_and_the_run_goes_on(federation):
    """It said its name, and its worker ends when the round comes; one that never comes is in the transport's tests."""
    federation.coordinator(asked=terms(rounds=1, attempts=1)).begin()
    silos, dead = federation.silos(), threading.Event()

    def die(_message):
        dead.set()
        raise ConnectionResetError

    silos["south"].answer = die
    try:
        done = simulate(federation, silos.values(), south={"stop": dead})
    finally:
        dead.set()
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = load_state(federation.out).history
    assert record.silos == ("north", "west")
    assert set(record.lost) == {"south"}
    assert not (silos["south"].folder / "runs").exists()


# --- a deployment: TLS, node keys, a SuperLink, three SuperNodes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_deployment_on_loopback(federation, tmp_path):
    """Three registered silos do the rounds; a node that nobody registered is refused."""
    federation.coordinator(asked=terms(rounds=2)).begin()
    out, port, over = federation.out, free_port(), threading.Event()
    make_certificates(out / TLS, ["localhost", "127.0.0.1"], days=2)
    silos = federation.silos()
    with ExitStack() as stack:
        for name, silo in silos.items():
            stack.enter_context(at_work(silo))
            (out / NODES).mkdir(exist_ok=True)
            (out / NODES / f"{name}.pub").write_bytes(make_node_key(silo.folder))
            shutil.copy(out / TLS / "ca.pem", silo.folder / "ca.pem")
        flower = stack.enter_context(superlink(out, "127.0.0.1", port))
        register(flower, sorted((out / NODES).glob("*.pub")))
        register(flower, sorted((out / NODES).glob("*.pub")))  # again: a server that is started again does so
        stranger = tmp_path / "stranger"
        make_node_key(stranger)
        shutil.copy(out / TLS / "ca.pem", stranger / "ca.pem")
        for folder in (*(silo.folder for silo in silos.values()), stranger):
            options = {"silo_folder": folder, "port": free_port(), "stop": over.is_set}
            node = threading.Thread(target=supernode, args=(folder, f"127.0.0.1:{port}"), kwargs=options)
            node.start()
            stack.callback(node.join)
        stack.callback(over.set)
        run_rounds(out, flower, patience=240, timeout=240)
    state = load_state(out)
    assert [record.silos for record in state.history] == [NAMES, NAMES]
    for name in NAMES:
        check_ledger(federation.ledger(name), 4)
    assert federation_report(out).report.claim is True
    log = (stranger / "flower" / "supernode.log").read_text().lower()
    assert "failed to activate supernode" in log
