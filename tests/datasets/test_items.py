"""Single items: drawn together, each as if it was drawn alone, and TensorDicts for whoever looks at them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from loading import check_batch, filled_buffer, iterating, loading
from steps import LABEL, check_chunk, make_trajectory
from tensordict import TensorDict, is_tensor_collection
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset

from embodichain_rl import ByGroup, ByPriority, ByRecency, ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.datasets import OnlineDataset, UniformChunkSampler
from embodichain_rl.datasets.items import Item
from embodichain_rl.datasets.streams import item_seed, item_seeds, stream_seeds
from embodichain_rl.errors import ChunkTooLongError
from embodichain_rl.replay.kernels import FIRST_NUMBERS, TWIN, kernels
from embodichain_rl.replay.sampling import RandomStreams

SEED = 7


def steps_with_segments(number: int, length: int) -> TensorDict:
    data = make_trajectory(number, length)
    data["segment_id"] = torch.arange(length) // 4
    return data


@pytest.fixture(scope="module")
def rb() -> TrajectoryReplayBuffer:
    rb = TrajectoryReplayBuffer(max_trajectories=40, max_total_steps=2000, chunk_size=8)
    for number in range(30):
        rb.extend(steps_with_segments(number, 6 + 7 * number % 23))
    return rb


OPTIONS: dict[str, dict[str, Any]] = {
    "chunks": {},
    "chunks that few trajectories have": {"chunk_size": 26},
    "within a segment": {"chunk_size": 4, "sampling_mode": "segment"},
    "with a change of segment": {"chunk_size": 4, "sampling_mode": "boundary"},
    "padded": {"pad": "both"},
    "padded within a segment": {"chunk_size": 4, "pad_before": 3, "pad_after": 3, "sampling_mode": "segment"},
    "windows": {
        "chunk_size": None,
        "windows": {"observation": (-1, 0), ("next", "observation"): (-3, 0), "action": (0, 5)},
        "pad": "both",
    },
    "strided": {"chunk_size": 4, "stride": 2},
    "in proportion to their chunks": {"weights": "steps"},
    "newer ones more often": {"weights": ByRecency(3.0)},
    "groups": {"chunk_size": 4, "weights": ByGroup(("robot", "mode"))},
    "by priority": {"weights": ByPriority()},
    "of a subset": {"subset": ("train", 0.3)},
    "young enough": {"max_age": 3600.0},
}


def equal(left: TensorDict, right: TensorDict) -> bool:
    keys = [*left.keys(True, True)]
    return keys == [*right.keys(True, True)] and all(torch.equal(left[key], right[key]) for key in keys)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_nth_item_is_the_one_that_its_seed_draws_alone(rb: TrajectoryReplayBuffer, name: str) -> None:
    options = {"chunk_size": 8, **OPTIONS[name]}
    length = options.pop("chunk_size")
    query = ChunkSampler(length, **options).query(length)
    stream, _ = stream_seeds(SEED, 0, 0, 0)
    generators = [torch.Generator().manual_seed(item_seed(stream, number)) for number in range(40)]
    alone = [rb.sample_chunks(1, query, generator=generator)[0] for generator in generators]
    batches = DataLoader(OnlineDataset(rb, length, seed=SEED, **options), batch_size=5)
    for number, batch in enumerate(islice(iter(batches), 8)):
        assert equal(batch, torch.stack(alone[5 * number : 5 * number + 5])), number


def test_an_item_of_a_mixture_does_not_depend_on_those_beside_it(rb: TrajectoryReplayBuffer) -> None:
    sources = [rb, filled_buffer()]
    first = [*islice(OnlineDataset(sources, 8, seed=SEED, weights=[1.0, 2.0], common_keys=True), 30)]
    loader = DataLoader(OnlineDataset(sources, 8, seed=SEED, weights=[1.0, 2.0], common_keys=True), batch_size=6)
    for number, batch in enumerate(islice(iter(loader), 5)):
        assert equal(batch, torch.stack(first[6 * number : 6 * number + 6]))
    assert {int(item["trajectory", "source"][0]) for item in first} == {0, 1}


def test_a_transform_of_items_draws_what_it_draws_alone(rb: TrajectoryReplayBuffer) -> None:
    from embodichain_rl.replay.sampling import current_generator

    def noisy(item: TensorDict) -> TensorDict:
        assert type(item) is TensorDict
        noise = torch.rand(2, generator=current_generator(None))
        return item.set("noise", noise.expand(len(item), 2))

    alone = [*islice(OnlineDataset(rb, 8, transform=noisy, seed=SEED), 12)]
    loader = DataLoader(OnlineDataset(rb, 8, transform=noisy, seed=SEED), batch_size=4)
    for number, batch in enumerate(islice(iter(loader), 3)):
        assert torch.equal(batch["noise"], torch.stack([item["noise"] for item in alone[4 * number : 4 * number + 4]]))
    flat = DataLoader(OnlineDataset(rb, 8, as_dict=True, seed=SEED), batch_size=4)
    for number, batch in enumerate(islice(iter(flat), 3)):
        assert torch.equal(batch["next.reward"][1], alone[4 * number + 1]["next", "reward"])


def test_first_numbers_are_those_of_generators_compiled_or_not() -> None:
    seeds = np.array([0, 1, 7, 2**31, 2**32 - 1, *range(100, 120)])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    expected = [torch.rand(FIRST_NUMBERS, dtype=torch.float64, generator=each).numpy() for each in generators]
    for every in (TWIN, kernels()):
        assert (every.first_numbers(seeds) == np.stack(expected)).all()
        assert every.first_numbers(seeds[:0]).shape == (0, FIRST_NUMBERS)


def test_random_streams_are_those_of_generators() -> None:
    seeds = item_seeds(2**63 + 12345, 2**32 - 3, 6)
    assert seeds.tolist() == [item_seed(2**63 + 12345, 2**32 - 3 + number) for number in range(6)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    expected = np.stack([torch.rand(40, dtype=torch.float64, generator=each).numpy() for each in generators])
    streams = RandomStreams(seeds)
    assert (streams.take(12).reshape(2, 6) == expected[:, :2].T).all()
    some = streams.part(np.array([4, 1]))
    assert (some.take(20).reshape(10, 2) == expected[[4, 1], 2:12].T).all(), "more than are computed at once"
    assert (streams.part(np.arange(6) == 4).take(1) == expected[4, 12]).all()
    assert (streams.take(6) == expected[range(6), [2, 12, 2, 2, 13, 2]]).all()
    assert torch.rand(1, dtype=torch.float64, generator=streams.generator(1)).item() == expected[1, 13]


# ------------------------------------------------------------------------------------------------- what an item is


def unread(rb: TrajectoryReplayBuffer, count: int = 4) -> list[Any]:
    """Return the items of one block, as a ``collate_fn`` gets them."""
    items: list[Any] = next(iter(DataLoader(OnlineDataset(rb, 8, seed=SEED), batch_size=count, collate_fn=list)))
    assert all(isinstance(item, TensorDict) for item in items)
    assert {type(item) for item in items} == {Item}, "somebody has looked at them"
    return items


def saved(item: Any) -> Any:
    file = io.BytesIO()
    torch.save(item, file)
    assert file.tell() < 3 * sum(value.nbytes for value in item.values(True, True)) + 8192, "the whole block is saved"
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_items_are_tensordicts(rb: TrajectoryReplayBuffer) -> None:
    alone = next(iter(OnlineDataset(rb, 8, seed=SEED)))
    copies = [
        lambda item: pickle.loads(pickle.dumps(item)),
        saved,
        copy.copy,
        copy.deepcopy,
        lambda item: item.clone(),
        lambda item: item.to("cpu"),
        lambda item: item.to(torch.device("cpu")),
        lambda item: item[:],
        lambda item: TensorDict(item.to_dict(), [8]),
        lambda item: torch.stack([item, item])[0],
        lambda item: torch.cat([item, item])[:8],
        lambda item: tree_map(torch.clone, item),
        lambda item: item.apply(torch.clone),
        lambda item: item.contiguous(),
        lambda item: item.view(8),
        lambda item: item.select(*item.keys(True, True)),
        lambda item: item.exclude("nothing"),
        lambda item: item.lock_().unlock_(),
        lambda item: item.unflatten_keys("."),
        lambda item: torch.where(torch.ones(8, dtype=torch.bool), item, item),
    ]
    for number, copied in enumerate(copies):
        found = copied(unread(rb)[0])
        assert equal(check_chunk(found), alone), number
        assert type(found) is TensorDict, number
    item = unread(rb)[0]
    assert len(item) == 8
    assert is_tensor_collection(item)
    assert item.batch_size == (8,)
    assert (item == alone).all()
    first, *others = unread(rb)
    assert first in [first, *others]
    assert first.shape == (8,)
    first, second = unread(rb, 2)
    first["new"] = torch.zeros(8)
    first["observation"].zero_()
    assert "new" in first
    assert second.get("new", None) is None
    assert equal(check_chunk(second), [*islice(OnlineDataset(rb, 8, seed=SEED), 2)][1])
    assert repr(unread(rb)[0]) == repr(alone)
    third = unread(rb)[2]
    third.batch_size = []
    assert third.shape == ()
    assert [key for key, _ in unread(rb)[3].items()] == [*alone.keys()]


class Remembering(IterableDataset[Any]):
    """A dataset of a user around ours, which keeps its items."""

    def __init__(self, dataset: OnlineDataset) -> None:
        self.dataset, self.kept = dataset, []

    def __iter__(self) -> Iterator[Any]:
        for item in self.dataset:
            self.kept.append(item)
            yield item


def test_changes_of_a_batch_do_not_show_in_items_that_are_kept(rb: TrajectoryReplayBuffer) -> None:
    alone = [*islice(OnlineDataset(rb, 8, seed=SEED), 12)]
    kept = Remembering(OnlineDataset(rb, 8, seed=SEED))
    for batch in islice(iter(DataLoader(kept, batch_size=4)), 3):
        batch["observation"].zero_()
    assert all(map(equal, kept.kept, alone))

    def collate(items: list[Any]) -> list[Any]:
        batch = OnlineDataset.collate_fn(items)
        batch["observation"].zero_()
        return [*items, OnlineDataset.collate_fn(items)]

    loader = DataLoader(OnlineDataset(rb, 8, seed=SEED), batch_size=4, collate_fn=collate)
    for number, (*items, again) in enumerate(islice(iter(loader), 3)):
        expected = alone[4 * number : 4 * number + 4]
        assert all(map(equal, items, expected))
        assert equal(again, torch.stack(expected))


@pytest.mark.parametrize("collate_fn", [None, OnlineDataset.collate_fn])
def test_batches_of_items_are_independent_of_each_other(rb: TrajectoryReplayBuffer, collate_fn: Any) -> None:
    alone = [*islice(OnlineDataset(rb, 8, seed=SEED), 40)]
    batches = []
    for batch in islice(iter(DataLoader(OnlineDataset(rb, 8, seed=SEED), batch_size=4, collate_fn=collate_fn)), 10):
        batches.append(batch.clone())
        batch["observation"].zero_()
    assert all(equal(batch, torch.stack(alone[4 * n : 4 * n + 4])) for n, batch in enumerate(batches))


def test_a_loop_that_collates_by_itself_gets_the_same(rb: TrajectoryReplayBuffer) -> None:
    alone = [*islice(OnlineDataset(rb, 8, seed=SEED), 40)]
    items = iter(OnlineDataset(rb, 8, seed=SEED))
    for begin in range(0, 36, 6):
        taken = [next(items) for _ in range(6)]
        picked = [taken[number] for number in (4, 1, 2)]
        assert equal(OnlineDataset.collate_fn(picked), torch.stack([alone[begin + number] for number in (4, 1, 2)]))
        assert equal(OnlineDataset.collate_fn(taken), torch.stack(alone[begin : begin + 6]))
    mixed = [next(items), unread(rb)[0]]
    assert equal(OnlineDataset.collate_fn(mixed), torch.stack([alone[36], alone[0]]))


# -------------------------------------------------------------------------------------- states, passes, lengths, errors


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": SEED},
        {"seed": SEED, "weights": "steps"},
        {"replacement": False},
        {"replacement": False, "passes": 2},
    ],
)
def test_a_state_inside_of_a_block_goes_on_exactly(rb: TrajectoryReplayBuffer, options: dict[str, Any]) -> None:
    dataset = OnlineDataset(rb, 8, **options)
    items = iter(dataset)
    for _ in range(2):
        OnlineDataset.collate_fn([next(items) for _ in range(6)])
    for _ in range(2):
        next(items)
    state = copy.deepcopy(dataset.state_dict())
    following = [next(items) for _ in range(10)]
    assert state["position"] == 14
    resumed = OnlineDataset(rb, 8, **options)
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
    again = [*islice(resumed, 10)]
    assert all(map(equal, again, following))


def test_each_chunk_comes_once_a_pass(rb: TrajectoryReplayBuffer) -> None:
    lengths = rb.trajectory_lengths(range(30))
    chunks = int((lengths - 7).clamp(min=0).sum())
    for workers in (0, 2):
        dataset = OnlineDataset(rb, 8, replacement=False, passes=2, seed=SEED)
        with loading(dataset, workers, batch_size=7) as loader:
            seen = torch.cat([check_batch(batch)["index"][:, 0].clone() for batch in loader])
        assert len(seen) == 2 * chunks
        assert len(seen[:chunks].unique(dim=0)) == chunks
        assert len(seen.unique(dim=0)) == chunks


def test_lengths_are_asked_for_once_a_batch(rb: TrajectoryReplayBuffer) -> None:
    calls = iter([8, 5, 100, 7, 3])
    batches = iter(DataLoader(OnlineDataset(rb, lambda: next(calls)), batch_size=4))
    assert [next(batches).shape for _ in range(2)] == [(4, 8), (4, 5)]
    with pytest.raises(ChunkTooLongError):
        next(batches)
    assert [next(batches).shape for _ in range(2)] == [(4, 7), (4, 3)]


def test_a_buffer_that_transforms_what_it_samples_does_so_chunk_by_chunk() -> None:
    rb = filled_buffer(transform=lambda data: data.set("chunks", torch.full((*data.shape,), len(data))))
    batch = next(iter(DataLoader(OnlineDataset(rb, 8), batch_size=4)))
    assert (batch["chunks"] == 1).all()


def test_items_of_workers_are_whole_while_others_write() -> None:
    rb = filled_buffer(max_trajectories=4, max_total_steps=120)
    with iterating(OnlineDataset(rb, UniformChunkSampler(2, 12)), 1, batch_size=16) as batches:
        newest = number = 0
        for _ in range(2000):
            for _ in range(3):
                number += 1
                rb.extend(make_trajectory(1000 + number, 12 + number % 9))
            newest = max(newest, int(check_batch(next(batches))[LABEL][..., 0].max()))
            if newest > 1100:
                break
        assert newest > 1100


def test_compiled_code_takes_items(rb: TrajectoryReplayBuffer) -> None:
    @torch.compile(backend="eager")
    def doubled(item: TensorDict) -> torch.Tensor:
        return item["observation"] * 2

    alone = [*islice(OnlineDataset(rb, 8, seed=SEED), 2)]
    for item, other in zip(OnlineDataset(rb, 8, seed=SEED), alone, strict=False):
        assert torch.equal(doubled(item), other["observation"] * 2)
