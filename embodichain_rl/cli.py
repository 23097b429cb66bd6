"""The command line, ``embodichain-rl``. Each group of commands has one function that adds its parser."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from embodichain_rl.errors import EmbodiChainRLError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 if it failed, 2 for wrong arguments.

    Args:
        arguments: those of the command line, without the name of the program; by default those of this process.
    """
    parser = argparse.ArgumentParser(prog="embodichain-rl", description="Live trajectory streaming for robot learning.")
    groups = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_buffer(groups)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except (EmbodiChainRLError, AssertionError, OSError) as error:
        print(f"embodichain-rl: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _add_buffer(groups: Any) -> None:
    parser = groups.add_parser("buffer", help="look at a buffer in a file, also while it is in use")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("info", _info, "print counts, limits, ages and the keys of a step"),
        ("verify", _verify, "check the invariants of the ledger, and read every trajectory"),
        ("sync", _sync, "wait until all that is published is on the disk; recovers a buffer after a power cut"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", help="the directory of the buffer")
        command.set_defaults(run=run)


def _open(path: str, mode: Any) -> Any:
    from embodichain_rl.replay.storage import TrajectoryStorage

    return TrajectoryStorage.open(path, mode)


def _info(chosen: Any) -> None:
    storage = _open(chosen.path, "r")
    ledger = storage.ledger
    rows = ledger.live_rows()
    live, steps = len(ledger), ledger.num_steps
    print(f"path: {storage.path}")
    print(f"trajectories: {live:,} of at most {storage.max_size:,}")
    print(f"steps: {steps:,} of at most {storage.max_total_steps:,}")
    print(f"free: {storage.max_size - live:,} trajectories, {storage.max_total_steps - steps:,} steps")
    stored_once = "yes" if storage.compact else "no"
    print(f"observations stored once: {stored_once}")
    for name, value in ledger.stats().items():
        if name not in ("trajectories", "steps"):
            print(f"{name}: {value:,}")
    if len(rows.ids):
        ages = (time.monotonic_ns() - rows.published_at) / 1e9
        print(f"ids: {rows.ids[0]} to {rows.ids[-1]}")
        print(f"age: {ages.min():.1f} s to {ages.max():.1f} s")
        print(f"length: {rows.lengths.min():,} to {rows.lengths.max():,} steps")
    print(f"synced up to id: {int(ledger.last_commit()[1])}")
    print(f"texts: {len(storage.texts):,}")
    schema = storage.schema
    if schema is None:
        print("schema: nothing was written yet")
        return
    print(f"bytes of a step: {schema.nbytes:,}")
    for key, (shape, dtype, is_text) in schema.kinds.items():
        print(f"  {'/'.join(key)}: {list(shape)} {'text' if is_text else str(dtype).removeprefix('torch.')}")


def _verify(chosen: Any) -> None:
    from embodichain_rl.replay.ledger import check_ledger
    from embodichain_rl.replay.storage import read_existing

    storage = _open(chosen.path, "r+")
    check_ledger(storage.ledger)
    read = 0
    if storage.initialized:
        ids = storage.ledger.live().all()
        for number in range(len(ids)):
            read += len(read_existing(storage.view, ids[number : number + 1]).rows.ids)
    check_ledger(storage.ledger)
    print(f"{storage.path}: the invariants hold, {read:,} trajectories were read")


def _sync(chosen: Any) -> None:
    storage = _open(chosen.path, "r+")
    storage.sync()
    print(f"{storage.path}: {len(storage):,} trajectories are safe on the disk")


if __name__ == "__main__":
    sys.exit(main())
