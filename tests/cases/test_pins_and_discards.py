"""Keeping demonstrations, throwing broken episodes out, and changing rewards of what is stored."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from instructions import EVERY, run_in_child_until
from tensordict import TensorDict

from embodichain_rl import (
    ByGroup,
    ByPriority,
    ByRecency,
    ChunkSampler,
    TrajectoryReplayBuffer,
)
from embodichain_rl.errors import (
    CheckpointError,
    InvalidArgumentError,
    NothingToDrawError,
    PinLimitError,
    SchemaMismatchError,
    TrajectoryEvictedError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.ledger.invariants import check_ledger

ONLINE, DEMO = 0, 1


def episode(number: int, steps: int = 10, task: int = ONLINE) -> TensorDict:
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    return TensorDict(
        {
            "observation": torch.full((steps, 3), float(number)),
            "trajectory": {"task": torch.full((steps,), task), "label": ["unknown"] * steps},
            "next": {"done": done, "reward": torch.zeros(steps, 1)},
        },
        [steps],
    )


def make_buffer(**options: object) -> TrajectoryReplayBuffer:
    settings = {"max_trajectories": 8, "max_total_steps": 80, "batch_size": 64, "chunk_size": 4}
    if "sampler" in options:
        del settings["chunk_size"]
    return TrajectoryReplayBuffer(**{**settings, **options})


def test_demonstrations_that_are_pinned_outlive_any_number_of_online_episodes() -> None:
    rb = make_buffer()
    demos = torch.cat([rb.extend(episode(n, task=DEMO)) for n in range(3)])
    rb.pin(demos)
    for n in range(3, 700):
        rb.extend(episode(n, 5 + n % 6))
        if n % 200 == 0:
            check_ledger(rb.storage.ledger)
    assert rb.pinned.tolist() == demos.unique().tolist()
    assert rb.trajectory(1)["observation"].unique().tolist() == [1.0]
    assert rb[0]["observation"].unique().tolist() == [0.0]
    assert rb.stats()["pinned"] == 3
    assert len(rb) == 8
    drawn = torch.cat([rb.sample()["observation"][:, 0, 0] for _ in range(10)])
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == [0.0, 1.0, 2.0, *range(695, 700)]
    assert (counts > 40).all(), "every live trajectory is equally likely: 80 each"


@pytest.mark.parametrize("weights", ["steps", ByRecency(3.0), ByPriority(), ByGroup("task")], ids=str)
def test_every_way_to_draw_finds_what_is_pinned(weights: object) -> None:
    rb = make_buffer(sampler=ChunkSampler(4, weights=weights))
    rb.pin([int(rb.extend(episode(n, task=DEMO))[0]) for n in range(2)])
    for n in range(2, 560):
        rb.extend(episode(n, 8))
        if n % 50 == 0:
            rb.sample()
    drawn = torch.cat([rb.sample()["observation"][:, 0, 0] for _ in range(20)])
    assert drawn.unique().tolist() == [0.0, 1.0, *range(554, 560)]


def test_every_chunk_of_a_pass_is_drawn_once_also_of_what_is_pinned() -> None:
    rb = make_buffer(sampler=ChunkSampler(4, replacement=False), batch_size=7)
    rb.pin(rb.extend(episode(0)))
    for n in range(1, 560):
        rb.extend(episode(n, 10))
    batches = [rb.sample()["index"][:, 0] for _ in range(8)]  # 8 trajectories of 7 chunks
    assert len(torch.cat(batches).unique(dim=0)) == 56


def test_half_demonstrations_and_half_online_never_runs_out_of_demonstrations() -> None:
    rb = make_buffer(sampler=ChunkSampler(4, weights=ByGroup("task", {DEMO: 0.5, ONLINE: 0.5})))
    rb.pin(rb.extend(episode(0, task=DEMO)))
    for n in range(1, 100):
        rb.extend(episode(n))
        if n % 10 == 0:
            share = (rb.sample()["trajectory", "task"] == DEMO).float().mean()
            assert 0.0 < share < 1.0  # of 64 chunks


def test_groups_by_the_short_name_of_a_trajectory_value() -> None:
    rb = make_buffer(sampler=ChunkSampler(4, weights=ByGroup("task", {DEMO: 1.0})))
    rb.extend(episode(0))
    rb.extend(episode(1, task=DEMO))
    assert rb.sample()["observation"].unique().tolist() == [1.0]


def test_without_pins_the_demonstrations_run_out() -> None:
    rb = make_buffer(sampler=ChunkSampler(4, weights=ByGroup("task", {DEMO: 0.5, ONLINE: 0.5})))
    for n in range(20):
        rb.extend(episode(n, task=DEMO if n == 0 else ONLINE))
    with pytest.raises(NothingToDrawError, match=r"no trajectory of \[1\]"):
        rb.sample()


def test_more_pins_than_the_share_are_refused_as_a_whole() -> None:
    rb = make_buffer(max_pinned=0.25)
    ids = [int(rb.extend(episode(n))[0]) for n in range(4)]
    rb.pin(ids[:1])
    with pytest.raises(PinLimitError, match="At most 2 trajectories with 20 steps"):
        rb.pin(ids)
    assert rb.pinned.tolist() == [0]


def test_a_full_buffer_of_pinned_trajectories_refuses_what_does_not_fit_beside_them() -> None:
    rb = make_buffer(max_trajectories=4, max_total_steps=40, max_pinned=1.0)
    rb.pin([int(rb.extend(episode(n))[0]) for n in range(3)])
    with pytest.raises(PinLimitError, match="11 steps, but 3 pinned trajectories take 30"):
        rb.extend(torch.cat([episode(3), episode(4, 11)]))
    assert len(rb) == 3, "all or nothing"
    for n in range(5, 9):
        rb.extend(episode(n))
        assert len(rb) == 4
        assert rb[-1]["observation"].unique().tolist() == [n]


def test_what_is_evicted_or_not_finished_can_not_be_pinned() -> None:
    rb = make_buffer()
    with pytest.raises(InvalidArgumentError, match="returns -1"):
        rb.pin(rb.extend(episode(0)[:3]))
    with pytest.raises(TrajectoryEvictedError, match=r"\[7\] to pin"):
        rb.pin(7)
    with pytest.raises(InvalidArgumentError, match="integers"):
        rb.pin([0.5])


def test_what_is_unpinned_is_the_next_to_go() -> None:
    rb = make_buffer()
    rb.pin(rb.extend(episode(0)))
    for n in range(1, 30):
        rb.extend(episode(n))
    rb.unpin(0)
    assert len(rb) == 8
    assert rb[0]["observation"].unique().tolist() == [0.0]
    rb.extend(episode(30))
    assert rb[0]["observation"].unique().tolist() == [23.0], "0 is gone"
    assert not len(rb.pinned)


def test_a_discarded_episode_is_never_drawn_again_and_its_room_is_used() -> None:
    rb = make_buffer(prefetch=2)
    ids = [int(rb.extend(episode(n))[0]) for n in range(4)]
    rb.sample()
    assert rb.discard(ids[1]) == 1
    assert rb.discard([ids[1]]) == 0
    for _ in range(20):
        assert 1.0 not in rb.sample()["observation"]
    assert len(rb) == 3
    assert rb.storage.num_steps == 30
    with pytest.raises(TrajectoryEvictedError):
        rb.trajectory(ids[1])
    for n in range(4, 9):  # eight fit again
        rb.extend(episode(n))
    assert rb[0]["observation"].unique().tolist() == [0.0]
    assert rb.stats().items() >= {"discarded": 1, "evicted": 0, "evicted_early": 0}.items()
    with pytest.raises(InvalidArgumentError, match="not given out"):
        rb.discard(99)


def test_emptying_removes_what_is_pinned_too() -> None:
    rb = make_buffer()
    rb.pin(rb.extend(episode(0)))
    rb.empty()
    assert len(rb) == len(rb.pinned) == 0


def test_checkpoints_and_copies_keep_pins_and_ids(tmp_path: Path) -> None:
    rb = make_buffer()
    rb.pin([int(rb.extend(episode(n))[0]) for n in range(3)])
    for n in range(3, 700):
        rb.extend(episode(n))
    rb.discard(rb[4]["trajectory", "id"][:1])
    rb.dumps(tmp_path)
    restored = make_buffer(max_trajectories=100, max_total_steps=1000)
    restored.loads(tmp_path)
    for other in (restored, copy.deepcopy(rb)):
        check_ledger(other.storage.ledger)
        assert other.pinned.tolist() == [0, 1, 2]
        ids = [int(other[n]["trajectory", "id"][0]) for n in range(len(other))]
        assert ids == [int(rb[n]["trajectory", "id"][0]) for n in range(len(rb))]


def test_copies_of_a_buffer_with_a_limit_of_bytes_keep_pins(tmp_path: Path) -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=8, max_bytes=1 << 20, chunk_size=2)
    done = torch.tensor([[0], [0], [0], [1]]).bool()
    for number in range(8):
        rb.extend(TensorDict({"number": torch.full((4, 1), number), "next": {"done": done}}, [4]))
    rb.pin([2, 5])
    rb.dumps(tmp_path)
    loaded = TrajectoryReplayBuffer(max_trajectories=8, max_bytes=1 << 20, chunk_size=2)
    loaded.loads(tmp_path)
    for other in (copy.deepcopy(rb), loaded):
        assert other.pinned.tolist() == [2, 5]
        for _ in range(20):
            other.extend(TensorDict({"number": torch.full((4, 1), 9), "next": {"done": done}}, [4]))
        assert (other.trajectory(2)["number"] == 2).all()
        check_ledger(other.storage.ledger)
    too_small = TrajectoryReplayBuffer(max_trajectories=2, max_bytes=1 << 20, chunk_size=2)
    with pytest.raises(CheckpointError, match="2 pinned trajectories with 8 steps"):
        too_small.loads(tmp_path)


def test_rewards_are_computed_anew_for_what_is_stored() -> None:
    rb = make_buffer()
    for n in range(4):
        rb.extend(episode(n))
    changed = rb.relabel(("next", "reward"), lambda trajectory: trajectory["observation"][:, :1] * 2, ids=[1, 3])
    assert changed == 2
    assert [rb[n]["next", "reward"].unique().tolist() for n in range(4)] == [[0.0], [2.0], [0.0], [6.0]]
    batch = rb.sample()
    odd = batch["observation"][..., :1] % 2 == 1
    assert (batch["next", "reward"] == torch.where(odd, 2 * batch["observation"][..., :1], 0.0)).all()


def test_labels_of_whole_trajectories_are_changed_and_draws_by_them_follow() -> None:
    rb = make_buffer(sampler=ChunkSampler(4, weights=ByGroup("task", {DEMO: 1.0})))
    for n in range(4):
        rb.extend(episode(n, task=DEMO))
    rb.sample()
    rb.relabel(("trajectory", "task"), lambda _: torch.tensor(ONLINE), ids=[0, 1, 2])
    rb.relabel(("trajectory", "label"), lambda trajectory: f"number {int(trajectory['observation'][0, 0])}")
    batch = rb.sample()
    assert batch["observation"].unique().tolist() == [3.0]
    assert rb.texts.resolve(batch["trajectory", "label"][0, 0]) == "number 3"


def test_what_can_not_be_relabelled_is_refused() -> None:
    rb = make_buffer(compact=True)
    steps = episode(0)
    steps["next", "observation"] = steps["observation"].clone()
    rb.extend(steps)
    for key, value, error, message in (
        ("missing", torch.zeros(10, 1), SchemaMismatchError, "to relabel, but what is stored has the keys"),
        (("next", "reward"), torch.zeros(10), SchemaMismatchError, r"a tensor \(10,\) of torch.float32"),
        (("next", "reward"), torch.zeros(10, 1).double(), SchemaMismatchError, "float64"),
        (("next", "reward"), 1.0, SchemaMismatchError, "returned a float"),
        ("observation", steps["observation"], UnsupportedOperationError, "compact buffer"),
    ):
        with pytest.raises(error, match=message):
            rb.relabel(key, lambda _, value=value: value)


def test_a_process_killed_at_any_instruction_of_pin_discard_and_relabel() -> None:
    torch.set_num_threads(1)
    rb = make_buffer()
    numbers = itertools.count()
    for _ in range(8):
        rb.extend(episode(next(numbers)))
    ledger, instruction, killed = rb.storage.ledger, 0, 0

    def change() -> None:
        ids = ledger.live().all()
        rb.unpin(rb.pinned)
        rb.pin(ids[2:5])
        rb.discard([int(ids[1]), int(ids[3])])
        rb.relabel(("next", "reward"), lambda trajectory: trajectory["next", "reward"] + 1, ids=ids[4:6])

    while run_in_child_until(instruction, change):
        check_ledger(ledger)
        live = ledger.live().all()
        batch = rb.sample()
        assert np.isin(batch["trajectory", "id"].numpy(), live).all()
        assert (batch["next", "reward"] == batch["next", "reward"][:, :1]).all(), "old and new values in one chunk"
        for _ in range(8 - len(rb)):
            rb.extend(episode(next(numbers)))
        rb.extend(episode(next(numbers)))
        check_ledger(ledger)
        rewards = [rb[n]["next", "reward"] for n in range(len(rb))]
        assert all((reward == reward[0]).all() for reward in rewards)
        assert len(rb) == 8
        killed += 1
        instruction += 7 * EVERY
    assert killed > 20, f"only {killed} instructions were reached"
