"""Several rates: each frame of a camera that is slower than the state is stored once, and found from each step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from embodichain_rl import ChunkSampler, OnlineDataEngine, OnlineDataEngineCfg, TrajectoryReplayBuffer
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError

EVERY, SIZE = 8, (32, 32, 3)


def episode(number: int, steps: int = 64) -> TensorDict:
    """A camera of 25 Hz beside a state of 200 Hz: a frame shows the number of its episode and of itself."""
    at = torch.arange(steps + 1)
    frames = torch.zeros(steps + 1, *SIZE, dtype=torch.uint8)
    frames[:] = (10 * number + at // EVERY).to(torch.uint8)[:, None, None, None]
    state = torch.stack([torch.full((steps + 1,), number), at], -1).float()
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    return TensorDict(
        {
            "camera": frames[:-1],
            "state": state[:-1],
            "next": {"camera": frames[1:], "state": state[1:], "done": done},
        },
        [steps],
    )


def make_buffer(**options: Any) -> TrajectoryReplayBuffer:
    settings = {"max_trajectories": 20, "max_total_steps": 1280, "batch_size": 16, "every": {"camera": EVERY}}
    if "sampler" not in options:
        settings["chunk_size"] = 12
    return TrajectoryReplayBuffer(**{**settings, **options})


def check(batch: TensorDict) -> None:
    for data in (batch, batch["next"]):
        expected = 10 * data["state"][..., 0] + data["state"][..., 1] // EVERY
        assert (data["camera"] == expected.to(torch.uint8)[..., None, None, None]).all()


@pytest.mark.parametrize("compact", [False, True])
def test_each_step_of_a_chunk_has_the_frame_that_was_valid_there(compact: bool) -> None:
    rb = make_buffer(compact=compact)
    for number in range(24):
        rb.extend(episode(number))
    for _ in range(5):
        batch = rb.sample()
        assert batch["camera"].shape == (16, 12, *SIZE)
        check(batch)
    check(rb[3])


def test_a_frame_takes_its_memory_once() -> None:
    rb = make_buffer()
    for number in range(40):
        rb.extend(episode(number))
    stats = rb.stats()
    frames = 1280 * 32 * 32 * 3
    assert stats["bytes_expected"] < 1.3 * frames / EVERY + 400_000
    assert stats["bytes_used"] < 1.15 * stats["bytes_expected"]
    assert len(rb) == 20
    assert stats["evicted_early"] == 0


def test_windows_of_frames_and_actions() -> None:
    sampler = ChunkSampler(windows={"camera": [-16, -8, 0], "state": range(20)}, pad="both")
    rb = make_buffer(sampler=sampler)
    for number in range(10):
        rb.extend(episode(number))
    batch = rb.sample()
    assert batch["camera"].shape == (16, 3, *SIZE)
    first = batch["state"][:, :1]
    steps = (first[..., 1] + torch.tensor([-16, -8, 0])).clamp(min=0)
    expected = 10 * first[..., 0] + steps // EVERY
    assert (batch["camera"] == expected.to(torch.uint8)[..., None, None, None]).all()


def test_pieces_checkpoints_and_queries(tmp_path: Path) -> None:
    rb = make_buffer()
    for number in range(12):
        data = episode(number, 60 + number)
        for begin in range(0, len(data), 7):
            rb.extend(data[begin : begin + 7])
    rb.dumps(tmp_path)
    restored = make_buffer()
    restored.loads(tmp_path)
    for other in (rb, restored):
        check(other.sample())
        assert [len(trajectory.data) for trajectory in other.query()] == [60 + number for number in range(12)]
        check(other.query()[5].data)


def test_values_of_any_kind_and_frames_that_change_more_often() -> None:
    rb = make_buffer(every={"map": 4})
    data = episode(0).exclude("camera", ("next", "camera"))
    data["map"] = torch.randn(64, 5, 7).double()
    data["map"][10:20] = data["map"][10]
    rb.extend(data)
    assert (rb[0]["map"] == data["map"]).all()


def test_an_engine_with_a_slow_camera() -> None:
    def episodes() -> Iterator[TensorDict]:
        for number in range(6):
            yield episode(number)

    cfg = OnlineDataEngineCfg(
        buffer_size=6, max_episode_steps=64, producers=[episodes()], progress_bar=False, every={"camera": EVERY}
    )
    with OnlineDataEngine(cfg) as engine:
        check(engine.sample_batch(8, 10))
        assert engine.replay_buffer.stats()["bytes_expected"] < 1.6 * 6 * 64 * 3072 / EVERY + 400_000


def test_what_can_not_work_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="every"):
        make_buffer(every={"camera": 0})
    with pytest.raises(InvalidArgumentError, match="for how many steps"):
        make_buffer(every=["camera"])
    with pytest.raises(SchemaMismatchError, match="every names"):
        make_buffer(every={"lidar": 4}).extend(episode(0))
