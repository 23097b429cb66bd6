"""The simulation of large clusters keeps its books, and agrees with the formula for the number of learners."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytest.importorskip("tyro", reason="needs the extra [examples]")
from scaling import Config, learners_needed, simulate

SHORT = Config(hours=0.02, node_days=1e9, worker_days=1e9, learner_days=1e9)
"""72 seconds without failures."""


def test_a_small_cluster_loses_nothing() -> None:
    result = simulate(SHORT, 10)
    assert result.down == result.held == result.replaced == 0.0
    assert result.offered == pytest.approx(160 * 1000 * 200 / 1e6)
    assert result.share == pytest.approx(1.0, abs=0.03)  # the last second has not been sent


def test_one_learner_takes_what_its_gateway_inserts_and_the_rest_waits() -> None:
    result = simulate(replace(SHORT, message_seconds=0.0), 300)
    assert result.busy == pytest.approx(1.0, abs=0.02)
    assert result.inserted == pytest.approx(300.0, rel=0.05)  # MB/s of one core
    assert result.held > 0.5


def test_as_many_learners_as_the_formula_says_keep_up() -> None:
    many = replace(SHORT, message_seconds=0.0)
    assert learners_needed(many, 150) == 2
    assert simulate(replace(many, learners=2), 150).share > 0.95
    assert simulate(replace(many, learners=1), 150).share < 0.7


def test_failures_cost_the_time_until_they_are_mended() -> None:
    # A simulator fails every hundred seconds and is away for 10: it is there 100 of 110 seconds.
    result = simulate(replace(SHORT, hours=0.2, worker_days=100 / 86_400, notice=2.0, worker_restart=8.0), 10)
    assert result.down == pytest.approx(10 / 110, rel=0.1)
    assert result.replaced / 86_400 == pytest.approx(160 / 100 * 100 / 110, rel=0.15)
