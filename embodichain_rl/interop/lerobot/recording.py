"""What the process of a recorder does: it waits for new trajectories, and appends them to a LeRobot dataset."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
from tensordict import TensorDict

from embodichain_rl.errors import DatasetWriteError
from embodichain_rl.interop.lerobot.episodes import Episode, read_episode
from embodichain_rl.interop.lerobot.features import Columns, columns_of
from embodichain_rl.interop.lerobot.frames import checked_rate
from embodichain_rl.interop.lerobot.packages import package
from embodichain_rl.interop.lerobot.writing import DatasetWriter
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.shared import SharedBlock, leave_signals_to_owner, own_process, process_is_alive

__all__ = ["EPISODES", "FRAMES", "REJECTED", "STOP", "WORDS", "RecordingJob", "first_to_record", "record"]

POLL_INTERVAL = 0.02
"""Seconds between two looks for new trajectories."""

COMMIT_BYTES = 1 << 27
"""The size of episodes from which they are written without waiting for more."""

ORPHAN_PATIENCE = 2.0
"""Seconds without a new trajectory, after which the recorder ends if the process that started it is gone."""

WORDS = 8
STOP, EPISODES, FRAMES, REJECTED = range(4)  # words that both processes share


@dataclass
class RecordingJob:
    """What the recorder's process does; everything that it needs can be pickled."""

    storage: TrajectoryStorage
    root: str
    fps: float | None
    filter: bytes | None
    max_episodes: int | None
    selection: dict[str, Any]
    task: str
    cameras: str
    codec: str
    robot_type: str | None
    commit_s: float
    words: SharedBlock
    owner: tuple[int, int] = field(default_factory=own_process)
    hold: int = -1


def record(job: RecordingJob, reports: Connection) -> None:
    """Record until it is time to stop; the main function of the recorder's process.

    Args:
        job: what to do.
        reports: gets ``"recording"`` when it begins, or the error that ended it and its traceback.
    """
    leave_signals_to_owner()  # which stops this process
    import torch

    torch.set_num_threads(1)
    ledger = job.storage.ledger
    try:
        ledger.holds.pass_on(job.hold, *own_process())
        _Recording(job, reports).run()
    except BaseException as error:
        reports.send((_sendable(error), traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        ledger.holds.release(job.hold)


def _sendable(error: BaseException) -> BaseException:
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        return DatasetWriteError(f"The recorder failed: {error!r}")
    return error if isinstance(error, Exception) else DatasetWriteError(f"The recorder failed: {error!r}")


class _Recording:
    """The loop of the recorder's process."""

    def __init__(self, job: RecordingJob, reports: Connection) -> None:
        self.job, self.reports = job, reports
        self.storage = job.storage
        self.ledger = job.storage.ledger
        self.words = job.words.array(np.int64, (WORDS,))
        self.filter: Callable[[TensorDict], bool] | None = None if job.filter is None else cloudpickle.loads(job.filter)
        self.next_id = first_to_record(Path(job.root), self.ledger)
        self.oldest = self.ledger.live_range()[0]
        self.writer: DatasetWriter | None = None
        self.columns: Columns | None = None
        self.fps = math.nan

    def run(self) -> None:
        # Before anything is published that must be on the disk soon: these imports take seconds.
        for name in ("pyarrow.parquet", "pandas", "av" if self.job.cameras == "video" else "PIL.Image"):
            package(name)
        if self.storage.schema is not None and len(self.storage):
            self._open()
        self.reports.send("recording")
        last_new = last_commit = time.monotonic()
        while not self._is_full():
            stopping = bool(self.words[STOP])
            orphaned = not process_is_alive(*self.job.owner)
            now = time.monotonic()
            end = self.ledger.live_range()[1]
            if end > self.next_id:
                last_new = now
                if stopping or orphaned or now - last_commit >= self.job.commit_s or self._is_urgent(end):
                    self._write_until(end)
                    last_commit = time.monotonic()
                    continue
            elif stopping or (orphaned and now - last_new > ORPHAN_PATIENCE):
                break
            time.sleep(POLL_INTERVAL)
        if self.writer is not None:
            self.writer.close()

    def _is_full(self) -> bool:
        return self.job.max_episodes is not None and int(self.words[EPISODES]) >= self.job.max_episodes

    def _is_urgent(self, end: int) -> bool:
        """Return whether half of the buffer is not recorded: the collectors may wait soon."""
        ledger, ids = self.ledger, self.ledger.live().all()
        rows = ledger.existing(ids[(ids >= self.next_id) & (ids < end)])
        steps = rows.lengths.sum()
        return bool(2 * len(rows.ids) >= ledger.max_trajectories or 2 * steps >= ledger.max_total_steps)

    def _open(self) -> None:
        job = self.job
        self.columns = columns_of(self.storage.arena.schema, **job.selection)
        self.fps = checked_rate(self.storage, self.columns, job.fps)
        self.writer = DatasetWriter(
            job.root,
            fps=self.fps,
            features=self.columns.features(job.cameras),
            robot_type=job.robot_type,
            codec=job.codec,
            keys=self.columns.keys(),
        )

    def _write_until(self, end: int) -> None:
        if self.writer is None:
            self._open()
        assert self.writer is not None
        assert self.columns is not None
        episodes: list[Episode] = []
        rejected = 0
        while self.next_id < end and sum(episode.nbytes for episode in episodes) < COMMIT_BYTES:
            if self.job.max_episodes is not None and self.words[EPISODES] + len(episodes) >= self.job.max_episodes:
                break
            if self._is_none(self.next_id):
                self.next_id += 1
                continue
            if self._takes(self.next_id):
                episode = read_episode(self.storage, self.columns, self.next_id, self.fps, self.job.task)
                if episode is None:
                    raise DatasetWriteError(
                        f"Trajectory {self.next_id:,} was overwritten before it was recorded: the buffer was emptied, "
                        "or is too small. Make the buffer larger."
                    )
                episodes.append(episode)
            else:
                rejected += 1
            self.next_id += 1
        own = self.writer.info.setdefault("embodichain_rl", {})
        own.update(buffer=self.ledger.holds.identity, next_id=self.next_id)
        self.writer.append(episodes)
        self.words[EPISODES] += len(episodes)
        self.words[FRAMES] += sum(len(episode) for episode in episodes)
        self.words[REJECTED] += rejected
        self.ledger.holds.advance(self.job.hold, self.next_id)

    def _is_none(self, trajectory_id: int) -> bool:
        """Return whether an id belongs to no trajectory that is to be recorded: it was discarded, or never assigned."""
        live = self.ledger.live()
        if live.contains(np.array([trajectory_id])).all():
            return False
        return trajectory_id >= live.oldest or trajectory_id < self.oldest  # else it was evicted

    def _takes(self, trajectory_id: int) -> bool:
        return self.filter is None or bool(self.filter(self.storage.trajectory(trajectory_id)))


def first_to_record(root: Path, ledger: Any) -> int:
    """Return the first trajectory that is not in the dataset at ``root`` yet."""
    live = ledger.live()
    oldest = int(live.at(np.array([0]))[0]) if len(live) else int(live.end)
    info = root / "meta/info.json"
    if not info.exists():
        return oldest
    position = json.loads(info.read_text()).get("embodichain_rl", {})
    return max(oldest, int(position["next_id"])) if position.get("buffer") == ledger.holds.identity else oldest
