"""Goals in hindsight: every relabelled goal was achieved by the same trajectory, at a step that the strategy allows."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated_device import SimulatedDevice
from steps import Child, assert_uniform
from tensordict import TensorDict, TensorDictBase
from torch.utils.data import DataLoader
from torchrl.data import (
    HERReplayBuffer,
    LazyTensorStorage,
    PrioritizedReplayBuffer,
    RandomSampler,
    ReplayBuffer,
    Sequence,
    TensorDictReplayBuffer,
    Transition,
)
from waiting import PATIENCE

from embodichain_rl import ChunkSampler, OnlineDataset, TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError, UnsupportedOperationError
from embodichain_rl.transforms import FlatChunks, HindsightRelabel

ORIGINAL = -1.0
"""The desired goal of every stored step; no step achieves it."""


def episode(number: int, length: int, *, ends: str = "terminated") -> TensorDict:
    """Steps whose achieved goal is ``[number, t]`` before step ``t``, and ``[number, t + 1]`` after it."""
    achieved = torch.stack([torch.full((length + 1,), float(number)), torch.arange(length + 1.0)], dim=-1)
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = True
    desired = torch.full((length, 2), ORIGINAL)
    return TensorDict(
        {
            "observation": torch.randn(length, 3),
            "achieved_goal": achieved[:-1],
            "desired_goal": desired,
            "next": {
                "achieved_goal": achieved[1:].clone(),
                "desired_goal": desired.clone(),
                "reward": torch.full((length, 1), -5.0),
                "done": done,
                "terminated": done.clone() if ends == "terminated" else torch.zeros_like(done),
                "truncated": done.clone() if ends == "truncated" else torch.zeros_like(done),
            },
        },
        [length],
    )


LENGTHS = (3, 7, 5, 12)


def buffer(**kwargs: Any) -> TrajectoryReplayBuffer:
    defaults: dict[str, Any] = {"max_trajectories": 8, "max_total_steps": 400, "batch_size": 64}
    if "sampler" not in kwargs:
        defaults["chunk_size"] = 3
    if "storage" in kwargs:
        del defaults["max_trajectories"], defaults["max_total_steps"]
    rb = TrajectoryReplayBuffer(**{"generator": torch.Generator().manual_seed(0), **defaults, **kwargs})
    for number, length in enumerate(LENGTHS):
        rb.extend(episode(number, length, ends=("terminated", "truncated")[number % 2]))
    rb.storage.flush()
    return rb


def reached(batch: TensorDictBase) -> torch.Tensor:
    """0 where the step achieves its desired goal, else -1."""
    return (batch["next", "achieved_goal"] == batch["desired_goal"]).all(-1, keepdim=True).float() - 1


def relabelling(rb: TrajectoryReplayBuffer | None = None, **kwargs: Any) -> TrajectoryReplayBuffer:
    rb = buffer() if rb is None else rb
    rb.append_transform(HindsightRelabel(rb, reached, **kwargs))
    return rb


def check(batch: TensorDictBase, strategy: str, *, goals_per: str = "chunk", after: int = 1) -> torch.Tensor:
    """Check the goals and rewards of ``[*B, L]`` against the rules of a strategy; return which steps are relabelled."""
    number, step = batch["achieved_goal"].unbind(-1)
    goal, goal_step = batch["desired_goal"].unbind(-1)
    length = torch.tensor(LENGTHS)[number.long()]
    changed = goal != ORIGINAL
    assert torch.equal(batch["desired_goal"], batch["next", "desired_goal"])
    assert (goal == number)[changed].all(), "a goal is of another trajectory"
    if goals_per == "chunk":
        assert (goal_step == goal_step[..., -1:]).all(), "a chunk has several goals"
        step = step.amax(-1, keepdim=True).expand_as(goal_step)
    first = {"future": step, "final": length - 1, "episode": torch.zeros_like(step)}[strategy]
    assert (goal_step >= first + after)[changed].all(), "a goal is from before"
    assert (goal_step <= length - 1 + after)[changed].all()
    reward = batch["next", "reward"]
    assert torch.equal(reward[changed], reached(batch)[changed])
    assert (reward[~changed] == -5.0).all()
    return changed


@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
@pytest.mark.parametrize("goals_per", ["chunk", "step"])
def test_goals_and_rewards_of_chunks(strategy: str, goals_per: str) -> None:
    rb = relabelling(strategy=strategy, goals_per=goals_per)
    fraction = torch.stack([check(rb.sample(), strategy, goals_per=goals_per) for _ in range(20)]).float().mean()
    assert 0.75 < fraction < 0.85


@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
def test_goals_of_single_steps(strategy: str) -> None:
    check(relabelling(buffer(chunk_size=1), strategy=strategy).sample(), strategy)


@pytest.mark.parametrize("key", ["achieved_goal", ("next", "achieved_goal")])
def test_what_was_achieved_before_or_after_the_step(key: Any) -> None:
    rb = relabelling(buffer(chunk_size=1), strategy="final", achieved_goal_key=key, fraction=1.0)
    assert check(rb.sample(), "final", after=int(key != "achieved_goal")).all()


def test_every_later_step_is_as_likely() -> None:
    rb = buffer(chunk_size=2, batch_size=20_000)
    batch = relabelling(rb, fraction=1.0).sample()
    start = batch["achieved_goal"][:, 0, 1]
    here = (batch["achieved_goal"][:, 0, 0] == 3) & (start == 4)
    assert_uniform(batch["desired_goal"][here][:, 0, 1].tolist(), range(6, 13))


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_none_or_all(fraction: float) -> None:
    batch = relabelling(fraction=fraction).sample()
    assert check(batch, "future").float().mean() == fraction


def test_a_policy_that_always_fails_sees_success() -> None:
    rb = relabelling(buffer(chunk_size=1, batch_size=500), fraction=1.0)
    assert 0.1 < (rb.sample()["next", "reward"] == 0).float().mean() < 0.9


def test_ends_are_as_they_were_stored() -> None:
    plain, relabelled = buffer(), relabelling()
    for _ in range(3):
        expected = plain.sample_chunks(64, 3, generator=torch.Generator().manual_seed(1))
        batch = relabelled.sample_chunks(64, 3, generator=torch.Generator().manual_seed(1))
        for name in ("done", "terminated", "truncated"):
            assert torch.equal(batch["next", name], expected["next", name])


def test_an_episode_that_ends_at_its_goal_ends_there_in_hindsight_too() -> None:
    rb = relabelling(fraction=0.5, terminated_fn=lambda batch: reached(batch) == 0)
    batch = rb.sample()
    changed = check(batch, "future")
    success = reached(batch) == 0
    assert success[changed].any()
    ends = batch["next"]
    last = (batch["trajectory", "step"] == torch.tensor(LENGTHS)[batch["achieved_goal"][..., 0].long()] - 1)[..., None]
    assert torch.equal(ends["terminated"][changed], success[changed])
    assert torch.equal(ends["done"][changed], (success | ends["truncated"])[changed])
    assert torch.equal(ends["done"][~changed], last[~changed])


def test_without_rewards() -> None:
    rb = buffer()
    rb.append_transform(HindsightRelabel(rb, None, fraction=1.0))
    batch = rb.sample()
    assert (batch["desired_goal"] != ORIGINAL).all()
    assert (batch["next", "reward"] == -5.0).all()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_rewards_with_and_without_a_last_axis(shape: tuple[int, ...]) -> None:
    rb = buffer()
    rb.append_transform(HindsightRelabel(rb, lambda batch: reached(batch).reshape(*batch.shape, *shape), fraction=1.0))
    assert check(rb.sample(), "future").all()


class TestShapes:
    @pytest.mark.parametrize("pad", ["before", "after", "both"])
    def test_padded_chunks(self, pad: str) -> None:
        check(relabelling(buffer(sampler=ChunkSampler(9, pad=pad))).sample(), "future")

    @pytest.mark.parametrize("strategy", ["future", "final", "episode"])
    def test_flat_chunks(self, strategy: str) -> None:
        rb = buffer(transform=FlatChunks())
        batch = relabelling(rb, strategy=strategy).sample()
        check(batch.reshape(64, 3), strategy)

    @pytest.mark.parametrize("desired", [(0, 0), (-1, 2)])
    def test_windows(self, desired: tuple[int, int]) -> None:
        windows = {"observation": (-1, 0), "achieved_goal": (0, 0), "desired_goal": desired, ("next", "reward"): (0, 0)}
        rb = buffer(sampler=ChunkSampler(windows=windows, pad="both"))
        rb.append_transform(HindsightRelabel(rb, None, fraction=1.0))
        batch = rb.sample()
        number, step = batch["achieved_goal"][:, 0].unbind(-1)
        assert batch["desired_goal"].shape == (64, desired[1] - desired[0] + 1, 2)
        assert (batch["desired_goal"][..., 0] == number[:, None]).all()
        assert (batch["desired_goal"][..., 1] > step[:, None]).all()
        assert (batch["desired_goal"] == batch["desired_goal"][:, :1]).all()

    def test_whole_trajectories(self) -> None:
        rb = relabelling(fraction=1.0)
        for number, length in enumerate(LENGTHS):
            assert (rb[number]["desired_goal"] == torch.tensor([number, length])).all()
        rows = rb[:]
        for row, mask, length in zip(rows, rows["collector", "mask"], LENGTHS, strict=True):
            assert (row["desired_goal"][mask][:, 1] == length).all()

    def test_a_goal_of_the_whole_trajectory(self) -> None:
        rb = TrajectoryReplayBuffer(max_trajectories=8, max_total_steps=400, chunk_size=3, batch_size=64)
        for number, length in enumerate(LENGTHS):
            data = episode(number, length).exclude("desired_goal", ("next", "desired_goal"))
            data["trajectory", "goal"] = torch.full((length, 2), ORIGINAL)
            rb.extend(data)
        rb.append_transform(HindsightRelabel(rb, None, fraction=1.0, desired_goal_key=("trajectory", "goal")))
        batch = rb.sample()
        assert (batch["trajectory", "goal"][..., 0] == batch["achieved_goal"][..., 0]).all()


STORAGES: dict[str, Callable[[], Any]] = {
    "compact": lambda: TrajectoryStorage(8, 400, compact=True),
    "views": lambda: TrajectoryStorage(8, 400, compact="views"),
    "on a device": lambda: TrajectoryStorage(8, 400, device=SimulatedDevice()),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
def test_from_other_storages(storage: str, strategy: str) -> None:
    rb = relabelling(buffer(storage=STORAGES[storage]()), strategy=strategy)
    check(rb.sample(), strategy)


class TestDatasets:
    """As the transform of a dataset, in the workers of a DataLoader too."""

    @pytest.mark.parametrize("batch_size", [None, 32])
    @pytest.mark.parametrize("start", [None, "fork", "forkserver"])
    def test_chunks_and_batches(self, batch_size: int | None, start: str | None) -> None:
        rb = buffer()
        relabel = HindsightRelabel(rb, reached)
        dataset = OnlineDataset(rb, 3, batch_size, transform=relabel, seed=0)
        workers = {} if start is None else {"num_workers": 1, "multiprocessing_context": start}
        loader = DataLoader(dataset, batch_size=None if batch_size else 32, **workers)
        batches = [batch for batch, _ in zip(loader, range(3), strict=False)]
        assert 0.5 < torch.stack([check(batch, "future") for batch in batches]).float().mean() < 0.99

    @pytest.mark.parametrize("at", ["dataset", "buffer"])
    def test_a_seed_repeats_the_goals(self, at: str) -> None:
        drawn = []
        for _ in range(2):
            rb = buffer(generator=None)
            relabel = HindsightRelabel(rb, reached)
            if at == "buffer":
                rb.append_transform(relabel)
            dataset = OnlineDataset(rb, 3, 16, transform=relabel if at == "dataset" else None, seed=5)
            drawn.append(torch.stack([batch["desired_goal"] for batch, _ in zip(dataset, range(3), strict=False)]))
        assert torch.equal(*drawn)


def test_the_generator_of_the_buffer_repeats_the_goals() -> None:
    drawn = []
    for _ in range(2):
        rb = relabelling()
        rb.set_rng(torch.Generator().manual_seed(3))
        drawn.append(torch.stack([rb.sample()["desired_goal"] for _ in range(3)]))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0][0], drawn[0][1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda rb: pickle.loads(pickle.dumps(rb))])
def test_a_copied_buffer_reads_goals_of_its_own(copied: Callable[[Any], Any]) -> None:
    rb = relabelling(fraction=1.0)
    twin = copied(rb)
    rb.empty()
    assert check(twin.sample(), "future").all()


def sample_there(rb: TrajectoryReplayBuffer) -> bool:
    return bool(check(rb.sample(), "future").all())


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_in_another_process(start: str) -> None:
    child = Child(start, relabelling(fraction=1.0))
    assert child.call(sample_there)
    child.end()


class TestEviction:
    def test_a_chunk_whose_trajectory_is_gone_keeps_its_goal_and_is_counted(self) -> None:
        rb = buffer(max_trajectories=4, max_total_steps=40)
        relabel = HindsightRelabel(rb, reached, fraction=1.0)
        batch = rb.sample()
        while rb.storage.ledger.still_valid(torch.unique(batch["trajectory", "id"]).numpy()).any():
            rb.extend(episode(9, 5))
        relabelled = relabel(batch)
        assert (relabelled["desired_goal"] == ORIGINAL).all()
        assert (relabelled["next", "reward"] == -5.0).all()
        assert relabel.evicted == 64

    def test_a_goal_that_is_overwritten_while_it_is_read_is_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rb = buffer(max_trajectories=4, max_total_steps=40)
        relabel = HindsightRelabel(rb, reached, fraction=1.0)
        batch, arena = rb.sample(), rb.storage.arena
        copy_steps, ids = arena.copy_steps, torch.unique(batch["trajectory", "id"]).numpy()

        def copy_after_others_wrote(*args: Any) -> torch.Tensor:
            while rb.storage.ledger.still_valid(ids).any():
                rb.extend(episode(9, 5))
            return copy_steps(*args)

        monkeypatch.setattr(arena, "copy_steps", copy_after_others_wrote)
        assert (relabel(batch)["desired_goal"] == ORIGINAL).all()
        assert relabel.evicted == 64

    def test_while_others_write_no_goal_is_of_another_trajectory(self) -> None:
        rb = buffer(max_trajectories=4, max_total_steps=40, batch_size=256)
        relabel = HindsightRelabel(rb, reached, fraction=1.0)
        rb.append_transform(relabel)
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                for number, length in enumerate(LENGTHS):
                    rb.extend(episode(number, length))

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(150):
                check(rb.sample(), "future")
        finally:
            stop.set()
            writer.join(PATIENCE)


class TestRefused:
    @pytest.mark.parametrize(
        "arguments",
        [
            {"fraction": 1.5},
            {"fraction": -0.1},
            {"fraction": "all"},
            {"strategy": "random"},
            {"goals_per": "batch"},
            {"achieved_goal_key": 3},
            {"desired_goal_key": ()},
            {"terminated_fn": True},
        ],
        ids=repr,
    )
    def test_arguments(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgumentError, match=next(iter(arguments)).split("_goal_")[-1]):
            HindsightRelabel(buffer(), reached, **arguments)

    @pytest.mark.parametrize("source", [None, 3, TensorDictReplayBuffer(storage=LazyTensorStorage(3))], ids=type)
    def test_another_source(self, source: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="TrajectoryStorage"):
            HindsightRelabel(source, reached)

    def test_a_batch_without_its_origin_or_goal(self) -> None:
        rb = buffer()
        relabel = HindsightRelabel(rb, reached, fraction=1.0)
        for gone in ("trajectory", "desired_goal"):
            with pytest.raises(SchemaMismatchError, match="desired goal"):
                relabel(rb.sample().exclude(gone))

    def test_a_batch_of_another_buffer(self) -> None:
        rb, other = buffer(), buffer()
        for _ in range(10):
            other.extend(episode(0, 4))
        with pytest.raises(InvalidArgumentError, match="another buffer"):
            HindsightRelabel(rb, reached, fraction=1.0)(other.sample())

    def test_goals_that_are_not_stored_or_of_another_shape(self) -> None:
        rb = buffer()
        with pytest.raises(SchemaMismatchError, match="'reached_goal'"):
            HindsightRelabel(rb, reached, fraction=1.0, achieved_goal_key="reached_goal")(rb.sample())
        with pytest.raises(SchemaMismatchError, match="must be the same"):
            HindsightRelabel(rb, reached, fraction=1.0, achieved_goal_key="observation")(rb.sample())

    def test_another_number_of_rewards(self) -> None:
        rb = buffer()
        with pytest.raises(InvalidArgumentError, match="reward_fn returned"):
            HindsightRelabel(rb, lambda batch: torch.zeros(3), fraction=1.0)(rb.sample())


class TestWrappersOfSteps:
    """TorchRL's wrappers that look for neighbours of a step would mix trajectories, and say so before they do."""

    def parts(self, **kwargs: Any) -> dict[str, Any]:
        return {
            "storage": TrajectoryStorage(8, 400),
            "writer": TrajectoryWriter(),
            "sampler": ChunkSampler(3),
            "batch_size": 8,
            **kwargs,
        }

    @pytest.mark.parametrize("sampler", [ChunkSampler(3), RandomSampler(), None], ids=repr)
    def test_her_replay_buffer(self, sampler: Any) -> None:
        with pytest.raises(UnsupportedOperationError, match="HindsightRelabel"):
            HERReplayBuffer(reached, **self.parts(sampler=sampler))

    def test_her_replay_buffer_of_ones_own(self) -> None:
        class Mine(HERReplayBuffer):
            pass

        with pytest.raises(UnsupportedOperationError, match="HindsightRelabel"):
            Mine(reached, **self.parts())

    def test_her_replay_buffer_that_gets_the_storage_later(self) -> None:
        rb = HERReplayBuffer(reached, storage=LazyTensorStorage(100), batch_size=8)
        rb.set_storage(buffer().storage)
        with pytest.raises(UnsupportedOperationError, match="HindsightRelabel"):
            rb.sample()

    @pytest.mark.parametrize("sampler", [ChunkSampler(3), RandomSampler()], ids=repr)
    def test_sequences(self, sampler: Any) -> None:
        with pytest.raises(UnsupportedOperationError, match="ChunkSampler"):
            TensorDictReplayBuffer(sample_unit=Sequence(3), **self.parts(sampler=sampler))

    def test_prioritized(self) -> None:
        class Prioritized(PrioritizedReplayBuffer):
            def __init__(self, **kwargs: Any) -> None:  # its own makes a sampler that not every build of TorchRL has
                ReplayBuffer.__init__(self, **kwargs)

        with pytest.raises(UnsupportedOperationError, match="ByPriority"):
            Prioritized(**self.parts())

    def test_consuming(self) -> None:
        with pytest.raises(UnsupportedOperationError, match="replacement=False"):
            TensorDictReplayBuffer(consume_after_n_samples=1, **self.parts(sampler=RandomSampler()))

    @pytest.mark.parametrize("kind", [ReplayBuffer, TensorDictReplayBuffer])
    def test_those_that_hand_out_what_was_drawn_are_accepted(self, kind: Any) -> None:
        class Mine(kind):  # type: ignore[misc]
            pass

        for rb in (kind(**self.parts()), Mine(sample_unit=Transition(), **self.parts())):
            rb.extend(episode(0, 5))
            assert rb.sample().shape == (8, 3)
