"""The benchmark of watching, for some seconds: a run that is watched beside one that is not, and a terminal view."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _watchers import Terminal, own_memory, wait_until
from watched import compare, growth, trajectory

from embodichain_rl import TrajectoryReplayBuffer


@pytest.mark.slow
def test_a_run_goes_on_while_it_is_watched() -> None:
    ratios = compare(rounds=1, every=0.05)
    assert set(ratios) == {"sample", "extend"}
    assert all(ratio > 0 for ratio in ratios.values())


@pytest.mark.slow
def test_the_terminal_view_shows_what_comes_in() -> None:
    pytest.importorskip("rich")
    rb = TrajectoryReplayBuffer(max_trajectories=10, max_total_steps=1000, chunk_size=16, batch_size=32)
    rb.extend(trajectory())
    terminal = Terminal(rb.handle, 0.1)
    try:
        wait_until(lambda: "lengths" in terminal.text() and "100 – 100, mean 100" in terminal.text())
        rb.extend(trajectory(50))
        wait_until(lambda: "50 – 100, mean 75" in terminal.text())
        assert own_memory(terminal.pid) > 2**20
    finally:
        terminal.close()


def test_growth_is_seen_and_what_falls_again_is_not() -> None:
    assert growth([100.0 + row for row in range(40)]) == 20.0
    assert growth([0.0] * 10 + [50.0, 60.0] * 15) == pytest.approx(0.0)
