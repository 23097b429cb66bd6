"""One way in from outside: an engine that runs in another process, to be looked at.

An engine has a *manifest* in nameless memory, as a buffer has: the numbers of its blocks. A process of the same user
finds it in ``/proc/<pid>/fd`` and maps the blocks to read them. The engine does nothing for it, and nothing is left
behind.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from embodichain_rl.engine.reading.reader import EngineReader
from embodichain_rl.engine.state import EngineChannel
from embodichain_rl.errors import SharingError
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.durable import AttachedBlocks, find_manifests, open_block
from embodichain_rl.replay.rate_limiter import RateLimiter
from embodichain_rl.replay.sampling import ChunkSampler
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.shared import SharedBlock, own_process, process_start

__all__ = ["EngineManifest", "find_engines", "watch_engine"]

NAME = "embodichain_rl_engine"
MANIFEST_BYTES = 1 << 14


class EngineManifest:
    """The description of an engine for processes that watch it.

    Args:
        channel: the shared state of the engine.
        buffer: its buffer.
        limiter: its rate limiter.
        title: what the engine is called, such as the id of its environment.
    """

    def __init__(
        self, channel: EngineChannel, buffer: TrajectoryReplayBuffer, limiter: RateLimiter | None, title: str
    ) -> None:
        storage = buffer.storage
        place = None
        if storage.path is not None:
            place = {"path": str(storage.path)}
        elif not storage.staged:
            place = {"handle": buffer.handle}
        content = {
            "title": title,
            "channel": channel.block.number,
            "num_workers": channel.num_workers,
            "buffer": place,
            "limiter": None if limiter is None else limiter.described(),
        }
        self._block = SharedBlock(MANIFEST_BYTES, name=NAME)
        words = self._block.array(np.uint8, (MANIFEST_BYTES,))
        encoded = json.dumps(content).encode().ljust(MANIFEST_BYTES, b"\0")
        words[:] = np.frombuffer(encoded, dtype=np.uint8)

    @property
    def handle(self) -> str:
        """Name of the engine for those who watch it: ``<pid>:<start time>:<number>``."""
        pid, start = own_process()
        return f"{pid}:{start}:{self._block.number}"


def find_engines(pid: int) -> dict[int, dict[str, Any]]:
    """Return the manifests of the engines that a process has open, by their numbers; a child has those of its parent.

    Raises:
        SharingError: if the process does not exist, or is of another user or in another pid namespace.
    """
    return find_manifests(pid, NAME)


def watch_engine(pid: int, number: int | None = None) -> tuple[EngineReader, AttachedBlocks | None]:
    """Return an engine of another process to look at, and the blocks of its buffer; None for a buffer in a file.

    Args:
        pid: the id of the process.
        number: which of its engines, as :func:`find_engines` has it; None if there is one.

    Raises:
        SharingError: if there is no such process or engine, or its buffer is on a device.
    """
    found = find_engines(pid)
    if number is not None:
        found = {key: content for key, content in found.items() if key == number}
    if len(found) != 1:
        raise SharingError(f"Process {pid} has {len(found)} engines; `embodichain-rl ps` lists those of all processes.")
    (content,) = found.values()
    place, blocks = content["buffer"], None
    if place is None:
        raise SharingError(f"The buffer of the engine of process {pid} is on a device, which only its owner can read.")
    if "path" in place:
        storage = TrajectoryStorage.open(place["path"], "r")
    else:
        storage, blocks = TrajectoryStorage.watched(_owner_of(place["handle"], pid))
    buffer = TrajectoryReplayBuffer(storage=storage, sampler=ChunkSampler(1))
    channel = EngineChannel.over(content["num_workers"], open_block(pid, content["channel"], "channel", read_only=True))
    described, limiter = content["limiter"], None
    if described is not None:
        limiter = RateLimiter.over(described, open_block(pid, described["number"], "limiter", read_only=True))
    return EngineReader(buffer, limiter, channel, 0.0), blocks


def _owner_of(handle: str, pid: int) -> str:
    """Return the handle of the buffer by way of a process that has it open, which may be a child of its owner."""
    return ":".join([str(pid), str(process_start(pid)), handle.split(":")[2]])
