"""The reports of the collector examples: the content of a batch, the rates of both sides, and dead workers."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import TracebackType

from tensordict import TensorDictBase
from tqdm import tqdm

from embodichain_rl import TrajectoryReplayBuffer

REFRESH = 1.0
"""Seconds between two updates of the progress bar. Episodes arrive in bursts, so rates over less would fluctuate."""


def describe(batch: TensorDictBase) -> str:
    """Return one line for each tensor of the batch: key, shape, dtype."""
    values = sorted(batch.flatten_keys(".").items())
    lines = [f"  {key:<20} {list(value.shape)!s:<16} {value.dtype}" for key, value in values]
    return "\n".join([f"One batch, {list(batch.shape)}:", *lines])


def exit_if_a_worker_died(workers: Sequence[BaseProcess]) -> None:
    """Exit with a message and exit code 1 if a worker has ended."""
    for number, worker in enumerate(workers):
        if worker.exitcode is None:
            continue
        if worker.exitcode < 0:
            how = f"was killed by {signal.Signals(-worker.exitcode).name}"
        else:
            how = f"ended with exit code {worker.exitcode}; if it raised, its traceback is printed above"
        raise SystemExit(f"Worker {number} of {len(workers)}, process {worker.pid}, {how}.")


@dataclass(frozen=True)
class Counts:
    """The totals of both sides at ``time``."""

    time: float
    steps_written: int
    episodes_written: int
    batches_sampled: int
    steps_sampled: int


class LiveReport:
    """A progress bar over ``seconds`` that shows the rates of the writers and the reader of a buffer, and a summary.

    Call :meth:`sampled` for every batch, and stop when :attr:`time_is_up`.
    """

    def __init__(self, rb: TrajectoryReplayBuffer, seconds: float) -> None:
        self._rb = rb
        self._batches_sampled = 0
        self._steps_sampled = 0
        self._begin = self._last = self._counts()
        self._seconds = seconds
        self._bar = tqdm(total=seconds, bar_format="{n:.0f} of {total:.0f} s |{bar:10}| {desc}")

    def __enter__(self) -> LiveReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        print(self._summary(self._counts()), flush=True)

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() - self._begin.time >= self._seconds

    def sampled(self, batch: TensorDictBase) -> None:
        """Count a batch, and update the rates at intervals."""
        self._batches_sampled += 1
        self._steps_sampled += batch.numel()
        if time.monotonic() - self._last.time >= REFRESH:
            self._refresh(self._counts(), self._seconds_since_written(batch))

    def _counts(self) -> Counts:
        return Counts(
            time=time.monotonic(),
            steps_written=self._rb.write_count,
            episodes_written=int(self._rb.stats()["published"]),
            batches_sampled=self._batches_sampled,
            steps_sampled=self._steps_sampled,
        )

    def _seconds_since_written(self, batch: TensorDictBase) -> float:
        """Return the average age of the episodes in the batch, in seconds."""
        ids = batch["trajectory", "id"][:, 0].numpy()
        return float(time.monotonic_ns() - self._rb.storage.ledger.published_at(ids).mean()) / 1e9

    def _refresh(self, now: Counts, age: float) -> None:
        seconds = now.time - self._last.time
        written = (now.steps_written - self._last.steps_written) / seconds
        sampled = (now.batches_sampled - self._last.batches_sampled) / seconds
        self._last = now
        self._bar.n = min(now.time - self._begin.time, self._seconds)
        self._bar.set_description_str(
            f"{now.episodes_written:,} episodes, {written:,.0f} steps/s written, {sampled:,.0f} batches/s sampled, "
            f"{len(self._rb):,} of {self._rb.storage.max_size:,} kept, {age:.1f} s old"
        )

    def _summary(self, now: Counts) -> str:
        seconds = now.time - self._begin.time
        steps = now.steps_written - self._begin.steps_written
        episodes = now.episodes_written - self._begin.episodes_written
        return (
            f"In {seconds:.1f} s\n"
            f"  written: {steps / seconds:,.0f} steps/s ({steps:,} steps in {episodes:,} episodes)\n"
            f"  sampled: {now.batches_sampled / seconds:,.0f} batches/s, {now.steps_sampled / seconds:,.0f} steps/s\n"
            f"  kept:    {self._rb.storage.num_steps:,} steps in {len(self._rb):,} episodes"
        )
