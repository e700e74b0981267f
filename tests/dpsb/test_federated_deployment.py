"""The commands of a deployment on the real model and mail: init, three silos, a server; TLS and node keys."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import workbench
from cryptography import x509
from forked import Forked, wait_until
from typer.testing import CliRunner

from dpsb.cli import app
from dpsb.config import ConfigError
from dpsb.demo import mail_file
from dpsb.federated.budget import FolderBusy, alone
from dpsb.federated.checks import FederatedError
from dpsb.federated.flower.keys import make_certificates
from dpsb.federated.flower.setup import open_silo
from dpsb.federated.server import load_state
from dpsb_accounting import Ledger, verify

pytest.importorskip("flwr")

NAMES = ("north", "south", "west")
SETTINGS = r"""
model = "minilm"
labels = "ham,spam"
epsilon = 3.0
expected_batch_size = 16
max_length = 64
targets = 're:.*layer\.5\..*(query|value)'
learning_rate = 0.05
head_learning_rate = 0.1
token_budget = 1024

[federation]
rounds = 2
local_steps = 2
min_silos = 2
"""


def free_ports(count):
    with_ports = [socket.socket() for _ in range(count)]
    for one in with_ports:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in with_ports]
    for one in with_ports:
        one.close()
    return found


def config(tmp_path, text=SETTINGS, **declared):
    file = tmp_path / "fed.toml"
    sizes = {name: declared.get(name, 900) for name in NAMES}
    silos = "".join(f"[silos.{name}]\n" + (f"num_examples = {n}\n" if n else "") for name, n in sizes.items())
    file.write_text(text + silos)
    return file


def command(*arguments, **options):
    program = [sys.executable, "-m", "dpsb.cli", "federate", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **options)


def invoke(*arguments):
    return CliRunner().invoke(app, ["federate", *map(str, arguments)])


def test_init_reads_no_data_and_keeps_secrets_to_their_owner(tmp_path):
    done = invoke("init", "--config", config(tmp_path), "--out", tmp_path / "fed", "--host", "fed.example.org,10.0.0.1")
    assert done.exit_code == 0, done.output
    fed = tmp_path / "fed"
    for name in NAMES:
        folder = fed / "for-silos" / name
        assert {p.name for p in folder.iterdir()} == {
            *("federation.json", "start.safetensors", "policy.toml", "silo.toml", "node")
        }
        assert (folder / "node" / "node.key").stat().st_mode & 0o777 == 0o600
        assert 'server = "fed.example.org:8800"' in (folder / "node" / "node.toml").read_text()
        assert (folder / "start.safetensors").read_bytes() == (fed / "start.safetensors").read_bytes()
        assert (fed / "nodes" / f"{name}.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    assert len({(fed / "nodes" / f"{name}.pub").read_bytes() for name in NAMES}) == 3
    for secret in ("ca.key", "server.key"):
        assert (fed / "tls" / secret).stat().st_mode & 0o777 == 0o600
    certificate = x509.load_pem_x509_certificate((fed / "tls" / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["10.0.0.1", "127.0.0.1"], "the server asks its own SuperLink there"
    again = invoke("init", "--config", config(tmp_path), "--out", fed)
    assert "fed exists already; choose another folder" in again.stderr
    undeclared = invoke("init", "--config", config(tmp_path, south=0), "--out", tmp_path / "other")
    assert undeclared.exit_code == 1
    text = SETTINGS.replace('labels = "ham,spam"\n', "")
    unlabelled = invoke("init", "--config", config(tmp_path, text), "--out", tmp_path / "other")
    assert "Declare labels: each silo would take them from its own file's schema" in unlabelled.stderr


def test_a_silo_without_its_files_is_told_what_is_missing(tmp_path):
    assert "make it with `dpsb federate init`" in invoke("silo", tmp_path).stderr
    assert "one of all, worker, node" in invoke("silo", tmp_path, "--part", "half").stderr
    assert "node.toml cannot be read" in invoke("silo", tmp_path, "--part", "node").stderr
    assert "dpsb federate init" in invoke("server", tmp_path).stderr


def test_keys_that_a_crash_left_without_certificates_are_made_anew(tmp_path):
    (tmp_path / "ca.key").write_text("half")
    make_certificates(tmp_path, ["127.0.0.1"], days=1)
    assert {p.name for p in tmp_path.iterdir()} == {"ca.pem", "ca.key", "server.pem", "server.key"}
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600


def carry(tmp_path, fed, node_ports):
    """Each silo's folder away from the server, with its part of the mail."""
    table = pq.read_table(mail_file("train"))
    for number, name in enumerate(NAMES):
        folder = tmp_path / name
        shutil.move(fed / "for-silos" / name, folder)
        data = folder / "mail.parquet"
        pq.write_table(table.slice(number * 900, 900), data)
        (folder / "silo.toml").write_text(f"data = {json.dumps(str(data))}\n")
        node = folder / "node" / "node.toml"
        node.write_text(node.read_text().replace(f"port = {9100 + number}", f"port = {node_ports[number]}"))


