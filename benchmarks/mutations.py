"""Mutation testing: does a test fail for each deliberate bug?

Each bug changes a few words in a copy of the package. The named test files are run against the copy until one of their
tests fails. That test must then pass without the change. The exit code is 0 if every bug was caught.

    python benchmarks/mutations.py
    python benchmarks/mutations.py --only reclaim --only margin
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from _harness import print_table, write_report

ROOT = Path(__file__).resolve().parent.parent

TIME_LIMIT = 180.0
"""Maximum seconds for the tests of one bug. A test that hangs fails by its own timeout as well."""


@dataclass(frozen=True)
class Mutation:
    """One deliberate bug."""

    what: str
    """Description."""
    file: str
    """The file, below ``embodichain_rl/replay``."""
    changes: tuple[tuple[str, str], ...]
    """Pairs of a text and its replacement. Each text must occur exactly once."""
    tests: tuple[str, ...]
    """Test files below ``tests/replay``, starting with those that are meant to catch the bug."""


MUTATIONS = (
    Mutation(
        "chunks are not checked after they are copied",
        "chunk_sampler.py",
        (("valid = ledger.still_valid(rows.ids)", "valid = np.ones(batch_size, dtype=bool)"),),
        ("test_chunk_sampler.py", "test_any_instruction.py"),
    ),
    Mutation(
        "a trajectory is published before it is copied",
        "storage.py",
        (
            ("longest_segment = arena.write(region.start, pieces)", "longest_segment = None"),
            (
                "return self.ledger.publish(region, longest_segment, policy_version=policy_version, fill=fill)",
                "published = self.ledger.publish(region, longest_segment, policy_version=policy_version, fill=fill)\n"
                "        arena.write(region.start, pieces)\n"
                "        return published",
            ),
        ),
        ("test_interleavings.py", "test_any_instruction.py", "test_reads_under_load.py"),
    ),
    Mutation(
        "the steps of the newest are counted off where the oldest is evicted",
        "ledger.py",
        (("self._rows[counters.oldest_id % self.num_rows, LENGTH]", "self._rows[counters.next_id - 1, LENGTH]"),),
        ("test_ledger.py", "test_ledger_model.py"),
    ),
    Mutation(
        "one is evicted that a limit would have let live",
        "ledger.py",
        (("counters.next_id - counters.oldest_id > self.max", "counters.next_id - counters.oldest_id >= self.max"),),
        ("test_ledger.py", "test_ledger_model.py"),
    ),
    Mutation(
        "nothing is reclaimed from the dead",
        "ledger.py",
        (("            self._reclaim_dead_writers(counters)\n", ""),),
        ("test_ledger.py", "test_any_instruction.py"),
    ),
    Mutation(
        "the reservation of a dead owner is kept",
        "ledger.py",
        (("not process_is_alive(pid, process_start)", "False"),),
        ("test_ledger.py", "test_any_instruction.py"),
    ),
    Mutation(
        "a process is known by its id alone",
        "processes.py",
        (("return process_start(pid) == start", "return process_start(pid) >= 0"),),
        ("test_ledger.py", "test_sharing.py"),
    ),
    Mutation(
        "a row's id is taken back after the row was written to",
        "ledger.py",
        (
            ("            row[ID] = -1\n            write_barrier()\n            if fill", "            if fill"),
            ("            write_barrier()\n            row[ID] = trajectory", "            row[ID] = trajectory"),
        ),
        ("test_interleavings.py", "test_any_instruction.py"),
    ),
    Mutation(
        "ids are left in the rows whose steps are given to others",
        "ledger.py",
        (("        self._row_ids[inside] = -1\n", ""),),
        ("test_ledger.py", "test_invariants.py", "test_ledger_model.py"),
    ),
    Mutation(
        "a region is handed out without its margin",
        "ledger.py",
        (("counters.gap_start += length + self.margin", "counters.gap_start += length"),),
        ("test_ledger_model.py", "test_compact.py"),
    ),
    Mutation(
        "the margin behind a live trajectory counts as free",
        "ledger.py",
        (("return starts, starts + lengths[order] + self.margin", "return starts, starts + lengths[order]"),),
        ("test_compact.py", "test_ledger_model.py"),
    ),
    Mutation(
        "counters are changed where readers look",
        "ledger_table.py",
        (("self._counters[following & 1] =", "self._counters[:] ="),),
        ("test_interleavings.py", "test_any_instruction.py"),
    ),
    Mutation(
        "whoever counts does not ask whether the counters changed meanwhile",
        "ledger_table.py",
        (("if self._active[0] == active:\n                return C", "if True:\n                return C"),),
        ("test_ledger.py",),
    ),
    Mutation(
        "whoever samples does not ask whether the counters changed meanwhile",
        "ledger_table.py",
        (("if self._active[0] == active:\n                return int", "if True:\n                return int"),),
        ("test_interleavings.py", "test_ledger.py"),
    ),
    Mutation(
        "the last start of a chunk is one too late",
        "windows.py",
        (("(uniform * count).astype", "(uniform * (count + 1)).astype"),),
        ("test_windows.py", "test_chunk_sampler.py"),
    ),
    Mutation(
        "the last start of a chunk is never drawn",
        "windows.py",
        (("(uniform * count).astype", "(uniform * np.maximum(count - 1, 1)).astype"),),
        ("test_windows.py", "test_chunk_sampler.py"),
    ),
    Mutation(
        "unfinished pieces of two producers are put together",
        "writer.py",
        (("_Run((producer, *trajectory)", "_Run((0, *trajectory)"),),
        ("test_writer.py",),
    ),
    Mutation(
        "unfinished pieces are kept by reference",
        "writer.py",
        (("[value.copy() for value in piece]", "list(piece)"),),
        ("test_writer.py",),
    ),
    Mutation(
        "chunks that are drawn again keep the ids of the first draw",
        "chunk_sampler.py",
        (("            rows = rows.replace(torn, new_rows)\n", ""),),
        ("test_chunk_sampler.py", "test_sharing.py"),
    ),
    Mutation(
        "whole trajectories are not checked after they are copied",
        "whole_reads.py",
        (
            ("kept = storage.ledger.still_valid(whole.rows.ids)", "kept = np.ones(len(whole.rows.ids), dtype=bool)"),
            (" and storage.ledger.still_valid(whole.rows.ids).all()", ""),
        ),
        ("test_storage.py", "test_reads_under_load.py"),
    ),
    Mutation(
        "a checkpoint is written over an earlier one that stays valid meanwhile",
        "checkpoint.py",
        (("            (path / DESCRIPTION).unlink(missing_ok=True)\n", ""),),
        ("test_checkpoint.py", "test_checkpoint_faults.py"),
    ),
    Mutation(
        "a forked child holds on to the lock of its parent",
        "shared_memory.py",
        (("        lock._reset_in_forked_child()\n", "        pass\n"),),
        ("test_ledger.py", "test_any_instruction.py"),
    ),
)


@dataclass(frozen=True)
class Config:
    """The selection of bugs."""

    only: tuple[str, ...] = ()
    """Only the bugs whose description contains one of these texts."""
    out: Path | None = None
    """Path of the JSON file for the report."""


def caught_by(mutation: Mutation) -> tuple[str | None, float]:
    """Return the first test that fails, or None if none does, and the seconds that it took."""
    with tempfile.TemporaryDirectory(prefix="embodichain_rl-mutation-") as folder:
        copy = Path(folder)
        for name in ("embodichain_rl", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / "embodichain_rl" / "replay" / mutation.file
        right = file.read_text()
        file.write_text(_changed(right, mutation))
        begin = time.monotonic()
        red = _first_red(copy, mutation.tests)
        seconds = time.monotonic() - begin
        file.write_text(right)
        if red is not None and "::" in red:
            assert _first_red(copy, [red]) is None, f"{red} is red without any bug"
        return red, seconds


def _first_red(copy: Path, tests: Sequence[str]) -> str | None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--no-header", "-p", "no:cacheprovider"]
    command += ["--timeout", "60", *(f"tests/replay/{test}" for test in tests)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return "(the tests did not end)"
    red = re.search(r"^(?:FAILED|ERROR) tests/replay/(\S+(?:\[.*?\](?= - |$))?)", done.stdout, re.MULTILINE)
    if red is None and done.returncode:
        assert "Timeout" in done.stdout + done.stderr, done.stdout  # otherwise the tests could not be run
        return "(a test hung)"
    return red and red[1]


def _changed(text: str, mutation: Mutation) -> str:
    for old, new in mutation.changes:
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {mutation.file}: {mutation.what}"
        text = text.replace(old, new)
    return text


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    chosen = [m for m in MUTATIONS if not config.only or any(word in m.what for word in config.only)]
    rows, survivors = [], []
    for mutation in chosen:
        test, seconds = caught_by(mutation)
        print(f"{mutation.what}: {test or 'NOT CAUGHT'} ({seconds:.0f} s)", flush=True)
        rows.append([mutation.what, mutation.file, test or "NOT CAUGHT", f"{seconds:.0f}"])
        survivors += [] if test else [mutation.what]
    print_table("Deliberate bugs", ["bug", "in", "caught by", "s"], rows)
    write_report(config.out, [{"bug": row[0], "file": row[1], "caught_by": row[2]} for row in rows])
    if survivors:
        raise SystemExit(f"Not caught: {survivors}")


if __name__ == "__main__":
    main()
