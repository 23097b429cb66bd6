"""Which chunks: draws trajectories and starts from the ledger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data.replay_buffers.samplers import Sampler

from embodichain_rl._checks import checked_int
from embodichain_rl.errors import (
    ChunkTooLongError,
    EmptyBufferError,
    InvalidArgumentError,
    TrajectoryEvictedError,
)
from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.windows import chunk_index, starts_from_uniform

__all__ = ["ChunkSampler"]

REJECTION_ROUNDS = 3
"""How often draws that hit a trajectory shorter than the chunk are repeated before the ledger is scanned once."""

REDRAW_ROUNDS = 100
"""How often chunks are drawn again whose trajectory was evicted while it was read."""


class ChunkSampler(Sampler):
    """A TorchRL sampler of chunks: ``L`` consecutive steps of one trajectory, ``[batch_size, L]`` a batch.

    A trajectory is drawn uniformly among the live ones with at least ``L`` steps, then a start uniformly among its
    ``T - L + 1`` valid ones. The work does not depend on how much the buffer holds: trajectories are drawn and kept if
    they are long enough, and only where most are too short is the ledger scanned.

    Random numbers come from the buffer's ``generator``, or from torch's global one as in TorchRL's samplers.

    Args:
        chunk_size: the length ``L`` in steps; or a picklable callable without arguments that returns it, asked once a
            batch, as a :class:`~embodichain_rl.datasets.sampler.ChunkSizeSampler` is.

    Raises:
        InvalidArgumentError: in the constructor, for a chunk size that is neither.
        EmptyBufferError: by ``sample``, when there is no trajectory yet.
        ChunkTooLongError: by ``sample``, when no live trajectory has ``L`` steps.

    Example:
        >>> rb = TensorDictReplayBuffer(
        ...     storage=TrajectoryStorage(max_trajectories=100, max_total_steps=30_000),
        ...     writer=TrajectoryWriter(), sampler=ChunkSampler(16), batch_size=32,
        ... )
    """

    def __init__(self, chunk_size: int | Callable[[], int]) -> None:
        if not callable(chunk_size):
            chunk_size = checked_int("chunk_size", chunk_size, minimum=1)
        self.chunk_size = chunk_size
        self._redrawn = 0

    def next_length(self) -> int:
        """Returns the length of the next batch's chunks, asking ``chunk_size`` if it is a callable.

        Raises:
            InvalidArgumentError: when the callable does not return an int of at least 1.
        """
        if not callable(self.chunk_size):
            return self.chunk_size
        return checked_int(f"the return value of chunk_size={self.chunk_size!r}", self.chunk_size(), minimum=1)

    @property
    def redrawn(self) -> int:
        """How many chunks this process drew again because their trajectory was evicted while it was read."""
        return self._redrawn

    def sample_chunks(
        self, storage: TrajectoryStorage, batch_size: int, length: int, generator: torch.Generator | None = None
    ) -> TensorDict:
        """Draws and copies a batch of chunks, without a lock; what is evicted meanwhile is drawn again.

        Args:
            storage: where to draw from.
            batch_size: how many chunks.
            length: steps of each.
            generator: for the draws; by default the buffer's.

        Returns:
            The chunks, ``[batch_size, length]``, with ``"index"`` ``[batch_size, length, 2]``: trajectory id and step.
        """
        ledger = storage.ledger
        generator = generator or self._rng
        rows, offsets = self._draw(ledger, batch_size, length, generator)
        values = storage.copy_chunks(rows.starts + offsets, length)
        ids = rows.ids
        for _ in range(REDRAW_ROUNDS):
            valid = ledger.still_valid(ids)
            if np.count_nonzero(valid) == batch_size:
                return storage.build_sample(values, chunk_index(ids, offsets, length))
            torn = np.flatnonzero(~valid)
            self._redrawn += len(torn)
            rows, new_offsets = self._draw(ledger, len(torn), length, generator)
            for value, new in zip(values, storage.copy_chunks(rows.starts + new_offsets, length), strict=True):
                value[torch.from_numpy(torn)] = new
            ids, offsets = ids.copy(), offsets.copy()
            ids[torn], offsets[torn] = rows.ids, new_offsets
        raise TrajectoryEvictedError(
            f"In {REDRAW_ROUNDS} rounds some of {batch_size} chunks were always evicted while they were read: the "
            f"buffer of {storage.max_size:,} trajectories turns over faster than a batch is copied. Make it larger, or "
            "sample smaller batches."
        )

    def _draw(
        self, ledger: Ledger, count: int, length: int, generator: torch.Generator | None
    ) -> tuple[Rows, np.ndarray]:
        """``count`` rows of trajectories with at least ``length`` steps, and a start within each."""
        parts: list[Rows] = []
        uniforms: list[np.ndarray] = []
        missing = count
        for _ in range(REJECTION_ROUNDS):
            oldest, end = ledger.live_range()
            if end == oldest:
                raise EmptyBufferError(
                    "Cannot sample from an empty storage: no trajectory is finished yet. Wait until len(rb) > 0."
                )
            # One random number says both: its whole part which trajectory, the rest where in it.
            place = torch.rand(missing, dtype=torch.float64, generator=generator).numpy() * (end - oldest)
            which = place.astype(np.int64)
            uniform = place - which
            rows = ledger.rows_of(which + oldest)
            fits = rows.lengths >= length
            fitting = int(np.count_nonzero(fits))
            if fitting == count:
                return rows, starts_from_uniform(uniform, rows.lengths, length)
            parts.append(Rows(rows.ids[fits], rows.starts[fits], rows.lengths[fits]))
            uniforms.append(uniform[fits])
            missing -= fitting
            if not missing:
                break
        else:
            parts.append(self._scan(ledger, missing, length, generator))
            uniforms.append(torch.rand(missing, dtype=torch.float64, generator=generator).numpy())
        rows = Rows(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.lengths for part in parts]),
        )
        return rows, starts_from_uniform(np.concatenate(uniforms), rows.lengths, length)

    def _scan(self, ledger: Ledger, count: int, length: int, generator: torch.Generator | None) -> Rows:
        live = ledger.live_rows()
        fitting = np.flatnonzero(live.lengths >= length)
        if not len(fitting):
            longest = int(live.lengths.max(initial=0))
            raise ChunkTooLongError(
                f"Got chunk_size {length}, but the longest of {len(live.ids):,} live trajectories has {longest} steps. "
                f"Ask for at most {longest} steps, or wait for longer trajectories."
            )
        uniform = torch.rand(count, dtype=torch.float64, generator=generator).numpy()
        chosen = fitting[(uniform * len(fitting)).astype(np.int64)]
        return Rows(live.ids[chosen], live.starts[chosen], live.lengths[chosen])

    def sample(
        self, storage: TrajectoryStorage, batch_size: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
        """Draws a batch for a plain TorchRL buffer: trajectory ids and steps, each ``[batch_size, L]``.

        The buffer reads them with ``storage.get`` afterwards. A plain buffer keeps its own lock meanwhile, or, where
        that is not shared, may find that a trajectory is gone (``TrajectoryEvictedError``).
        """
        _check_storage(storage)
        batch_size = checked_int("batch_size", batch_size, minimum=1)
        length = self.next_length()
        rows, offsets = self._draw(storage.ledger, batch_size, length, self._rng)
        index = torch.from_numpy(chunk_index(rows.ids, offsets, length))
        return (index[..., 0], index[..., 1]), {}

    def _empty(self) -> None:
        """Does nothing: what can be drawn is in the ledger."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict: draws are a function of the generator and of what the buffer holds."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: see :meth:`state_dict`."""

    def dumps(self, path: str | Path) -> None:
        """Does nothing: see :meth:`state_dict`."""

    def loads(self, path: str | Path) -> None:
        """Does nothing: see :meth:`state_dict`."""

    def __repr__(self) -> str:
        return f"ChunkSampler(chunk_size={self.chunk_size!r})"


def _check_storage(storage: object) -> None:
    if not isinstance(storage, TrajectoryStorage):
        raise InvalidArgumentError(
            f"Got a {type(storage).__name__}; a ChunkSampler draws from a TrajectoryStorage. For other storages use "
            "TorchRL's SliceSampler."
        )
