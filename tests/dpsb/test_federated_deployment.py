"""The commands of a deployment on the real model and mail: init, three silos, a server; TLS and node keys."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from cryptography import x509
from typer.testing import CliRunner

from dpsb.cli import app
from dpsb.demo import mail_file
from dpsb.federated.flower.keys import make_certificates
from dpsb_accounting import verify

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
rounds = 3
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
    assert "is not empty" in again.stderr
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


@pytest.mark.slow
def test_three_silos_and_one_that_is_killed(tmp_path):
    """One silo dies by SIGKILL in its first round and is not started again: the others finish."""
    port, *node_ports = free_ports(4)
    fed = tmp_path / "fed"
    done = invoke("init", "--config", config(tmp_path), "--out", fed, "--port", port)
    assert done.exit_code == 0, done.output
    table = pq.read_table(mail_file("train"))
    silos = {}
    try:
        for number, name in enumerate(NAMES):
            folder = tmp_path / name
            shutil.move(fed / "for-silos" / name, folder)
            data = folder / "mail.parquet"
            pq.write_table(table.slice(number * 900, 900), data)
            (folder / "silo.toml").write_text(f"data = {json.dumps(str(data))}\n")
            node = (
                (folder / "node" / "node.toml")
                .read_text()
                .replace(f"port = {9100 + number}", f"port = {node_ports[number]}")
            )
            (folder / "node" / "node.toml").write_text(node)
            silos[name] = command("silo", folder, start_new_session=True)
        server = command("server", fed, "--port", port, "--patience", 120, "--timeout", 90, "--json")
        ledgers = list((tmp_path / "south").glob("runs/*/ledger.jsonl"))
        last = time.monotonic() + 240
        while not ledgers and time.monotonic() < last and server.poll() is None:
            time.sleep(0.1)
            ledgers = list((tmp_path / "south").glob("runs/*/ledger.jsonl"))
        os.killpg(silos["south"].pid, signal.SIGKILL)
        output, _ = server.communicate(timeout=420)
        assert server.returncode == 0, output
    finally:
        for process in silos.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        texts = {name: process.communicate(timeout=60)[0] for name, process in silos.items()}
    report = json.loads((fed / "report.json").read_text())
    assert report["claim"] is True, texts
    assert report["epsilon"]["upper"] <= 3.0
    assert report["rounds"]["done"] == 3
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
