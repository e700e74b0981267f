"""The command line in processes that are forked from one that has imported it: a silo then starts at once.

Three silos that each import torch, transformers and Opacus keep two cores busy for half a minute before anything of
theirs is tested. These are processes of their own all the same: they can be stopped and killed.
"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["dpsb.cli", "dpsb.federated.flower.setup", "transformers"])


def _run(arguments, output):
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from dpsb.cli import app

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app(arguments)
    finally:
        sys.stdout.flush()


class Forked:
    """``dpsb ARGUMENTS`` in a forked process, with as much of ``subprocess.Popen`` as the tests use."""

    def __init__(self, *arguments, output):
        self._output = Path(output)
        self._process = _forks.Process(target=_run, args=(list(map(str, arguments)), str(output)), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout):
        """What it printed, once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} goes on after {timeout} seconds:\n{self.text()}")
        return self.text(), None

    def text(self):
        return self._output.read_text() if self._output.exists() else ""


def wait_until(condition, seconds, process=None):
    """Waits until a condition holds, or the process has ended, or time is over; whether it holds."""
    last = time.monotonic() + seconds
    while not condition() and time.monotonic() < last and (process is None or process.poll() is None):
        time.sleep(0.05)
    return condition()
