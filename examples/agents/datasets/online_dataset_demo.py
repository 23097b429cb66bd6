"""All ways to sample chunks from a live simulator with `OnlineDataset` and PyTorch's `DataLoader`.

    worker 0: MuJoCo ──┐
                       ├── OnlineDataEngine (shared memory) ── OnlineDataset ── DataLoader ── this process
    worker 1: MuJoCo ──┘

The robot demonstrates a task: its environment (reach_expert.py) plans how to reach a goal. The engine streams these
demonstrations, as it does where no policy is given. The workers replace episodes as fast as they are sampled. One
engine serves four datasets in sequence:

* items `[L]`, which the `DataLoader` collates into batches;
* whole batches `[B, L]`, sampled at once, which is many times faster;
* batches whose chunk size is drawn uniformly for each batch;
* batches whose chunk size is drawn from a mixture of Gaussians.

    python examples/agents/datasets/online_dataset_demo.py
    python examples/agents/datasets/online_dataset_demo.py --env HalfCheetah-v5 --num-loader-workers 2
    python examples/agents/datasets/online_dataset_demo.py --help
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import tyro
from torch.utils.data import DataLoader

from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.datasets.sampler import GMMChunkSampler, UniformChunkSampler
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg


@dataclass(frozen=True)
class Config:
    """Sample chunks from a live simulator in item mode, in batch mode and with varying sizes."""

    env: str = "reach_expert:ReachExpert-v0"
    """The id of any installed Gymnasium environment. One that offers no demonstrations gets random actions."""
    episode_steps: int = 50
    """Maximum steps of an episode."""
    num_workers: int = 2
    """Number of processes that step environments."""
    buffer_size: int = 32
    """Number of episodes that the buffer keeps, the newest ones."""
    chunk_size: int = 16
    """Steps of a chunk, if the size does not vary."""
    batch_size: int = 32
    """Chunks per batch."""
    num_loader_workers: int = 0
    """Number of processes that sample batches; 0 samples in this process."""
    seconds: float = 3.0
    """How long each dataset is sampled."""
    seed: int = 0
    """Seed of the environments and of the sampling."""


def make_loaders(config: Config, engine: OnlineDataEngine) -> Iterator[tuple[str, DataLoader]]:
    """Return the name and the loader of each way."""
    L, B, seed, workers = config.chunk_size, config.batch_size, config.seed, config.num_loader_workers
    method = "forkserver" if workers else None

    items = OnlineDataset(engine, chunk_size=L, seed=seed)
    yield f"items [{L}]", DataLoader(items, batch_size=B, num_workers=workers, multiprocessing_context=method)

    sizes = {
        f"batches [{B}, {L}]": L,
        f"batches [{B}, {L // 2} to {2 * L}]": UniformChunkSampler(L // 2, 2 * L),
        f"batches [{B}, about {L // 2} or {2 * L}]": GMMChunkSampler([L // 2, 2 * L], [1, 2], low=1, high=3 * L),
    }
    for name, chunk_size in sizes.items():
        batches = OnlineDataset(engine, chunk_size=chunk_size, batch_size=B, seed=seed)
        yield name, DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context=method)


def draw(loader: DataLoader, seconds: float) -> tuple[Counter[tuple[int, ...]], float]:
    """Return how often each shape occurred, and the duration, from the first batch on."""
    batches = iter(loader)
    shapes = Counter([tuple(next(batches).shape)])
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        shapes[tuple(next(batches).shape)] += 1
    return shapes, time.monotonic() - began


def report(name: str, shapes: Counter[tuple[int, ...]], seconds: float) -> str:
    batches = shapes.total() - 1
    steps = sum(count * shape[0] * shape[1] for shape, count in shapes.items())
    lengths = sorted(shape[1] for shape in shapes)
    example = list(next(iter(shapes)))
    spread = f"L = {lengths[0]}" if len(lengths) == 1 else f"L = {lengths[0]} to {lengths[-1]}"
    rates = f"{batches / seconds:>8,.0f} batches/s {steps / seconds:>12,.0f} steps/s"
    return f"  {name:<28} {example!s:<10} {spread:<14} {rates}"


def describe(engine: OnlineDataEngine) -> str:
    """Return what the robot does in the stored episodes."""
    episodes = engine.shared_buffer
    if "segment_id" not in episodes:
        return f"The buffer holds {len(episodes)} episodes of random actions."
    mask = episodes["collector", "mask"]
    names = engine.texts.resolve(episodes["segment_name"])
    parts = " and ".join(f"{name!r} for {count} steps" for name, count in Counter(names[0][: mask[0].sum()]).items())
    text = f"The buffer holds {len(episodes)} demonstrations. In the oldest one, the robot does {parts}"
    if ("next", "success") in episodes.keys(True):
        last = mask.sum(-1) - 1
        done = episodes["next", "success"][torch.arange(len(episodes)), last].float().mean()
        text += f"; {done:.0%} end with the task done"
    return f"{text}."


def main(config: Config) -> None:
    cfg = OnlineDataEngineCfg(
        buffer_size=config.buffer_size,
        max_episode_steps=config.episode_steps,
        gym_config={"id": config.env},
        num_workers=config.num_workers,
        seed=config.seed,
    )
    with OnlineDataEngine(cfg) as engine:
        batch = engine.sample_batch(config.batch_size, config.chunk_size)
        print(f"One batch of {config.env}, {list(batch.shape)}:")
        for key, value in sorted(batch.flatten_keys(".").items()):
            print(f"  {key:<28} {list(value.shape)!s:<16} {value.dtype}")
        print(f"\n{describe(engine)}")
        print(f"\nDrawn for {config.seconds:g} s each, while {config.num_workers} workers go on:")
        for name, loader in make_loaders(config, engine):
            print(report(name, *draw(loader, config.seconds)), flush=True)
        stats = engine.stats()
        print(
            f"\n{stats['inserted']:,} episodes written, {stats['inserts_per_second']:.1f} a second; "
            f"{stats['samples']:,} chunks drawn; the data is {stats['age_mean']:.1f} s old on average."
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.")
