"""The sampler of TorchRL's replay buffers that draws chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from embodichain_rl._checks import checked_int
from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import (
    InvalidArgumentError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.sampling.drawer import PRIORITY_WEIGHT, ChunkDrawer
from embodichain_rl.replay.sampling.names import refuse_index_column
from embodichain_rl.replay.sampling.priority_updates import refuse_column, weights_by_trajectory
from embodichain_rl.replay.sampling.resumable import ResumableSampler
from embodichain_rl.replay.sampling.weights import ByPriority
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["ChunkSampler"]


class ChunkSampler(ChunkDrawer, ResumableSampler):
    """A TorchRL sampler of chunks: ``L`` consecutive steps of one trajectory, in batches ``[batch_size, L]``.

    First a trajectory is drawn, uniformly among the live ones with at least ``L`` steps or by ``weights``. Then
    the start of the chunk is drawn uniformly among its ``T - L + 1`` valid offsets. The cost does not depend on how
    much the buffer holds: drawn trajectories that are too short are drawn again, and the ledger is scanned only if most
    of them are.

    Random numbers come from the buffer's ``generator``, or from torch's global one as in TorchRL's samplers.

    One sampler may serve several storages: passes, groups and counters are kept apart for each.

    Args:
        chunk_size: the length ``L`` in steps; or a picklable callable without arguments that returns it, called once
            per batch, such as a :class:`~embodichain_rl.datasets.sampler.ChunkSizeSampler`. None with windows.

    Keyword Args:
        sampling_mode: ``"episode"``: any chunk; ``"segment"``: chunks within one segment; ``"boundary"``: chunks that
            contain a change of segment. Segments are runs of steps with the same integer ``"segment_id"``. A trajectory
            is drawn uniformly among those that contain such a chunk, then the chunk uniformly within the trajectory.
        pad: ``"before"``, ``"after"`` or ``"both"``: chunks may reach beyond that edge of the trajectory, by up to
            ``L - 1`` steps, which repeat the edge step. So the first and last steps are drawn as often as those in the
            middle, and trajectories shorter than ``L`` are used. Batches then have ``("collector", "mask")``, ``bool``
            ``[batch_size, L]``; True = real. ``"none"``, the default: chunks lie within the trajectory. With
            ``sampling_mode="segment"``, the edges are those of the segment.
        pad_before: the same, by up to this many steps before the first step, at most ``L - 1``; with windows, at most
            as many as the earliest of them reaches back. Diffusion policy's ``pad_before``.
        pad_after: the same, after the last step. Diffusion policy's ``pad_after``: 7 for 8 actions of a horizon of 16.
        windows: for each wanted key, the first and the last step relative to a drawn step, as a tuple, such as
            ``{"observation": (-1, 0), "action": (0, 15)}``; or a list of steps, such as ``[-12, -8, -4, 0]``. No other
            key is read. The batch is ``[batch_size]``; a key is ``[batch_size, number of steps, *feature]``, with
            ``"<key>_is_pad"`` (True = padding) beside it, or under ``"trajectory"`` if that name is stored. Padding
            repeats the edge step. Before the first step, the padding of a next observation ``("next", key)`` is the
            first observation, so that the stack of next observations is the stack of observations of the step after.
        delta_timestamps: the same in LeRobot's format: for each key a list of times in seconds; needs ``fps``. If steps
            have a float ``"timestamp"``, in seconds, each batch is checked against it.
        fps: the number of steps per second, for ``delta_timestamps``. Or the key of a trajectory value that says it for
            each trajectory, ``("trajectory", "fps")``; then windows must be padded. A number that differs from a stored
            ``("trajectory", "fps")`` is an error.
        tolerance_s: the largest distance between one of the ``delta_timestamps`` and its step, in seconds; by default
            0.1 ms, as in LeRobot.
        stride: the distance between the steps of a chunk: ``L`` steps, each ``stride`` steps after the one before. A
            chunk takes ``(L - 1) * stride + 1`` steps of its trajectory. ``("next", key)`` is still of the step that
            follows in the trajectory, and rewards are not summed up.
        drop_n_first_frames: the first steps of each trajectory that are never drawn: as the first step of a chunk, or
            as the drawn step of windows.
        drop_n_last_frames: the same for the last steps of each trajectory, or segment; as in LeRobot's sampler.
        strict_length: False: trajectories that are shorter than ``L`` are drawn too, whole, padded after their last
            step. So ``min(L, T)`` steps of a chunk are real, as with ``SliceSampler(strict_length=False)``. Batches
            have ``("collector", "mask")``, as with ``pad``, and are ``[batch_size, L]`` in any case.
        init_key: a key, such as ``"is_init"``, that is True at the first step of each chunk, besides the steps at which
            what is stored there is True. ``SliceSampler`` marks its slices in this way. Recurrent modules of TorchRL
            reset their state there, so that a batch that is flattened is not taken for one sequence. None: no mark.
        squeeze: with ``chunk_size=1``: batches are ``[batch_size]``, single steps as TorchRL's ``RandomSampler`` draws
            them if ``weights="steps"``.
        weights: ``"uniform"``; ``"steps"``: trajectories in proportion to the number of their chunks, so that all
            chunks of the buffer are equally likely; :class:`ByRecency`, :class:`ByGroup`, :class:`ByStep` or
            :class:`ByPriority`.
        replacement: False: every chunk of the trajectories that are live when a pass begins is drawn once, in random
            order; then the next pass begins. This is an epoch over a stream: chunks whose trajectory is evicted before
            their turn are skipped, and new trajectories are part of the next pass. Every process that samples the
            buffer has passes of its own; the workers and ranks of an :class:`~embodichain_rl.datasets.OnlineDataset`
            share theirs. Needs ``weights="uniform"`` and a fixed ``chunk_size``.
        max_age: draw only trajectories that were written at most this many seconds ago.
        max_policy_lag: draw only trajectories that were made with the newest policy version of any live trajectory, or
            with one of this many versions before it. Needs data with a numeric ``"policy_version"``, which TorchRL's
            collectors write with ``track_policy_version=True`` (see :class:`TrajectoryWriter`); the engine records the
            version itself. Trajectories without a version are not drawn.
        subset: draw only some of the trajectories, such as a training split that leaves the others for validation:
            ``("train", 0.9)`` or ``("validation", 0.1)``, of which each trajectory belongs to one, by a hash of its id;
            or a function that takes the id of a trajectory, an ``int``, and returns whether it may be drawn. It must
            always return the same for the same id.

    Raises:
        InvalidArgumentError: in the constructor, for arguments that can't work, or not together; by ``sample``, when
            ``delta_timestamps`` are not the times of steps at the ``fps`` of a trajectory.
        EmptyBufferError: by ``sample``, when there is no trajectory yet.
        ChunkTooLongError: by ``sample``, when no live trajectory, or segment, has ``L`` steps.
        NothingToDrawError: by ``sample``, when no live trajectory has a change of segment, is young enough, is of a
            group of the mixture, or belongs to the subset.
        SchemaMismatchError: by ``sample``, when a key of the windows or of the groups, or ``"segment_id"``, is not
            stored; or, with ``max_policy_lag``, when no trajectory has a policy version.

    Example:
        >>> rb = TensorDictReplayBuffer(
        ...     storage=TrajectoryStorage(max_trajectories=100, max_total_steps=30_000),
        ...     writer=TrajectoryWriter(), sampler=ChunkSampler(16), batch_size=32,
        ... )
    """

    @graph_break
    def sample(
        self, storage: TrajectoryStorage, batch_size: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
        """Draw a batch for a plain TorchRL buffer: trajectory ids and steps, each ``[batch_size, L]``.

        The buffer, or an ensemble of buffers, reads them with ``storage.get`` afterwards. A plain buffer holds its own
        lock meanwhile. If that lock is not shared with the writers, a trajectory may be evicted before it is read
        (``TrajectoryEvictedError``).

        Returns:
            The index, and a dict with the importance weights, ``"priority_weight"`` ``float32`` ``[batch_size, L]``.
            They are 1 unless draws are by priority: an ensemble stacks what several samplers return. Without
            replacement, the last batch of a pass has the chunks that are left, and :attr:`ran_out` is True after it.
        """
        _check_storage(storage)
        if not self._options.reads_whole_steps:
            raise UnsupportedOperationError(
                f"A plain TorchRL buffer reads whole steps by their index, and {self!r} asks for padding, windows or "
                "marks. Use a TrajectoryReplayBuffer."
            )
        refuse_index_column(storage)
        batch_size = checked_int("batch_size", batch_size, minimum=1)
        query = self.query(self.next_length())
        if self._passes is None:
            rows, offsets = self._draw(storage, batch_size, query, self._rng)
        else:
            rows, offsets = self._draw_to_end(storage, batch_size, query, self._draw)
        self._ages.of(storage.ledger).note(storage.ledger, rows)
        index = torch.from_numpy(query.request.index(rows, offsets))
        importance = query.draws.importance(storage, rows)
        if importance is None:
            importance = np.ones(len(offsets), dtype=np.float32)
        weights = self._importance_weights(storage, importance, index.shape[:2])
        if self._options.squeeze:
            index, weights = index[:, 0], weights[:, 0]
        return (index[..., 0], index[..., 1]), {PRIORITY_WEIGHT: weights}

    @graph_break
    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Set the priorities of trajectories; evicted trajectories are ignored.

        It does nothing where the weights are not :class:`ByPriority`: programs call it whatever the sampler is.

        Args:
            index: trajectory ids, of any shape; or integers ``[..., 2]`` with at least two dimensions, such as the
                ``"index"`` of a batch: pairs of trajectory id and step. A trajectory that occurs several times gets its
                largest priority.
            priority: numbers that are not negative: one for all; one per chunk, ``[B]`` or ``[B, 1]``; or one per step,
                ``[B, L]`` or ``[B, L, 1]``.
            storage: the storage of the trajectories.

        Raises:
            InvalidArgumentError: for priorities that are negative, NaN or infinite, or whose shape does not fit; and
                for an index that is not made of integers.
        """
        if not isinstance(self.weights, ByPriority):
            return
        _check_storage(storage)
        refuse_column(index, storage)
        storage.ledger.prioritize(*weights_by_trajectory(index, priority, self.weights))


def _check_storage(storage: object) -> None:
    if not isinstance(storage, TrajectoryStorage):
        raise InvalidArgumentError(
            f"Got a {type(storage).__name__}; a ChunkSampler draws from a TrajectoryStorage. For other storages use "
            "TorchRL's SliceSampler."
        )
