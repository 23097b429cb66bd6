"""The benchmark and the soak of a Ray cluster, in short."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytest.importorskip("ray", reason="needs the extra [ray]")
pytest.importorskip("tyro", reason="needs the extra [examples]")
from _ray_cluster import local_cluster
from _soak_cluster import ClusterSoak, soak_cluster
from cluster import payload_per_byte, spilled_by_a_slow_learner


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package that is tested here is the one that other processes import.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or beside other programs, workers start after minutes


@pytest.mark.slow
def test_a_learner_outlives_the_machines_of_its_cluster_and_they_do_not_outlive_it() -> None:
    # Of producers and gateways that are killed, tests/engine/test_engine_on_cluster.py has tests.
    rows, problems = soak_cluster(0.0, seed=0, patience=10.0, faults=(ClusterSoak.kill_raylet, ClusterSoak.kill_gcs))
    assert not problems
    assert [name for name, *_ in rows] == ["SIGKILL of a raylet", "SIGKILL of the GCS", "SIGKILL of the learner"]
    assert all("no worker" not in noticed for _, noticed, _ in rows)


@pytest.mark.slow
def test_a_trajectory_crosses_the_network_once_and_nothing_is_spilled() -> None:
    with local_cluster() as cluster:
        for samples_per_insert in (1.0, 32.0):
            assert 1.0 <= payload_per_byte(cluster.address, False, samples_per_insert, seconds=1.0) <= 1.1
        assert spilled_by_a_slow_learner(cluster.address, seconds=1.0) == 0.0
