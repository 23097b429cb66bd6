"""A buffer on a CUDA device: the time of `sample()`, the throughput of uploads, and checks for torn chunks.

    python benchmarks/on_cuda.py
    python benchmarks/on_cuda.py --quick --out outputs/on_cuda.json

There are five parts. In each, the contestants alternate on the same data in one run:

* sampling: `TrajectoryReplayBuffer.sample()` against TorchRL's `SliceSampler(end_key)` over a `LazyTensorStorage` on
  the device, and against one copy of as many bytes within the device. The result is the time of a call while the device
  is kept busy, and the time for which the call occupies the host;
* uploading: trajectories in the staging ring, against one copy of as many bytes from pinned memory;
* both: sampling while producers in other processes write at full speed, against sampling while they are paused;
* wholeness: every step carries its number and a checksum in every key. Chunks are checked on three streams, while
  producers write and trajectories are written on the device;
* collecting: 4,096 pendulums are stepped on the device in this process, and their trajectories never leave it.

If torch finds no CUDA device, the script says so and exits with 1.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from _harness import print_table, write_report
from _pendulum import BatchedPendulum
from sampling import CASES, TYPICAL, Case, make_trajectory
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs.utils import RandomPolicy

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage

OURS, THEIRS, COPY = "TrajectoryReplayBuffer", "SliceSampler(end_key)", "one copy on the device"

LARGE = (Case("states", 4096, 300, 1024, 64), Case("3 cameras", 32, 50, 64, 32))

DEVICE: Any = "cuda"

CALLS = 50
"""Calls per turn, after which the device is synchronised."""

MOST_STAGED = 4000
"""Trajectories in the staging ring, which holds at most 4,096 of any size."""

WIDTH = 64
"""Numbers per step in the data that is checked."""


@dataclass(frozen=True)
class Config:
    """Measure a buffer on a CUDA device."""

    quick: bool = False
    """Two shapes and a second each, instead of all."""
    seconds: float = 5.0
    """Duration of each part."""
    producers: int = 2
    """Number of writer processes, in the parts that have some."""
    environments: tuple[int, ...] = (4096, 32_768, 131_072)
    """Numbers of pendulums that are stepped at once."""
    out: Path | None = None
    """Path of the JSON file for the results."""


def synchronize() -> None:
    torch.cuda.synchronize()


@dataclass(frozen=True)
class Taken:
    """Seconds per call: in total, and until the call returned."""

    whole: float
    host: float


def take_turns(contestants: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Taken]:
    """Give every contestant a turn of ``CALLS`` calls per round, and return the medians over the rounds."""
    names, order = list(contestants), random.Random(0)
    turns: dict[str, list[Taken]] = {name: [] for name in names}
    for name in names:
        _turn(contestants[name])
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(turns[names[0]]) < 5:
        order.shuffle(names)
        for name in names:
            turns[name].append(_turn(contestants[name]))
    return {
        name: Taken(*(sorted(getattr(turn, part) for turn in taken)[len(taken) // 2] for part in ("whole", "host")))
        for name, taken in turns.items()
    }


def _turn(call: Callable[[], object]) -> Taken:
    synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    host = time.perf_counter() - begin
    synchronize()
    return Taken((time.perf_counter() - begin) / CALLS, host / CALLS)


def make_buffer(case: Case, **options: Any) -> TrajectoryReplayBuffer:
    storage = TrajectoryStorage(case.trajectories, case.trajectories * case.steps, device=DEVICE, **options)
    return TrajectoryReplayBuffer(storage=storage, sampler=ChunkSampler(case.chunk_size), batch_size=case.batch_size)


def bytes_of(case: Case) -> int:
    """Return the bytes of a step."""
    data = make_trajectory(case, 0)
    return sum(value.nbytes for value in data.values(True, True)) // len(data)


# ---------------------------------------------------------------------------------------------------------- sampling


def measure_sampling(case: Case, seconds: float) -> list[dict[str, Any]]:
    total = case.trajectories * case.steps
    ours = make_buffer(case)
    theirs = TensorDictReplayBuffer(
        storage=LazyTensorStorage(total, device=ours.storage.device),
        sampler=SliceSampler(slice_len=case.chunk_size, end_key=("next", "done")),
        batch_size=case.batch_size * case.chunk_size,
    )
    for number in range(case.trajectories):
        trajectory = make_trajectory(case, number % 64)
        ours.extend(trajectory.copy())
        theirs.extend(trajectory)
    ours.storage.flush()
    check_same(case, ours)
    nbytes = bytes_of(case) * case.batch_size * case.chunk_size
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=ours.storage.device) for _ in range(2))
    taken = take_turns({OURS: ours.sample, THEIRS: theirs.sample, COPY: lambda: target.copy_(source)}, seconds)
    return reported("sampling", case, nbytes, taken)


def reported(part: str, case: Case, nbytes: int, taken: Mapping[str, Taken]) -> list[dict[str, Any]]:
    """Print the times of the contestants for batches of ``nbytes``, and return them as results."""
    print_table(
        f"{case}, {nbytes / 1e6:.2f} MB a batch",
        ("", "ms", "x ours", "GB/s", "ms of the host"),
        [
            (
                name,
                f"{1e3 * times.whole:.3f}",
                f"{times.whole / taken[OURS].whole:.2f}",
                f"{nbytes / times.whole / 1e9:.1f}",
                f"{1e3 * times.host:.3f}",
            )
            for name, times in taken.items()
        ],
    )
    return [
        {"part": part, "case": asdict(case), "contestant": name, "bytes": nbytes, **asdict(times)}
        for name, times in taken.items()
    ]


def check_same(case: Case, buffer: TrajectoryReplayBuffer) -> None:
    """Assert that the buffer returns the data that was written."""
    batch = buffer.sample().cpu()
    for chunk in batch[:4]:
        number, step = int(chunk["trajectory", "id"][0]), int(chunk["trajectory", "step"][0])
        expected = make_trajectory(case, number % 64)[step : step + case.chunk_size]
        for key, value in expected.items(True, True):
            assert torch.equal(chunk[key], value), f"{key} has other values"


# --------------------------------------------------------------------------------------------------------- uploading


def measure_uploading(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Measure the upload of a full staging ring until all of it is live, against one copy of as many bytes."""
    trajectory = make_trajectory(case, 0)
    nbytes = bytes_of(case) * case.steps
    count = min(max(2, (256 << 20) // nbytes), MOST_STAGED)
    rb = make_buffer(
        Case(case.kind, 2 * count, case.steps, case.batch_size, case.chunk_size), staging_bytes=(count + 1) * nbytes
    )
    rb.extend(trajectory)
    rb.storage.flush()
    total = count * nbytes
    pinned = torch.zeros(total, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    target = torch.zeros(total, dtype=torch.uint8, device=rb.storage.device)
    taken: dict[str, list[float]] = {"uploads": [], "one copy from pinned memory": []}
    for _ in range(rounds):
        with rb.storage._memory._uploader._opening:  # pauses the uploader
            for _ in range(count):
                rb.extend(trajectory)
            synchronize()
            begin = time.perf_counter()
        rb.storage.flush()
        taken["uploads"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        target.copy_(pinned, non_blocking=True)
        synchronize()
        taken["one copy from pinned memory"].append(time.perf_counter() - begin)
    medians = {name: sorted(seconds)[len(seconds) // 2] for name, seconds in taken.items()}
    print_table(
        f"Uploading {count} trajectories of {case.kind}, {nbytes / 1e6:.2f} MB each",
        ("", "ms", "GB/s"),
        [(name, f"{1e3 * median:.2f}", f"{total / median / 1e9:.2f}") for name, median in medians.items()],
    )
    return [
        {"part": "uploading", "case": asdict(case), "contestant": name, "bytes": total, "median_s": median}
        for name, median in medians.items()
    ]


# ------------------------------------------------------------------------------------- sampling during writes


def produce(rb: TrajectoryReplayBuffer, trajectory: TensorDict, stop: Any, rest: Any, number: int) -> None:
    """Write one trajectory after the other, except while paused."""
    torch.set_num_threads(1)
    written = 0
    while not stop.is_set():
        if rest.is_set():
            time.sleep(0.001)
            continue
        rb.extend(number_steps(trajectory, 1_000_000 * number + written))
        written += 1


def number_steps(trajectory: TensorDict, number: int) -> TensorDict:
    """Write the trajectory number, the step and a checksum into every key that has room for them."""
    if "numbers" in trajectory:
        steps = torch.arange(len(trajectory))
        label = torch.stack([torch.full_like(steps, number), steps, number * 31 + steps * 7], dim=-1)
        for key in ("numbers", "copy", "another"):
            trajectory[key] = label.repeat(1, WIDTH // 3 + 1)[:, :WIDTH].contiguous()
    return trajectory


def numbered(steps: int) -> TensorDict:
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    fields = {key: torch.zeros(steps, WIDTH, dtype=torch.int64) for key in ("numbers", "copy", "another")}
    return TensorDict({**fields, "next": {"done": done}}, [steps])


def torn(batch: TensorDict) -> torch.Tensor:
    """Return how many chunks are torn, as a number on the device."""
    label = batch["numbers"][..., :3]
    number, step, checksum = label.unbind(-1)
    whole = (number == number[:, :1]) & (step == batch["trajectory", "step"]) & (checksum == number * 31 + step * 7)
    expected = label.repeat(1, 1, WIDTH // 3 + 1)[..., :WIDTH]
    for key in ("numbers", "copy", "another"):
        whole &= (batch[key] == expected).all(-1)
    return (~whole).any(-1).sum()


class Producers:
    """Run processes that write to a buffer until the block ends."""

    def __init__(self, rb: TrajectoryReplayBuffer, trajectory: TensorDict, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.stop, self.rest = context.Event(), context.Event()
        self._processes = [
            context.Process(target=produce, args=(rb, trajectory, self.stop, self.rest, number), daemon=True)
            for number in range(1, count + 1)
        ]
        self._rb = rb

    def __enter__(self) -> Producers:
        for process in self._processes:
            process.start()
        begun = self._rb.stats()["published"]
        while self._rb.stats()["published"] < begun + 4 * len(self._processes):
            assert all(process.is_alive() for process in self._processes), "a producer has ended"
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        for process in self._processes:
            process.join(30)


def measure_both(case: Case, seconds: float, producers: int) -> list[dict[str, Any]]:
    rb = make_buffer(case)
    trajectory = make_trajectory(case, 0)
    for _ in range(min(8, case.trajectories)):
        rb.extend(trajectory)
    rb.storage.flush()
    taken: dict[str, list[Taken]] = {"while they rest": [], "while they write": []}
    written = 0
    with Producers(rb, trajectory, producers) as writing:
        deadline = time.perf_counter() + 2 * seconds
        while time.perf_counter() < deadline or len(taken["while they rest"]) < 5:
            for name, turns in taken.items():
                (writing.rest.clear if name == "while they write" else writing.rest.set)()
                time.sleep(0.05)  # until they have noticed the pause
                before = rb.stats()["published"]
                turns.append(_turn(rb.sample))
                written += rb.stats()["published"] - before
    medians = {
        name: Taken(*(sorted(getattr(turn, part) for turn in turns)[len(turns) // 2] for part in ("whole", "host")))
        for name, turns in taken.items()
    }
    print_table(
        f"{case}, beside {producers} producers; {written:,} trajectories came in the meantime",
        ("sample()", "ms", "ms of the host"),
        [(name, f"{1e3 * times.whole:.3f}", f"{1e3 * times.host:.3f}") for name, times in medians.items()],
    )
    return [
        {"part": "both", "case": asdict(case), "contestant": name, "written": written, **asdict(times)}
        for name, times in medians.items()
    ]


def streams() -> list[Any]:
    """Return contexts for sampling: the current stream and two other streams."""
    chosen = (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream())
    return [torch.cuda.stream(stream) for stream in chosen]


def check_wholeness(seconds: float, producers: int) -> list[dict[str, Any]]:
    case = Case("numbered", 16, 64, 256, 16)
    rb = make_buffer(case, staging_bytes=16 << 20)
    number = 0
    rb.extend(number_steps(numbered(64), number))
    rb.storage.flush()
    checked, found, contexts = 0, torch.zeros((), dtype=torch.int64, device=rb.storage.device), streams()
    with Producers(rb, numbered(64), producers):
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            for context in contexts:
                with context:
                    batches = [rb.sample() for _ in range(10)]
                    if context is contexts[0]:
                        number -= 1
                        rb.extend(number_steps(numbered(64), number).to(rb.storage.device))
                    counts = torch.stack([torn(batch) for batch in batches]).sum()
                synchronize()
                found += counts
                checked += sum(batch.numel() for batch in batches)
    stats = rb.stats()
    print(
        f"\nWholeness: {checked:,} steps in chunks checked on {len(contexts)} streams while {stats['published']:,} "
        f"trajectories came in; torn chunks: {int(found)}; drawn again: {stats['redrawn']:,}"
    )
    assert not int(found), "a chunk is torn"
    return [{"part": "wholeness", "steps_checked": checked, "torn": int(found), **stats}]


# --------------------------------------------------------------------------------------------------------- collecting


def measure_collecting(
    seconds: float, environments: int, steps: int = 32, *, compact: bool = False
) -> list[dict[str, Any]]:
    """Measure the steps per second of pendulums on the device: with TorchRL's collector, and into the buffer too."""
    storage = TrajectoryStorage(environments, 220 * environments, device=DEVICE, compact=compact)
    rb = TrajectoryReplayBuffer(storage=storage, sampler=ChunkSampler(32), batch_size=256)
    device = rb.storage.device
    env = BatchedPendulum(environments, device=device)
    frames = steps * environments
    collector = Collector(
        env,
        RandomPolicy(env.action_spec),
        frames_per_batch=frames,
        total_frames=-1,
        device=device,
        storing_device=device,
    )
    results: dict[str, float] = {}
    first = 0.0
    try:
        batches = iter(collector)
        for name, consume in (("TorchRL's Collector", lambda data: None), ("and into the buffer", rb.extend)):
            begin = time.perf_counter()
            consume(next(batches))
            synchronize()
            first = time.perf_counter() - begin
            count, inside, begin = 0, 0.0, time.perf_counter()
            # Until the first trajectories of all environments have ended, and the buffer is full.
            while time.perf_counter() - begin < seconds or count < (250 * environments if consume == rb.extend else 1):
                batch = next(batches)
                synchronize()
                before = time.perf_counter()
                consume(batch)
                synchronize()
                inside += time.perf_counter() - before
                count += frames
            results[name] = count / (time.perf_counter() - begin)
        results["extend() alone"] = count / inside
    finally:
        collector.shutdown()
    assert rb.sample()["observation"].device == device
    stored = int(storage.nbytes_per_step)
    print_table(
        f"{environments:,} pendulums on {device}, {stored} bytes a step, {len(rb):,} trajectories in the buffer, "
        f"first extend() after {first:.2f} s",
        ("", "steps/s"),
        [(name, f"{rate:,.0f}") for name, rate in results.items()],
    )
    return [
        {
            "part": "collecting",
            "environments": environments,
            "compact": compact,
            "contestant": name,
            "steps_per_second": rate,
            "bytes_of_step": stored,
        }
        for name, rate in results.items()
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
    results = [result for case in cases for result in measure_sampling(case, seconds)]
    for case in TYPICAL if config.quick else (*TYPICAL, LARGE[1]):
        results += measure_uploading(case, 3 if config.quick else 15)
        results += measure_both(case, seconds, config.producers)
    results += check_wholeness(2 * seconds, config.producers)
    for environments in config.environments:
        results += measure_collecting(seconds, environments)
    results += measure_collecting(seconds, config.environments[-1], compact=True)
    write_report(config.out, results)


if __name__ == "__main__":
    main(tyro.cli(Config))
