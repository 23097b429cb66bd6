"""What a storage of trajectories is read by: positions, ids, and pairs of id and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict

from embodichain_rl._checks import checked_key
from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import CodecError, SchemaMismatchError
from embodichain_rl.replay.device import DeviceArena, DeviceTable
from embodichain_rl.replay.host import Arena, TrajectoryTable
from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.schema import Schema
from embodichain_rl.replay.storage.reads.by_id import read_trajectory, trajectory_lengths
from embodichain_rl.replay.storage.reads.columns import as_column_key, read_column
from embodichain_rl.replay.storage.reads.items import contains, get_items
from embodichain_rl.replay.storage.reads.whole_reads import ReadView

__all__ = ["ReadableTrajectories"]


class ReadableTrajectories:
    """The reads of trajectories whose memory a subclass provides; see :class:`TrajectoryStorage`."""

    ledger: Ledger
    max_size: int

    def __len__(self) -> int:
        return len(self.ledger)

    @property
    def schema(self) -> Schema | None:
        """Keys, shapes and dtypes of a step; None before allocation."""
        raise NotImplementedError

    @property
    def arena(self) -> Arena | DeviceArena:
        """The memory of the steps."""
        raise NotImplementedError

    @property
    def table(self) -> TrajectoryTable | DeviceTable | None:
        """The values of whole trajectories; None if no key belongs to whole trajectories."""
        raise NotImplementedError

    @property
    def view(self) -> ReadView:
        """What it takes to read trajectories: the ledger, the arena and the table.

        Raises:
            TrajectoryIndexError: before allocation.
            SharingError: where the arena lies on a device, in another process than its owner's.
        """
        return ReadView(self.ledger, self.arena, self.table)

    def values_at(self, number: int, steps: np.ndarray, rows: Rows) -> torch.Tensor:
        """Return copies of the values of a field at some steps of the arena, decoded where they are kept encoded.

        Of evicted trajectories they are arbitrary: check ``ledger.unchanged(rows)`` afterwards.

        Args:
            number: the number of the field.
            steps: steps of the arena, ``int64`` ``[*B]``.
            rows: the rows of their trajectories.

        Raises:
            CodecError: when a frame of a trajectory that is still there can't be decoded.
        """
        arena = self.arena
        value = arena.copy_steps(number, steps)
        try:
            return arena.resolved(number, value)
        except CodecError:
            if self.ledger.unchanged(rows).all():
                raise
            field = arena.schema.fields[number]
            return torch.zeros((*steps.shape, *field.shape), dtype=field.dtype)

    @graph_break
    def get(self, index: Any) -> Any:
        """Return copies of whole trajectories, of single steps, or of one key of all steps.

        Args:
            index: one of

                * an int: the trajectory at that position, ``[T_i]``; 0 is the oldest.
                * a slice, or a list, tensor or mask ``[B]`` of positions: these trajectories, ``[B, T_max]``, padded
                  with zeros; ``("collector", "mask")`` is True for real steps.
                * integers ``[..., 2]`` with at least two dimensions, such as the ``"index"`` of a batch: the steps with
                  these pairs of trajectory id and step within it, ``[...]``.
                * a pair of tensors of the same shape, trajectory ids and steps: the same.
                * a key, such as ``"observation"`` or ``("next", "done")``: its values at all live steps,
                  ``[steps, *shape]``, one trajectory after the other, oldest first.

        Raises:
            TrajectoryIndexError: when there is no trajectory at a position.
            TrajectoryEvictedError: when a trajectory with a given id is no longer in the buffer, or lacks the step.
            MissingKeyError: when there is no such key.
        """
        key = as_column_key(index)
        return get_items(self.view, index) if key is None else read_column(self.view, key)

    def trajectory(self, trajectory_id: int) -> TensorDict:
        """Return a copy of a whole trajectory, ``[T]``, by its id.

        Args:
            trajectory_id: an id as ``extend`` returns it, or as it is in ``("trajectory", "id")`` of a sample.

        Raises:
            TrajectoryEvictedError: when there is no such trajectory in the buffer (any more).
        """
        return read_trajectory(self.view, trajectory_id)

    def trajectory_lengths(self, ids: int | Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return the lengths of trajectories, by their ids, in steps.

        Args:
            ids: integers of any shape, such as ``batch["trajectory", "id"][:, 0]``.

        Returns:
            ``int64`` of the shape of ``ids``, on the CPU.

        Raises:
            TrajectoryEvictedError: when one of them is not in the buffer (any more).
            InvalidArgumentError: when they are not integers.

        Example:
            >>> storage = TrajectoryStorage(max_trajectories=10, max_total_steps=1000)
            >>> writer = TrajectoryWriter()
            >>> writer.register_storage(storage)
            >>> done = torch.tensor([[0], [1], [0], [0], [1]]).bool()
            >>> ids = writer.extend(TensorDict({"observation": torch.zeros(5, 4), "next": {"done": done}}, [5]))
            >>> storage.trajectory_lengths(ids)
            tensor([2, 2, 3, 3, 3])
        """
        return trajectory_lengths(self.ledger, ids)

    def trajectory_values(self, key: NestedKey, ids: np.ndarray) -> np.ndarray:
        """Return the values of a key of whole trajectories; text as its ids.

        For evicted trajectories the value is arbitrary: check ``ledger.still_valid(ids)`` afterwards.

        Args:
            key: such as ``("trajectory", "task")``.
            ids: ``int64`` ``[n]``, of trajectories that were published.

        Returns:
            ``[n, *shape]``, one row per trajectory; integers of the same size if numpy lacks the dtype.

        Raises:
            SchemaMismatchError: when there is no such key.
        """
        table = self.table
        if table is None:
            raise SchemaMismatchError(f"Got {key!r}, but what is stored has no key under 'trajectory': {self.schema}.")
        return table.column(checked_key(key), ids)

    def contains(self, item: int | Sequence[int] | torch.Tensor) -> bool | list[bool] | torch.Tensor:
        """Return whether there is a trajectory at each position of ``item``, or a step for each pair in ``[..., 2]``.

        See :meth:`get` for what is a position and what is a pair.
        """
        return contains(self.ledger, item)
