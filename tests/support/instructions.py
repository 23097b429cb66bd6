"""Stops at every bytecode instruction of the replay room."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import embodichain_rl.replay

ROOM = str(Path(embodichain_rl.replay.__file__).parent)


def at_every_instruction(action: Callable[[], Any], visit: Callable[[int], None]) -> int:
    """Runs ``action`` and calls ``visit(n)`` before the ``n``-th instruction of the replay room in it.

    Returns:
        How many instructions there were.
    """
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Callable | None:
        nonlocal count
        if not frame.f_code.co_filename.startswith(ROOM):
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
