"""Cuts what collectors hand over into whole trajectories."""

from __future__ import annotations

import itertools
import os
import reprlib
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data.replay_buffers.writers import Writer

from embodichain_rl.errors import (
    InvalidArgumentError,
    PendingStepsError,
    SchemaMismatchError,
    TrajectoryTooLongError,
    TrajectoryValueError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.acceptance import Accept, AcceptFilter
from embodichain_rl.replay.direct_writes import Span, extend_directly
from embodichain_rl.replay.runs import (
    POLICY_VERSION_KEY,
    Run,
    checked_shape,
    ends_of,
    real_lengths,
    runs_of,
    traj_ids_of,
)
from embodichain_rl.replay.schema import MASK, Key, Leaf, Schema, StepField, leaves_of
from embodichain_rl.replay.shifted import Shifted, refuse_unshifted
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.texts import resolve_texts
from embodichain_rl.replay.trajectory_values import first_difference
from embodichain_rl.replay.windows import as_array, as_tensor

__all__ = ["TrajectoryWriter"]

MAX_UNFINISHED = 4096
"""How many trajectories may wait for their end in one process, beyond those that the data at hand goes on with."""

PENDING = -1
"""What stands in the index of a step whose trajectory is not in the buffer: not finished yet, or not accepted."""


@dataclass(slots=True)
class _Unfinished:
    """The pieces so far, copied, of a trajectory whose end has not come: on the host, or as spans on a device."""

    pieces: list[list[np.ndarray]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    of_trajectory: list[np.ndarray] = field(default_factory=list)
    steps: int = 0


_NOTHING = _Unfinished()


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
        self._unfinished: dict[Hashable, _Unfinished] = {}
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
        return sum(unfinished.steps for unfinished in list(self._unfinished.values()))

    def add(self, data: TensorDictBase) -> int | torch.Tensor:
        """Takes one step, ``[]``, or one of each of several environments, ``[B]``.

        Returns:
            The id of the trajectory if it ends with the step, else -1; a tensor ``[B]`` of them for several.
        """
        return self.extend(data.unsqueeze(1))[:, 0] if data.ndim else int(self.extend(data.unsqueeze(0))[0])

    def extend(self, data: TensorDictBase) -> torch.Tensor:
        """Takes steps, ``[T]`` or ``[B, T]``; returns an ``int64`` index of the same shape (see the class)."""
        if self._storage is None:
            raise UnsupportedOperationError("This writer has no storage yet: call register_storage(storage) first.")
        shape = checked_shape(data)
        leaves = leaves_of(data)
        lengths = real_lengths(leaves.pop(MASK, None), shape)
        there = self._storage.directly(leaves) if self._storage.staged else None
        if there is not None:
            return extend_directly(self, there, leaves, shape, lengths)
        schema = self._storage.schema
        if schema is None:
            schema = Schema.of_leaves(leaves, data.ndim)
            rows = self._rows_of(schema, leaves, shape)
            self._cut(schema, self._storage.shifted_in(schema), rows, lengths)  # refuses before memory is taken
            schema = self._storage.allocate_schema(schema)
        rows = self._rows_of(schema, leaves, shape)
        runs, pieces = self._cut(schema, self._storage.shifted_in(schema), rows, lengths)
        of_trajectories = self._of_trajectories(schema, runs, rows[len(schema.fields) :])
        index = np.full(shape if data.ndim == 2 else (1, *shape), PENDING, dtype=np.int64)
        for run, piece, of_trajectory in zip(runs, pieces, of_trajectories, strict=True):
            if run.ends:
                earlier = self._unfinished.get(run.key, _NOTHING)
                index[run.row, run.start : run.stop] = self._write([*earlier.pieces, piece], of_trajectory)
                self._unfinished.pop(run.key, None)
            else:
                unfinished = self._begin(run.key)
                unfinished.pieces.append([value.copy() for value in piece])
                unfinished.of_trajectory = of_trajectory
                unfinished.steps += run.stop - run.start
        return torch.from_numpy(index.reshape(shape))

    def _begin(self, key: Hashable) -> _Unfinished:
        return self._unfinished.setdefault(key, _Unfinished())

    def _cut(
        self, schema: Schema, shifted: Shifted, rows: list[np.ndarray], lengths: np.ndarray | None
    ) -> tuple[list[Run], list[list[np.ndarray]]]:
        """The runs of steps that belong to one trajectory each, and of each one array ``[n, *shape]`` a field."""
        runs = list(runs_of(self._producer(), ends_of(schema, rows), traj_ids_of(schema, rows), lengths))
        self._refuse_endless(runs, staged=self._storage.staged)
        if self._unfinished:
            self._refuse_begun_on_device(runs)
        pieces = [[value[run.row, run.start : run.stop] for value in rows[: len(schema.fields)]] for run in runs]
        self._refuse_unshifted(schema, shifted, runs, pieces)
        return runs, pieces

    def _write(self, pieces: Sequence[Sequence[np.ndarray]], of_trajectory: Sequence[np.ndarray]) -> int:
        """Writes one whole trajectory; returns its id, or ``PENDING`` if it is not accepted."""
        steps = sum([len(piece[0]) for piece in pieces])
        if not self._admits(steps, lambda: self._trajectory(pieces, of_trajectory)):
            return PENDING
        version = self._version(self._policy_version(pieces))
        number = self._storage.write(pieces, of_trajectory, policy_version=version)
        self._wrote(steps)
        return number

    def _admits(self, steps: int, trajectory: Callable[[], TensorDictBase]) -> bool:
        """Says whether a trajectory of so many steps is written, when it is."""
        return self._filter is None or self._filter.admit(trajectory())

    def _version(self, written: int) -> int:
        """The policy version that a trajectory is stored with, given what was written with its last step."""
        return written

    def _wrote(self, steps: int) -> None:
        """Called when a trajectory of so many steps is written."""

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

    def _of_trajectories(self, schema: Schema, runs: list[Run], values: list[np.ndarray]) -> list[list[np.ndarray]]:
        """Of each run, the values of its trajectory; refuses those that change within one, across pieces too."""
        if not values:
            return [[]] * len(runs)
        begun = {key: (unfinished.of_trajectory, unfinished.steps) for key, unfinished in self._unfinished.items()}
        of_runs = []
        for run in runs:
            earlier, steps = begun.pop(run.key, ([], 0))
            of_trajectory = earlier or [value[run.row, run.start, ...].copy() for value in values]
            for of_field, value, expected in zip(schema.trajectory_fields, values, of_trajectory, strict=True):
                step = first_difference(value[run.row, run.start : run.stop], expected)
                if step is not None:
                    self._refuse_change(of_field, expected, value[run.row, run.start + step], steps + step)
            if not run.ends:
                begun[run.key] = of_trajectory, steps + run.stop - run.start
            of_runs.append(of_trajectory)
        return of_runs

    def _refuse_change(self, of_field: StepField, before: np.ndarray, after: np.ndarray, step: int) -> NoReturn:
        texts = self._storage.texts
        was, became = (
            reprlib.repr(texts.resolve(value) if of_field.is_text else value.tolist()) for value in (before, after)
        )
        raise TrajectoryValueError(
            f"Got {of_field.key} that changes at step {step} of its trajectory, from {was} to {became}. What is "
            "written under 'trajectory' is stored once a trajectory; write what changes under another key."
        )

    def _refuse_endless(self, runs: list[Run], *, staged: bool) -> None:
        limit = self._storage.max_total_steps
        steps = {key: unfinished.steps for key, unfinished in self._unfinished.items()}
        for run in runs:
            length = steps.pop(run.key, 0) + run.stop - run.start
            if length > limit:
                raise TrajectoryTooLongError(
                    f"Got a trajectory of {'' if run.ends else 'at least '}{length:,} steps, but max_total_steps="
                    f"{limit:,}. Raise max_total_steps, or end episodes earlier (StepCounter(max_steps=...))."
                )
            if staged:
                self._storage.check_length(length)
            if not run.ends:
                steps[run.key] = length
        if len(steps) > MAX_UNFINISHED + len(runs):
            raise PendingStepsError(
                f"{len(steps):,} trajectories with {sum(steps.values()):,} steps wait for their end. Either "
                "('next', 'done') is never set, or the collector abandons trajectories (reset_at_each_iter=True): let "
                "it truncate them (set_truncated=True), or call writer.discard_pending()."
            )

    def _refuse_unshifted(
        self, schema: Schema, shifted: Shifted, runs: list[Run], pieces: list[list[np.ndarray]]
    ) -> None:
        if not shifted:
            return
        before: dict[Hashable, tuple[list[np.ndarray] | None, int]] = {
            key: (unfinished.pieces[-1], unfinished.steps) for key, unfinished in self._unfinished.items()
        }
        for run, piece in zip(runs, pieces, strict=True):
            last, steps = before.pop(run.key, (None, 0))
            refuse_unshifted(schema, shifted, piece, before=last, step=steps)
            if not run.ends:
                before[run.key] = piece, steps + run.stop - run.start

    def _refuse_begun_on_device(self, runs: list[Run]) -> None:
        for run in runs:
            if self._unfinished.get(run.key, _NOTHING).spans:
                raise SchemaMismatchError(
                    "Got steps on the CPU of a trajectory that was begun with steps on the device. Write all steps of "
                    "a trajectory from the same place."
                )

    def discard_pending(self) -> int:
        """Forgets the unfinished trajectories of this process; returns how many steps they had."""
        steps = self.pending_steps
        self._unfinished.clear()
        return steps

    def _empty(self, empty_write_count: bool = True) -> None:
        self._unfinished.clear()
        if empty_write_count:
            self._storage.ledger.count_steps_from(0)

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict: the counts are part of the storage's state, unfinished trajectories are not saved."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._unfinished.clear()

    def dumps(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)

    def loads(self, path: str | Path) -> None:
        self._unfinished.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("_unfinished", "_of_thread")}

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
