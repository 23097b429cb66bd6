"""What a dataset can draw from: TorchRL's buffers, our parts in them, anything with the right method; and what not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loading import check_batch, indices, loading, overlap, same, take
from steps import LABEL, check_chunk, make_trajectory
from tensordict import TensorDict
from torchrl.data import (
    LazyTensorStorage,
    ListStorage,
    RandomSampler,
    ReplayBuffer,
    SliceSampler,
    SliceSamplerWithoutReplacement,
    TensorDictReplayBuffer,
)

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.datasets import OnlineDataset, UniformChunkSampler
from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay import ChunkSampler, TrajectoryStorage, TrajectoryWriter

LENGTHS = range(12, 32)


def double(data: TensorDict) -> TensorDict:
    return data.set("doubled", data["observation"] * 2)


def plain_buffer(**kwargs: Any) -> TensorDictReplayBuffer:
    """Our parts in TorchRL's own buffer."""
    settings = {"storage": TrajectoryStorage(40, 2000), "writer": TrajectoryWriter(), "sampler": ChunkSampler(8)}
    rb = TensorDictReplayBuffer(**{**settings, "batch_size": 4, **kwargs})
    for number, length in enumerate(LENGTHS):
        rb.extend(make_trajectory(number, length))
    return rb


def slice_buffer(cls: type[ReplayBuffer] = TensorDictReplayBuffer, **kwargs: Any) -> ReplayBuffer:
    """TorchRL's buffer of steps, and its sampler of slices."""
    kwargs.setdefault("sampler", SliceSampler(slice_len=8, end_key=("next", "done")))
    rb = cls(storage=LazyTensorStorage(1000), **kwargs)
    for number, length in enumerate(LENGTHS):
        rb.extend(make_trajectory(number, length))
    return rb


def check_slices(batch: TensorDict) -> TensorDict:
    """TorchRL sets done at the end of every slice, and its index is one of steps."""
    batch = batch.exclude("index")
    batch["next", "done"] = (batch[LABEL][..., 1] == batch[LABEL][..., 2] - 1).unsqueeze(-1)
    check_chunk(batch)
    return batch


class Steps:
    """A source of its own."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def sample_chunks(
        self, batch_size: int, chunk_size: int, *, generator: torch.Generator | None = None
    ) -> TensorDict:
        self.asked.append((batch_size, chunk_size))
        index = torch.randint(1000, (batch_size, chunk_size, 2), generator=generator)
        return TensorDict({"index": index}, [batch_size, chunk_size])


def test_anything_that_samples_chunks() -> None:
    source = Steps()
    take(OnlineDataset(source, 5, 3), 1)
    take(OnlineDataset(source, 6), 1)
    assert source.asked == [(3, 5), (1, 6)]
    assert same(take(OnlineDataset(source, 5, 3, seed=1), 3), take(OnlineDataset(source, 5, 3, seed=1), 3))


def test_our_parts_in_a_torchrl_buffer_and_any_chunk_size() -> None:
    rb = plain_buffer(transform=double)
    for batch in take(OnlineDataset(rb, UniformChunkSampler(2, 10), 3, seed=0), 4):
        assert torch.equal(check_batch(batch)["doubled"], batch["observation"] * 2)
    ours = TrajectoryReplayBuffer(storage=rb.storage, sampler=ChunkSampler(8))
    assert same(take(OnlineDataset(rb, 5, 3, seed=0), 4), take(OnlineDataset(ours, 5, 3, seed=0), 4))


@pytest.mark.parametrize("cls", [ReplayBuffer, TensorDictReplayBuffer])
def test_slices_of_a_torchrl_buffer(cls: type[ReplayBuffer]) -> None:
    rb = slice_buffer(cls)
    for batch in take(OnlineDataset(rb, 8, 3), 4):
        assert batch.shape == (3, 8)
        check_slices(batch)
    assert check_slices(next(iter(OnlineDataset(rb, 8)))).shape == (8,)


def test_slices_of_changing_length_where_their_number_is_fixed() -> None:
    rb = slice_buffer(sampler=SliceSampler(num_slices=3, end_key=("next", "done")))
    for batch in take(OnlineDataset(rb, UniformChunkSampler(2, 10), 3), 5):
        check_slices(batch)
        assert batch.shape[0] == 3


def test_a_seed_leaves_the_generator_of_a_torchrl_buffer_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    rb = slice_buffer(generator=generator)
    first, second = (take(OnlineDataset(rb, 8, 3, seed=2), 4) for _ in range(2))
    assert same(first, second)
    assert rb._rng is generator
    assert rb.sampler._rng is generator
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_draw_slices_of_streams_of_their_own(method: str) -> None:
    with loading(OnlineDataset(slice_buffer(), 8, 3, seed=2), 2, method) as loader:
        batches = take(loader, 6)
    for batch in batches:
        check_slices(batch)
    assert not overlap(batches[::2], batches[1::2])
    assert len(indices(batches)) == 6


# ------------------------------------------------------------------------------------------------------------- refused


def sampler(**kwargs: Any) -> SliceSampler:
    return SliceSampler(end_key=("next", "done"), **kwargs)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: None, "source=None and engine=None"),
        (lambda: [1, 2], "returns no chunks"),
        (lambda: Steps, "returns no chunks"),
        (lambda: ReplayBuffer(storage=ListStorage(10)), "RandomSampler, whose samples are single steps"),
        (lambda: plain_buffer(sampler=RandomSampler()), r"RandomSampler, which draws no chunks; .*ChunkSampler"),
        (
            lambda: TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=9, sampler=RandomSampler()),
            "draws no chunks",
        ),
        (lambda: slice_buffer(sampler=sampler(slice_len=5)), "chunk_size=8, but .* slice_len=5"),
        (lambda: slice_buffer(sampler=sampler(num_slices=5)), r"num_slices=5, but 3 chunk\(s\)"),
        (lambda: slice_buffer(sampler=sampler(slice_len=8, strict_length=False)), "shorter than requested"),
        (lambda: slice_buffer(sampler=sampler(slice_len=8, span=True)), "shorter than requested"),
        (
            lambda: slice_buffer(sampler=SliceSamplerWithoutReplacement(slice_len=8, end_key=("next", "done"))),
            "last batch may be smaller",
        ),
        (lambda: slice_buffer(prefetch=2, batch_size=24), "prefetch"),
    ],
)
def test_what_hands_out_no_such_chunks_is_refused_by_the_constructor(source: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        OnlineDataset(source(), 8, 3)


def test_slices_of_one_length_are_no_chunks_of_changing_length() -> None:
    with pytest.raises(InvalidArgumentError, match=r"chunk sizes that vary, but .* slice_len=8"):
        OnlineDataset(slice_buffer(), UniformChunkSampler(2, 10), 3)


def test_single_chunks_are_not_drawn_by_a_number_of_slices() -> None:
    with pytest.raises(InvalidArgumentError, match=r"num_slices=3, but 1 chunk\(s\)"):
        OnlineDataset(slice_buffer(sampler=sampler(num_slices=3)), 8)
