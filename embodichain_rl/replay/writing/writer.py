"""Cuts what collectors hand over into whole trajectories."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data.replay_buffers.writers import Writer

from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import (
    InvalidArgumentError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.schema import (
    MASK,
    Key,
    Leaf,
    Schema,
    Shifted,
    as_array,
    as_tensor,
    leaves_of,
    resolve_texts,
)
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.writing.acceptance import Accept, AcceptFilter
from embodichain_rl.replay.writing.device_data import extend_from_device
from embodichain_rl.replay.writing.pending import PendingTrajectories
from embodichain_rl.replay.writing.runs import (
    PENDING,
    POLICY_VERSION_KEY,
    Run,
    checked_shape,
    ends_of,
    real_lengths,
    runs_of,
    traj_ids_of,
)

__all__ = ["TrajectoryWriter"]


class TrajectoryWriter(Writer):
    """A TorchRL writer that stores trajectories when they are whole.

    It takes everything that TorchRL's collectors hand over:

    * flat ``[T]`` steps of one or several whole trajectories (``trajs_per_batch=``);
    * pieces that begin and end anywhere, ``[T]`` or ``[B, T]`` with one environment a row: they are put together by
      ``("collector", "traj_ids")``, or by row where there are none, until ``("next", "done")``, ``"terminated"`` or
      ``"truncated"`` is True. Pieces from different threads are kept apart, since ids are unique within one collector
      only;
    * padded trajectories ``[B, T]`` with ``("collector", "mask")``: only what is real is stored;
    * lazy stacks, and single steps through ``add``;
    * text (``NonTensorData`` and ``NonTensorStack`` of strings, as a TensorDict holds them), stored as ids in
      ``storage.texts``;
    * under ``"trajectory"``, tensors and text that are the same at every step of a trajectory: stored once.

    What is not finished is copied, never kept by reference, since collectors use their memory again. It stays in the
    process that collected it; a copy of the writer in another process starts without.

    The index that ``extend`` returns is shaped like the data: for each step the id of its trajectory, -1 where the
    trajectory is not finished, or not accepted, or is on its way to a device.

    ``extend`` is all or nothing: data that is refused changes nothing, and can be extended again when it is mended.

    Each trajectory is stored with the version of the policy that made its last step: the value of
    ``"policy_version"`` there, which TorchRL's collectors write with ``track_policy_version=True``; 0 without.

    Args:
        accept: judges each whole trajectory, a TensorDict ``[T]``: False leaves it out. ``accept_success`` keeps those
            that end with a success, by ``("next", "success")``. None keeps all.

    Raises:
        SchemaMismatchError: by ``extend``, when keys, shapes or dtypes differ from the arena's or no end key is there;
            with a storage that is ``compact``, when a next observation is not the observation of the step after.
        TrajectoryTooLongError: by ``extend``, when a trajectory exceeds ``max_total_steps``.
        TrajectoryValueError: by ``extend``, when what is written under ``"trajectory"`` changes within one.
        TextTableFullError: by ``extend``, when there is too much text that is different every time.
        PendingStepsError: by ``extend``, when unfinished trajectories pile up, because their end never comes.

    Example:
        >>> storage = TrajectoryStorage(max_trajectories=10, max_total_steps=1000)
        >>> writer = TrajectoryWriter()
        >>> writer.register_storage(storage)
        >>> done = torch.tensor([[0], [0], [1]]).bool()
        >>> writer.extend(TensorDict({"observation": torch.zeros(3, 4), "next": {"done": done}}, [3]))
        tensor([0, 0, 0])
    """

    _storage: TrajectoryStorage

    def __init__(self, *, accept: Accept | None = None) -> None:
        super().__init__()
        self._filter = None if accept is None else AcceptFilter(accept)
        self._start_anew()
        _writers.add(self)

    def _start_anew(self) -> None:
        self._pending = PendingTrajectories()
        self._of_thread = threading.local()

    def _producer(self) -> int:
        """A number of the calling thread's own. The ids of threads are used again, and so can't tell them apart."""
        number: int | None = getattr(self._of_thread, "number", None)
        if number is None:
            number = self._of_thread.number = next(_numbers)
        return number

    def register_storage(self, storage: TrajectoryStorage) -> None:
        """Attaches the storage to write to.

        Raises:
            InvalidArgumentError: when it is not a :class:`TrajectoryStorage`.
        """
        if not isinstance(storage, TrajectoryStorage):
            raise InvalidArgumentError(
                f"Got a {type(storage).__name__}; a TrajectoryWriter writes to a TrajectoryStorage. For other storages "
                "use TorchRL's RoundRobinWriter."
            )
        super().register_storage(storage)

    @property
    def _write_count(self) -> int:
        # Read by TorchRL's rb.write_count, and through it by init_random_frames. All processes count in the ledger.
        return self._storage.ledger.steps_written

    @property
    def pending_steps(self) -> int:
        """Steps of unfinished trajectories that this process holds."""
        return self._pending.steps

    @graph_break
    def add(self, data: TensorDictBase) -> int | torch.Tensor:
        """Takes one step, ``[]``, or one of each of several environments, ``[B]``.

        Returns:
            The id of the trajectory if it ends with the step, else -1; a tensor ``[B]`` of them for several.
        """
        return self.extend(data.unsqueeze(1))[:, 0] if data.ndim else int(self.extend(data.unsqueeze(0))[0])

    @graph_break
    def extend(self, data: TensorDictBase) -> torch.Tensor:
        """Takes steps, ``[T]`` or ``[B, T]``; returns an ``int64`` index of the same shape (see the class)."""
        if self._storage is None:
            raise UnsupportedOperationError("This writer has no storage yet: call register_storage(storage) first.")
        shape = checked_shape(data)
        leaves = leaves_of(data)
        lengths = real_lengths(leaves.pop(MASK, None), shape)
        there = self._storage.directly(leaves) if self._storage.staged else None
        if there is not None:
            return extend_from_device(
                self._storage, there, self._pending, self, self._producer(), leaves, shape, lengths
            )
        schema = self._storage.schema
        if schema is None:
            schema = Schema.of_leaves(leaves, data.ndim)
            rows = self._rows_of(schema, leaves, shape)
            self._cut(schema, self._storage.shifted_in(schema), rows, lengths)  # refuses before memory is taken
            schema = self._storage.allocate_schema(schema)
        rows = self._rows_of(schema, leaves, shape)
        runs, pieces = self._cut(schema, self._storage.shifted_in(schema), rows, lengths)
        trajectory_values = self._pending.trajectory_values(
            schema, runs, rows[len(schema.fields) :], self._storage.texts
        )
        index = np.full(shape if data.ndim == 2 else (1, *shape), PENDING, dtype=np.int64)
        for run, piece, values in zip(runs, pieces, trajectory_values, strict=True):
            if run.ends:
                earlier = self._pending.get(run.key).pieces
                index[run.row, run.start : run.stop] = self._write([*earlier, piece], values)
                self._pending.end(run.key)
            else:
                pending = self._pending.begin(run.key)
                pending.pieces.append([value.copy() for value in piece])
                pending.trajectory_values = values
                pending.steps += run.stop - run.start
        return torch.from_numpy(index.reshape(shape))

    def _cut(
        self, schema: Schema, shifted: Shifted, rows: list[np.ndarray], lengths: np.ndarray | None
    ) -> tuple[list[Run], list[list[np.ndarray]]]:
        """The runs of steps that belong to one trajectory each, and of each one array ``[n, *shape]`` a field."""
        runs = list(runs_of(self._producer(), ends_of(schema, rows), traj_ids_of(schema, rows), lengths))
        check_length = self._storage.check_length if self._storage.staged else None
        self._pending.refuse_endless(runs, self._storage.max_total_steps, check_length)
        self._pending.refuse_mixed_devices(runs, on_device=False)
        pieces = [[value[run.row, run.start : run.stop] for value in rows[: len(schema.fields)]] for run in runs]
        self._pending.refuse_unshifted(schema, shifted, runs, pieces)
        return runs, pieces

    def _write(self, pieces: Sequence[Sequence[np.ndarray]], of_trajectory: Sequence[np.ndarray]) -> int:
        """Writes one whole trajectory; returns its id, or ``PENDING`` if it is not accepted."""
        steps = sum([len(piece[0]) for piece in pieces])
        if not self.admits(steps, lambda: self._trajectory(pieces, of_trajectory)):
            return PENDING
        version = self.stored_version(self._policy_version(pieces))
        number = self._storage.write(pieces, of_trajectory, policy_version=version)
        self.stored(steps)
        return number

    # What an Admission answers; a subclass may answer otherwise.

    def admits(self, steps: int, trajectory: Callable[[], TensorDictBase]) -> bool:
        """Return whether ``accept`` keeps a whole trajectory; see :class:`Admission`."""
        return self._filter is None or self._filter.admit(trajectory())

    def stored_version(self, version: int) -> int:
        """Return the policy version that a trajectory is stored with: the one in its last step."""
        return version

    def stored(self, steps: int) -> None:
        """Take note of a stored trajectory; does nothing."""

    def _trajectory(
        self, pieces: Sequence[Sequence[np.ndarray]], of_trajectory: Sequence[np.ndarray]
    ) -> TensorDictBase:
        """The trajectory as whoever judges it sees it, ``[T]``."""
        schema = self._storage.schema
        assert schema is not None, "a trajectory is whole only when its steps were held against it"
        arrays = map(np.concatenate, zip(*pieces, strict=True))
        values = [as_tensor(array, field.dtype) for array, field in zip(arrays, schema.fields, strict=True)]
        steps = sum(len(piece[0]) for piece in pieces)
        data = schema.build(values, [steps])
        for of_field, value in zip(schema.trajectory_fields, of_trajectory, strict=True):
            data.set(of_field.key, as_tensor(value, of_field.dtype).expand(steps, *of_field.shape))
        return resolve_texts(data, schema.text_keys, self._storage.texts)

    def _policy_version(self, pieces: Sequence[Sequence[np.ndarray]]) -> int:
        """The version of the policy that made the last step."""
        schema = self._storage.schema
        assert schema is not None, "a trajectory is whole only when its steps were held against it"
        number = schema.number_of(POLICY_VERSION_KEY)
        return 0 if number is None or schema.fields[number].is_text else int(pieces[-1][number][-1].reshape(-1)[0])

    @property
    def rejected(self) -> int:
        """How many trajectories this process did not accept."""
        return 0 if self._filter is None else self._filter.num_rejected

    def _rows_of(self, schema: Schema, leaves: Mapping[Key, Leaf], shape: torch.Size) -> list[np.ndarray]:
        """The values of each field, ``[B, T, *shape]``; of text its ids."""
        texts = self._storage.texts
        values = [
            texts.ids_of(value) if isinstance(value, np.ndarray) else as_array(value)
            for value in schema.in_order(leaves, len(shape))
        ]
        return [value[None] for value in values] if len(shape) == 1 else values

    def discard_pending(self) -> int:
        """Forgets the unfinished trajectories of this process; returns how many steps they had."""
        steps = self.pending_steps
        self._pending.clear()
        return steps

    def _empty(self, empty_write_count: bool = True) -> None:
        self._pending.clear()
        if empty_write_count:
            self._storage.ledger.count_steps_from(0)

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict: the counts are part of the storage's state, unfinished trajectories are not saved."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending.clear()

    def dumps(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)

    def loads(self, path: str | Path) -> None:
        self._pending.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("_pending", "_of_thread")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_anew()
        _writers.add(self)


_numbers = itertools.count()
_writers: weakref.WeakSet[TrajectoryWriter] = weakref.WeakSet()


def _start_anew_in_forked_child() -> None:
    # What is under way goes on in the parent, where it was begun.
    for writer in list(_writers):
        writer._start_anew()


os.register_at_fork(after_in_child=_start_anew_in_forked_child)
