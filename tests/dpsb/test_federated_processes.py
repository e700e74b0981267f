"""Flower's programs as children: what they are told in their environment, and how they are kept running."""

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr")

from dpsb.federated.flower import processes
from dpsb.federated.flower.processes import environment, running, supervised
from dpsb.federated.flower.simulation import SETTINGS

ASKED = """
import json, os, sys
import ray._private.ray_constants, ray._private.services
from flwr.superlink.cli.flower_superlink import _runtime_dependency_install_default
from flwr.supercore import telemetry, update_check
from ray._common.usage import usage_lib

looked = []

def posted(*_, **__):
    looked.append("telemetry")
    raise telemetry.urllib.error.URLError("not here")

update_check._read_flwr_update_check_cache = lambda: looked.append("an update")
update_check._start_flwr_update_check_refresh_thread = lambda *_: looked.append("an update")
telemetry.urllib.request.urlopen = posted
update_check.warn_if_flwr_update_available()
telemetry.create_event(telemetry.EventType.PING, None)
print(json.dumps({
    "looked": looked,
    "installs": _runtime_dependency_install_default(),
    "usage": usage_lib.usage_stats_enabled(),
    "address": ray._private.services.get_node_ip_address(),
    "home": os.environ["FLWR_HOME"],
    "settings": {name: os.environ.get(name) for name in json.loads(sys.argv[1])},
}))
"""


def said_by_a_child(tmp_path, env):
    """What Flower's and Ray's own code in a child process makes of an environment."""
    log = tmp_path / "child.log"
    with running([sys.executable, "-c", ASKED, json.dumps(list(SETTINGS))], env, log) as child:
        assert child.wait(120) == 0, log.read_text()
    return json.loads(log.read_text().splitlines()[-1])


def test_children_call_nobody_and_listen_on_loopback(tmp_path, monkeypatch):
    """Also where the parent was told otherwise."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "1" if SETTINGS[name] == "0" else "0")
    found = said_by_a_child(tmp_path, environment(tmp_path))
    assert found.pop("settings") == SETTINGS
    assert found == {
        "looked": [],
        "installs": False,
        "usage": False,
        "address": "127.0.0.1",
        "home": str(tmp_path.resolve()),
    }


def test_without_the_settings_they_would(tmp_path):
    """The test above would notice: these are Flower's and Ray's own defaults."""
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    found = said_by_a_child(tmp_path, {**env, "FLWR_HOME": str(tmp_path), "HOME": str(tmp_path)})
    assert set(found["looked"]) == {"an update", "telemetry"}
    assert (found["installs"], found["usage"]) == (True, True)


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("exit 0", 0), ("kill -9 $$", -9)])
def test_a_child_that_ends_is_started_again_whatever_it_ended_with(tmp_path, monkeypatch, script, code):
    monkeypatch.setattr(processes, "_FIRST_PAUSE", 0.1)
    codes, starts = [], tmp_path / "starts"
    command = ["sh", "-c", f"echo >> {starts}; {script}"]
    stop = {"stop": lambda: len(codes) == 2, "on_restart": codes.append}
    supervised(command, dict(os.environ), tmp_path / "log", **stop)
    assert codes == [code] * 2
    assert starts.read_text() == "\n\n"


class Lives:
    """Children that live as long as they are told, on a clock of their own."""

    def __init__(self, *lives):
        self.lives, self.now, self.pauses, self.ended = list(lives), 0.0, [], None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    @contextmanager
    def running(self, *_arguments):
        if self.ended is not None:
            self.pauses.append(self.now - self.ended)
        self.ended = self.now + self.lives.pop(0)
        yield SimpleNamespace(poll=lambda: 1 if self.now >= self.ended else None)


def test_one_that_dies_again_and_again_is_started_ever_more_seldom_and_never_given_up(monkeypatch):
    """A SuperNode whose server is away for a night is there in the morning; one that ran for long is back at once."""
    children = Lives(*[0.0] * 8, 200.0, 0.0, 0.0)
    monkeypatch.setattr(processes, "time", children)
    monkeypatch.setattr(processes, "running", children.running)
    supervised([], {}, Path("log"), stop=lambda: not children.lives)
    assert children.pauses == pytest.approx([4, 8, 16, 32, 60, 60, 60, 60, 2, 4], abs=0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_child_and_its_children_end_when_they_are_told_to(tmp_path):
    numbers = tmp_path / "numbers"
    command = ["sh", "-c", f"sleep 600 & echo $! $$ > {numbers}; wait"]
    supervised(command, dict(os.environ), tmp_path / "log", stop=lambda: numbers.exists() and numbers.read_text())
    for number in numbers.read_text().split():
        assert is_over(int(number))


def is_over(number, patience=10.0):
    """Whether a process ends in time; one that is dead and waits for its parent has."""
    last = time.monotonic() + patience
    while time.monotonic() < last:
        try:
            if Path(f"/proc/{number}/stat").read_text().split()[2] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False
