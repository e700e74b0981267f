import json
import os
import subprocess
import sys

import pytest
from plans import fill, make_plan, resealed, two_phases

from dpsb_accounting import (
    BudgetSpent,
    Ledger,
    LedgerError,
    NonPrivate,
    Phase,
    PoissonGaussian,
    Taint,
    chain,
    epsilon,
    spent,
)

ALONE = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


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
def test_a_ledger_of_a_million_lines_streams(path):
    """Verified and accounted for in a process of its own: CPU seconds and memory as measured there."""
    steps = 1_000_000
    step = PoissonGaussian(noise_multiplier=1.0, sampling_prob=0.001)
    plan = make_plan(phases=(Phase("train", step, steps),), sampling_prob=0.001, expected_batch_size=20)
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
    code = f"""
import pathlib, re, resource, time
from dpsb_accounting import verify
outcome = verify({str(path)!r})
assert outcome.ok and outcome.claim, outcome.failures
status = pathlib.Path("/proc/self/status")  # getrusage counts what the parent had before this program was loaded
if status.exists():
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text()).group(1)) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.process_time(), peak)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ALONE, check=True)
    seconds, memory = map(float, done.stdout.split())
    print(f"{seconds:.1f} s CPU, {memory / 2**20:.0f} MiB")
    assert seconds <= 40, "20 s where nothing else runs; twice that on a busy machine"
    assert memory <= 2**30
