"""``embodichain-rl trace``: what workers and learners do for some seconds, as a trace."""

from __future__ import annotations

from pathlib import Path

from embodichain_rl.monitor.source import Source
from embodichain_rl.monitor.tracing import trace as record

__all__ = ["COMMAND"]


def trace(
    pid: str | None = None, path: Path | None = None, seconds: float = 10.0, output: Path = Path("trace.json")
) -> None:
    """Record what workers and learners do for some seconds. Open the file at https://ui.perfetto.dev.

    Args:
        pid: the process that has the engine or the buffer, or a handle; by default the only one of this user.
        path: the directory of a buffer in a file.
        seconds: how long to look.
        output: the file to write.
    """
    events = record(Source.attach(pid, path), output, seconds)
    print(f"{output}: {events:,} events of {seconds:g} s; open it at https://ui.perfetto.dev or chrome://tracing")


COMMAND = trace
