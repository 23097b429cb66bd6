"""Which gather is the fastest on a CUDA device, and how much does a CUDA graph speed up a training step?

    python benchmarks/cuda_gathers.py
    python benchmarks/cuda_gathers.py --quick --out outputs/cuda_gathers.json

The same chunks of all columns of an arena are gathered: by one `index_select` per shape and dtype, as in the buffer; by
one per key; by advanced indexing, eager and compiled by `torch.compile`; and by one Triton kernel over all columns, if
Triton is installed. The reference is one copy of as many bytes within the device. The script asserts that all results
are equal.

Then it measures a training step of a small network, each after a `sample()`: eager, and captured in a CUDA graph that
is replayed on a copy of the batch.

If torch finds no CUDA device, the script says so and exits with 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from _harness import print_table, write_report
from on_cuda import COPY, LARGE, OURS, make_buffer, reported, take_turns
from sampling import CASES, TYPICAL, Case, make_trajectory
from tensordict import TensorDict
from torchrl.modules import MLP

from embodichain_rl import TrajectoryReplayBuffer

Gather = Callable[[torch.Tensor], list[torch.Tensor]]
"""From the first step of each chunk, ``int64`` ``[B]``, to ``[B, L, *shape]`` for each column."""

BY_KIND = "index_select, a shape and dtype at a time"
BY_KEY, BY_INDEX, COMPILED = "index_select, a key at a time", "advanced indexing", "advanced indexing, compiled"
TRITON = "one Triton kernel"


@dataclass(frozen=True)
class Config:
    """Compare gathers on a CUDA device."""

    quick: bool = False
    """Two shapes and a second each, instead of all."""
    seconds: float = 5.0
    """Duration of each comparison."""
    out: Path | None = None
    """Path of the JSON file for the results."""


def gather_by_key(columns: Sequence[torch.Tensor], length: int) -> Gather:
    rows = []
    for column in columns:
        flat = column.reshape(len(column), -1)
        width = flat.shape[1]
        rows.append(flat.as_strided((len(column) - length + 1, length * width), (width, 1)))

    def gather(starts: torch.Tensor) -> list[torch.Tensor]:
        return [
            torch.index_select(chunks, 0, starts).view(len(starts), length, *column.shape[1:])
            for chunks, column in zip(rows, columns, strict=True)
        ]

    return gather


def gather_by_index(columns: Sequence[torch.Tensor], length: int) -> Gather:
    steps = torch.arange(length, device=columns[0].device)

    def gather(starts: torch.Tensor) -> list[torch.Tensor]:
        at = starts[:, None] + steps
        return [column[at] for column in columns]

    return gather


def gathers_of(columns: Sequence[torch.Tensor], length: int) -> dict[str, Gather]:
    gathers = {
        BY_KEY: gather_by_key(columns, length),
        BY_INDEX: gather_by_index(columns, length),
        COMPILED: torch.compile(gather_by_index(columns, length), dynamic=False),
    }
    try:
        from _triton_gather import TritonGather
    except ImportError as error:
        print(f"{TRITON} is left out: {error}")
    else:
        gathers[TRITON] = TritonGather(columns, length)
    return gathers


def filled(case: Case) -> TrajectoryReplayBuffer:
    rb = make_buffer(case)
    for number in range(case.trajectories):
        rb.extend(make_trajectory(case, number % 64))
    rb.storage.flush()
    return rb


def assert_same(expected: Sequence[torch.Tensor], chunks: Sequence[torch.Tensor], name: str) -> None:
    for mine, other in zip(expected, chunks, strict=True):
        assert torch.equal(mine, other), f"{name} returns other chunks"


def measure_gathers(case: Case, seconds: float) -> list[dict[str, Any]]:
    rb = filled(case)
    arena = rb.storage.arena
    rng = np.random.default_rng(0)
    last = len(arena.columns[0]) - case.chunk_size

    def places() -> np.ndarray:
        return rng.integers(last, size=case.batch_size)

    gathers = gathers_of(arena.columns, case.chunk_size)
    at = places()
    expected = arena.copy_chunks(at, case.chunk_size)
    for name, gather in gathers.items():
        assert_same(expected, gather(arena.tensor(at)), name)
    nbytes = sum(chunks.nbytes for chunks in expected)
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=expected[0].device) for _ in range(2))
    contestants: dict[str, Callable[[], object]] = {
        OURS: rb.sample,
        BY_KIND: lambda: arena.copy_chunks(places(), case.chunk_size),
    }
    for name, gather in gathers.items():
        contestants[name] = lambda gather=gather: gather(arena.tensor(places()))
    contestants[COPY] = lambda: target.copy_(source)
    return reported("gathers", case, nbytes, take_turns(contestants, seconds))


class Learner:
    """A small network that learns to predict the stored action. Its step can be captured."""

    def __init__(self, batch: TensorDict) -> None:
        self.batch = batch.select("observation", "action").clone()
        features, actions = (self.batch[key].shape[-1] for key in ("observation", "action"))
        device = self.batch["action"].device
        self.net = MLP(in_features=features, out_features=actions, num_cells=[256, 256], device=device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3, capturable=device.type == "cuda")
        self.loss = torch.zeros((), device=device)

    def take(self, batch: TensorDict) -> None:
        """Copy a batch to the memory that a captured step reads."""
        for key in ("observation", "action"):
            self.batch[key].copy_(batch[key], non_blocking=True)

    def step(self) -> None:
        """Learn from the copied batch."""
        self.optimizer.zero_grad(set_to_none=False)
        loss = (self.net(self.batch["observation"]) - self.batch["action"]).square().mean()
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())


def captured(learner: Learner) -> Callable[[], None]:
    """Return a function that replays the learner's step. See https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # memory that the first steps allocate must exist before the capture
            learner.step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the buffer's uploading thread uses CUDA, too
        learner.step()
    return graph.replay


def measure_steps(case: Case, seconds: float) -> list[dict[str, Any]]:
    rb = filled(case)
    eager, graphed = Learner(rb.sample()), Learner(rb.sample())
    replay = captured(graphed)

    def step(learner: Learner, learn: Callable[[], None]) -> None:
        learner.take(rb.sample())
        learn()

    taken = take_turns(
        {
            "sample(), and a step": lambda: step(eager, eager.step),
            "sample(), and a step in a graph": lambda: step(graphed, replay),
            "sample()": rb.sample,
        },
        seconds,
    )
    losses = [float(learner.loss) for learner in (eager, graphed)]
    print_table(
        f"{case}: training; losses at the end {losses[0]:.4f} and {losses[1]:.4f}",
        ("", "ms", "ms of the host"),
        [(name, f"{1e3 * times.whole:.3f}", f"{1e3 * times.host:.3f}") for name, times in taken.items()],
    )
    return [
        {"part": "training", "case": asdict(case), "contestant": name, **asdict(times)} for name, times in taken.items()
    ]


def main(config: Config) -> None:
    if not torch.cuda.is_available():
        sys.exit(
            f"Nothing is measured: this torch {torch.__version__} sees no CUDA device. Run it on a machine with one, "
            "with a torch for CUDA (nvidia-smi shows the devices)."
        )
    print(torch.cuda.get_device_name())
    seconds = 1.0 if config.quick else config.seconds
    cases = TYPICAL if config.quick else (*CASES, *LARGE)
    results = [result for case in cases for result in measure_gathers(case, seconds)]
    write_report(config.out, results + measure_steps(TYPICAL[0], seconds))


if __name__ == "__main__":
    main(tyro.cli(Config))
