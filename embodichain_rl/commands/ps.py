"""``embodichain-rl ps``: the running engines and buffers of this user."""

from __future__ import annotations

from embodichain_rl.errors import EmbodiChainRLError
from embodichain_rl.monitor.source import Source, command_of, running

__all__ = ["COMMAND"]


def ps() -> None:
    """List the running engines of this user, and the buffers in memory that have no engine."""
    rows = [("PID", "KIND", "STATE", "TRAJECTORIES", "WORKERS", "ENVIRONMENT", "COMMAND")]
    for each in running():
        try:
            stats = Source.attach(each.handle).read().stats
            shown = (stats.get("state", "–"), f"{stats['trajectories']:,}", str(len(stats.get("workers", ()))))
        except EmbodiChainRLError as error:
            shown = ("other version" if "version" in str(error) else "unreadable", "–", "–")
        rows.append((str(each.pid), each.kind, *shown, each.title or "–", command_of(each.pid)[:60]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


COMMAND = ps
