"""Stops, or kills a child, at every bytecode instruction of the rooms that a buffer consists of."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from waiting import wait_until

import embodichain_rl.replay
import embodichain_rl.shared

ROOMS = tuple(str(Path(room.__file__).parent) for room in (embodichain_rl.replay, embodichain_rl.shared))

EVERY = 23
"""In the suite every so-many-th instruction is one to be killed at; a prime, so that loops are met at all of theirs."""


def at_every_instruction(action: Callable[[], Any], visit: Callable[[int], None]) -> int:
    """Runs ``action`` and calls ``visit(n)`` before the ``n``-th instruction of these rooms in it.

    Returns:
        How many instructions there were.
    """
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Callable | None:
        nonlocal count
        if not frame.f_code.co_filename.startswith(ROOMS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            sys.settrace(None)
            visit(count)
            count += 1
            sys.settrace(trace)
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return count


def run_in_child_until(instruction: int, action: Callable[[], object]) -> bool:
    """Runs ``action`` in a forked child that kills itself at an instruction; False if it ended before."""

    def visit(n: int) -> None:
        if n == instruction:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            at_every_instruction(action, visit)
        finally:
            os._exit(0)
    status = 0

    def ended() -> bool:
        nonlocal status
        done, status = os.waitpid(pid, os.WNOHANG)
        return done == pid

    try:
        wait_until(ended, f"the end of the child before instruction {instruction}")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return os.WIFSIGNALED(status)
