"""Cells one after the other, or several at a time, each worker in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from dpsb.curves.work import Job, run_job

OnStep = Callable[[Job, int, int], None]


def run_jobs(jobs: Sequence[Job], processes: int, on_step: OnStep) -> Iterator[tuple[Job, str | None]]:
    """Runs every job; yields each when it is done, with the sentence on why it failed if it did.

    Args:
      jobs: In the order in which they are begun.
      processes: How many run at a time; 1 runs them in this process.
      on_step: Called with a job, its steps done and their number.
    """
    if processes == 1 or len(jobs) <= 1:
        from dpsb.frozen_prefix import FrozenOutputs

        outputs = FrozenOutputs()
        for job in jobs:
            yield job, run_job(job, partial(on_step, job), outputs)
        return
    yield from _Pool(min(processes, len(jobs)), on_step).run(jobs)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Pool:
    """Workers that end with this process, however it ends; one that dies costs its cell only."""

    def __init__(self, size: int, on_step: OnStep) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._threads = max(1, cores() // size)
        self._size = size
        self._on_step = on_step
        self._workers: dict[Connection, tuple[BaseProcess, Job]] = {}

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str | None]]:
        waiting = list(jobs)
        try:
            while waiting and len(self._workers) < self._size:
                self._start(waiting.pop(0))
            while self._workers:
                for ready in wait(list(self._workers)):
                    if not isinstance(ready, Connection):
                        continue
                    done = self._hear(ready, waiting)
                    if done is not None:
                        yield done
        finally:
            for connection, (process, _) in self._workers.items():
                process.terminate()
                process.join()
                connection.close()

    def _start(self, job: Job) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._threads), daemon=True)
        process.start()
        theirs.close()
        ours.send(job)
        self._workers[ours] = (process, job)

    def _hear(self, connection: Connection, waiting: list[Job]) -> tuple[Job, str | None] | None:
        process, job = self._workers[connection]
        try:
            kind, content = connection.recv()
        except (EOFError, OSError):
            del self._workers[connection]
            process.join()
            connection.close()
            if waiting:
                self._start(waiting.pop(0))
            return job, f"its process died ({_cause(process.exitcode)}); perhaps memory ran out."
        if kind == "step":
            self._on_step(job, *content)
            return None
        if waiting:
            following = waiting.pop(0)
            connection.send(following)
            self._workers[connection] = (process, following)
        else:
            del self._workers[connection]
            connection.send(None)
            process.join()
            connection.close()
        return job, content


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def _serve(connection: Any, threads: int) -> None:
    """A worker: takes jobs until it gets None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from dpsb.frozen_prefix import FrozenOutputs

    torch.set_num_threads(threads)
    outputs = FrozenOutputs()
    while True:
        job = connection.recv()
        if job is None:
            return
        reason = run_job(job, lambda step, steps: connection.send(("step", (step, steps))), outputs)
        connection.send(("done", reason))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
