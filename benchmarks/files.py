"""A buffer in a file against the same buffer in memory, and against the disk.

* ``sample()`` and ``extend()``, warm, against nameless memory: alternating, median of the ratios.
* ``sync()`` after each trajectory, of one size or ragged, beside a bare loop of ``write`` and ``fdatasync`` of as many
  bytes.
* A large buffer of many trajectories: the time from ``open`` to the first batch; a checkpoint of it, beside ``cp``.
* Images that are read from the disk, with an empty page cache, beside bare reads of the same ranges.

    python benchmarks/files.py --gigabytes 5 --trajectories 50000
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from _harness import in_a_fork, print_table, write_report
from tensordict import TensorDict

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer

IMAGE = (64, 64, 3)


@dataclass(frozen=True)
class Config:
    """The options."""

    gigabytes: float = 5.0
    """Size of the large buffer."""
    trajectories: int = 50_000
    """Its trajectories."""
    rounds: int = 200
    """Pairs of calls that are compared."""
    folder: Path | None = None
    """Where the files are made and removed; by default the folder for temporary files."""
    out: Path | None = None
    """Path of the JSON file for the report."""


def _states(steps: int, width: int = 16) -> TensorDict:
    done = (torch.arange(steps) == steps - 1)[:, None]
    data = {"observation": torch.randn(steps, width), "action": torch.randn(steps, 4)}
    return TensorDict({**data, "next": TensorDict({"done": done, "reward": torch.randn(steps, 1)}, [steps])}, [steps])


def _images(steps: int) -> TensorDict:
    done = (torch.arange(steps) == steps - 1)[:, None]
    pixels = torch.randint(0, 255, (steps, *IMAGE), dtype=torch.uint8)
    return TensorDict({"pixels": pixels, "next": TensorDict({"done": done}, [steps])}, [steps])


def _points(steps: int) -> TensorDict:
    done = (torch.arange(steps) == steps - 1)[:, None]
    lengths = torch.arange(steps) % 11
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    points = torch.nested.nested_tensor_from_jagged(torch.randn(int(lengths.sum()), 4), offsets)
    return TensorDict({"points": points, "next": TensorDict({"done": done}, [steps])}, [steps])


def _buffer(path: Path | None, trajectories: int, steps: int, batch: int, chunk: int) -> TrajectoryReplayBuffer:
    limits = {"max_trajectories": trajectories, "max_total_steps": steps}
    return TrajectoryReplayBuffer(**limits, chunk_size=chunk, batch_size=batch, path=path)


def _seconds(call: Callable[[], object], times: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def warm(folder: Path, rounds: int) -> dict[str, float]:
    """Return how many times as long nameless memory takes, per call; 1 is as fast, more is in favour of the file."""
    found = {}
    for name, one, batch, chunk in (("states", _states(300), 32, 64), ("images", _images(200), 16, 16)):
        file, memory = (_buffer(path, 64, 64 * len(one), batch, chunk) for path in (folder / name, None))
        for _ in range(130):
            file.extend(one)
            memory.extend(one)
        calls: dict[str, Callable[[TrajectoryReplayBuffer], object]] = {
            "sample()": lambda rb: rb.sample(),
            "extend()": lambda rb, steps=one: rb.extend(steps),  # type: ignore[misc]
        }
        for call, act in calls.items():
            ratios = []
            for number in range(rounds):
                times = {}
                for rb in (file, memory)[:: 1 - 2 * (number % 2)]:
                    times[rb is file] = _seconds(partial(act, rb), 5)
                ratios.append(times[False] / times[True])
            found[f"{call} of {name}, against nameless memory"] = statistics.median(ratios)
        file.close()
    return found


def syncing(folder: Path, rounds: int, kind: str) -> dict[str, float]:
    """Return trajectories per second with a ``sync`` after each, and those of a bare loop of as many bytes."""
    one = {"states": _states, "points": _points}[kind](50)
    rb = _buffer(folder / f"synced {kind}", 1000, 50_000, 8, 8)
    nbytes = sum((value.values() if value.is_nested else value).nbytes for value in one.values(True, True))
    content = bytes(nbytes)
    fd = os.open(folder / f"bare {kind}", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, 64 << 20)
    os.pwrite(fd, bytes(64 << 20), 0)  # as the log of the buffer is
    os.fsync(fd)
    at = 0

    def bare() -> None:
        nonlocal at
        os.pwrite(fd, content, at)
        os.fdatasync(fd)
        at = (at + nbytes) % (32 << 20)

    def synced() -> None:
        rb.extend(one)
        rb.sync()

    synced()
    bare()
    pairs = [(_seconds(synced, 10), _seconds(bare, 10)) for _ in range(max(10, rounds // 2))]
    rb.close()
    os.close(fd)
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        f"trajectories/s with a sync after each, {kind}, {nbytes:,} bytes": 1 / ours,
        f"write and fdatasync of as many bytes, {kind}, 1/s": 1 / theirs,
    }


def large(folder: Path, gigabytes: float, trajectories: int) -> dict[str, float]:
    """Return the seconds from ``open`` to the first batch, warm and cold, and those of a checkpoint beside ``cp``."""
    steps = 50
    width = max(1, int(gigabytes * 1e9 / trajectories / steps / 4) - 8)
    path = folder / "large"

    def fill() -> float:
        rb = _buffer(path, trajectories, trajectories * steps, 32, 16)
        one = _states(steps, width)
        seconds = _seconds(lambda: rb.extend(one), trajectories)
        rb.close()
        return seconds

    def first_batch() -> float:
        return _seconds(lambda: TrajectoryReplayBuffer.open(path).sample())

    found = {"MB/s written": steps * width * 4 / in_a_fork(fill) / 1e6}
    found["bytes, GB"] = sum(file.stat().st_blocks * 512 for file in path.iterdir()) / 1e9
    found["open to first batch, s"] = statistics.median(in_a_fork(first_batch) for _ in range(5))
    _drop(path)
    found["open to first batch, nothing in the page cache, s"] = in_a_fork(first_batch)

    def save() -> float:
        rb = TrajectoryReplayBuffer.open(path)
        return _seconds(lambda: rb.dumps(folder / "checkpoint"))

    def again() -> float:
        rb = TrajectoryReplayBuffer.open(path)
        return _seconds(lambda: rb.dumps(folder / "checkpoint"))

    subprocess.run(["cat", str(path / "arena")], stdout=subprocess.DEVNULL, check=True)
    found["checkpoint, s"] = in_a_fork(save)
    found["checkpoint into the same place, nothing new, s"] = in_a_fork(again)
    shutil.rmtree(folder / "checkpoint")
    copy = ["cp", "--sparse=auto", str(path / "arena"), str(folder / "copy")]
    found["cp of the arena, and sync, s"] = _seconds(
        lambda: (subprocess.run(copy, check=True), subprocess.run(["sync", str(folder / "copy")], check=True))
    )
    (folder / "copy").unlink()
    shutil.rmtree(path)
    return found


def cold(folder: Path) -> dict[str, float]:
    """Return MB/s of images with an empty page cache, in chunks and windows, and those of bare reads of such ranges."""
    path, batch, batches = folder / "cold", 16, 100
    frame = int(np.prod(IMAGE))

    def fill() -> None:
        rb = _buffer(path, 400, 400 * 200, batch, 16)
        one = _images(200)
        for _ in range(400):
            rb.extend(one)
        rb.close()

    in_a_fork(fill)

    def sample(sampler: ChunkSampler, nbytes: int) -> float:
        rb = TrajectoryReplayBuffer.open(path, sampler=sampler)
        rb.sample()
        return batches * batch * nbytes / _seconds(lambda: [rb.sample() for _ in range(batches)]) / 1e6

    def read(nbytes: int, ahead: bool) -> float:
        fd = os.open(path / "arena", os.O_RDONLY)
        places = np.random.default_rng(0).integers(0, 400 * 200 - nbytes // frame, batches * batch) * frame

        def act() -> None:
            for begin in range(0, len(places), batch):
                some = places[begin : begin + batch].tolist()
                if ahead:
                    for place in some:
                        os.posix_fadvise(fd, place, nbytes, os.POSIX_FADV_WILLNEED)
                for place in some:
                    os.pread(fd, nbytes, place)

        return batches * batch * nbytes / _seconds(act) / 1e6

    def whole() -> float:
        block = memoryview(bytearray(8 << 20))
        fd = os.open(path / "arena", os.O_RDONLY)
        size = 400 * 200 * frame
        return size / _seconds(lambda: [os.preadv(fd, [block], at) for at in range(0, size, len(block))]) / 1e6

    works: dict[str, Callable[[], float]] = {}
    for what, sampler, steps in (
        ("chunks", ChunkSampler(16), 16),
        ("windows", ChunkSampler(windows={"pixels": (-1, 0)}), 2),
    ):
        nbytes = steps * frame
        works |= {
            f"sample() of images from the disk, {what} of {nbytes:,} bytes, MB/s": partial(sample, sampler, nbytes),
            f"pread of such {what}, one after the other, MB/s": partial(read, nbytes, False),
            f"such {what}, announced with WILLNEED for each batch, MB/s": partial(read, nbytes, True),
        }
    works["the file from its beginning, MB/s"] = whole
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(5):
        for name, work in works.items():
            _drop(path)
            rates[name].append(in_a_fork(work))
    shutil.rmtree(path)
    return {name: statistics.median(values) for name, values in rates.items()}


def _drop(path: Path) -> None:
    """Drop the pages of files that nobody has mapped from the page cache."""
    for file in path.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=config.folder, prefix="embodichain_rl-files-") as name:
        folder = Path(name)
        found = in_a_fork(lambda: warm(folder, config.rounds))
        for kind in ("states", "points"):  # of one size, and ragged
            found |= in_a_fork(partial(syncing, folder, config.rounds, kind))
        found |= cold(folder)
        found |= large(folder, config.gigabytes, config.trajectories)
    print_table("A buffer in a file", ["", ""], [[name, f"{value:,.3f}"] for name, value in found.items()])
    write_report(config.out, [found])


if __name__ == "__main__":
    main()
