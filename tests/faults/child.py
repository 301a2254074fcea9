"""A function in a process of its own, which may die, lose its rights, or run out of room."""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

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
    _tell(action, send)  # and not through pytest, which runs in this process, too


def _tell(action: Callable[[], object], send: int) -> NoReturn:
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
        os._exit(code)


def finish(child: int, receive: int) -> tuple[int, str]:
    with os.fdopen(receive) as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def trained(*actions: functools.partial[Any]) -> list[tuple[int, str]]:
    """As `forked`, all at once, for functions of modules that train: autograd refuses to run in a fork of a
    process where it has threads, so these are forks of one that has only imported what takes long."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["pytest", "torch._dynamo", "bokehflux.training.recipes.run"])
    running = []
    for action in actions:
        receive, send = server.Pipe(duplex=False)
        process = server.Process(target=_tell_through, args=(action, send))
        process.start()
        send.close()
        running.append((process, receive))
    found = []
    for process, receive in running:
        with receive, open(receive.fileno(), closefd=False) as stream:
            said = stream.read()
        process.join()
        found.append((process.exitcode, said))
    return found


def _tell_through(action: Callable[[], object], send: Connection) -> NoReturn:
    _tell(action, send.fileno())
