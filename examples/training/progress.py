"""The history of a training on a live stream: recorded during the training and shown in a progress bar."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

from tqdm import tqdm

from embodichain_rl.engine.data import OnlineDataEngine

REFRESH = 0.5
"""Seconds between two samples of the engine's statistics."""
LOSS_UPDATES = 50
"""Number of updates over which the loss is averaged, exponentially."""


@dataclass(frozen=True)
class Look:
    """The state of the engine and the learner at one moment. `time` is in seconds since the start."""

    time: float
    episodes: int
    steps_written: int
    bytes_written: int
    bytes_used: int
    steps_trained: int
    updates: int
    fill: float
    samples_per_insert: float | None
    age: float | None
    loss: float | None


@dataclass(frozen=True)
class Evaluation:
    time: float
    updates: int
    success: float


@dataclass
class History:
    looks: list[Look] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    ready: float | None = None
    """When the buffer was filled and training started."""

    @property
    def success(self) -> float | None:
        return self.evaluations[-1].success if self.evaluations else None

    def reached(self, target: float) -> bool:
        """Whether the last two evaluations reached it. A single one may have had easy goals by chance."""
        return len(self.evaluations) > 1 and all(each.success >= target for each in self.evaluations[-2:])


class Progress:
    """A progress bar over `seconds` with a history. A thread samples the engine's statistics.

    Args:
        engine: the engine of the training.
        seconds: the longest duration of the training.
        unit: the name of what is written and trained on; "frames": with the gigabytes that they took.

    Call :meth:`trained` for every update, and :meth:`evaluated` for every evaluation.
    """

    def __init__(self, engine: OnlineDataEngine, seconds: float, unit: str = "steps") -> None:
        self.history = History()
        self._engine = engine
        self._seconds, self._unit = seconds, unit
        self._began = time.monotonic()
        self._updates = self._steps_trained = 0
        self._loss: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="progress", daemon=True)
        self._bar = tqdm(total=seconds, bar_format="{n:.0f} of {total:.0f} s |{bar:10}| {desc}")

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._began

    @property
    def time_is_up(self) -> bool:
        return self.seconds >= self._seconds

    def begin_training(self) -> None:
        self.history.ready = self.seconds

    def trained(self, steps: int, loss: float) -> None:
        self._updates += 1
        self._steps_trained += steps
        self._loss = loss if self._loss is None else self._loss + (loss - self._loss) / LOSS_UPDATES

    def evaluated(self, success: float) -> None:
        self.history.evaluations.append(Evaluation(self.seconds, self._updates, success))

    def _look_on(self) -> None:
        while not self._ended.wait(REFRESH):
            self._look()
        self._look()

    def _look(self) -> None:
        stats, sizes = self._engine.stats(), self._engine.replay_buffer.storage.bytes()
        look = Look(
            time=self.seconds,
            episodes=stats["inserted"],
            steps_written=stats["inserted_steps"],
            bytes_written=stats["inserted_steps"] * sizes["nbytes_per_step"],
            bytes_used=sizes["bytes_used"],
            steps_trained=self._steps_trained,
            updates=self._updates,
            fill=stats["fill"],
            samples_per_insert=stats["samples_per_insert"],
            age=stats["age_mean"],
            loss=self._loss,
        )
        self.history.looks.append(look)
        self._bar.n = min(look.time, self._seconds)
        self._bar.set_description_str(self._describe())

    def _describe(self) -> str:
        looks = self.history.looks
        # Episodes arrive in bursts, so rates over less than some seconds would fluctuate.
        before, now = looks[-min(len(looks), 7)], looks[-1]
        seconds = max(now.time - before.time, 1e-9)
        written = (now.steps_written - before.steps_written) / seconds
        size = f" ({now.bytes_written / 1e9:.2f} GB)" if self._unit == "frames" else ""
        parts = [f"{now.episodes:,} episodes{size}, {written:,.0f} {self._unit}/s written"]
        if self.history.ready is None:
            return f"{parts[0]}, buffer {now.fill:.0%} full"
        parts.append(f"{(now.steps_trained - before.steps_trained) / seconds:,.0f} trained")
        if now.age is not None:
            parts.append(f"{now.age:.0f} s old")
        if now.loss is not None:
            parts.append(f"loss {now.loss:.3f}")
        if self.history.success is not None:
            parts.append(f"success {self.history.success:.0%}")
        return ", ".join(parts)