def test_a_silo_whose_rows_the_basis_takes_for_public_does_not_open(tmp_path):
    """It has never seen the server's file: the settings that it got hold the digests."""
    private, near = pq.read_table(mail_file("train")), tmp_path / "near.parquet"
    pq.write_table(
        pa.concat_tables([pq.read_table(mail_file("validation")).slice(0, 40), private.slice(1000, 5)]), near
    )
    made = invoke(
        "init",
        "--config",
        config(tmp_path, f'basis = "public:{tmp_path}/./near.parquet"\n{SETTINGS}'),
        "--out",
        tmp_path / "fed",
    )
    assert made.exit_code == 0, made.output
    near.unlink()
    carry(tmp_path, tmp_path / "fed", [9100, 9101, 9102])
    silo, _ = open_silo(tmp_path / "north", on_status=lambda _message: None)
    assert silo.name == "north"
    refused = invoke("silo", tmp_path / "south", "--part", "worker")
    assert refused.exit_code == 1
    said = " ".join(refused.stderr.split())
    assert "5 of the 45 rows of" in said
    assert "named as public, are in the data of silo 'south' too" in said
    policy, own = tmp_path / "north" / "policy.toml", tmp_path / "north" / "silo.toml"
    before = policy.read_text(), own.read_text()
    undeclared = "".join(
        line for line in before[0].splitlines(True) if not line.startswith(("num_examples", "neighboring"))
    )
    policy.write_text(f'neighboring = "replace_one"\n{undeclared}')
    own.write_text(before[1].replace('"\n', '#train(test=0.2,validation=0,seed=7)"\n'))
    with pytest.raises(ConfigError, match="with neighboring='replace_one' needs num_examples"):
        open_silo(tmp_path / "north", on_status=lambda _message: None)
    policy.write_text(before[0])
    own.write_text(before[1])
    settings = tmp_path / "north" / "federation.json"
    begun = json.loads(settings.read_text())
    guesses = [{**begun["public_texts"][0], "rows": 1}]
    for changes, match in (
        ({"public_texts": []}, "does not say which rows the basis takes for public"),
        ({"public_texts": begun["public_texts"] * 2}, "does not say which rows the basis takes for public"),
        ({"public_texts": guesses}, "public_texts is not what a server writes: it states 1 rows"),
        ({"public_texts": None}, "public_texts is not what a server writes"),
        ({"settings": {}}, "is not what `dpsb federate init` wrote"),
        ({"basis": None}, "is not what `dpsb federate init` wrote"),
    ):
        settings.write_text(json.dumps({**begun, **changes}))
        with pytest.raises(FederatedError, match=match):
            open_silo(tmp_path / "north", on_status=lambda _message: None)


def start_silos(tmp_path, silos, in_two_parts=()):
    """Each silo's process, or two of them."""
    for name in NAMES:
        for part in ("worker", "node") if name in in_two_parts else ("all",):
            started = Forked(
                "federate", "silo", tmp_path / name, "--part", part, output=tmp_path / f"{name}-{part}.txt"
            )
            silos[name if part != "node" else f"{name}'s node"] = started


def stop(silos, *servers):
    """Ends the silos' processes, and a server's that is still there; returns what the silos printed."""
    for process in servers:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=60)
    for process in silos.values():
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGINT)
    return {name: process.communicate(timeout=60)[0] for name, process in silos.items()}


