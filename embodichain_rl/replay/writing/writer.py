"""The writer: it cuts what collectors hand over into whole trajectories, and stores them."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase, is_tensor_collection

from embodichain_rl._checks import checked_int
from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import InvalidArgumentError, UnsupportedOperationError
from embodichain_rl.replay.ledger import NO_VERSION, MetricWord
from embodichain_rl.replay.schema import (
    MASK,
    Key,
    Leaf,
    RaggedLeaf,
    Schema,
    as_array,
    leaves_of,
)
from embodichain_rl.replay.storage import version_field, version_of
from embodichain_rl.replay.writing.acceptance import Accept, AcceptFilter, whole_trajectory
from embodichain_rl.replay.writing.boundary_keys import BoundaryKeys
from embodichain_rl.replay.writing.cutting import Incoming
from embodichain_rl.replay.writing.device_data import extend_from_device, truncate_on_device
from embodichain_rl.replay.writing.origin import PRIORITY_WEIGHT, origin_of, refuse_windows
from embodichain_rl.replay.writing.pending import Pending
from embodichain_rl.replay.writing.pending_writer import PendingWriter
from embodichain_rl.replay.writing.runs import (
    PENDING,
    Run,
    checked_shape,
    real_steps,
)
from embodichain_rl.replay.writing.truncation import truncated

__all__ = ["TrajectoryWriter"]


class TrajectoryWriter(PendingWriter):
    """A TorchRL writer that stores trajectories when they are whole.

    It takes everything that TorchRL's collectors hand over:

    * flat ``[T]`` steps of one or several whole trajectories (``trajs_per_batch=``);
    * pieces that begin and end anywhere, ``[T]`` or ``[B, T]`` with one environment a row. They are joined by
      ``("collector", "traj_ids")``, or by row where there are none, until ``("next", "done")``, ``"terminated"`` or
      ``"truncated"`` is True. Pieces from different threads are kept apart, since ids are unique within one collector
      only;
    * padded trajectories ``[B, T]`` with ``("collector", "mask")``: only real steps are stored;
    * lazy stacks;
    * single steps through ``add``: one, ``[]``, or one of each of several environments, ``[B]``;
    * text (``NonTensorData`` and ``NonTensorStack`` of strings, as a TensorDict holds them), stored as ids in
      ``storage.texts``;
    * values whose size changes from step to step: jagged tensors, stacks of tensors (``NonTensorStack``), lazy stacks
      whose elements differ in size, padded tensors with their lengths; see ``ragged`` of :class:`TrajectoryStorage`;
    * under ``"trajectory"``, tensors and text that are the same at every step of a trajectory: stored once.

    Unfinished trajectories are copied, never kept by reference, since collectors use their memory again. They stay in
    the process that collected them; a copy of the writer in another process starts without.

    The index that ``extend`` returns is shaped like the data: for each step the id of its trajectory, -1 where the
    trajectory is not finished, or not accepted, or is on its way to a device.

    ``extend`` is all or nothing: data that is refused changes nothing, and can be extended again when it is mended.

    Each trajectory is stored with the version of the policy that made its last step: the value of
    ``"policy_version"`` there, a number, which TorchRL's collectors write with ``track_policy_version=True``. Without
    it the version is unknown.

    **Trajectories that are broken off.** An environment that is reset in the middle of a trajectory leaves no end flag.
    The trajectory ends there where ``"is_init"`` is True at the step after it, or ``"step_count"`` does not count on,
    or a next observation, ``("next", key)``, is not the observation ``key`` of the step after it, although it is at
    most other steps. (With a compact storage, such observations are refused.) The trajectory is stored as *truncated*:
    ``("next", "truncated")`` of its last step is set to True, and so is ``("next", "done")``, as a collector does with
    ``set_truncated=True``. Data without ``("next", "truncated")`` keeps its flags, since done alone would say that the
    trajectory is terminated. ``stats()["truncated"]`` counts these trajectories.

    **Samples of another buffer.** A batch of chunks carries ``("trajectory", "id")`` and ``("trajectory", "step")``.
    It is cut wherever they are not consecutive, and each piece is stored as a trajectory of its own, truncated as
    described unless it ends with the end of its trajectory; later calls never continue it. Padding is left out, before
    real steps too. Batches of TorchRL's ``SliceSampler`` mark the end of each slice themselves. Batches of windows are
    refused.

    **One step of each of several environments**, ``[B]``, has the shape of a trajectory, ``[T]``. It is refused where
    its content says so: ``"step_count"`` does not count up, or no next observation is the observation of the step after
    it, while neither trajectory ids nor an end at the last step say that the steps belong together. Write it with
    ``rb.add(td)``.

    Keyword Args:
        accept: judges each whole trajectory, a TensorDict ``[T]``: False leaves it out. ``accept_success`` keeps those
            that end with a success, by ``("next", "success")``. None keeps all.
        sequences: whether rows are consecutive steps, whatever ``"step_count"`` and next observations say. True where
            noise, running normalization or n-step returns make next observations differ from those that follow.
        max_pending_bytes: bytes that unfinished trajectories may take in one process; by default as many as
            ``max_total_steps`` steps take, at least 16 MiB.
        end_key: the end flags: a trajectory ends where they are True; where a step has several, such as one for each
            agent of a group, where all are. By default ``("next", "done")``, ``"terminated"`` and ``"truncated"``;
            where none of these is there, the flat keys ``"next.done"``, ``"next.terminated"`` and ``"next.truncated"``,
            as LeRobot names them; where these are missing too, but there are ids of trajectories, the ``"done"`` of
            groups, ``("next", "agents", "done")``.
            Where one of these has one element a step, those with several, of single agents, do not count; where all
            have several, a trajectory ends where any is True, as in TorchRL's collectors.
        traj_key: the id of the trajectory of each step, a number or text. Then a trajectory ends where its id changes
            within a row, whatever the end flags say. Without end flags, or with ``"terminated"`` alone, it also ends
            where the same row of a later call begins with another id. The last one waits for that: store it with
            :meth:`truncate_pending`. By default ``("collector", "traj_ids")``, if it is there: such a trajectory may go
            on in a later call.
        compilable: as for TorchRL's writers; it changes nothing.
        track_generations: as for TorchRL's writers; must be False.

    Raises:
        InvalidArgumentError: for arguments that can't work.
        UnsupportedOperationError: for ``track_generations=True``.
        SchemaMismatchError: by ``extend``, when keys, shapes or dtypes differ from the arena's or no end key is there;
            with a storage that is ``compact``, when a next observation is not the observation of the step after;
            for a batch of windows.
        StepOrderError: by ``extend``, when rows are not consecutive steps of one environment.
        TrajectoryTooLongError: by ``extend``, when a trajectory exceeds ``max_total_steps``.
        PinLimitError: by ``extend``, when the pinned trajectories leave no room for one.
        TrajectoryValueError: by ``extend``, when what is written under ``"trajectory"`` changes within one.
        TextTableFullError: by ``extend``, when there is too much text that is different every time.
        PendingStepsError: by ``extend``, when unfinished trajectories pile up, because their end never comes: more
            than 4,096 of them, or more than ``max_pending_bytes``.

    Example:
        >>> storage = TrajectoryStorage(max_trajectories=10, max_total_steps=1000)
        >>> writer = TrajectoryWriter()
        >>> writer.register_storage(storage)
        >>> done = torch.tensor([[0], [0], [1]]).bool()
        >>> writer.extend(TensorDict({"observation": torch.zeros(3, 4), "next": {"done": done}}, [3]))
        tensor([0, 0, 0])
    """

    _writes_ahead = True
    """Whether the pieces of a long trajectory are written to the storage before it is whole."""

    def __init__(
        self,
        *,
        accept: Accept | None = None,
        sequences: bool = False,
        max_pending_bytes: int | None = None,
        end_key: NestedKey | None = None,
        traj_key: NestedKey | None = None,
        compilable: bool = False,
        track_generations: bool = False,
    ) -> None:
        if track_generations:
            raise UnsupportedOperationError(
                f"Got track_generations={track_generations!r}. The ids of trajectories are never used again, so an "
                "index [..., 2] names its steps for good: rb.storage.contains(index) tells which are still there. "
                "Leave it out."
            )
        if not isinstance(sequences, bool):
            raise InvalidArgumentError(f"Got sequences={sequences!r}; it must be True or False.")
        if max_pending_bytes is not None:
            max_pending_bytes = checked_int("max_pending_bytes", max_pending_bytes, minimum=1)
        keys = BoundaryKeys.checked(end_key, traj_key)
        super().__init__(sequences=sequences, max_pending_bytes=max_pending_bytes, keys=keys)
        self._filter = None if accept is None else AcceptFilter(accept)

    @property
    def _write_count(self) -> int:
        # Read by TorchRL's rb.write_count, and through it by init_random_frames. All processes count in the ledger.
        return self._storage.ledger.steps_written

    @property
    def rejected(self) -> int:
        """Trajectories that this process did not accept."""
        return 0 if self._filter is None else self._filter.num_rejected

    def stats(self) -> dict[str, int]:
        """Return what this process holds and has counted.

        Returns:
            ``pending_steps``, ``pending_trajectories`` and ``pending_bytes`` of unfinished trajectories; ``rejected``:
            trajectories that were not accepted; ``truncated``: trajectories that were broken off without an end flag.
        """
        return {
            "pending_steps": self.pending_steps,
            "pending_trajectories": self.pending_trajectories,
            "pending_bytes": self.pending_bytes,
            "rejected": self.rejected,
            "truncated": self.truncated,
        }

    @graph_break
    def add(self, data: TensorDictBase) -> int | torch.Tensor:
        """Write one step, ``[]``, or one of each of several environments, ``[B]``.

        The environments are told apart by ``("collector", "traj_ids")``, or by their row where there are none. A row
        whose ``("collector", "mask")`` is False is left out.

        Returns:
            The id of the trajectory if it ends with the step, else -1; a tensor ``[B]`` of them for several.
        """
        if not is_tensor_collection(data):
            checked_shape(data)  # raises
        return self.extend(data.unsqueeze(1))[:, 0] if data.ndim else int(self.extend(data.unsqueeze(0))[0])

    @graph_break
    def extend(self, data: TensorDictBase) -> torch.Tensor:
        """Write steps, ``[T]`` or ``[B, T]``; return an ``int64`` index of the same shape (see the class)."""
        if not self.registered:
            raise UnsupportedOperationError("This writer has no storage yet: call register_storage(storage) first.")
        if 0 in checked_shape(data):
            return torch.empty(data.shape, dtype=torch.int64)
        schema = self._storage.schema
        if schema is not None and not schema.has_text:
            return self._extend(data)
        with self._texts_held:
            return self._extend(data)

    def _extend(self, data: TensorDictBase) -> torch.Tensor:
        leaves = leaves_of(data, stored=self._storage.schema, is_live=self._are_live, fill=self._storage.fill)
        shape = leaves.batch_size  # of a ragged stack, padded
        formats = self._storage.formats
        known = self._storage.schema
        if (
            formats
            or (known is not None and known.blob_numbers)
            or any(isinstance(leaf, RaggedLeaf) for leaf in leaves.values())
        ):
            formats.take(leaves, known)
        origin = origin_of(leaves.origin, shape)
        sampled = origin is not None and origin.sampled
        if origin is not None and origin.sampled:
            stored: Container[Key] = self._storage.schema or ()
            refuse_windows(leaves, origin, stored)
            if PRIORITY_WEIGHT not in stored:
                leaves.pop(PRIORITY_WEIGHT, None)
        real = real_steps(leaves.pop(MASK, None), shape, anywhere=sampled)
        incoming = Incoming(leaves, shape, real, origin)
        there = self._storage.directly(leaves) if self._storage.staged else None
        if there is not None:
            ids = extend_from_device(
                self._storage, there, self._pending, self._cutter, self, self._producer(), incoming
            )
            self._watch.published = self._storage.ledger.next_id
            self._note_kept(self._storage.schema, len(self._pending), int(torch.count_nonzero(ids < 0)))
            return ids
        schema = self._storage.schema
        if schema is None:
            schema = formats.applied(Schema.of_leaves(leaves), leaves, len(shape))
            rows = self._rows_of(schema, leaves, shape)
            self._cut(schema, rows, incoming)  # refuses before memory is taken
            schema = self._storage.allocate_schema(schema)
        rows = self._rows_of(schema, leaves, shape)
        runs, pieces = self._cut(schema, rows, incoming)
        trajectory_values = self._pending.trajectory_values(
            schema, runs, rows[len(schema.fields) :], self._storage.texts
        )
        index = np.full(shape if data.ndim == 2 else (1, *shape), PENDING, dtype=np.int64)
        unfinished = steps_kept = 0
        for run, piece, values in zip(runs, pieces, trajectory_values, strict=True):
            if run.begins:
                self._truncate(run.key)
            if run.ends:
                pending = self._pending.get(run.key)
                if run.truncated:
                    piece = truncated(schema, piece)
                    self._pending.truncated += 1
                index[run.row, run.start : run.stop] = self._write([*pending.pieces, piece], values, pending)
                self._pending.end(run.key)
            else:
                self._keep(schema, run, piece, values)
                unfinished += 1
                steps_kept += run.stop - run.start
        if unfinished:
            self._note_kept(schema, unfinished, steps_kept)
        if unfinished or self._shows_pending:
            self._show_pending()
        return torch.from_numpy(index.reshape(shape))

    def _are_live(self, ids: torch.Tensor, steps: torch.Tensor) -> bool:
        """Return whether all of some trajectory ids and steps, ``[n]``, name live steps of the storage."""
        there = self._storage.contains(torch.stack([ids, steps], dim=-1))
        return bool(torch.as_tensor(there).all())

    def _cut(
        self, schema: Schema, rows: list[np.ndarray], incoming: Incoming
    ) -> tuple[list[Run], list[list[np.ndarray]]]:
        """Return the runs of one trajectory each, and the steps of each run: one array ``[n, *shape]`` per field."""
        limited = self._storage.staged or not self._storage.ledger.plain
        check_length = self._storage.check_length if limited else None
        runs = self._cutter.runs(
            schema, rows, rows, self._producer(), incoming, on_device=False, check_length=check_length
        )
        pieces = [[value[run.row, run.start : run.stop] for value in rows[: len(schema.fields)]] for run in runs]
        self._pending.refuse_unshifted(schema, self._storage.shifted_in(schema), runs, pieces)
        return runs, pieces

    def _keep(self, schema: Schema, run: Run, piece: Sequence[np.ndarray], values: list[np.ndarray]) -> None:
        """Copy the steps of a trajectory that is not finished: their producer may reuse its memory."""
        pending = self._pending.begin(run.key)
        storage = self._storage if self._writes_ahead else None
        self._pending.add_piece(pending, piece, self._storage.stored_bytes(schema), storage)
        pending.trajectory_values = values
        pending.traj_id = run.traj_id
        count = self._cutter.evidence(schema).step_count
        pending.step_count = None if count is None else piece[count][-1].copy()

    def _truncate(self, key: Hashable) -> None:
        """Store what is pending under ``key``, if anything is, as a trajectory that ends there."""
        pending, schema = self._pending.get(key), self._storage.schema
        if pending.pieces and schema is not None:
            last = truncated(schema, pending.pieces[-1])
            self._write([*pending.pieces[:-1], last], pending.trajectory_values, pending)
            self._pending.truncated += 1
            self._pending.end(key)

    def _write(
        self, pieces: Sequence[Sequence[np.ndarray]], of_trajectory: Sequence[np.ndarray], pending: Pending
    ) -> int:
        """Write one whole trajectory; return its id, or ``PENDING`` if it is not accepted.

        Args:
            pieces: all of its steps.
            of_trajectory: its trajectory values.
            pending: what was pending of it: its pieces but for the last one of ``pieces``, or for changes of the last
                step.
        """
        steps = sum([len(piece[0]) for piece in pieces])
        if not self.admits(steps, lambda: whole_trajectory(self._storage, pieces, of_trajectory)):
            self._watch.rejected(self.rejected)
            self._storage.ledger.metrics.own.words[MetricWord.REJECTED] = self.rejected
            return PENDING
        version = self.stored_version(self._policy_version(pieces))
        number = None if pending.region is None else self._publish_region(pieces, of_trajectory, pending, version)
        if number is None:
            number = self._store(pieces, of_trajectory, version)
        self._watch.stored()
        self._storage.ledger.metrics.own.inserted(steps)
        self.stored(steps)
        return number

    def _publish_region(
        self,
        pieces: Sequence[Sequence[np.ndarray]],
        of_trajectory: Sequence[np.ndarray],
        pending: Pending,
        version: int,
    ) -> int | None:
        """Publish a trajectory of which all earlier pieces lie in a region; None if it must be written anew."""
        region = pending.region
        if region is None or not pending.all_in_region:
            return None
        if len(pieces) > len(pending.pieces):
            if not region.append(pieces[-1]):
                return None
        else:
            region.overwrite_last([value[-1:] for value in pieces[-1]])
        number = self._storage.publish_pieces(region, of_trajectory, policy_version=version)
        self._pending.longest = region.steps
        return number

    def _store(self, pieces: Sequence[Sequence[np.ndarray]], of_trajectory: Sequence[np.ndarray], version: int) -> int:
        """Store a whole trajectory that is accepted; return its id. A subclass may send it elsewhere."""
        return self._storage.write(pieces, of_trajectory, policy_version=version)

    # The methods of an Admission; a subclass may override them.

    @property
    def admits_all(self) -> bool:
        """Whether there is no ``accept``, nor a subclass that decides in its place."""
        return self._filter is None and type(self).admits is TrajectoryWriter.admits

    def admits(self, steps: int, trajectory: Callable[[], TensorDictBase]) -> bool:
        """Return whether ``accept`` keeps a whole trajectory; see :class:`Admission`."""
        return self._filter is None or self._filter.admit(trajectory())

    def stored_version(self, version: int) -> int:
        """Return the policy version that a trajectory is stored with: the one in its last step."""
        return version

    def stored(self, steps: int) -> None:
        """Take note of a stored trajectory; do nothing here."""

    def _policy_version(self, pieces: Sequence[Sequence[np.ndarray]]) -> int:
        """Return the version of the policy that made the last step; ``NO_VERSION`` without a numeric key for it."""
        schema = self._storage.schema
        assert schema is not None, "a trajectory is whole only when its steps were held against it"
        number = version_field(schema)
        return NO_VERSION if number is None else version_of(pieces[-1][number][-1])

    def _rows_of(self, schema: Schema, leaves: Mapping[Key, Leaf], shape: torch.Size) -> list[np.ndarray]:
        """Return the values of each field, ``[B, T, *shape]``; of text its ids, and of blobs their bytes."""
        texts = self._storage.texts
        values: list[Any] = [
            texts.ids_of(value, for_good=False)
            if isinstance(value, np.ndarray)
            else as_array(value)
            if isinstance(value, torch.Tensor)
            else value  # ragged
            for value in list[Any](schema.in_order(leaves, len(shape)))
        ]
        if schema.blob_numbers:
            self._storage.formats.encode(schema, values, len(shape))
        return [value[None] for value in values] if len(shape) == 1 else values

    def truncate_pending(self) -> int:
        """Store the unfinished trajectories of this process as truncated ones; return how many there were.

        Call it where collection ends and what was begun is worth keeping. Steps that come later begin new trajectories.
        """
        keys = self._pending.keys
        on_device = [key for key in keys if self._pending.get(key).spans]
        if on_device:
            truncate_on_device(self._storage, self._pending, self, on_device)
        for key in keys:
            self._truncate(key)
        self._texts_held.settle()
        self._watch.forgive()
        return len(keys)

    def _empty(self, empty_write_count: bool = True) -> None:
        self._watch.emptied()
        self.discard_pending()
        if empty_write_count:
            self._storage.ledger.count_steps_from(0)
