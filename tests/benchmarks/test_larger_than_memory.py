"""A short version of ``benchmarks/larger_than_memory.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from larger_than_memory import Config, NoCgroup, run


def test_a_buffer_of_four_times_the_free_memory_fills_samples_and_reopens(tmp_path: Path) -> None:
    try:
        found = run(Config(free=48, batches=20, folder=tmp_path))
    except NoCgroup as reason:
        pytest.skip(str(reason))
    assert found["buffer, MiB"] > 4 * 48
    assert found["largest use of memory, MiB"] <= 48
    assert found["memory.failcnt"] > 0  # the limit was reached
