"""Crashes, full disks and two writers: a step is charged on disk, once, or it is not drawn."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
from plans import fill, make_plan

from dpsb_accounting import BudgetSpent, Ledger, LedgerError, Phase
from dpsb_accounting.record import in_use

ALONE = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_two_writers_in_one_process(path):
    fill(path)
    with Ledger.open(path) as ledger:
        with pytest.raises(LedgerError, match="in use by another run"):
            Ledger.open(path)
        assert Ledger.read(path).head == ledger.head
    Ledger.open(path).close()


def test_two_writers_in_two_processes(path):
    fill(path)
    code = f"from dpsb_accounting import Ledger; Ledger.open({str(path)!r}); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ALONE
    ) as other:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(LedgerError, match=f"{path.name} is in use"):
            Ledger.open(path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    Ledger.open(path).close()


def test_threads_share_the_budget(path):
    numbers, refused = [], []

    def work(ledger):
        for _ in range(5):
            try:
                numbers.append(ledger.charge("train"))
            except BudgetSpent:
                refused.append(1)

    with Ledger.create(path, make_plan()) as ledger:
        threads = [threading.Thread(target=work, args=(ledger,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(numbers) == list(range(10))
    assert len(refused) == 10


def failing_write(descriptor, data, real=os.write):
    real(descriptor, data[:7])
    raise OSError(errno.ENOSPC, "No space left on device")


def short_write(descriptor, data, real=os.write):
    return real(descriptor, data[:7])


@pytest.mark.parametrize("write", [failing_write, short_write])
def test_a_full_disk_stops_training_before_the_draw(path, monkeypatch, write):
    whole = fill(path, 2)
    ledger = Ledger.open(path)
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(LedgerError, match="before any data was drawn"):
        ledger.charge("train")
    monkeypatch.undo()
    assert path.read_bytes() == whole
    with pytest.raises(LedgerError, match="can no longer be written"):
        ledger.charge("train")
    with pytest.raises(LedgerError, match="can no longer be written"):
        ledger.taint("a", "b")
    ledger.close()
    with Ledger.open(path) as again:
        assert again.charge("train") == 2


def test_a_failing_fsync_stops_training_before_the_draw(path, monkeypatch):
    fill(path, 2)
    ledger = Ledger.open(path)

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(LedgerError, match=r"Input/output error.*could not be removed.*before any data"):
        ledger.charge("train")
    monkeypatch.undo()
    with pytest.raises(LedgerError, match="can no longer be written"):
        ledger.charge("train")
    ledger.close()
    assert Ledger.read(path).charged("train") == 2


def test_a_full_disk_at_creation_leaves_nothing(path, monkeypatch):
    monkeypatch.setattr(os, "write", failing_write)
    with pytest.raises(LedgerError, match="cannot create"):
        Ledger.create(path, make_plan())
    assert not path.exists()


def test_a_file_size_limit_in_a_real_process(path):
    size = len(fill(path, 2))
    code = f"""
import resource, signal
from dpsb_accounting import Ledger, LedgerError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger.open({str(path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({size} + 300, resource.RLIM_INFINITY))
charged = 0
try:
    while True:
        ledger.charge("train")
        charged += 1
except LedgerError as error:
    print(charged, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ALONE, check=True)
    assert done.stdout.startswith("1 cannot write")
    assert "before any data was drawn" in done.stdout
    record = Ledger.read(path)
    assert (record.charged("train"), record.torn) == (3, False)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != size + 300


def test_another_program_appending_is_noticed(path):
    fill(path, 1)
    with Ledger.open(path) as ledger:
        with path.open("ab") as file:
            file.write(b"x")
        with pytest.raises(LedgerError, match="changed by another program"):
            ledger.charge("train")


def test_killed_at_any_moment_never_exceeds_the_plan(path):
    """Runs are killed while charging; together they make exactly the planned charges."""
    plan = make_plan(phases=(Phase("train", make_plan().train.event, 400),))
    Ledger.create(path, plan).close()
    code = f"""
from dpsb_accounting import Ledger
ledger = Ledger.open({str(path)!r})
print('open', flush=True)
while ledger.remaining("train"):
    print(ledger.charge("train"), flush=True)
"""
    returned = []
    for wait in (3, 40, 90, 10_000):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=ALONE) as run:
            for count, line in enumerate(run.stdout):
                if line != b"open\n":
                    returned.append(int(line))
                if count == wait:
                    run.kill()
    assert len(set(returned)) == len(returned)
    record = Ledger.read(path)
    assert record.charged("train") == 400
    assert set(returned) <= set(range(400))


def test_a_ledger_in_use_is_seen_and_looking_does_not_disturb(path):
    fill(path)
    assert not in_use(path)
    assert not in_use(path.parent / "missing.jsonl")
    with Ledger.open(path) as ledger:
        assert in_use(path)
        assert ledger.charge("train") == 3
    assert not in_use(path)


def test_a_writer_waits_for_whoever_only_looks(path):
    fill(path)
    with path.open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        looked = threading.Timer(0.05, lambda: fcntl.flock(reader, fcntl.LOCK_UN))
        looked.start()
        Ledger.open(path).close()
        looked.join()


@pytest.mark.parametrize(
    "begin", [lambda path: Ledger.create(path, make_plan()), lambda path: fill(path) and Ledger.open(path)]
)
def test_the_file_is_only_appended_to_and_no_child_inherits_it(path, begin):
    with begin(path) as ledger:
        descriptor = ledger._descriptor
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND
        assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert not path.stat().st_mode & 0o022, "nobody else may write it"
        assert len(ledger.run_id) == 32


@pytest.mark.parametrize(
    "change", [lambda path: os.truncate(path, path.stat().st_size - 5), lambda path: path.write_bytes(b"")]
)
def test_a_ledger_that_became_shorter_stops_the_run(path, change):
    with Ledger.create(path, make_plan()) as ledger:
        ledger.charge("train")
        change(path)
        with pytest.raises(LedgerError, match="changed by another program"):
            ledger.charge("train")
        with pytest.raises(LedgerError, match="can no longer be written"):
            ledger.charge("train")
