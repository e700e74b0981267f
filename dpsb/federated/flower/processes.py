"""Flower's own programs as child processes: what they are started with, and how they end."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dpsb.federated.channel import WorkerError
from dpsb.federated.flower.simulation import SETTINGS

_GRACE = 10.0
_PR_SET_PDEATHSIG = 1
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 60.0
_LONG_ENOUGH = 120.0


def environment(home: Path) -> dict[str, str]:
    """The environment of every program: Flower's home within the federation's folder, nothing that calls home."""
    return {**os.environ, **SETTINGS, "FLWR_HOME": str(home.resolve()), "PATH": _path()}  # it starts its own by name


def program(name: str) -> str:
    """The path of one of Flower's console scripts, from the environment that this process runs in.

    Raises:
      WorkerError: If Flower is not installed.
    """
    found = shutil.which(name, path=_path())
    if found is None:
        raise WorkerError(f"{name} is not there: pip install '.[federated]' in a checkout.")
    return found


def _path() -> str:
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


@contextmanager
def running(command: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program with its output in ``log``; it and its children end with the block, and with this process."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(env),
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        yield process
    finally:
        end(process)


def _end_with_parent() -> None:
    """On Linux: a process whose parent was killed gets SIGTERM instead of staying behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its children: asked first, then by force."""
    for sign, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, _GRACE)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        if sign is signal.SIGTERM:
            continue  # children of it may still be there
    process.wait()


def supervised(
    command: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    *,
    stop: Callable[[], bool],
    on_restart: Callable[[int], None] = lambda _code: None,
) -> None:
    """Keeps a program running until ``stop`` says so: started again when it ends, after 2 to 60 seconds.

    A SuperNode that was killed is refused until its old heartbeat is over, about a minute; it has to be patient.
    """
    pause = _FIRST_PAUSE
    while not stop():
        began = time.monotonic()
        with running(command, env, log) as process:
            while process.poll() is None and not stop():
                time.sleep(0.2)
            code = process.poll()
        if code is None:
            return
        on_restart(code)
        pause = _FIRST_PAUSE if time.monotonic() - began > _LONG_ENOUGH else min(_LONGEST_PAUSE, pause * 2)
        until = time.monotonic() + pause
        while time.monotonic() < until and not stop():
            time.sleep(0.2)


def checked(command: Sequence[str], env: Mapping[str, str], what: str) -> str:
    """Runs a program to its end and returns its output.

    Raises:
      WorkerError: If it fails, with the end of what it printed.
    """
    done = subprocess.run(command, env=dict(env), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        lines = [line.strip(" ╭╮╰╯│─") for line in (done.stdout + done.stderr).splitlines()]
        raise WorkerError(f"{what} failed: {' '.join(line for line in lines if line)[-400:] or 'no output'}")
    return done.stdout


def python_module(name: str, *arguments: str) -> list[str]:
    """A module of this package as a command."""
    return [sys.executable, "-m", name, *arguments]
