"""How is the time of one `sample()` and one `extend()` distributed over the functions that they call?

    python benchmarks/profile_calls.py
    python benchmarks/profile_calls.py --quick --out outputs/profile_calls.json

The functions of a call are instrumented. The time of each excludes the other instrumented functions that it calls. The
overhead of the clock is measured and subtracted. "all of it" is the time of the call without instrumentation.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from _harness import print_table, write_report
from sampling import TYPICAL, Case, make_trajectory

from embodichain_rl import TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter
from embodichain_rl.replay.batches import DrawingBuffer
from embodichain_rl.replay.host.arena import Arena
from embodichain_rl.replay.host.chunk_batches import ChunkBatches
from embodichain_rl.replay.kernels import PlainChunks
from embodichain_rl.replay.ledger.ledger import Ledger
from embodichain_rl.replay.ledger.space import LedgerSpace
from embodichain_rl.replay.sampling import drawer, one_call
from embodichain_rl.replay.sampling.drawer import ChunkDrawer
from embodichain_rl.replay.schema.schema import Schema
from embodichain_rl.replay.writing import writer
from embodichain_rl.shared.lock import CrossProcessLock

Function = tuple[Any, str]
"""A function, as the class or module that contains it, and its name there."""

PARTS_OF_SAMPLE: dict[str, tuple[Function, ...]] = {
    "the call, its checks, the loop": (
        (DrawingBuffer, "sample"),
        (ChunkDrawer, "sample_chunks"),
        (drawer, "sample_in_one_call"),
    ),
    "random numbers": ((one_call, "uniform_tensor"),),
    "memory of the batch, its tensors": ((ChunkBatches, "output"),),
    "draw, look up, copy, index, check": ((ChunkBatches, "sample"),),
    "build the TensorDict": ((ChunkBatches, "finish"),),
}

PARTS_OF_LARGE_SAMPLE: dict[str, tuple[Function, ...]] = {
    **PARTS_OF_SAMPLE,
    "draw, look up, copy, index, check": ((ChunkBatches, "sample"), (ChunkBatches, "copy")),
}
"""The same for batches of a megabyte and more, whose memory is taken after the draw."""

PARTS_OF_EXTEND: dict[str, tuple[Function, ...]] = {
    "the call, its checks, the index": ((TrajectoryReplayBuffer, "extend"), (TrajectoryWriter, "extend")),
    "take the TensorDict apart": ((writer, "leaves_of"),),
    "check keys, shapes and dtypes": ((Schema, "in_order"),),
    "tensors to arrays": ((TrajectoryWriter, "_rows_of"),),
    "where trajectories end": ((TrajectoryWriter, "_cut"),),
    "write one": ((TrajectoryWriter, "_write"), (TrajectoryStorage, "write")),
    "find room": ((Ledger, "reserve"), (LedgerSpace, "_open_gap")),
    "take and release the lock, twice": ((CrossProcessLock, "__enter__"), (CrossProcessLock, "__exit__")),
    "copy the steps": ((Arena, "write"),),
    "publish": ((Ledger, "publish"),),
}


@dataclass(frozen=True)
class Config:
    """Show the distribution of the time of a call."""

    quick: bool = False
    """A tenth of the calls."""
    out: Path | None = None
    """Path of the JSON file for the results."""


class Clock:
    """A clock that measures functions, each without the instrumented functions that it calls.

    Args:
        of_own: overhead of the clock inside the measured time of a function, in nanoseconds.
        of_caller: further overhead of the clock in the time of the caller, in nanoseconds.
    """

    def __init__(self, of_own: float = 0.0, of_caller: float = 0.0) -> None:
        self.own: dict[Function, list[float]] = {}
        """The times of all calls of a function, in nanoseconds."""
        self._of_own, self._of_caller = of_own, of_caller
        self._inner = [0.0]

    @contextmanager
    def inside(self, owner: Any, name: str) -> Iterator[None]:
        """Instrument ``owner.name`` within the block."""
        original = owner.__dict__[name]
        function = original.__func__ if isinstance(original, staticmethod) else original
        own, inner = self.own.setdefault((owner, name), []), self._inner
        of_own, of_caller = self._of_own, self._of_caller

        def measured(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            begin = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter_ns() - begin
                own.append(taken - of_own - inner.pop())
                inner[-1] += taken + of_caller

        setattr(owner, name, staticmethod(measured) if isinstance(original, staticmethod) else measured)
        try:
            yield
        finally:
            setattr(owner, name, original)


class _Nothing:
    def call(self) -> None:
        """Do nothing, to measure the overhead of the clock."""


def cost_of_clock() -> tuple[float, float]:
    """Return the overhead of an instrumented call, in nanoseconds: in its own time, and in that of its caller."""
    nothing, calls = _Nothing(), 20_000

    def outer(times: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(times):
            nothing.call()
        return (time.perf_counter_ns() - begin) / times

    plain = min(outer(calls) for _ in range(5))
    clock = Clock()
    with clock.inside(_Nothing, "call"):
        whole = min(outer(calls) for _ in range(5))
    own = float(np.median(clock.own[_Nothing, "call"]))
    return own, max(0.0, whole - plain - own)


def median_us(call: Callable[[], object], calls: int) -> float:
    taken = []
    for _ in range(calls):
        begin = time.perf_counter_ns()
        result = call()
        taken.append(time.perf_counter_ns() - begin)
        del result
    return float(np.median(taken)) / 1e3


def own_us(taken: list[float], calls: int) -> float:
    """Return the microseconds of a function per call of the whole, from the median of its times."""
    return float(np.median(taken)) * len(taken) / calls / 1e3 if taken else 0.0


def profile(
    title: str, call: Callable[[], object], parts: dict[str, tuple[Function, ...]], calls: int
) -> dict[str, Any]:
    whole = median_us(call, calls)
    clock = Clock(*cost_of_clock())
    with ExitStack() as stack:
        for owner, name in itertools.chain(*parts.values()):
            stack.enter_context(clock.inside(owner, name))
        for _ in range(calls):
            call()
    own = {part: sum(own_us(clock.own[function], calls) for function in functions) for part, functions in parts.items()}
    print_table(
        title,
        ("", "us", "part"),
        [
            *((part, f"{us:.1f}", f"{us / sum(own.values()):.0%}") for part, us in own.items()),
            ("sum", f"{sum(own.values()):.1f}", ""),
            ("all of it", f"{whole:.1f}", ""),
        ],
    )
    return {"what": title, "us": own, "all_us": whole}


def profile_kernels(title: str, buffer: TrajectoryReplayBuffer, calls: int) -> dict[str, Any]:
    """Measure the parts of the one call of the kernels, each called by itself."""
    size, length = buffer._batch_size, buffer.sampler.chunk_size
    batches = buffer.storage.chunk_batches(PlainChunks(size, length, 0, 1 - length))
    assert batches is not None, "plain chunks in memory of the CPU"
    kernels, plan = batches._kernels, batches._plan
    draws, output = batches.draws(), batches.output()
    names = ("draw and look up", "copy", "index", "check")
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(calls):
        numbers = torch.rand(size, dtype=torch.float64)
        steps: tuple[Callable[[], object], ...] = (
            functools.partial(kernels.draw, plan, numbers.data_ptr(), 0, draws),
            functools.partial(kernels.gather, plan, draws, output.base, output.targets, 1),
            functools.partial(kernels.write_index, plan, draws, output.base, output.targets),
            functools.partial(kernels.check, plan, draws),
        )
        for name, step in zip(names, steps, strict=True):
            begin = time.perf_counter_ns()
            step()
            taken[name].append(time.perf_counter_ns() - begin)
    own = {name: float(np.median(times)) / 1e3 for name, times in taken.items()}
    version = "compiled" if kernels.is_compiled else "NumPy"
    print_table(f"{title}, {version}", ("", "us"), [(name, f"{us:.1f}") for name, us in own.items()])
    return {"what": title, "us": own, "all_us": sum(own.values()), "kernels": version}


def measure(case: Case, calls: int) -> list[dict[str, Any]]:
    buffer = TrajectoryReplayBuffer(
        max_trajectories=case.trajectories,
        max_total_steps=case.trajectories * case.steps,
        chunk_size=case.chunk_size,
        batch_size=case.batch_size,
    )
    trajectories = [make_trajectory(case, number) for number in range(8)]
    for number in range(2 * case.trajectories):
        buffer.extend(trajectories[number % 8])
    following = itertools.cycle(trajectories)
    parts = PARTS_OF_LARGE_SAMPLE if case.kind == "images" else PARTS_OF_SAMPLE
    results = [
        profile(f"sample(): {case}", lambda: buffer.sample(), parts, calls),
        profile_kernels(f"the call of the kernels: {case}", buffer, calls),
        profile(f"extend(): {case}", lambda: buffer.extend(next(following)), PARTS_OF_EXTEND, calls),
    ]
    return [{"case": asdict(case), **result} for result in results]


def main(config: Config) -> None:
    torch.set_num_threads(1)
    calls = 1_000 if config.quick else 10_000
    write_report(config.out, [result for case in TYPICAL for result in measure(case, calls)])


if __name__ == "__main__":
    main(tyro.cli(Config))
