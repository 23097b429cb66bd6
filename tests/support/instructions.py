"""Stops, or kills a child, at every bytecode instruction of the rooms that a buffer consists of."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from waiting import PATIENCE

import embodichain_rl.replay
import embodichain_rl.shared
from embodichain_rl.shared import ProcessWatch

ROOMS = tuple(str(Path(room.__file__).parent) for room in (embodichain_rl.replay, embodichain_rl.shared))

EVERY = 23
"""In the suite every so-many-th instruction is one to be killed at; a prime, so that loops are met at all of theirs."""


def at_every_instruction(action: Callable[[], Any], visit: Callable[[int], None]) -> int:
    """Runs ``action`` and calls ``visit(n)`` before the ``n``-th instruction of these rooms in it.

    Returns:
        How many instructions there were.
    """
    count = 0

    def meet() -> None:
        nonlocal count
        visit(count)
        count += 1

    with (_monitored if sys.version_info >= (3, 12) else _traced)(meet):
        action()
    return count


def change_within_samples(rb: Any, change: Callable[[], Any], every: int, check: Callable[[Any], Any]) -> int:
    """Call ``change`` before the 0th, the ``every``-th, ... instruction of one ``rb.sample()`` each; check each batch.

    Returns:
        The number of the first instruction that there was not.
    """
    at, count = 0, 1
    while at < count:
        batches: list[Any] = []
        count = at_every_instruction(
            lambda batches=batches: batches.append(rb.sample()),
            lambda instruction, at=at: change() if instruction == at else None,
        )
        check(batches[0])
        at += every
    return at


@contextmanager
def _traced(meet: Callable[[], None]) -> Iterator[None]:
    """Call ``meet`` before every instruction of the rooms in this thread."""

    def trace(frame: FrameType, event: str, _: Any) -> Callable | None:
        if not frame.f_code.co_filename.startswith(ROOMS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            sys.settrace(None)
            meet()
            sys.settrace(trace)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


@contextmanager
def _monitored(meet: Callable[[], None]) -> Iterator[None]:
    """Do the same where ``sys.settrace`` meets hardly any instruction: it stops at what the interpreter specializes."""
    monitoring = sys.monitoring
    thread, visiting = threading.get_ident(), False

    def instruction(code: CodeType, _: int) -> object:
        nonlocal visiting
        if not code.co_filename.startswith(ROOMS):
            return monitoring.DISABLE
        if not visiting and threading.get_ident() == thread:
            visiting = True
            try:
                meet()
            finally:
                visiting = False
        return None

    tool = monitoring.DEBUGGER_ID
    monitoring.use_tool_id(tool, "instructions")
    monitoring.register_callback(tool, monitoring.events.INSTRUCTION, instruction)
    monitoring.set_events(tool, monitoring.events.INSTRUCTION)
    monitoring.restart_events()
    try:
        yield
    finally:
        monitoring.set_events(tool, monitoring.events.NO_EVENTS)
        monitoring.register_callback(tool, monitoring.events.INSTRUCTION, None)
        monitoring.free_tool_id(tool)


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
    try:
        assert ProcessWatch(pid).wait(PATIENCE), f"the child did not end before instruction {instruction}"
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)
