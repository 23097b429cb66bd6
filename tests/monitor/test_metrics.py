"""What stats() says of a buffer and an engine: the documented list, counts of all processes, what they mean."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steps import Child, make_buffer
from tensordict import TensorDict
from torchrl.record.loggers import CSVLogger

from embodichain_rl import ByGroup, ChunkSampler, OnlineDataEngine, OnlineDataEngineCfg, TrajectoryReplayBuffer
from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.monitor import METRICS, PROCESS_METRICS, WORKER_METRICS


def episode(length: int = 10, *, task: str = "lift", success: bool = True, version: int = 0) -> TensorDict:
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = True
    end = {"done": done, "success": done & success, "reward": torch.ones(length, 1)}
    data = TensorDict({"observation": torch.randn(length, 3), "next": end}, [length])
    data["policy_version"] = torch.full((length, 1), version)
    data["trajectory", "task"] = task
    return data


def episodes() -> Iterator[TensorDict]:
    while True:
        yield episode()


def engine_of_producers() -> OnlineDataEngine:
    cfg = OnlineDataEngineCfg(buffer_size=4, max_episode_steps=10, producers=[episodes()], progress_bar=False)
    return OnlineDataEngine(cfg)


def buffer_of(*trajectories: TensorDict, **options: Any) -> TrajectoryReplayBuffer:
    rb = TrajectoryReplayBuffer(
        max_trajectories=50, max_total_steps=5_000, batch_size=8, **{"chunk_size": 4, **options}
    )
    for trajectory in trajectories:
        rb.extend(trajectory)
    return rb


def at(stats: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        stats = stats[part]
    return stats


def test_every_figure_of_a_buffer_is_in_the_list_and_the_other_way_round() -> None:
    stats = buffer_of(episode()).stats()
    of_draws = {"mixture", "passes"}  # with groups, and without replacement
    listed = {metric.name for metric in METRICS if metric.where != "engine"}
    assert {name.split(".")[0] for name in listed} - of_draws == set(stats) - of_draws
    for name in listed - of_draws:
        at(stats, name)
    assert set(stats["sampled"]) == {name.removeprefix("sampled.") for name in listed if name.startswith("sampled.")}
    assert all(set(row) == {metric.name for metric in PROCESS_METRICS} for row in stats["processes"])


def test_every_figure_of_an_engine_is_in_the_list_and_the_other_way_round() -> None:
    with engine_of_producers() as engine:
        engine.sample_batch(4, 4)
        stats = engine.stats()
    assert {metric.name.split(".")[0] for metric in METRICS if metric.where != "buffer"} == set(stats)
    assert set(stats["workers"][0]) == {metric.name for metric in WORKER_METRICS}
    assert stats["samples"] == 4


def test_each_name_is_there_once_and_has_a_meaning() -> None:
    for metrics in (METRICS, WORKER_METRICS, PROCESS_METRICS):
        names = [metric.name for metric in metrics]
        assert len(set(names)) == len(names)
        assert all(metric.meaning for metric in metrics)


def test_what_came_in_and_what_is_there() -> None:
    rb = buffer_of(episode(10), episode(20, task="place", success=False), episode(30))
    stats = rb.stats()
    assert (stats["inserted"], stats["inserted_steps"], stats["fill"]) == (3, 60, 3 / 50)
    assert stats["inserted_bytes"] == stats["bytes"] == 60 * stats["nbytes_per_step"]
    assert (stats["length_min"], stats["length_mean"], stats["length_max"]) == (10, 20.0, 30)
    assert (stats["return_min"], stats["return_mean"], stats["return_max"]) == (10.0, 20.0, 30.0)
    assert stats["success_rate"] == pytest.approx(2 / 3)
    assert stats["success_by_task"] == {"lift": 1.0, "place": 0.0}
    assert sum(stats["histograms"]["length"]["counts"]) == 3


def test_outcomes_follow_what_is_evicted_and_relabelled() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=100, chunk_size=4)
    for length in (10, 20, 30):
        rb.extend(episode(length))
    assert rb.stats()["return_min"] == 20.0
    rb.relabel(("next", "reward"), lambda trajectory: torch.zeros(len(trajectory), 1))
    assert rb.stats()["return_max"] == 0.0


def test_outcomes_of_each_task_also_where_some_are_new() -> None:
    rb = buffer_of(episode(task="place", success=False), episode(), episode(task="place"))
    assert rb.stats()["success_by_task"] == {"place": 0.5, "lift": 1.0}
    rb.extend(episode(task="stack", success=False))
    rb.extend(episode(task="lift", success=False))
    stats = rb.stats()
    assert stats["success_by_task"] == {"place": 0.5, "lift": 0.5, "stack": 0.0}
    assert list(stats["success_by_task"]) == ["place", "lift", "stack"]
    assert stats["success_rate"] == 2 / 5


def test_returns_of_any_kind_have_the_histogram_of_numpy() -> None:
    rb = buffer_of()
    totals = [0.0, 0.5, -3.0, 1e6, 0.5, float("inf")]
    for total in totals:
        rewarded = episode(2)
        rewarded["next", "reward"] = torch.tensor([[0.0], [total]])
        rb.extend(rewarded)
    counts, edges = np.histogram(totals[:-1], bins=20)
    assert rb.stats()["histograms"]["return"] == {"edges": edges.tolist(), "counts": counts.tolist()}
    assert rb.stats()["return_max"] == float("inf")


def test_who_changes_what_was_returned_changes_nothing_else() -> None:
    rb = buffer_of(episode())
    first, as_it_was = rb.stats(), rb.stats()
    first["success_by_task"].clear()
    for histogram in first["histograms"].values():
        histogram["counts"].clear()
        histogram["edges"].clear()
    again = rb.stats()
    assert again["success_by_task"] == as_it_was["success_by_task"]
    assert again["histograms"] == as_it_was["histograms"]


def test_what_was_sampled_counts_in_all_processes_also_in_those_that_ended() -> None:
    rb = buffer_of(episode(), episode())
    rb.sample()
    child = Child("fork", rb)
    child.call(sample_times, 3)
    stats = rb.stats()
    assert (stats["batches"], stats["samples"]) == (4, 32)
    pids = {row["pid"]: row for row in stats["processes"]}
    assert len(pids) == 2
    assert (pids[child.process.pid]["samples"], pids[child.process.pid]["alive"]) == (24, True)
    child.end()
    stats = rb.stats()
    assert stats["samples"] == 32
    assert sorted(row["alive"] for row in stats["processes"]) == [False, True]


def sample_times(rb: TrajectoryReplayBuffer, times: int) -> None:
    for _ in range(times):
        rb.sample()


def test_what_is_unfinished_and_not_accepted() -> None:
    rb = buffer_of(episode())
    begun = episode(6)
    begun["next", "done"] = torch.zeros(6, 1, dtype=torch.bool)
    rb.extend(begun)
    stats = rb.stats()
    assert (stats["pending_trajectories_total"], stats["pending_steps_total"]) == (1, 6)
    rb.extend(episode(4))
    stats = rb.stats()
    assert (stats["pending_trajectories_total"], stats["pending_steps_total"]) == (0, 0)


def test_ages_in_seconds_and_in_versions() -> None:
    rb = buffer_of(*(episode(version=version) for version in range(5)))
    rb.sample(64)
    sampled = rb.stats()["sampled"]
    assert 0.0 <= sampled["age_mean"] <= sampled["age_max"]
    assert 0.0 <= sampled["age_p95"] <= sampled["age_max"]
    assert 0 <= sampled["policy_lag_p95"] <= sampled["policy_lag_max"]
    assert sampled["age_span"] <= sampled["age_max"]
    assert 0 <= sampled["policy_lag_mean"] <= sampled["policy_lag_max"] <= 4
    assert sum(rb.stats()["histograms"]["sampled_policy_lag"]["counts"][:5]) == 64
    assert sum(map(sum, rb.stats()["draws_by_place_and_age"])) == 64


def test_padding_as_a_share() -> None:
    rb = buffer_of(episode(4), chunk_size=8, strict_length=False)
    rb.sample()
    assert rb.stats()["padding_fraction"] == 0.5
    rb = buffer_of(episode(20))
    rb.sample()
    assert rb.stats()["padding_fraction"] == 0.0


def test_a_mixture_that_was_asked_for_and_drawn() -> None:
    weights = ByGroup("task", {"lift": 3.0, "place": 1.0})
    rb = buffer_of(episode(), episode(task="place"), chunk_size=None, sampler=ChunkSampler(4, weights=weights))
    rb.sample(400)
    stats = rb.stats()
    assert stats["mixture_asked"] == {"lift": 0.75, "place": 0.25}
    assert sum(stats["mixture_drawn"].values()) == pytest.approx(1.0)
    assert stats["mixture_drawn"] == pytest.approx(stats["mixture"])
    assert stats["underdrawn"] == []  # one of them would have to be drawn 50 times instead of 100


def test_waiting_times() -> None:
    rb = buffer_of(episode())
    for _ in range(3):
        rb.sample()
    stats = rb.stats()
    assert stats["data_s"] > 0
    assert stats["updt_s"] > 0
    assert stats["extend_s"] > 0
    assert 0 < stats["starvation"] < 1


def test_reading_them_takes_no_lock() -> None:
    rb = buffer_of(episode())
    rb.sample()
    with rb.storage.ledger.frozen():
        assert rb.stats()["samples"] == 8


def test_more_processes_than_rows_count_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embodichain_rl.replay.ledger.metrics.ROWS", 1)
    rb = buffer_of(episode())
    child = Child("fork", rb)
    child.call(sample_times, 2)
    child.end()
    rb.sample()
    assert rb.stats()["samples"] == 8
    assert multiprocessing.current_process().pid in {row["pid"] for row in rb.stats()["processes"]}


class TestLoggers:
    def test_to_csv(self, tmp_path: Path) -> None:
        rb = buffer_of(episode())
        rb.sample()
        with rb.log_to(CSVLogger("run", log_dir=str(tmp_path)), every=60.0) as log:
            log.log()
        (file,) = tmp_path.rglob("fill.csv")
        steps, values = zip(*(line.split(",") for line in file.read_text().splitlines()), strict=True)
        assert [float(value) for value in values] == [0.02, 0.02]  # and once more at the end
        assert [int(step) for step in steps] == [10, 10]

    def test_of_an_engine_to_tensorboard(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torchrl.record.loggers import TensorboardLogger

        with engine_of_producers() as engine:
            engine.sample_batch(4, 4)
            logger = TensorboardLogger("run", log_dir=str(tmp_path))
            engine.log_to(logger, every=60.0).close()
            logger.experiment.flush()
        (file,) = tmp_path.rglob("events.out.tfevents.*")
        events = EventAccumulator(str(file))
        events.Reload()
        assert events.Scalars("engine/fill")[0].value == 1.0
        assert events.Scalars("engine/samples")[0].value == 4.0
        assert "engine/workers/0/steps" in events.Tags()["scalars"]

    def test_what_is_no_logger(self, tmp_path: Path) -> None:
        rb = make_buffer()
        with pytest.raises(InvalidArgumentError, match="log_scalar"):
            rb.log_to(print)
        with pytest.raises(InvalidArgumentError, match="every"):
            rb.log_to(CSVLogger("run", log_dir=str(tmp_path)), every=0.0)
