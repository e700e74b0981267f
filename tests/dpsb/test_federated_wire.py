"""Messages as bytes, and the socket between an engine's short processes and a silo's long one."""

import json
import os
import socket
import stat
import threading
import zlib
from contextlib import contextmanager
from dataclasses import replace
from secrets import token_hex

import pytest
import torch
from federation import NAMES, Federation, check_ledger, policy, terms, trainer

from dpsb.federated import channel, worker
from dpsb.federated.messages import SUM, Receipt, Refusal, RoundMessage, Update, bytes_of
from dpsb.federated.terms import SiloTerms
from dpsb.federated.wire import WireError, framing_bytes, pack, unpack

THETA = {"z.R": torch.arange(6.0).view(2, 3), "a.R": torch.ones(2, 2), "head": torch.zeros(3, dtype=torch.bfloat16)}
RECEIPT = Receipt(ledger_id="run", length=3, head="a" * 64, round=1)


def message(**changes):
    spec = terms().specs("0" * 32, 0, THETA, "1" * 64)["north"]
    return RoundMessage(**{"silo": "north", "spec": spec, "theta": THETA, "receipt": RECEIPT, **changes})


def update(tensors=THETA):
    facts = {"silo": "north", "run_id": "0" * 32, "round": 0, "theta_sha256": "2" * 64, "receipt": RECEIPT}
    return Update(**facts, tensors=tensors, follows="b" * 64)


def same(one, other):
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name])


@pytest.mark.parametrize("receipt", [RECEIPT, None])
def test_a_round_comes_through_bit_for_bit(receipt):
    sent = message(receipt=receipt)
    found = unpack(pack(sent), THETA)
    same(found.theta, THETA)
    assert replace(found, theta={}) == replace(sent, theta={})


@pytest.mark.parametrize("tensors", [THETA, {SUM: torch.randn(13, dtype=torch.float64)}], ids=["theta", "sum"])
def test_an_update_comes_through_bit_for_bit(tensors):
    found = unpack(pack(update(tensors)), THETA)
    same(found.tensors, tensors)
    assert replace(found, tensors={}) == replace(update(), tensors={})


def test_a_refusal_comes_through():
    refusal = Refusal(silo="north", run_id="0" * 32, round=2, kind="budget", message="The budget is spent.")
    assert unpack(pack(refusal), THETA) == refusal


def test_bytes_are_the_numbers_and_little_else():
    """Framing is below 2 % at the size of the mail example, with digests and calibrated numbers as they are."""
    large = {f"layer{i}.R": torch.randn(16, 16) for i in range(12)} | {"head": torch.randn(2, 385)}
    run, digest, other = token_hex(16), token_hex(32), token_hex(32)
    asked = SiloTerms(sampling_prob=64 / 1007, noise_multiplier=0.8712893412, expected_batch_size=64)
    spec = terms(silos=dict.fromkeys(NAMES, asked), rounds=8, schedule="linear").specs(run, 3, large, digest)["north"]
    receipt = Receipt(ledger_id=token_hex(16), length=31, head=other, round=2)
    down = pack(RoundMessage(silo="north", spec=spec, theta=large, receipt=receipt))
    theta = {"theta_sha256": spec.theta_sha256}
    up = pack(Update(silo="north", run_id=run, round=3, tensors=large, receipt=receipt, follows=digest, **theta))
    assert bytes_of(large) == (12 * 16 * 16 + 770) * 4
    for content in (down, up):
        assert len(content) == bytes_of(large) + framing_bytes(content)
        assert framing_bytes(content) < 0.02 * bytes_of(large)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda content: content[:-1], "bytes of numbers"),
        (lambda content: content + b"\0", "bytes of numbers"),
        (lambda content: b"x" + content, "no message"),
        (lambda _content: b"", "no message"),
        (lambda content: content[:20], "cut off"),
        (lambda content: content[:12] + b"\0" * (len(content) - 12), "cannot be read"),
        (lambda content: content[:8] + b"\xff\xff\xff\xff" + content[12:], "cut off"),
    ],
)
def test_spoilt_bytes_are_refused(spoil, what):
    with pytest.raises(WireError, match=what):
        unpack(spoil(pack(update())), THETA)


def test_framing_that_inflates_without_end_is_refused():
    bomb = zlib.compress(b'{"a":"' + b"a" * (1 << 26) + b'"}', 9)
    assert len(bomb) < 1 << 17
    with pytest.raises(WireError):
        unpack(b"dpsbfed2" + len(bomb).to_bytes(4, "big") + bomb, THETA)


def framed(meta):
    framing = zlib.compress(meta, 9)
    return b"dpsbfed2" + len(framing).to_bytes(4, "big") + framing


@pytest.mark.parametrize("meta", [b'{"update":{},"sum":[["a",1e999,1]]}', b'{"round":{},"basis":[["a",Infinity,1]]}'])
def test_a_shape_without_end_is_refused(meta):
    """It raised OverflowError, which ended a silo's worker or the coordinator."""
    with pytest.raises(WireError, match="without a shape"):
        unpack(framed(meta), THETA)


def test_framing_that_nests_without_end_is_refused():
    """Python's JSON raises RecursionError there, which ended a silo's worker or the coordinator."""
    with pytest.raises(WireError, match="cannot be read"):
        unpack(framed(b"[" * 60_000), THETA)


