"""What a user does to single trajectories of a buffer: keep them, throw them out, change their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from tensordict import NestedKey

from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.batches import PrefetchingBuffer
from embodichain_rl.replay.schema import as_array
from embodichain_rl.replay.storage import Relabel, TrajectoryStorage, relabel

__all__ = ["KeepingBuffer", "TrajectoryIds"]

TrajectoryIds: TypeAlias = int | Sequence[int] | np.ndarray | torch.Tensor
"""Ids of trajectories, of any shape and in any number, such as what ``extend`` returns."""


class KeepingBuffer(PrefetchingBuffer):
    """A buffer of trajectories that can be pinned, discarded and relabelled."""

    _storage: TrajectoryStorage

    @graph_break
    def pin(self, ids: TrajectoryIds) -> None:
        """Keep trajectories, such as demonstrations: they are never evicted, until :meth:`unpin` or :meth:`discard`.

        Pinned trajectories count for ``max_trajectories`` and ``max_total_steps``. At most the share ``max_pinned`` of
        each can be pinned, and never all trajectories. A trajectory that is written must fit beside the pinned ones.
        Every process that shares the buffer can pin.

        Args:
            ids: their ids, as ``extend`` returns them: one for each step is fine.

        Raises:
            TrajectoryEvictedError: when one of them is not in the buffer (any more); none is pinned then.
            PinLimitError: when more would be pinned than ``max_pinned`` allows; none is pinned then.
            InvalidArgumentError: when they are not ids, such as -1 for a trajectory that is not finished.

        Example:
            >>> rb = TrajectoryReplayBuffer(max_trajectories=10, max_total_steps=1000, chunk_size=2, max_pinned=0.3)
            >>> done = torch.tensor([[0], [0], [1]]).bool()
            >>> rb.pin(rb.extend(TensorDict({"observation": torch.zeros(3, 4), "next": {"done": done}}, [3])))
            >>> rb.pinned
            tensor([0])
        """
        self._storage.ledger.pin(_checked_ids(ids))

    @graph_break
    def unpin(self, ids: TrajectoryIds) -> None:
        """Let pinned trajectories be evicted again; others are ignored.

        One that is older than all others is the next to go.

        Args:
            ids: their ids.

        Raises:
            InvalidArgumentError: when they are not ids.
        """
        self._storage.ledger.unpin(_checked_ids(ids))

    @property
    def pinned(self) -> torch.Tensor:
        """The ids of the pinned trajectories, ascending, ``int64`` ``[n]``."""
        return torch.from_numpy(self._storage.ledger.pinned_ids().copy())

    @graph_break
    def discard(self, ids: TrajectoryIds) -> int:
        """Throw trajectories out, such as broken episodes, pinned or not; return how many there were.

        When it returns, no process draws them again, and their room is free. Evicted ones are ignored.

        Args:
            ids: their ids.

        Raises:
            InvalidArgumentError: when they are not ids that the buffer has given out.
        """
        checked, ledger = _checked_ids(ids), self._storage.ledger
        unknown = checked[~ledger.published(checked)]
        if len(unknown):
            raise InvalidArgumentError(
                f"Got the ids {unknown[:5].tolist()}, which the buffer has not given out. extend() returns ids."
            )
        return ledger.discard(checked)

    def close(self) -> None:
        """Give the memory of the buffer back at once, also where reference cycles hold it.

        Batches that were sampled before stay as they are. Writing and sampling raise ``OwnerGoneError`` from then on,
        in every process. In a process that did not make the buffer, this does nothing. A buffer in a file is synced
        and closed in this process only; its files stay, and it can be opened again.
        """
        with self._discarding_prefetched():
            self._storage.close()

    @graph_break
    def relabel(self, key: NestedKey, fn: Relabel, ids: TrajectoryIds | None = None) -> int:
        """Replace the values of a small key, such as a reward or a label, in trajectories that are stored.

        Readers in every process get the old values of a trajectory or the new ones, never some of both. Ids, pins and
        priorities stay.

        Args:
            key: the key: of steps, such as ``("next", "reward")``; or of whole trajectories, such as ``("trajectory",
                "label")``.
            fn: takes a whole trajectory, a TensorDict ``[T]``, and returns its new values: a tensor of the same dtype,
                ``[T, *shape]`` for a key of steps, ``[*shape]`` for one of whole trajectories. For text, a string or a
                list of strings.
            ids: the trajectories; None for all live ones. Those that are evicted meanwhile are left out.

        Returns:
            How many trajectories were changed.

        Raises:
            SchemaMismatchError: when the key is not stored, or ``fn`` returns another shape or dtype.
            UnsupportedOperationError: for a buffer on a device; for a key that others are read from
                (observations of a ``compact`` buffer, ``"segment_id"``); for more than 16 MiB in one trajectory.
            InvalidArgumentError: when the ids are not ids.

        Example:
            >>> rb = TrajectoryReplayBuffer(max_trajectories=10, max_total_steps=1000, chunk_size=2)
            >>> done = torch.tensor([[0], [0], [1]]).bool()
            >>> data = {"observation": torch.ones(3, 1), "next": {"done": done, "reward": torch.zeros(3, 1)}}
            >>> ids = rb.extend(TensorDict(data, [3]))
            >>> rb.relabel(("next", "reward"), lambda trajectory: trajectory["observation"].cumsum(0))
            1
            >>> rb[0]["next", "reward"].flatten()
            tensor([1., 2., 3.])
        """
        return relabel(self._storage, key, fn, None if ids is None else _checked_ids(ids))


def _checked_ids(ids: Any) -> np.ndarray:
    """Return the different ids among ``ids``, ascending, ``int64`` ``[n]``."""
    try:
        array = as_array(ids.cpu()) if isinstance(ids, torch.Tensor) else np.asarray(ids)
    except ValueError:
        array = np.empty(1, dtype=object)
    if array.size and array.dtype.kind not in "iu":
        raise InvalidArgumentError(f"Got ids={ids!r}; the ids of trajectories are integers.")
    found = np.unique(array.astype(np.int64))
    if len(found) and found[0] < 0:
        raise InvalidArgumentError(
            f"Got the id {found[0]}: extend() returns -1 for steps of a trajectory that is not finished, not accepted, "
            "or on its way to a device. Take the ids from the call that ends it."
        )
    return found
