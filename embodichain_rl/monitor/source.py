"""What is watched: an engine or a buffer, of this process or of another one, and a reading of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

from embodichain_rl.engine.reading import EngineReader, condition_of, find_engines, watch_engine
from embodichain_rl.errors import InvalidArgumentError, SharingError
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.durable import AttachedBlocks, find_buffers, parsed_handle
from embodichain_rl.replay.sampling import ChunkSampler
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.shared import process_is_alive, process_start

__all__ = ["Reading", "Running", "Source", "Watchable", "running"]

Watchable: TypeAlias = "EngineReader | TrajectoryReplayBuffer"
"""What can be watched."""

NOTICE_EVERY = 0.1
"""Seconds between two checks of whether a worker was lost."""


@dataclass(frozen=True)
class Reading:
    """What was seen at one moment.

    Attributes:
        at: Unix time, in seconds.
        stats: ``stats()`` of the engine or the buffer.
        rates: what has changed since the reading before, by the second: ``inserts``, ``samples``, ``steps``, and
            ``starvation``, the share of the time that the learner waited in ``sample()``. Empty at first.
    """

    at: float
    stats: dict[str, Any]
    rates: dict[str, float] = field(default_factory=dict)


class Source:
    """An engine or a buffer that is looked at. Nothing in it is changed, and nobody waits for it.

    Args:
        target: of this process; :meth:`attach` finds those of others.
    """

    def __init__(self, target: Watchable) -> None:
        if not isinstance(target, (EngineReader, TrajectoryReplayBuffer)):
            raise InvalidArgumentError(
                f"Got a {type(target).__name__}; an engine or a TrajectoryReplayBuffer can be watched."
            )
        self.target: Watchable = target
        self.title = ""
        self._blocks: AttachedBlocks | None = None
        self._number: int | None = None
        self._owner: tuple[int, int] | None = None
        self._before: Reading | None = None
        self._condition: tuple[object, ...] = ()

    @classmethod
    def attach(cls, pid: int | str | None = None, path: str | os.PathLike[str] | None = None) -> Self:
        """Return the engine or the buffer of another process, or a buffer in a file.

        Args:
            pid: the id of the process. If it has an engine, that is watched, otherwise its buffer. With several of
                them, the handle of one (``engine.handle``, ``rb.handle``, ``running()[i].handle``).
            path: the directory of a buffer. Without both, the only engine or buffer of this user is watched.

        Raises:
            SharingError: if there is none, or more than one.
            BufferNotFoundError: if there is no buffer at ``path``.
        """
        if pid is not None and path is not None:
            raise InvalidArgumentError("Got pid and path; give one of them.")
        if path is not None:
            source = cls(_over(TrajectoryStorage.open(path, "r")))
            source.title = str(path)
            return source
        if pid is None:
            found = running()
            if len(found) != 1:
                pids = ", ".join(f"{each.pid} ({each.kind} {each.title})".replace(" )", ")") for each in found)
                raise SharingError(
                    f"This user has {len(found)} engines and buffers"
                    + (f": of the processes {pids}. Name one: --pid." if found else ". Name the path of one in a file.")
                )
            pid = found[0].handle
        process, number = parsed_handle(pid)
        source = cls.__new__(cls)
        source._before, source._number, source._condition = None, number, ()
        source._connect(process)
        return source

    def _connect(self, pid: int) -> None:
        engines, number = find_engines(pid), self._number
        self._owner = pid, process_start(pid)
        if engines and (number is None or number in engines):
            self.target, self._blocks = watch_engine(pid, number)
            self.title = engines[number or next(iter(engines))]["title"]
        else:
            handle = pid if number is None else f"{pid}:{process_start(pid)}:{number}"
            storage, self._blocks = TrajectoryStorage.watched(handle)
            self.target, self.title = _over(storage), ""

    @property
    def is_engine(self) -> bool:
        """Whether it is an engine."""
        return isinstance(self.target, EngineReader)

    @property
    def pid(self) -> int | None:
        """The process that has it; None for a buffer in a file."""
        if self._owner is not None:
            return self._owner[0]
        return None if self.buffer.path is not None else os.getpid()

    @property
    def buffer(self) -> TrajectoryReplayBuffer:
        """The buffer, or that of the engine."""
        return self.target.replay_buffer if isinstance(self.target, EngineReader) else self.target

    @property
    def is_alive(self) -> bool:
        """Whether the process that has it still runs."""
        return self._owner is None or process_is_alive(*self._owner)

    def read(self) -> Reading:
        """Return what is seen now.

        Raises:
            SharingError: if the process has ended, or has given up the buffer.
        """
        stats, before = self._stats(), self._before
        self._before = reading = Reading(time.time(), stats, _rates(before, stats) if before else {})
        return reading

    @property
    def has_changed(self) -> bool:
        """Whether a worker was lost or has started, or the state has changed, since what was read last."""
        return not self.is_alive or self._condition != self._read_condition()

    def changes(self, seconds: float) -> Iterator[Reading]:
        """Yield a reading whenever :attr:`has_changed`, for some seconds.

        So the loss of a worker is seen at once, and not at the next :meth:`read`. The rates are those of the last one.

        Raises:
            SharingError: as :meth:`read`.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, NOTICE_EVERY))
            if self.has_changed:
                yield self.glance()

    def glance(self) -> Reading:
        """Return what is seen now, with the rates of the last :meth:`read`, which go on being counted from there.

        Raises:
            SharingError: as :meth:`read`.
        """
        return Reading(time.time(), self._stats(), self._before.rates if self._before else {})

    def _stats(self) -> dict[str, Any]:
        if not self.is_alive:
            raise SharingError(f"Process {self.pid} has ended.")
        if self._blocks is not None and self._owner is not None and not self._blocks.is_current:
            self._connect(self._owner[0])  # it has emptied its buffer, and taken new memory
        self._condition = self._read_condition()  # before the rest: what changes meanwhile is seen next time
        return self.target.stats()

    def _read_condition(self) -> tuple[object, ...]:
        return condition_of(self.target) if isinstance(self.target, EngineReader) else ()