@pytest.mark.parametrize("changes", [{"kind": "other"}, {"kind": ["spec"]}, {"message": "\x1b]0;owned\x07"}])
def test_a_refusal_says_what_is_known_and_printable(changes):
    facts = {"silo": "north", "run_id": "0" * 32, "round": 0, "kind": "spec", "message": "No.", **changes}
    with pytest.raises(WireError, match="no known kind"):
        unpack(framed(json.dumps({"refusal": facts}).encode()), THETA)


# --- the worker


@contextmanager
def at_work(silo, **options):
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(
        target=worker.serve, args=(silo,), kwargs={"on_ready": ready.set, "stop": stop, **options}
    )
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        stop.set()
        thread.join(10)


@pytest.fixture
def federation(tiny, tmp_path):
    return Federation(tmp_path, trainer(tiny))


def test_a_round_over_the_socket_is_the_silos_own(federation):
    silo, made = federation.silo("north"), federation.trainer
    spec = terms().specs("0" * 32, 0, made.start, made.basis_sha256)["north"]
    asked = pack(RoundMessage(silo="north", spec=spec, theta=made.start))
    with at_work(silo):
        assert channel.ask(silo.folder, channel.NAME) == b"north"
        first, again = (channel.ask(silo.folder, channel.ROUND, asked) for _ in range(2))
        assert first == again, "asked again, the silo sends the same bytes"
        ledger = channel.ask(silo.folder, channel.LEDGER, b"0" * 32)
        assert channel.ask(silo.folder, channel.LEDGER, b"../../north") == b""
        assert channel.ask(silo.folder, channel.LEDGER, b"1" * 32) == b""
    assert isinstance(unpack(first, made.start), Update)
    check_ledger(federation.ledger("north"), 2)
    assert ledger == federation.ledger("north").path.read_bytes()
    assert not (silo.folder / channel.SOCKET_NAME).exists()


def test_only_the_owner_may_enter_and_there_is_one_worker(federation):
    silo = federation.silo("north")
    with at_work(silo):
        assert stat.S_IMODE(os.stat(silo.folder).st_mode) == 0o700
        assert stat.S_IMODE(os.stat(silo.folder / channel.SOCKET_NAME).st_mode) == 0o600
        with pytest.raises(channel.WorkerError, match=r"answers at .* already"):
            worker.serve(silo)
        assert channel.ask(silo.folder, channel.NAME) == b"north"


def test_a_socket_left_by_a_killed_worker_is_no_obstacle(federation):
    silo = federation.silo("north")
    silo.folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(silo.folder / channel.SOCKET_NAME))
    with at_work(silo):
        assert channel.ask(silo.folder, channel.NAME) == b"north"


@pytest.mark.parametrize(
    "content",
    [
        *(b"rubbish", b"rund" + (1 << 50).to_bytes(8, "big"), b"rund" + (4).to_bytes(8, "big") + b"abcd"),
        b"rund" + len(framed(b"[" * 60_000)).to_bytes(8, "big") + framed(b"[" * 60_000),
    ],
)
def test_rubbish_costs_nothing_and_the_worker_stays(federation, content):
    silo = federation.silo("north")
    with at_work(silo):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(silo.folder / channel.SOCKET_NAME))
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(10) == b""
        assert channel.ask(silo.folder, channel.NAME) == b"north"
    assert not (silo.folder / "runs").exists()


def test_without_a_worker_the_error_says_what_to_start(tmp_path):
    with pytest.raises(channel.WorkerError, match="dpsb federate silo"):
        channel.ask(tmp_path, channel.NAME)
    with pytest.raises(channel.WorkerError, match="dpsb federate silo"):
        channel.ask(tmp_path / ("x" * 100), channel.NAME)


def test_a_long_path_is_no_obstacle(tiny, tmp_path, monkeypatch):
    """pytest's hundredth folder was one byte too long for a socket."""
    silo = Federation(tmp_path / ("é" * 60), trainer(tiny)).silo("north")
    assert len(os.fsencode(silo.folder)) > 108
    before = len(os.listdir("/proc/self/fd"))
    with at_work(silo):
        assert stat.S_IMODE(os.stat(silo.folder / channel.SOCKET_NAME).st_mode) == 0o600
        assert channel.ask(silo.folder, channel.NAME) == b"north"
    assert not (silo.folder / channel.SOCKET_NAME).exists()
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr(channel, "_OPEN_FOLDERS", tmp_path / "nowhere")
    with pytest.raises(channel.WorkerError, match="too long"):
        channel.ask(silo.folder, channel.NAME)


def test_a_policy_holds_over_the_socket_too(federation):
    federation.policies["north"] = policy("north", min_noise_multiplier=5.0)
    silo, made = federation.silo("north"), federation.trainer
    spec = terms().specs("0" * 32, 0, made.start, made.basis_sha256)["north"]
    with at_work(silo):
        reply = channel.ask(silo.folder, channel.ROUND, pack(RoundMessage(silo="north", spec=spec, theta=made.start)))
    assert unpack(reply, made.start).kind == "spec"
    assert not (silo.folder / "runs").exists()
