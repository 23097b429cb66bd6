"""Functions under ``torch.compile`` call the buffer between two graphs, and see what it holds at that moment."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from steps import make_buffer, make_plain_buffer, small
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader
from torchrl.data import RandomSampler

from embodichain_rl import (
    ByPriority,
    ChunkSampler,
    OnlineDataEngine,
    OnlineDataEngineCfg,
    OnlineDataset,
    RateLimiter,
    TrajectoryReplayBuffer,
)
from embodichain_rl.errors import EmptyBufferError
from embodichain_rl.transforms import FlatChunks


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def filled(make: Callable[..., Any] = make_buffer, **kwargs: Any) -> Any:
    """A buffer whose trajectory ``n`` has the observation ``n`` at every step."""
    parts = {} if make is make_plain_buffer else {"max_trajectories": 50, "max_total_steps": 1000}
    rb = make(**parts, **kwargs)
    for number in range(4):
        rb.extend(numbered(number))
    return rb


def numbered(number: int, length: int = 5) -> Any:
    data = small(number, length)
    data["observation"] = torch.full((length, 3), float(number))
    return data


def loss_of(net: torch.nn.Module, batch: Any) -> torch.Tensor:
    return (net(batch["observation"]).squeeze(-1) - batch["label"][..., 0]).square().mean()


def windowed() -> TrajectoryReplayBuffer:
    return filled(sampler=ChunkSampler(windows={"observation": (0, 1), "label": (0, 1)}, pad="both"))


def dataset() -> OnlineDataset:
    return OnlineDataset(filled(), 3, 8)


WAYS_TO_SAMPLE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "sample": (filled, lambda rb: rb.sample()),
    "another batch size": (lambda: filled(batch_size=None), lambda rb: rb.sample(5)),
    "sample_chunks": (filled, lambda rb: rb.sample_chunks(4, 2)),
    "prefetch": (lambda: filled(prefetch=2), lambda rb: rb.sample()),
    "a transform": (lambda: filled(transform=FlatChunks()), lambda rb: rb.sample()),
    "whole trajectories": (lambda: filled(sampler=RandomSampler()), lambda rb: rb.sample()),
    "windows": (windowed, lambda rb: rb.sample()),
    "next": (filled, lambda rb: rb.next()),
    "a plain TorchRL buffer": (lambda: filled(make_plain_buffer), lambda rb: rb.sample()),
    "a dataset": (lambda: iter(dataset()), next),
    "a loader": (lambda: iter(DataLoader(dataset(), batch_size=None)), next),
    "one item": (filled, lambda rb: rb[-1]),
    "a query": (filled, lambda rb: rb.query()[0].data),
}


@pytest.mark.parametrize("way", WAYS_TO_SAMPLE)
def test_a_training_step_that_samples_inside(way: str) -> None:
    make, draw = WAYS_TO_SAMPLE[way]
    source = make()
    net = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    backend = CompileCounterWithBackend("eager")

    @torch.compile(backend=backend)
    def train() -> torch.Tensor:
        loss = loss_of(net, draw(source))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    losses = [train().item() for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert backend.frame_count > 0, "nothing was compiled"


def episodes() -> Iterator[Any]:
    for number in itertools.count():
        yield numbered(number)


def test_a_training_step_that_samples_an_engine_inside() -> None:
    cfg = OnlineDataEngineCfg(buffer_size=4, max_episode_steps=5, producers=[episodes()], progress_bar=False)
    net = torch.nn.Linear(3, 1)
    with OnlineDataEngine(cfg) as engine:

        @torch.compile(backend="eager")
        def train() -> torch.Tensor:
            return loss_of(net, engine.sample_batch(4, 3))

        assert all(train().isfinite() for _ in range(5))


def test_a_loop_over_batches_inside() -> None:
    rb, net = filled(), torch.nn.Linear(3, 1)

    @torch.compile(backend="eager")
    def train() -> torch.Tensor:
        total = torch.zeros(())
        for number, batch in enumerate(rb):
            total = total + loss_of(net, batch)
            if number == 2:
                break
        return total

    assert train().isfinite()
    assert train().isfinite()


@pytest.mark.parametrize("make", [make_buffer, make_plain_buffer])
def test_a_step_that_writes_and_samples_sees_what_was_written(make: Callable[..., Any]) -> None:
    rb = filled(make)
    trajectories = [numbered(number) for number in range(10, 14)]

    @torch.compile(backend="eager")
    def collect(data: Any) -> torch.Tensor:
        rb.extend(data)
        newest = rb[-1]["observation"].mean()
        return newest + 2 * rb.sample()["observation"].mean() * 0

    assert [collect(data).item() for data in trajectories] == [10.0, 11.0, 12.0, 13.0]


@pytest.mark.parametrize("make", [make_buffer, make_plain_buffer])
def test_single_steps_are_added_inside(make: Callable[..., Any]) -> None:
    rb = filled(make)

    @torch.compile(backend="eager")
    def add(step: Any, scale: torch.Tensor) -> torch.Tensor:
        return rb.add(step) * scale

    steps = [numbered(20)[number] for number in range(5)]
    assert [add(step, torch.ones(())).item() for step in steps] == [-1, -1, -1, -1, 4]
    assert (rb[-1]["observation"] == 20).all()


COUNTS: dict[str, Callable[[TrajectoryReplayBuffer], Any]] = {
    "len": len,
    "the storage's len": lambda rb: len(rb.storage),
    "num_steps": lambda rb: rb.storage.num_steps // 5,
    "write_count": lambda rb: rb.write_count // 5,
    "stats": lambda rb: rb.stats()["trajectories"],
}


@pytest.mark.parametrize("count", COUNTS)
def test_counts_are_those_of_the_moment(count: str) -> None:
    rb, read = filled(), COUNTS[count]

    @torch.compile(backend="eager")
    def scaled(by: torch.Tensor) -> torch.Tensor:
        return by * read(rb)

    counted = []
    for number in range(4):
        counted.append(scaled(torch.full((), 10.0)).item())
        rb.extend(numbered(number))
    assert counted == [40.0, 50.0, 60.0, 70.0]


def test_priorities_are_set_inside() -> None:
    rb = filled(sampler=ChunkSampler(3, weights=ByPriority(alpha=1.0, eps=1e-200)), batch_size=64)
    net = torch.nn.Linear(3, 1)

    @torch.compile(backend="eager")
    def train() -> torch.Tensor:
        batch = rb.sample()
        loss = loss_of(net, batch)
        batch["td_error"] = (batch["label"][..., 0] == 3).float()
        rb.update_tensordict_priority(batch)
        return loss

    train()
    assert (rb.sample()["label"][..., 0] == 3).all()


def test_pacing_inside() -> None:
    rb, limiter = filled(), RateLimiter(4.0)

    @torch.compile(backend="eager")
    def train(data: Any) -> torch.Tensor:
        if limiter.wait_to_insert(0.0):
            rb.extend(data)
            limiter.count_insert()
        limiter.wait_to_sample(2, timeout=10.0)
        batch = rb.sample_chunks(2, 3)
        limiter.count_sample(2)
        return batch["observation"].mean()

    for number in range(3):
        assert train(numbered(number)).isfinite()
    assert (limiter.stats()["inserts"], limiter.stats()["samples"]) == (3, 6)


def test_an_emptied_buffer_is_empty_inside() -> None:
    rb = filled()

    @torch.compile(backend="eager")
    def emptied(by: torch.Tensor) -> torch.Tensor:
        rb.empty()
        return by * len(rb)

    assert emptied(torch.ones(())).item() == 0


def test_errors_come_out_as_they_are() -> None:
    rb = make_buffer()
    net = torch.nn.Linear(3, 1)
    train = torch.compile(lambda: loss_of(net, rb.sample()), backend="eager")
    with pytest.raises(EmptyBufferError, match="Cannot sample from an empty storage"):
        train()
    rb.extend(numbered(1))
    assert train().isfinite()


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_what_comes_after_the_sample_is_one_graph(backend: str) -> None:
    rb, net = filled(), torch.nn.Linear(3, 1)
    counter = CompileCounterWithBackend(backend)
    compute = torch.compile(lambda batch: loss_of(net, batch), backend=counter, fullgraph=True)
    for _ in range(5):
        compute(rb.sample()).backward()
    assert counter.frame_count == 1


FORBIDDEN: dict[str, Callable[[TrajectoryReplayBuffer, Any], Any]] = {
    "TrajectoryReplayBuffer.sample": lambda rb, data: rb.sample(),
    "TrajectoryReplayBuffer.sample_chunks": lambda rb, data: rb.sample_chunks(4, 2),
    "TrajectoryReplayBuffer.extend": lambda rb, data: rb.extend(data),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_with_fullgraph_the_error_names_the_call_and_what_to_do(name: str) -> None:
    rb, data, call = filled(), numbered(1), FORBIDDEN[name]

    @torch.compile(backend="eager", fullgraph=True)
    def train(by: torch.Tensor) -> torch.Tensor:
        call(rb, data)
        return by * 2

    with pytest.raises(torch._dynamo.exc.Unsupported) as refused:
        train(torch.ones(()))
    for part in (name, "memory that processes share", "fullgraph=False"):
        assert part in str(refused.value)
