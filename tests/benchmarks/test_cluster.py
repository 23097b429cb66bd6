"""The benchmark and the soak of a Ray cluster, in short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytest.importorskip("ray", reason="needs the extra [ray]")
pytest.importorskip("tyro", reason="needs the extra [examples]")
from _soak_cluster import ClusterSoak, soak_cluster

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "cluster.py"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that is tested here is the one that other processes import."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


@pytest.mark.slow
def test_a_learner_outlives_the_machines_of_its_cluster_and_they_do_not_outlive_it() -> None:
    # Of producers and gateways that are killed, tests/engine/test_engine_on_cluster.py has tests.
    rows, problems = soak_cluster(0.0, seed=0, patience=10.0, faults=(ClusterSoak.kill_raylet, ClusterSoak.kill_gcs))
    assert not problems
    assert [name for name, *_ in rows] == ["SIGKILL of a raylet", "SIGKILL of the GCS", "SIGKILL of the learner"]
    assert all("no worker" not in noticed for _, noticed, _ in rows)


@pytest.mark.slow
def test_a_trajectory_crosses_the_network_once_and_nothing_is_spilled(tmp_path: Path) -> None:
    out = tmp_path / "cluster.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    results = json.loads(out.read_text())["results"]
    payload = {result["images"]: result["bytes per byte"] for result in results if result["kind"] == "payload"}
    assert set(payload) == {False, True}
    for shares in payload.values():
        assert all(1.0 <= share <= 1.1 for share in shares)
    assert [result["spilled MiB"] for result in results if result["kind"] == "slow learner"] == [0.0]
