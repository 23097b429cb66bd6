"""Chunks from several buffers in one batch."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from itertools import islice
from typing import Any

import pytest
import torch
from loading import check_batch, loading, same, take
from steps import LABEL, assert_chances, make_trajectory, small
from tensordict import TensorDict
from torchdata.stateful_dataloader import StatefulDataLoader

from embodichain_rl import (
    ByGroup,
    ChunkSampler,
    OnlineDataEngine,
    OnlineDataEngineCfg,
    ResolveText,
    TrajectoryReplayBuffer,
)
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import EmptyBufferError, InvalidArgumentError, SchemaMismatchError

SOURCE = ("trajectory", "source")


def buffer(*trajectories: TensorDict, **kwargs: Any) -> TrajectoryReplayBuffer:
    rb = TrajectoryReplayBuffer(max_trajectories=20, max_total_steps=2000, chunk_size=4, **kwargs)
    for trajectory in trajectories:
        rb.extend(trajectory)
    return rb


@pytest.fixture(scope="module")
def sources() -> list[TrajectoryReplayBuffer]:
    """Trajectories 0 to 4 in one buffer, 10 to 12 in another."""
    return [buffer(*(make_trajectory(n, 30) for n in range(5))), buffer(*(make_trajectory(n, 9) for n in (10, 11, 12)))]


def sources_of(batches: Any) -> list[int]:
    """The source of each chunk, checked against the trajectories that are in it."""
    numbers = []
    for batch in batches:
        check_batch(batch)
        assert batch[SOURCE].dtype == torch.int64
        assert torch.equal(batch[SOURCE], (batch[LABEL][..., 0] >= 10).long())
        numbers += batch[SOURCE][:, 0].tolist()
    return numbers


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 64), (2, 64), (0, None), (2, None)])
def test_mix_two_buffers_by_weight(sources: list[TrajectoryReplayBuffer], workers: int, batch_size: int | None) -> None:
    dataset = OnlineDataset(sources, 4, batch_size, weights=[0.7, 0.3], seed=1)
    with loading(dataset, workers, batch_size=None if batch_size else 64) as loader:
        first = take(loader, 16)
    assert_chances(sources_of(first), {0: 0.7, 1: 0.3})
    again = OnlineDataset(sources, 4, batch_size, weights=[7, 3], seed=1)
    with loading(again, workers, batch_size=None if batch_size else 64) as loader:
        assert same(take(loader, 4), first[:4])


def test_sources_without_weights_are_equally_likely(sources: list[TrajectoryReplayBuffer]) -> None:
    drawn = sources_of(islice(OnlineDataset(sources, 4, 500, seed=1), 2))
    assert_chances(drawn, {0: 1.0, 1: 1.0})


def test_a_source_of_weight_zero_is_not_drawn_and_may_be_empty(sources: list[TrajectoryReplayBuffer]) -> None:
    dataset = OnlineDataset([sources[0], buffer()], 4, 50, weights=[1, 0])
    assert Counter(sources_of(islice(dataset, 1))) == {0: 50}


def test_weights_within_each_source(sources: list[TrajectoryReplayBuffer]) -> None:
    dataset = OnlineDataset(sources, 4, 200, weights=ByGroup(("robot", "mode")), seed=0)
    assert set(sources_of(islice(dataset, 1))) == {0, 1}


@pytest.mark.parametrize("arguments", [{"pad": "both"}, {"windows": {"observation": (-1, 2)}, "chunk_size": None}])
def test_mix_padded_chunks_and_windows(sources: list[TrajectoryReplayBuffer], arguments: dict[str, Any]) -> None:
    dataset = OnlineDataset(**{"source": sources, "chunk_size": 4, "batch_size": 50, "seed": 0, **arguments})
    batch = next(iter(dataset))
    assert batch[SOURCE].shape == batch.shape
    assert set(batch[SOURCE].reshape(-1).tolist()) == {0, 1}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_mixture_goes_on_where_it_was_stopped(sources: list[TrajectoryReplayBuffer], workers: int) -> None:
    def dataset() -> OnlineDataset:
        return OnlineDataset(sources, 4, 8, weights=[0.7, 0.3])

    with loading(dataset(), workers, kind=StatefulDataLoader) as loader:
        iteration = iter(loader)
        list(islice(iteration, 3))
        state, expected = loader.state_dict(), [batch.clone() for batch in islice(iteration, 3)]
        del iteration
    with loading(dataset(), workers, kind=StatefulDataLoader) as loader:
        loader.load_state_dict(state)
        resumed = take(loader, 3)
    assert same(resumed, expected)
    assert sources_of(resumed) == sources_of(expected)


def test_an_empty_source_is_named(sources: list[TrajectoryReplayBuffer]) -> None:
    with pytest.raises(EmptyBufferError) as caught:
        next(iter(OnlineDataset([sources[0], buffer()], 4, 8)))
    assert "source 1 of a mixture" in caught.value.__notes__[0]


def test_sources_with_different_keys_are_refused_by_name_or_share_what_both_have() -> None:
    wrist = small(1, 20).set("wrist", torch.zeros(20, 3))
    sources = [buffer(small(0, 20)), buffer(wrist)]
    for batch_size in (None, 8):
        with pytest.raises(SchemaMismatchError, match=r"\('wrist',\) in source \[1\] only"):
            next(iter(OnlineDataset(sources, 4, batch_size)))
    for item in islice(OnlineDataset(sources, 4, 8, common_keys=True, seed=0), 4):
        assert {"observation", "wrist"} & set(item.keys()) == {"observation"}


@pytest.mark.parametrize("other", [torch.zeros(20, 5), torch.zeros(20, 3, dtype=torch.float64)])
def test_sources_with_different_shapes_or_dtypes_are_refused_by_name(other: torch.Tensor) -> None:
    changed = small(1, 20)
    changed = changed.exclude(("next", "observation")).set("observation", other)
    same_keys = small(0, 20).exclude(("next", "observation"))
    with pytest.raises(SchemaMismatchError, match=r"different values of \('observation',\)"):
        next(iter(OnlineDataset([buffer(same_keys), buffer(changed)], 4, 8, common_keys=True)))


def test_a_key_of_the_user_is_not_replaced() -> None:
    own = [small(n, 20).set(SOURCE, torch.full((20,), 7 + n)) for n in range(2)]
    sources = [buffer(each) for each in own]
    with pytest.raises(SchemaMismatchError, match="source_key="):
        next(iter(OnlineDataset(sources, 4, 8)))
    batch = next(iter(OnlineDataset(sources, 4, 50, source_key="buffer", seed=0)))
    assert torch.equal(batch[SOURCE], batch["buffer"] + 7)
    assert set(batch["buffer"][:, 0].tolist()) == {0, 1}


def test_instructions_are_those_of_the_first_buffer() -> None:
    tasks = (["lift", "push"], ["pour", "lift"])
    sources = []
    for source in tasks:
        rb = buffer()
        for number, task in enumerate(source):
            rb.extend(small(number, 12).set("task", [task] * 12))
        sources.append(rb)
    batch = next(iter(OnlineDataset(sources, 4, 64, seed=0)))
    expected = [
        tasks[source][number]
        for source, number in zip(batch[SOURCE][:, 0].tolist(), batch[LABEL][:, 0, 0].tolist(), strict=True)
    ]
    assert sources[0].texts.resolve(batch["task"][:, 0]) == expected
    resolved = next(iter(OnlineDataset(sources, 4, 64, transform=ResolveText(sources[0], ["task"]), seed=0)))
    assert [texts[0] for texts in resolved["task"]] == expected


@pytest.mark.parametrize("provenance", [False, True])
def test_so_are_those_of_engines(provenance: bool) -> None:
    tasks = (["lift", "push"], ["pour", "lift"])
    with ExitStack() as stack:
        engines = []
        for of_engine in tasks:
            episodes = [small(number, 12).set("task", [task] * 12) for number, task in enumerate(of_engine)]
            cfg = OnlineDataEngineCfg(
                buffer_size=2, max_episode_steps=12, producers=[episodes], refill_policy="manual", progress_bar=False
            )
            engines.append(stack.enter_context(OnlineDataEngine(cfg)))
        batch = next(iter(OnlineDataset(engines, 4, 64, seed=0, provenance=provenance)))
        numbers = zip(batch[SOURCE][:, 0].tolist(), batch[LABEL][:, 0, 0].tolist(), strict=True)
        assert engines[0].texts.resolve(batch["task"][:, 0]) == [tasks[source][number] for source, number in numbers]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 sources"),
        ([1.0, -1.0], r"weights\[1\]"),
        ([0.0, 0.0], "positive weight"),
        ([1.0, float("nan")], r"weights\[1\]"),
    ],
)
def test_bad_weights_are_refused(sources: list[TrajectoryReplayBuffer], weights: list[float], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        OnlineDataset(sources, 4, 8, weights=weights)


def test_what_is_no_mixture_is_refused(sources: list[TrajectoryReplayBuffer]) -> None:
    with pytest.raises(InvalidArgumentError, match="no sources"):
        OnlineDataset([], 4, 8)
    with pytest.raises(InvalidArgumentError, match="which returns no chunks"):
        OnlineDataset([sources[0], 3], 4, 8)
    with pytest.raises(InvalidArgumentError, match="a mixture has no pass"):
        OnlineDataset(sources, 4, 8, replacement=False)
    with pytest.raises(InvalidArgumentError, match="'uniform', 'steps', ByRecency"):
        OnlineDataset(sources[0], 4, 8, weights=[1.0])


# ------------------------------------------------------------------------------------------ one sampler for two buffers


def test_one_sampler_in_two_buffers_counts_and_draws_apart() -> None:
    sampler = ChunkSampler(4, weights=ByGroup("task"))
    parts = []
    for tasks, generator in ((("lift", "push"), 1), (("pour",), 2)):
        rb = TrajectoryReplayBuffer(
            max_trajectories=20,
            max_total_steps=2000,
            sampler=sampler,
            batch_size=6,
            generator=torch.Generator().manual_seed(generator),
        )
        for number, task in enumerate(tasks):
            rb.extend(small(number, 12).set("task", [task] * 12))
        parts.append(rb)
    first, second = parts
    drawn = first.sample()["index"]
    second.sample(12)
    assert sum(first.stats()["mixture"].values()) == pytest.approx(1.0)
    assert set(second.stats()["mixture"]) == {"pour"}
    assert set(first.stats()["mixture"]) <= {"lift", "push"}
    assert second.stats()["sampled_age_max"] < first.stats()["sampled_age_max"] + 1e9
    first.set_rng(torch.Generator().manual_seed(1))
    second.set_rng(torch.Generator().manual_seed(2))
    assert torch.equal(first.sample()["index"], drawn), "draws with the generator of the other buffer"


def test_a_buffer_that_gets_another_storage_draws_its_groups() -> None:
    rb = buffer(*(small(n, 12).set("task", ["lift"] * 12) for n in range(3)))
    rb.set_sampler(ChunkSampler(4, weights=ByGroup("task")))
    rb.sample(8)
    other = buffer(small(7, 12).set("task", ["pour"] * 12), small(8, 12).set("task", ["push"] * 12))
    rb.set_storage(other.storage)
    batch = rb.sample(64)
    assert set(batch[LABEL][:, 0, 0].tolist()) == {7, 8}
    assert set(rb.stats()["mixture"]) == {"pour", "push"}
