"""Mutation testing: does a test fail for each deliberate bug?

Each bug changes a few words in a copy of the package. The named test files are run against the copy until one of their
tests fails. That test must then pass without the change. The exit code is 0 if every bug was caught.

    python benchmarks/mutations.py
    python benchmarks/mutations.py --only reclaim margin
    python benchmarks/mutations.py --patience 4
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

TEST_LIMIT = 60.0
"""Timeout of one test, in seconds. A test that takes longer counts as hung, and so as failed."""

TIME_LIMIT = 180.0
"""Timeout of all tests of one bug, in seconds."""


@dataclass(frozen=True)
class Mutation:
    """One deliberate bug."""

    what: str
    """Description."""
    file: str
    """The file, below ``embodichain_rl``."""
    changes: tuple[tuple[str, str], ...]
    """Pairs of a text and its replacement. Each text must occur exactly once."""
    tests: tuple[str, ...]
    """Test files below ``tests``, starting with those that are meant to catch the bug."""

    @property
    def path(self) -> Path:
        """Path of the file in the repository."""
        return Path("embodichain_rl", self.file)

    def apply(self, text: str) -> str:
        """Return the text of the file with the bug in it.

        Raises:
            ValueError: if a text to replace does not occur exactly once.
        """
        for old, new in self.changes:
            if text.count(old) != 1:
                raise ValueError(f"{old!r} occurs {text.count(old)} times in {self.path}, not once: {self.what}")
            text = text.replace(old, new)
        return text


MUTATIONS = (
    Mutation(
        "chunks are not checked after the copy",
        "replay/sampling/drawer.py",
        (("valid = ledger.unchanged(rows)", "valid = np.ones(batch_size, dtype=bool)"),),
        ("replay/sampling/test_chunk_sampler.py", "replay/test_any_instruction.py"),
    ),
    Mutation(
        "chunks that are drawn again keep the ids of the first draw",
        "replay/sampling/drawer.py",
        (("            rows = rows.replace(torn, new_rows)\n", ""),),
        ("replay/sampling/test_chunk_sampler.py", "replay/test_sharing.py"),
    ),
    Mutation(
        "the last offset of a chunk is one too high",
        "replay/sampling/requests/offsets.py",
        (("(uniform * count).astype", "(uniform * (count + 1)).astype"),),
        ("replay/sampling/test_offsets.py", "replay/sampling/test_chunk_sampler.py"),
    ),
    Mutation(
        "the last offset of a chunk is never drawn",
        "replay/sampling/requests/offsets.py",
        (("(uniform * count).astype", "(uniform * np.maximum(count - 1, 1)).astype"),),
        ("replay/sampling/test_offsets.py", "replay/sampling/test_chunk_sampler.py"),
    ),
    Mutation(
        "pieces of two producers are joined",
        "replay/writing/runs.py",
        (("Run((producer, *trajectory)", "Run((0, *trajectory)"),),
        ("replay/writing/test_writer.py",),
    ),
    Mutation(
        "pending pieces are kept by reference",
        "replay/writing/pending.py",
        (("[value.copy() for value in piece]", "list(piece)"),),
        ("replay/writing/test_writer.py",),
    ),
    Mutation(
        "whole trajectories are not checked after the copy",
        "replay/storage/reads/whole_reads.py",
        (
            (
                "kept = view.ledger.unchanged(whole.rows)\n        if 2",
                "kept = np.ones(len(whole.rows.ids), dtype=bool)\n        if 2",
            ),
            (
                "kept = view.ledger.unchanged(whole.rows)\n        missed",
                "kept = np.ones(len(whole.rows.ids), dtype=bool)\n        missed",
            ),
            (" and view.ledger.unchanged(whole.rows).all()", ""),
        ),
        ("replay/storage/test_storage.py", "replay/storage/test_reads_under_load.py"),
    ),
    Mutation(
        "a new checkpoint counts before it is written",
        "replay/placement.py",
        (
            (
                "            super().dumps(folder)\n            write_durably(path / METADATA, "
                'json.dumps({"checkpoint": folder.name}).encode())\n',
                "            write_durably(path / METADATA, "
                'json.dumps({"checkpoint": folder.name}).encode())\n            super().dumps(folder)\n',
            ),
        ),
        ("replay/storage/test_checkpoint.py", "replay/storage/test_checkpoint_faults.py"),
    ),
    Mutation(
        "a trajectory is published before it is copied",
        "replay/host/memory.py",
        (
            ("longest_segment = arena.write(region.start, pieces, blobs)", "longest_segment = None"),
            (
                "raise\n        return self._publish(region, longest_segment, trajectory_values, policy_version)",
                "raise\n"
                "        published = self._publish(region, longest_segment, trajectory_values, policy_version)\n"
                "        arena.write(region.start, pieces, blobs)\n"
                "        return published",
            ),
        ),
        (
            "replay/ledger/test_interleavings.py",
            "replay/test_any_instruction.py",
            "replay/storage/test_reads_under_load.py",
        ),
    ),
    Mutation(
        "an eviction subtracts the steps of the newest trajectory instead of the oldest",
        "replay/ledger/members.py",
        (
            (
                "length = int(self._rows[row, LENGTH])",
                "length = int(self._rows[(counters.next_id - 1) % self.num_rows, LENGTH])",
            ),
        ),
        ("replay/ledger/test_ledger.py", "replay/ledger/test_ledger_model.py"),
    ),
    Mutation(
        "a trajectory is evicted although the limits allow it",
        "replay/ledger/publishing.py",
        (("counters.live > self.max_trajectories or", "counters.live >= self.max_trajectories or"),),
        ("replay/ledger/test_ledger.py", "replay/ledger/test_ledger_model.py"),
    ),
    Mutation(
        "dead writers are not reclaimed before space or slots are short",
        "replay/ledger/ledger.py",
        (("                self._reclaim_dead_writers(counters)\n", ""),),
        ("replay/ledger/test_ledger.py", "replay/test_any_instruction.py"),
    ),
    Mutation(
        "the reservation of a dead owner is kept",
        "replay/ledger/space.py",
        (("not process_is_alive(pid, process_start)", "False"),),
        ("replay/ledger/test_ledger.py", "replay/test_any_instruction.py"),
    ),
    Mutation(
        "the id stays in a row while the row is changed",
        "replay/ledger/publishing.py",
        (("        row[ID] = -1\n        write_barrier()\n        if fill", "        if fill"),),
        ("replay/ledger/test_interleavings.py", "replay/test_any_instruction.py"),
    ),
    Mutation(
        "the ids stay in rows whose regions are reused",
        "replay/ledger/space.py",
        (("        self._row_ids[inside] = -1\n", ""),),
        ("replay/ledger/test_ledger.py", "replay/ledger/test_invariants.py", "replay/ledger/test_ledger_model.py"),
    ),
    Mutation(
        "a region is reserved without its margin",
        "replay/ledger/ledger.py",
        (("max(room, length + self.margin)", "max(room, length)"),),
        ("replay/ledger/test_ledger_model.py", "replay/storage/test_compact.py"),
    ),
    Mutation(
        "the margin of a live trajectory counts as free",
        "replay/ledger/space.py",
        (("rooms = live[:, LENGTH] + self.margin", "rooms = live[:, LENGTH]"),),
        ("replay/storage/test_compact.py", "replay/ledger/test_ledger_model.py"),
    ),
    Mutation(
        "counters are changed in the copy that readers use",
        "replay/ledger/table.py",
        (("self._counters[following & 1] =", "self._counters[:] ="),),
        ("replay/ledger/test_interleavings.py", "replay/test_any_instruction.py"),
    ),
    Mutation(
        "counts are read without the check that the counters have not changed",
        "replay/ledger/table.py",
        (("if self._active[0] == active:\n                return C", "if True:\n                return C"),),
        ("replay/ledger/test_ledger.py",),
    ),
    Mutation(
        "the live range is read without that check",
        "replay/ledger/table.py",
        (
            (
                "if self._active[0] == active:\n                return int(oldest), ",
                "if True:\n                return int(oldest), ",
            ),
        ),
        ("replay/ledger/test_interleavings.py", "replay/ledger/test_ledger.py"),
    ),
    Mutation(
        "a process is identified by its id alone",
        "shared/processes.py",
        (("return process_start(pid) == start", "return process_start(pid) >= 0"),),
        ("replay/ledger/test_ledger.py", "replay/test_sharing.py"),
    ),
    Mutation(
        "a forked child keeps its parent's lock",
        "shared/lock.py",
        (("        lock._reset_in_forked_child()\n", "        pass\n"),),
        ("replay/ledger/test_ledger.py", "replay/test_any_instruction.py"),
    ),
)


@dataclass(frozen=True)
class Config:
    """The selection of bugs."""

    only: tuple[str, ...] = ()
    """Only the bugs whose description contains one of these texts."""
    patience: float = 1.0
    """Factor on all time limits; more than 1 on a machine that is busy with other things."""
    out: Path | None = None
    """Path of the JSON file for the report."""


def caught_by(mutation: Mutation, patience: float) -> tuple[str | None, float]:
    """Return the first test that fails, or None if none does, and the seconds that it took.

    Raises:
        RuntimeError: if that test fails without the bug too.
    """
    with tempfile.TemporaryDirectory(prefix="embodichain_rl-mutation-") as folder:
        copy = Path(folder)
        for name in ("embodichain_rl", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / mutation.path
        correct = file.read_text()
        file.write_text(mutation.apply(correct))
        begin = time.monotonic()
        failed = _first_failure(copy, mutation.tests, patience)
        seconds = time.monotonic() - begin
        file.write_text(correct)
        if failed is not None:
            alone = [failed.name] if "::" in failed.name else mutation.tests
            without = _first_failure(copy, alone, patience)
            if without is not None:
                raise RuntimeError(f"{without} fails without any bug; a busy machine needs more --patience")
        return failed and str(failed), seconds


@dataclass(frozen=True)
class Failure:
    """A test that failed."""

    name: str
    """Its name, beginning with the test file; another text if the tests were ended by a time limit."""
    hung: bool
    """Whether a time limit made it fail."""

    def __str__(self) -> str:
        return f"{self.name} (by its time limit)" if self.hung else self.name


def _first_failure(copy: Path, tests: Sequence[str], patience: float) -> Failure | None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--no-header", "-p", "no:cacheprovider"]
    command += ["--timeout", str(TEST_LIMIT * patience), *(f"tests/{test}" for test in tests)]
    environment = {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "1000"}  # wide, so that no reason is cut off
    limit = TIME_LIMIT * patience
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return Failure("tests that did not end", hung=True)
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+(?:\[.*?\](?= - |$))?)(.*)", done.stdout, re.MULTILINE)
    if failed is not None:
        return Failure(failed[1], hung=failed[2].startswith(" - Failed: Timeout"))
    if done.returncode == 0:
        return None
    if "Timeout" in done.stdout + done.stderr:  # pytest was ended while a test hung
        return Failure("a test that hung", hung=True)
    raise RuntimeError(f"The tests could not be run:\n{done.stdout}\n{done.stderr}")


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    chosen = [m for m in MUTATIONS if not config.only or any(word in m.what for word in config.only)]
    rows, survivors = [], []
    for mutation in chosen:
        test, seconds = caught_by(mutation, config.patience)
        print(f"{mutation.what}: {test or 'NOT CAUGHT'} ({seconds:.0f} s)", flush=True)
        rows.append([mutation.what, mutation.file, test or "NOT CAUGHT", f"{seconds:.0f}"])
        survivors += [] if test else [mutation.what]
    print_table("Deliberate bugs", ["bug", "in", "caught by", "s"], rows)
    write_report(config.out, [{"bug": row[0], "file": row[1], "caught_by": row[2]} for row in rows])
    if survivors:
        raise SystemExit(f"Not caught: {survivors}")


if __name__ == "__main__":
    main()
