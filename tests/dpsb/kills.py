"""A process that dies by SIGKILL at a given call: a fork of the test's own, which saves the imports."""

import os
import signal


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at(place, name, *, count=1, before=True, when=lambda *_args: True):
    """Replaces a function by one that dies at its ``count``-th call for which ``when`` holds."""
    inner, calls = getattr(place, name), []

    def deadly(*args, **kwargs):
        counts = when(*args)
        if counts:
            calls.append(0)
        if before and counts and len(calls) == count:
            die()
        result = inner(*args, **kwargs)
        if not before and counts and len(calls) == count:
            die()
        return result

    setattr(place, name, deadly)


def in_a_fork(work):
    """Runs ``work`` in a forked process; returns the signal it died of, 0 for none."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return max(0, -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
