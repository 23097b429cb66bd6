"""``LeRobotRecorder``: a process that writes what a buffer receives to a LeRobot dataset."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
from tensordict import NestedKey, TensorDict

from embodichain_rl._checks import checked_float, checked_int
from embodichain_rl.errors import (
    DatasetWriteError,
    DataTimeoutError,
    InvalidArgumentError,
    UnsupportedOperationError,
)
from embodichain_rl.interop.lerobot.features import columns_of
from embodichain_rl.interop.lerobot.frames import without_rate
from embodichain_rl.interop.lerobot.packages import package
from embodichain_rl.interop.lerobot.recording import (
    EPISODES,
    FRAMES,
    REJECTED,
    STOP,
    WORDS,
    RecordingJob,
    first_to_record,
    record,
)
from embodichain_rl.replay.storage import storage_of
from embodichain_rl.shared import (
    Deadline,
    SharedBlock,
    own_process,
    without_owners_signals,
)

__all__ = ["LeRobotRecorder"]

CAMERAS = ("video", "image")

STARTING_PATIENCE = 600.0
"""Seconds that the recorder's process may take to start."""


class LeRobotRecorder:
    """Records the trajectories of a live buffer as a LeRobot dataset of version 3, in a process of its own.

    The dataset is whole at every moment, whatever is killed: LeRobot opens it and finds as many rows as frames. New
    episodes are written beside it and shown by one rename, ``commit_s`` seconds after they were published, or when the
    last write has ended. They are on the disk then, also after a power cut.

    No trajectory is left out. If the recorder is slower than the collectors, they wait before a trajectory would be
    evicted that is not recorded. If the recorder's process is killed, they go on without it.

    If there is a dataset at ``root`` with the same features, episodes are added to it. A recorder over the same buffer
    goes on where the last one ended.

    A script that starts one needs ``if __name__ == "__main__":``, as the process is spawned. If the process that
    started the recorder is killed, the recorder writes what was published and ends.

    Args:
        source: a buffer, a storage or an engine.
        root: the folder of the dataset, on a local file system.

    Keyword Args:
        fps: frames per second; by default as in :func:`as_lerobot`.
        filter: a callable that gets a whole trajectory, a TensorDict ``[T]``, and returns whether it is recorded. It is
            called in the recorder's process.
        max_episodes: the number of episodes after which the recorder stops; None: no limit.
        keys: as in :func:`as_lerobot`.
        names: as there.
        task_key: as there.
        task: as there.
        robot_type: for ``info.json``.
        cameras: how images are written: ``"video"``, one file for each episode and camera, or ``"image"``, as PNG in
            the rows, without loss.
        codec: of videos: ``"h264"``, ``"hevc"`` or ``"libsvtav1"``.
        commit_s: seconds for which episodes are collected before they are written together.

    Raises:
        MissingPackageError: by :meth:`start`, when a package is missing.
        DatasetWriteError: by :meth:`start` and :meth:`stop`, when the dataset can't be written, or the recorder's
            process ended early.
        InvalidArgumentError: for arguments that can't be, and a dataset with other features.
        UnsupportedOperationError: for a buffer on a device, which other processes can't read.

    Example:
        >>> rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=30_000, chunk_size=2)
        >>> with LeRobotRecorder(rb, "outputs/recording", fps=30) as recorder:  # doctest: +SKIP
        ...     train(rb)
        >>> recorder.num_episodes  # doctest: +SKIP
        120
    """

    def __init__(
        self,
        source: Any,
        root: str | Path,
        *,
        fps: float | None = None,
        filter: Callable[[TensorDict], bool] | None = None,
        max_episodes: int | None = None,
        keys: Iterable[NestedKey] | None = None,
        names: Mapping[NestedKey, str] | None = None,
        task_key: NestedKey | None = None,
        task: str = "",
        cameras: str = "video",
        codec: str = "h264",
        robot_type: str | None = None,
        commit_s: float = 0.25,
    ) -> None:
        storage = storage_of(source, "LeRobotRecorder")
        if storage.staged:
            raise UnsupportedOperationError(
                "Got a buffer on a device, which only its own process can read. Record a buffer in CPU memory."
            )
        if cameras not in CAMERAS:
            raise InvalidArgumentError(f"Got cameras={cameras!r}; it must be one of {CAMERAS}.")
        if filter is not None and not callable(filter):
            raise InvalidArgumentError(f"Got filter={filter!r}; it must be a callable that takes a trajectory.")
        selection: dict[str, Any] = {
            "keys": None if keys is None else list(keys),
            "names": dict(names or {}),
            "task_key": task_key,
        }
        if storage.schema is not None:  # refuse here rather than in the other process
            columns = columns_of(storage.schema, **selection)
            if fps is None and columns.timestamp is None and ("trajectory", "fps") not in storage.schema:
                raise without_rate()
        self.root = Path(root).absolute()
        self._words_block = SharedBlock(8 * WORDS)
        self._words = self._words_block.array(np.int64, (WORDS,))
        self._job = RecordingJob(
            storage=storage,
            root=str(self.root),
            fps=None if fps is None else checked_float("fps", fps, minimum=1e-9),
            filter=None if filter is None else cloudpickle.dumps(filter),
            max_episodes=None if max_episodes is None else checked_int("max_episodes", max_episodes, minimum=1),
            selection=selection,
            task=task,
            cameras=cameras,
            codec=codec,
            robot_type=robot_type,
            commit_s=checked_float("commit_s", commit_s, minimum=0.0),
            words=self._words_block,
        )
        self._process: Any = None
        self._reports: Connection | None = None

    @property
    def num_episodes(self) -> int:
        """The number of episodes that this recorder has written; they are on the disk."""
        return int(self._words[EPISODES])

    @property
    def num_frames(self) -> int:
        """The number of frames that this recorder has written."""
        return int(self._words[FRAMES])

    @property
    def is_recording(self) -> bool:
        """Whether the recorder's process runs."""
        return self._process is not None and self._process.is_alive()

    @property
    def pid(self) -> int | None:
        """The id of the recorder's process; None before :meth:`start`."""
        return None if self._process is None else self._process.pid

    def stats(self) -> dict[str, Any]:
        """Return what was recorded: ``episodes``, ``frames``, ``rejected`` (by ``filter``), ``recording``."""
        return {
            "episodes": self.num_episodes,
            "frames": self.num_frames,
            "rejected": int(self._words[REJECTED]),
            "recording": self.is_recording,
        }

    def start(self) -> LeRobotRecorder:
        """Start the recorder's process, and return when it records.

        From this call on, no trajectory is evicted that is not recorded.
        """
        if self._process is not None:
            raise DatasetWriteError("This recorder was started before. Make another one; it goes on at the same root.")
        for name in ("pyarrow", "pandas"):
            package(name)
        ledger = self._job.storage.ledger
        self._job.hold = ledger.holds.claim(first_to_record(self.root, ledger), *own_process())
        context = multiprocessing.get_context("spawn")
        self._reports, sender = context.Pipe(duplex=False)
        try:
            self._process = context.Process(
                target=record, args=(self._job, sender), name="embodichain-rl-lerobot-recorder"
            )
            with without_owners_signals():
                self._process.start()
            sender.close()
            self._wait_until_started()
        except BaseException:
            ledger.holds.release(self._job.hold)
            raise
        _stop_with(self, self._words)
        return self

    def stop(self, timeout: float = 60.0) -> None:
        """Record what was published so far, and end the recorder's process.

        Raises:
            DatasetWriteError: when the process ended early, or could not write.
            DataTimeoutError: when it is not done after ``timeout`` seconds; it goes on.
        """
        if self._process is None:
            return
        self._words[STOP] = 1
        self._process.join(checked_float("timeout", timeout, minimum=0.0))
        if self._process.is_alive():
            raise DataTimeoutError(
                f"The recorder is not done after {timeout:g} s: {self.num_episodes} episodes are written. Call stop() "
                "again with a longer timeout."
            )
        self._raise_failure()

    def __enter__(self) -> LeRobotRecorder:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"The recorder failed as well: {failure}")

    def _wait_until_started(self) -> None:
        assert self._reports is not None
        deadline = Deadline(STARTING_PATIENCE)
        while not self._reports.poll(0.1):
            if not self._process.is_alive() and not self._reports.poll(0.0):
                raise DatasetWriteError(f"The recorder's process ended while it started, {self._exit()}.")
            if deadline.passed():
                self._process.kill()
                raise DatasetWriteError(f"The recorder's process did not start within {STARTING_PATIENCE:.0f} s.")
        self._raise_report()

    def _raise_report(self) -> None:
        assert self._reports is not None
        try:
            report = self._reports.recv()
        except EOFError:
            return
        if isinstance(report, tuple):
            error, trace = report
            error.add_note(f"In the recorder's process:\n{trace}")
            raise error

    def _raise_failure(self) -> None:
        assert self._reports is not None
        if self._reports.poll(0.0):
            self._raise_report()
        if self._process.exitcode:
            raise DatasetWriteError(
                f"The recorder's process ended early, {self._exit()}. The dataset at {self.root} is whole and has the "
                f"{self.num_episodes} episodes that were written. A new recorder goes on from there."
            )

    def _exit(self) -> str:
        code = self._process.exitcode
        return f"by {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"


_started: list[np.ndarray] = []


@atexit.register
def _ask_all_to_stop() -> None:
    # Registered after multiprocessing's own, which waits for these processes, and so called before it.
    for words in _started:
        words[STOP] = 1


def _stop_with(recorder: LeRobotRecorder, words: np.ndarray) -> None:
    """Let a recorder's process end with its object, and with this process."""
    _started.append(words)
    weakref.finalize(recorder, words.__setitem__, STOP, 1)
