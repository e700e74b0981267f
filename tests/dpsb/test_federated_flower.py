"""The real engine: rounds through Flower's simulation, on Ray, with silos in workers of their own."""

import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest
from federation import NAMES, Federation, check_ledger, terms, trainer
from test_federated_wire import at_work

from dpsb.federated.report import federation_report
from dpsb.federated.server import load_state

pytest.importorskip("flwr")

PROGRAM = (sys.executable, "-m", "dpsb.federated.flower.simulation")


@pytest.fixture
def federation(tiny, tmp_path):
    return Federation(tmp_path, trainer(tiny))


def simulate(federation, silos):
    with ExitStack() as stack:
        turn = threading.Lock()
        for silo in silos:
            stack.enter_context(at_work(silo, turn=turn))
        return subprocess.run([*PROGRAM, str(federation.out)], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_three_silos_and_two_rounds(federation):
    federation.coordinator(asked=terms(rounds=2)).begin()
    done = simulate(federation, federation.silos().values())
    assert done.returncode == 0, done.stdout + done.stderr
    state = load_state(federation.out)
    assert state.round == 2
    assert [record.silos for record in state.history] == [NAMES, NAMES]
    for name in NAMES:
        check_ledger(federation.ledger(name), 4)
    report = federation_report(federation.out).report
    assert report.claim is True


@pytest.mark.slow
def test_a_silo_that_is_not_there_is_lost_and_the_run_goes_on(federation):
    federation.coordinator(asked=terms(rounds=1, attempts=1)).begin()
    silos = federation.silos()
    done = simulate(federation, [silos["north"], silos["west"]])
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = load_state(federation.out).history
    assert record.silos == ("north", "west")
    assert set(record.lost) == {"south"}
    assert not (silos["south"].folder / "runs").exists()
