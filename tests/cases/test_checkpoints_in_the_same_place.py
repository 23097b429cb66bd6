"""What users do with checkpoints that are saved again and again to the same directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import LABEL, check_chunk, contents, make_buffer, make_trajectory, small
from tensordict import TensorDict

from embodichain_rl import ByPriority, ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage
from embodichain_rl.errors import CheckpointError
from embodichain_rl.replay.ledger.invariants import check_ledger

LIMITS: dict[str, Any] = {"max_trajectories": 8, "max_total_steps": 200, "chunk_size": 3}


def values_in(path: Path) -> dict[tuple[int, int], int]:
    """Return the files with values under a directory, by device and inode, and their sizes in bytes."""
    files = [file.stat() for file in path.rglob("field_*.bin")]
    return {(file.st_dev, file.st_ino): file.st_size for file in files}


def written(path: Path, save: Callable[[], object]) -> int:
    """Return how many bytes of values are written by a checkpoint."""
    before = values_in(path)
    save()
    return sum(size for file, size in values_in(path).items() if file not in before)


def loaded(path: Path, **limits: Any) -> TrajectoryReplayBuffer:
    rb = make_buffer(**{**LIMITS, **limits})
    rb.loads(path)
    check_ledger(rb.storage.ledger)
    for number in range(len(rb)):
        check_chunk(rb.storage[number])
    return rb


def fill(rb: TrajectoryReplayBuffer, numbers: range, steps: int = 10) -> None:
    for number in numbers:
        rb.extend(make_trajectory(number, steps))


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("compact", [False, True])
def test_only_what_is_new_is_written(tmp_path: Path, where: str, compact: bool) -> None:
    path = tmp_path / "checkpoint"
    place = {"path": tmp_path / "buffer"} if where == "file" else {}
    rb = make_buffer(compact=compact, **LIMITS, **place)
    fill(rb, range(8))
    all_of_it = written(path, lambda: rb.dumps(path))
    assert written(path, lambda: rb.dumps(path)) == 0
    fill(rb, range(8, 10))
    assert written(path, lambda: rb.dumps(path)) == all_of_it // 4
    again = loaded(path, compact=not compact)
    assert contents(again) == contents(rb)
    ids = [int(again.storage[n]["trajectory", "id"][0]) for n in range(8)]
    assert ids == [*range(2, 10)]
    assert again.storage.ledger.next_id == 10
    for number in range(10, 35 if compact and not place else 12):
        fill(rb, range(number, number + 1), steps=3 + number % 7)
        rb.dumps(path)
        assert sum(values_in(path).values()) <= 2 * all_of_it
    assert contents(loaded(path)) == contents(rb)
    assert len({file.parent for file in path.rglob("field_*.bin")}) <= 17


def test_a_storage_alone(tmp_path: Path) -> None:
    storage = make_buffer(**LIMITS).storage
    rb = TrajectoryReplayBuffer(storage=storage, chunk_size=3)
    fill(rb, range(8))
    first = written(tmp_path, lambda: storage.dumps(tmp_path))
    fill(rb, range(8, 9))
    assert written(tmp_path, lambda: storage.dumps(tmp_path)) == first // 8
    other = TrajectoryStorage(8, 200)
    other.loads(tmp_path)
    assert [int(one[LABEL][0, 0]) for one in other] == [*range(1, 9)]


def test_of_a_buffer_whose_trajectories_are_all_gone(tmp_path: Path) -> None:
    rb = make_buffer(**LIMITS)
    fill(rb, range(8))
    rb.dumps(tmp_path)
    rb.discard(range(8))
    rb.dumps(tmp_path)
    again = loaded(tmp_path)
    assert len(again) == 0
    fill(again, range(8, 10))
    assert len(again) == 2
    again.dumps(tmp_path)
    assert len(loaded(tmp_path)) == 2


def test_after_sigkill_it_goes_on_from_the_last_one(tmp_path: Path) -> None:
    path, buffer = tmp_path / "checkpoint", tmp_path / "buffer"
    pid = os.fork()
    if pid == 0:
        rb = make_buffer(path=buffer, **LIMITS)
        fill(rb, range(8))
        rb.dumps(path)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    rb = TrajectoryReplayBuffer.open(buffer)
    assert written(path, lambda: rb.dumps(path)) == 0
    assert contents(loaded(path)) == contents(rb) == [(number, 10) for number in range(8)]


def test_labels_pins_texts_and_priorities_are_those_of_now(tmp_path: Path) -> None:
    def labelled(number: int) -> TensorDict:
        data = make_trajectory(number, 10)
        data["task"] = [f"lift cube {number % 3}"] * 10
        return data

    sampler = ChunkSampler(3, weights=ByPriority(alpha=1.0, eps=1e-12))
    rb = make_buffer(**{name: value for name, value in LIMITS.items() if name != "chunk_size"}, sampler=sampler)
    for number in range(8):
        rb.extend(labelled(number))
    rb.sample()
    rb.dumps(tmp_path)
    rb.pin([3, 5])
    rb.discard(4)
    rb.update_priority([6], 5.0)
    rb.relabel(("next", "reward"), lambda trajectory: trajectory["next", "reward"] + 1.0, ids=[2])
    rb.extend(labelled(8))
    rb.dumps(tmp_path)
    again = make_buffer(**{name: value for name, value in LIMITS.items() if name != "chunk_size"}, sampler=sampler)
    again.loads(tmp_path)
    assert again.pinned.tolist() == [3, 5]
    ids = rb.storage.ledger.live().all()
    assert ids.tolist() == again.storage.ledger.live().all().tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert again.storage.ledger.weights_of(ids).tolist() == rb.storage.ledger.weights_of(ids).tolist()
    for number in ids.tolist():
        before, after = rb.storage.trajectory(number), again.storage.trajectory(number)
        assert torch.equal(before["next", "reward"], after["next", "reward"])
        assert (
            rb.texts.resolve(before["task"]) == again.texts.resolve(after["task"]) == [f"lift cube {number % 3}"] * 10
        )


def test_another_buffer_in_the_same_place(tmp_path: Path) -> None:
    first = make_buffer(**LIMITS)
    fill(first, range(8))
    first.dumps(tmp_path)
    second = make_buffer(**LIMITS)
    fill(second, range(100, 108))
    second.dumps(tmp_path)
    assert contents(loaded(tmp_path)) == [(number, 10) for number in range(100, 108)]
    third = make_buffer([small(3, 4)])
    third.dumps(tmp_path)
    other = make_buffer()
    other.loads(tmp_path)
    assert contents(other) == [(3, 4)]


def test_what_is_damaged_is_not_gone_on_from(tmp_path: Path) -> None:
    rb = make_buffer(**LIMITS)
    fill(rb, range(8))
    rb.dumps(tmp_path)
    file = max(tmp_path.rglob("field_*.bin"), key=lambda one: one.stat().st_size)
    file.write_bytes(b"")
    rb.dumps(tmp_path)
    assert contents(loaded(tmp_path)) == contents(rb)
    (description,) = tmp_path.rglob("trajectories.json")
    description.write_text("[")
    rb.dumps(tmp_path)
    (description,) = tmp_path.rglob("trajectories.json")
    described = json.loads(description.read_text())
    description.write_text(json.dumps({**described, "folder": "../../../outside"}))
    rb.dumps(tmp_path)
    assert contents(loaded(tmp_path)) == contents(rb)


def test_damaged_parts_are_found(tmp_path: Path) -> None:
    rb = make_buffer(**LIMITS)
    fill(rb, range(8))
    rb.dumps(tmp_path)
    fill(rb, range(8, 10))
    rb.dumps(tmp_path)
    (description,) = tmp_path.rglob("trajectories.json")
    described = json.loads(description.read_text())
    (part,) = described["parts"]
    for damage in (
        {"folder": "../x"},
        {"kept": [99]},
        {"kept": [0, 0]},
        {"kept": "all"},
        {"ids": [1] * 8},
        {"ids": None},
        {"lengths": [3]},
        {"texts": 3},
        {"shifted": {"0": 1}},
    ):
        description.write_text(json.dumps({**described, "parts": [{**part, **damage}]}))
        with pytest.raises(CheckpointError):
            loaded(tmp_path)
    for parts in (3, [3], [part, part]):
        description.write_text(json.dumps({**described, "parts": parts}))
        with pytest.raises(CheckpointError):
            loaded(tmp_path)
    description.write_text(json.dumps(described))
    shutil.rmtree(next(tmp_path.rglob(part["folder"])))
    with pytest.raises(CheckpointError):
        loaded(tmp_path)


def test_checkpoints_of_an_engine(tmp_path: Path) -> None:
    from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg

    cfg = OnlineDataEngineCfg(buffer_size=8, max_episode_steps=20, gym_config={"id": "Pendulum-v1"})
    engine = OnlineDataEngine(cfg)
    fill(engine.replay_buffer, range(8))
    first = written(tmp_path, lambda: engine.save(tmp_path))
    fill(engine.replay_buffer, range(8, 10))
    assert written(tmp_path, lambda: engine.save(tmp_path)) == first // 4
    again = OnlineDataEngine.load(tmp_path)
    assert contents(again.replay_buffer) == [(number, 10) for number in range(2, 10)]
