import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
from plans import make_plan, two_phases

from dpsb_accounting import BudgetSpent, Ledger, LedgerError, NonPrivate, Phase, Taint, chain, epsilon, spent

ALONE = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def fill(path, charges=3, plan=None):
    with Ledger.create(path, plan or make_plan()) as ledger:
        for _ in range(charges):
            ledger.charge("train")
    return path.read_bytes()


def resealed(data):
    data = {name: value for name, value in data.items() if name != "hash"}
    return chain.sealed_line(data)


def test_charges_are_on_disk_when_they_return(path):
    with Ledger.create(path, make_plan()) as ledger:
        for number in range(4):
            assert ledger.charge("train") == number
            record = Ledger.read(path)
            assert record.charged("train") == number + 1
            assert (record.length, record.head) == (ledger.length, ledger.head)
        assert (ledger.charged("train"), ledger.remaining("train")) == (4, 6)
    assert Ledger.read(path).plan == make_plan()


def test_a_resumed_run_does_what_is_left_and_no_more(path):
    fill(path, 7)
    with Ledger.open(path) as ledger:
        assert [ledger.charge("train") for _ in range(ledger.remaining("train"))] == [7, 8, 9]
        with pytest.raises(BudgetSpent, match="all 10 charges"):
            ledger.charge("train")
        assert ledger.length == 11
    with Ledger.open(path) as ledger, pytest.raises(BudgetSpent):
        ledger.charge("train")


def test_phases_are_charged_in_order(path):
    with Ledger.create(path, two_phases()) as ledger:
        ledger.charge("train")
        assert ledger.remaining("basis") == 0
        with pytest.raises(BudgetSpent, match="'basis' is closed"):
            ledger.charge("basis")
        with pytest.raises(ValueError, match="'evaluate'"):
            ledger.charge("evaluate")


def test_spent_is_less_than_the_claim(path):
    plan = two_phases()
    with Ledger.create(path, plan) as ledger:
        assert spent(ledger).upper == 0
        ledger.charge("basis")
        ledger.charge("train")
        assert 0 < spent(ledger).upper < epsilon(ledger).upper == epsilon(plan).upper
        while ledger.remaining("train"):
            ledger.charge("train")
        assert spent(ledger) == epsilon(ledger)


def test_a_ledger_holds_nothing_but_public_facts(path):
    lines = [json.loads(line) for line in fill(path).splitlines()]
    assert set(lines[0]) == {"schema", "run_id", "created_utc", "software", "plan", "kind", "index", "prev", "hash"}
    for line in lines[1:]:
        assert set(line) == {"phase", "number", "event", "kind", "index", "prev", "hash"}


def test_taints_are_kept_once(path):
    with Ledger.create(path, make_plan()) as ledger:
        ledger.taint("seeded", "a test")
        ledger.taint("seeded", "a test")
        assert ledger.taints == (Taint(name="seeded", reason="a test"),)
        assert ledger.length == 2
        with pytest.raises(ValueError, match="reason"):
            ledger.taint("seeded", "")
    with Ledger.open(path) as ledger:
        ledger.taint("seeded", "a test")
        assert ledger.length == 2


def test_an_existing_file_is_never_overwritten(path):
    path.write_text("precious")
    with pytest.raises(LedgerError, match="exists already"):
        Ledger.create(path, make_plan())
    assert path.read_text() == "precious"


def test_missing_files_and_directories(path):
    for act in (Ledger.open, Ledger.read):
        with pytest.raises(LedgerError, match="No such file"):
            act(path)
        with pytest.raises(LedgerError, match=r"directory|Is a"):
            act(path.parent)
    with pytest.raises(LedgerError, match="cannot create"):
        Ledger.create(path.parent / "nowhere" / "ledger.jsonl", make_plan())
    with pytest.raises(ValueError, match="plan"):
        Ledger.create(path, {"phases": []})


def test_a_closed_ledger_refuses(path):
    fill(path)
    ledger = Ledger.open(path)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.charge("train")


def test_every_changed_byte_is_noticed(path):
    whole = fill(path, 2, make_plan(details={}))
    record = Ledger.read(path)
    for position in range(len(whole)):
        edited = bytearray(whole)
        edited[position] ^= 0x20 if position % 2 else 0x01
        path.write_bytes(edited)
        with pytest.raises(LedgerError):
            Ledger.read(path).check_not_behind(record.length, record.head)


def test_removed_repeated_and_swapped_lines_are_noticed(path):
    lines = fill(path, 4).splitlines(keepends=True)
    for changed in (
        lines[:2] + lines[3:],
        lines[1:],
        lines[:3] + lines[2:],
        [lines[0], lines[2], lines[1], *lines[3:]],
        lines + lines[:1],
        [*lines[:2], b"\n", *lines[2:]],
        [*lines[:2], b"{}\n", *lines[2:]],
    ):
        path.write_bytes(b"".join(changed))
        with pytest.raises(LedgerError, match=r"line \d of the ledger is wrong"):
            Ledger.read(path)
        with pytest.raises(LedgerError):
            Ledger.open(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"number": 2}, "number"),
        ({"number": True}, "number"),
        ({"index": 7}, "index"),
        ({"phase": "basis"}, "phase"),
        (
            {"event": {"type": "poisson_gaussian", "noise_multiplier": 2.0, "sampling_prob": 0.01}},
            "not the one planned",
        ),
        ({"extra": 1}, "unknown fields: 'extra'"),
        ({"kind": "plan"}, "first line, and no other"),
        ({"kind": "gift"}, "kind"),
        ({"prev": "0" * 64}, "prev"),
    ],
)
def test_a_resealed_lie_is_noticed(path, changes, words):
    lines = fill(path, 2).splitlines(keepends=True)
    lines[2] = resealed({**json.loads(lines[2]), **changes})
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=words):
        Ledger.read(path)


