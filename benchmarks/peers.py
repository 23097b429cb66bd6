"""How long does `sample()` take, compared with trajectory buffers of other frameworks?

    pip install -e '.[examples,peers]'
    python benchmarks/peers.py
    python benchmarks/peers.py --quick --out outputs/peers.json

`TrajectoryReplayBuffer.sample()` and the jitted sample of Flashbax's trajectory buffer, in JAX on the CPU, alternate on
the same trajectories, each with all cores. Flashbax stores them as rows of equal length, in one process. Before the
measurement, the script checks that both return the same keys, shapes, dtypes and the values that were written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flashbax
import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from _harness import print_times, take_turns, write_report
from sampling import Case, assert_equal, make_trajectory
from tensordict import TensorDict, TensorDictBase

from embodichain_rl import TrajectoryReplayBuffer

OURS = "TrajectoryReplayBuffer"
FLASHBAX = "Flashbax"

CASES = (
    Case("states", 64, 300, 32, 64),
    Case("states", 4096, 300, 256, 64),
    Case("images", 16, 200, 16, 16),
)


@dataclass(frozen=True)
class Config:
    """Measure `sample()` against other frameworks."""

    quick: bool = False
    """A second each instead of eight."""
    out: Path | None = None
    """Path of the JSON file for the results."""


def as_tree(data: TensorDictBase) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in data.flatten_keys(".").items()}


def make_flashbax(case: Case, trajectories: list[TensorDict]) -> Callable[[], Any]:
    """Return a function that samples a batch, a dict of `[B, L, ...]`."""
    buffer = flashbax.make_trajectory_buffer(
        add_batch_size=case.trajectories,
        sample_batch_size=case.batch_size,
        sample_sequence_length=case.chunk_size,
        period=1,
        min_length_time_axis=case.chunk_size,
        max_length_time_axis=case.steps,
    )
    state = buffer.init(jax.tree.map(lambda values: jnp.asarray(values[0]), as_tree(trajectories[0])))
    rows = jax.tree.map(lambda *values: np.stack(values), *map(as_tree, trajectories))
    state = jax.jit(buffer.add, donate_argnums=0)(state, rows)
    sample, keys = jax.jit(buffer.sample), itertools.cycle(list(jax.random.split(jax.random.key(0), 4096)))
    return lambda: jax.block_until_ready(sample(state, next(keys)).experience)


def check_same(case: Case, chunks: TensorDictBase, batch: dict[str, Any], trajectories: list[TensorDict]) -> None:
    theirs = TensorDict({key: torch.from_numpy(np.asarray(value).copy()) for key, value in batch.items()})
    theirs.batch_size = [case.batch_size, case.chunk_size]
    for chunk in chunks:
        trajectory, start = chunk["index"][0].tolist()
        expected = trajectories[trajectory][start : start + case.chunk_size]
        assert_equal(chunk.exclude("index", "trajectory"), expected)
    for chunk in theirs:
        trajectory = trajectories[int(chunk["collector.traj_ids"][0])]
        same = (trajectory["observation"] == chunk["observation"][0]).all(-1)
        (start,) = same.nonzero().flatten().tolist()
        assert_equal(chunk, trajectory[start : start + case.chunk_size])


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    trajectories = [make_trajectory(case, number) for number in range(case.trajectories)]
    ours = TrajectoryReplayBuffer(
        max_trajectories=case.trajectories,
        max_total_steps=case.trajectories * case.steps,
        chunk_size=case.chunk_size,
        batch_size=case.batch_size,
    )
    for trajectory in trajectories:
        ours.extend(trajectory)
    theirs = make_flashbax(case, trajectories)
    check_same(case, ours.sample(), theirs(), trajectories)
    times = take_turns({OURS: ours.sample, FLASHBAX: theirs}, seconds=seconds)
    print_times(str(case), times)
    return [{"case": asdict(case), "contestant": name, **taken.as_dict()} for name, taken in times.items()]


def main(config: Config) -> None:
    jax.config.update("jax_enable_x64", True)
    seconds = 1.0 if config.quick else 8.0
    write_report(config.out, [result for case in CASES for result in measure(case, seconds)])


if __name__ == "__main__":
    main(tyro.cli(Config))