def _over(storage: TrajectoryStorage) -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(storage=storage, sampler=ChunkSampler(1))


def _rates(before: Reading, stats: dict[str, Any]) -> dict[str, float]:
    seconds = max(time.time() - before.at, 1e-3)

    def grown(name: str) -> float:
        return max(0.0, stats[name] - before.stats[name])

    rates = {
        "inserts": grown("inserted") / seconds,
        "steps": grown("inserted_steps") / seconds,
        "samples": grown("samples") / seconds,
        "batches": grown("batches") / seconds,
    }
    learners = sum(1 for row in stats["processes"] if row["alive"] and row["batches"])
    waited = max(0.0, _waited(stats) - _waited(before.stats))
    if learners and rates["batches"]:
        rates["starvation"] = min(1.0, waited / seconds / learners)
    return rates


def _waited(stats: dict[str, Any]) -> float:
    return (stats["data_s"] or 0.0) * stats["batches"]


@dataclass(frozen=True)
class Running:
    """An engine or a buffer of a process of this user.

    Attributes:
        pid: the process that made it.
        kind: ``"engine"`` or ``"buffer"``.
        title: the environment of an engine.
        handle: what :meth:`Source.attach` takes.
    """

    pid: int
    kind: str
    title: str
    handle: str


def running() -> list[Running]:
    """Return the engines of this user, and the buffers in nameless memory that no engine has, by process id."""
    found: dict[int, Running] = {}
    of_engines: set[str] = set()
    for name in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int):
        pid = int(name)
        try:
            if pid == os.getpid() or os.stat(f"/proc/{pid}").st_uid != os.geteuid():
                continue
            engines, buffers = find_engines(pid), find_buffers(pid)
        except (OSError, SharingError, StopIteration):
            continue
        start = process_start(pid)
        for number, content in engines.items():
            found.setdefault(number, Running(pid, "engine", content["title"], f"{pid}:{start}:{number}"))
            of_engines.add((content["buffer"] or {}).get("handle", "::").split(":")[2])
        for number in buffers:
            found.setdefault(number, Running(pid, "buffer", "", f"{pid}:{start}:{number}"))
    return [each for number, each in found.items() if each.kind == "engine" or str(number) not in of_engines]


def command_of(pid: int) -> str:
    """Return the command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def watched(target: Watchable | Source) -> Source:
    """Return the source of something that is to be watched."""
    return target if isinstance(target, Source) else Source(target)