def test_more_charges_than_planned_are_noticed(path):
    last = fill(path, 10).splitlines()[-1]
    line = json.loads(last)
    extra = resealed({**line, "index": 11, "number": 10, "prev": line["hash"]})
    with path.open("ab") as file:
        file.write(extra)
    with pytest.raises(LedgerError, match="all 10 charges"):
        Ledger.read(path)


def test_another_schema_is_refused(path):
    first = json.loads(fill(path, 0))
    path.write_bytes(resealed({**first, "schema": "dpsb-ledger/2"}))
    with pytest.raises(LedgerError, match="schema must be 'dpsb-ledger/1', not 'dpsb-ledger/2'"):
        Ledger.read(path)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x80\x00\n", b"[1]\n", b"PK\x03\x04" * 100, b"\0" * 50])
def test_what_is_no_ledger_is_refused(path, content):
    path.write_bytes(content)
    for act in (Ledger.read, Ledger.open):
        with pytest.raises(LedgerError):
            act(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", ["charge", "taint"])
def test_a_line_torn_at_any_byte(path, kind, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with Ledger.create(path, make_plan(details={})) as ledger:
        ledger.charge("train")
        before, length = path.read_bytes(), ledger.length
        if kind == "charge":
            ledger.charge("train")
        else:
            ledger.taint("seeded", "a test")
    line = path.read_bytes()[len(before) :]
    for size in range(1, len(line)):
        for filled in (b"", b"\0" * 9):
            torn = line[:size] + filled
            path.write_bytes(before + torn)
            whole = size == len(line) - 1 and not filled
            record = Ledger.read(path)
            assert record.torn == (not whole)
            counted = kind == "charge" or (size < 3 and kind == "taint")
            assert record.charged("train") >= (2 if counted else 1)
            with Ledger.open(path) as ledger:
                assert ledger.repairs == 1
                assert ledger.length == length + 1 + int(whole)
                assert ledger.charged("train") == 1 + int(whole and kind == "charge")
                assert ledger.charge("train") == ledger.charged("train") - 1
            assert not Ledger.read(path).torn


def test_a_torn_line_never_hides_an_edit(path):
    whole = fill(path, 2)
    for end in (b"x", b"{", b'{"event":{"noise_multiplier":2', b'{"hash":"a"}', b"\n", b"\0\0\n\0x"):
        path.write_bytes(whole + end)
        if end == b"{":
            assert Ledger.read(path).torn
            continue
        with pytest.raises(LedgerError):
            Ledger.read(path)
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(LedgerError):
        Ledger.open(path)


def test_a_torn_plan_means_nothing_was_drawn(path):
    whole = fill(path, 0)
    for size in (1, 10, len(whole) - 2):
        path.write_bytes(whole[:size])
        with pytest.raises(LedgerError, match="no data was drawn"):
            Ledger.open(path)


def test_a_rolled_back_ledger_is_refused(path):
    fill(path, 5)
    record = Ledger.read(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]))
    with pytest.raises(LedgerError, match="is behind: it has 4 lines, but 6"):
        Ledger.read(path).check_not_behind(record.length, record.head)
    with Ledger.open(path) as ledger:
        for _ in range(4):
            ledger.charge("train")
        ledger.check_not_behind(4, record.hash_at(3))
        ledger.check_not_behind(6, record.head)  # the charges are the same lines again
        ledger.taint("x", "y")
        with pytest.raises(LedgerError, match="another ledger"):
            ledger.check_not_behind(9, record.head)
    with pytest.raises(ValueError, match="length"):
        record.check_not_behind(0, record.head)


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


def test_a_non_private_plan_costs_everything(path):
    plan = make_plan(phases=(Phase("train", NonPrivate(reason="no noise"), 2),), clipping="none")
    with Ledger.create(path, plan) as ledger:
        assert spent(ledger).upper == 0
        ledger.charge("train")
        assert spent(ledger).upper == epsilon(ledger).upper == float("inf")


def test_the_quick_form_of_a_charge_is_the_canonical_one(path):
    plan = two_phases()
    with Ledger.create(path, plan) as ledger:
        for phase in (plan.phases[0], plan.train):
            line = ledger._chain.charge_line(phase)
            assert line == resealed(json.loads(line))
            ledger.charge(phase.name)
    assert path.read_bytes().endswith(line)


@pytest.mark.slow
def test_a_long_ledger_streams(path):
    steps = 100_000
    plan = make_plan(phases=(Phase("train", make_plan().train.event, steps),))
    made = chain.Chain()
    fields = {"schema": chain.SCHEMA, "run_id": "r", "created_utc": "t", "software": {}, "plan": plan.to_json()}
    with path.open("wb") as file:
        line = made.next_line("plan", fields)
        while True:
            made.append(line)
            file.write(line)
            if made.length > steps:
                break
            line = made.charge_line(plan.train)
    assert Ledger.read(path).charged("train") == steps