@pytest.mark.slow
def test_three_silos_and_one_that_is_killed(tmp_path):
    """One silo dies by SIGKILL in its first round and is not started again: the others finish.

    Its node stays, as the other user's would, and says so; a node that is gone too is in the transport's tests.
    """
    port, *node_ports = free_ports(4)
    fed = tmp_path / "fed"
    done = invoke("init", "--config", config(tmp_path), "--out", fed, "--port", port)
    assert done.exit_code == 0, done.output
    silos, servers = {}, []
    try:
        carry(tmp_path, fed, node_ports)
        start_silos(tmp_path, silos, in_two_parts=["south"])
        servers.append(
            server := command(
                *("server", fed, "--port", port, "--patience", 240, "--timeout", 240, "--json"), start_new_session=True
            )
        )
        assert wait_until(lambda: list((tmp_path / "south").glob("runs/*/ledger.jsonl")), 480, server)
        os.killpg(silos["south"].pid, signal.SIGKILL)
        output, _ = server.communicate(timeout=600)
        assert server.returncode == 0, output
    finally:
        texts = stop(silos, *servers)
    report = json.loads((fed / "report.json").read_text())
    assert report["claim"] is True, texts
    assert report["epsilon"]["upper"] <= 3.0
    assert report["rounds"]["done"] == 2
    used = [set(entry["silos"]) for entry in report["rounds"]["history"]]
    assert all({"north", "west"} <= names for names in used)
    assert used[-1] == {"north", "west"}
    for name in ("north", "west"):
        (ledger,) = (tmp_path / name).glob("runs/*/ledger.jsonl")
        assert verify(ledger).ok
        assert (fed / "ledgers" / f"{name}.jsonl").read_bytes() == ledger.read_bytes()
    assert (fed / "adapter" / "adapter_model.safetensors").exists()
    for text in texts.values():
        assert "Subject:" not in text


@pytest.mark.slow
def test_the_walk_through_of_the_example(tmp_path):
    """The script as a user would start it."""
    script = Path(__file__).resolve().parents[2] / "examples" / "federated_mail" / "deployment.sh"
    (port,), out = free_ports(1), tmp_path / "fed"
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", script, out, str(port)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "server" / "report.json").read_text())
    assert report["claim"] is True
    assert [entry["silos"] for entry in report["rounds"]["history"]] == [list(NAMES)] * 2
    assert done.stdout.count("claim: epsilon 2.99") == 3
    assert sum(pq.read_metadata(out / name / "mail.parquet").num_rows for name in NAMES) == 3023
    for text in (done.stdout, done.stderr, *((out / f"{name}.log").read_text() for name in NAMES)):
        assert "Subject:" not in text


def is_free(folder):
    """Whether no coordinator holds a server's folder."""
    try:
        with alone(folder):
            return True
    except FolderBusy:
        return False


@pytest.mark.slow
def test_a_server_that_is_killed_goes_on_at_the_round_that_was_open(tmp_path):
    """SIGKILL in the second round of two; started again by the same command, with silos that stayed up."""
    model = f'model = "{workbench.bert_folder()}"\nlabels = "ham,spam"\nepsilon = 3.0\nexpected_batch_size = 16\n'
    text = f"{model}max_length = 16\n\n[federation]\nrounds = 2\nlocal_steps = 1\nmin_silos = 2\n"
    port, *node_ports = free_ports(4)
    fed, silos, servers = tmp_path / "fed", {}, []
    done = invoke("init", "--config", config(tmp_path, text), "--out", fed, "--port", port)
    assert done.exit_code == 0, done.output
    serve = ("server", fed, "--port", port, "--timeout", 240, "--patience", 240, "--json")
    try:
        carry(tmp_path, fed, node_ports)
        start_silos(tmp_path, silos)
        servers.append(server := command(*serve, start_new_session=True))
        assert wait_until(lambda: load_state(fed).round >= 1, 480, server), server.communicate(timeout=5)[0]
        for silo in silos.values():
            silo.send_signal(signal.SIGSTOP)  # nobody answers the second round, however slow this test is
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate(timeout=60)
        assert wait_until(lambda: is_free(fed), 90), "its ServerApp ends with it"
        for silo in silos.values():
            silo.send_signal(signal.SIGCONT)
        before = load_state(fed)
        assert before.round == 1
        assert not (fed / "report.json").exists()
        servers.append(server := command(*serve, start_new_session=True))
        output, _ = server.communicate(timeout=600)
        assert server.returncode == 0, output
    finally:
        texts = stop(silos, *servers)
    after = load_state(fed)
    assert after.run_id == before.run_id
    assert [record.round for record in after.history] == [0, 1], texts
    assert after.history[: before.round] == before.history, "no closed round was done again"
    report = json.loads((fed / "report.json").read_text())
    assert report["claim"] is True
    assert report["epsilon"]["upper"] <= 3.0
    for name in NAMES:
        (path,) = (tmp_path / name).glob("runs/*/ledger.jsonl")
        assert verify(path).ok
        assert Ledger.read(path).charged("train") == 2, "what the server forgot, silos answered from their disks"
