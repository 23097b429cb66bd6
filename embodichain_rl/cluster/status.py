"""The status of the workers of a cluster, in shared memory: the gateway writes it, every process can read it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from embodichain_rl.engine.remote import RemoteStatus
from embodichain_rl.shared import SharedBlock

__all__ = ["ClusterStatus", "Word"]

NAME_BYTES = 64
"""Size of the name of a node, in bytes of UTF-8."""


class Word:
    """The words of one worker. Written by the gateway."""

    (
        NODE_SIZE,
        IN_FLIGHT,
        BYTES,
        MESSAGES,
        LAG,
        CLOSED,
    ) = range(6)
    WORDS = 6


class ClusterStatus(RemoteStatus):
    """The words of each worker, the name of its node, and the heartbeat of the gateway.

    Like every shared block, it is passed to a child process when that process is started.

    Args:
        num_workers: the number of workers.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._block = SharedBlock(8 * (2 + num_workers * Word.WORDS) + NAME_BYTES * num_workers)
        self._map()

    def _map(self) -> None:
        self._gateway = self._block.array(np.int64, (2,))
        self.words = self._block.array(np.int64, (self.num_workers, Word.WORDS), 16)
        """The words of each worker, ``int64`` ``[num_workers, WORDS]``."""
        offset = 16 + self.words.nbytes
        self._names = self._block.array(np.uint8, (self.num_workers, NAME_BYTES), offset)

    def __getstate__(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "block": self._block}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.num_workers, self._block = state["num_workers"], state["block"]
        self._map()

    def begin(self) -> None:
        """Clear what belongs to an earlier gateway. Called by the owner."""
        self._gateway[:] = time.monotonic_ns(), 0
        self.words[:, [Word.NODE_SIZE, Word.IN_FLIGHT, Word.CLOSED]] = 0

    def beat(self) -> None:
        """Write a heartbeat of the gateway."""
        self._gateway[0] = time.monotonic_ns()

    @property
    def last_beat(self) -> float:
        """The time of the gateway's last heartbeat, in seconds of ``time.monotonic()``."""
        return int(self._gateway[0]) / 1e9

    @property
    def connected(self) -> bool:
        """Whether the gateway has connected to the cluster."""
        return bool(self._gateway[1])

    @connected.setter
    def connected(self, connected: bool) -> None:
        self._gateway[1] = connected

    def set_node(self, index: int, name: str) -> None:
        """Set the node on which a worker runs; empty if it runs on none."""
        content = name.encode()[:NAME_BYTES]
        self.words[index, Word.NODE_SIZE] = 0
        self._names[index, : len(content)] = np.frombuffer(content, dtype=np.uint8)
        self.words[index, Word.NODE_SIZE] = len(content)

    def node(self, index: int) -> str:
        """Return the node on which a worker runs; empty if it runs on none."""
        size = int(self.words[index, Word.NODE_SIZE])
        return self._names[index, :size].tobytes().decode(errors="ignore")

    def nodes(self) -> list[dict[str, Any]]:
        """Return one dict for each machine on which workers run.

        * ``node``: its address and the first digits of its id in the cluster.
        * ``workers``: the indices of its workers.
        * ``in_flight``: messages that are requested, or not written to the buffer yet.
        * ``bytes``, ``messages``: payload received from its workers, since the engine was made.
        * ``lag``: mean seconds from the end of an episode on the machine until its trajectory was in the buffer, of
          the newest message of each worker.
        """
        found: dict[str, list[int]] = {}
        for index in range(self.num_workers):
            name = self.node(index)
            if name:
                found.setdefault(name, []).append(index)
        rows = []
        for name, indices in sorted(found.items()):
            words = self.words[indices]
            rows.append(
                {
                    "node": name,
                    "workers": indices,
                    "in_flight": int(words[:, Word.IN_FLIGHT].sum()),
                    "bytes": int(words[:, Word.BYTES].sum()),
                    "messages": int(words[:, Word.MESSAGES].sum()),
                    "lag": float(words[:, Word.LAG].mean()) / 1e9,
                }
            )
        return rows
