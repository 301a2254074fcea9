"""A function in a process of its own, which may die, lose its rights, or run out of room."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable

import pytest

CPU_SECONDS, SECONDS = 60, 600
"""What a child may use, and how long it may last: a busy machine is slow, only a hang ends at the second."""

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def forked(action: Callable[[], object]) -> tuple[int, str]:
    """Run `action` in a fork: exit code (minus its signal) and what it returned, or its traceback."""
    child, receive = start(action)
    return finish(child, receive)


def start(action: Callable[[], object]) -> tuple[int, int]:
    """As `forked`, without waiting: what `finish` takes."""
    receive, send = os.pipe()
    child = os.fork()
    if child:
        os.close(send)
        return child, receive
    code = 1
    try:
        faulthandler.disable()  # a signal is what some children are for
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.alarm(SECONDS)
        said = str(action())
        code = 0
    except BaseException:
        said = traceback.format_exc()
    finally:
        os.write(send, said.encode()[-60_000:])
        os._exit(code)  # not through pytest, which runs in this process, too


def finish(child: int, receive: int) -> tuple[int, str]:
    with os.fdopen(receive) as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
