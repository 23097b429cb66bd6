"""Where one trajectory goes over into the next without an end, and rows that are no trajectory at all.

A row of data should be consecutive steps of one environment, with an end flag where a trajectory ends. Collection that
is broken off leaves no flag: the environment was reset, and the next row begins another trajectory. And one step of
each of several environments, ``[B]``, has the shape of a trajectory. What is stored says so: ``"is_init"``,
``"step_count"``, the ids of trajectories, and next observations that are not the observations that follow.

Pure functions. Arrays may be on a device where that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from embodichain_rl.errors import StepOrderError
from embodichain_rl.replay.schema import Key, Schema, as_array, presence_key_of, same_values, shifted_fields
from embodichain_rl.replay.storage import POLICY_VERSION_KEY
from embodichain_rl.replay.writing.origin import Origin

__all__ = ["Evidence", "Followed", "beginnings", "differs", "follows_inside", "refuse_order"]

IS_INIT: Key = ("is_init",)
"""True at the first step of a trajectory; written by TorchRL's ``InitTracker``."""

STEP_COUNT: Key = ("step_count",)
"""The number of a step in its trajectory; written by TorchRL's ``StepCounter``."""

STEPS_TO_NEXT: Key = ("steps_to_next_obs",)
"""Steps from an observation to its next one, as TorchRL's ``MultiStepTransform`` writes it with n-step returns."""

NO_OBSERVATIONS = (IS_INIT, STEP_COUNT, POLICY_VERSION_KEY)
"""Entries whose next value may be another than the value that follows."""

MOST_FOLLOWED = 4
"""Entries that are compared from step to step: the widest ones."""

COMPARED = 1024
"""Elements of an entry that are compared at each step: enough to tell one image from another."""

LEAST_COMPARED = 4
"""Places along each dimension of an entry that are compared."""


@dataclass(frozen=True, slots=True)
class Followed:
    """An entry ``("next", *key)`` that is followed by ``key`` of the next step.

    Attributes:
        next: number of the field ``("next", *key)``.
        root: number of the field ``key``.
        but_last: index of what is compared of each step but the last.
        but_first: index of what is compared of each step but the first.
    """

    next: int
    root: int
    but_last: tuple[slice, ...]
    but_first: tuple[slice, ...]

    def neighbours(self, values: Sequence[Any]) -> tuple[Any, Any]:
        """Return the next values of each step but the last, and the values of each but the first."""
        return values[self.next][self.but_last], values[self.root][self.but_first]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The fields of a schema that tell whether one step follows another.

    Attributes:
        is_init: number of the field ``"is_init"``; None where there is none.
        step_count: number of the field ``"step_count"``, if it is one number a step.
        followed: entries of which the next step has the next value.

    Example:
        >>> step = TensorDict({"state": torch.zeros(3), "next": {"state": torch.zeros(3), "done": torch.zeros(1)}})
        >>> [(followed.next, followed.root) for followed in Evidence.of(Schema.of(step)).followed]
        [(1, 0)]
    """

    is_init: int | None
    step_count: int | None
    followed: tuple[Followed, ...]

    @classmethod
    def of(cls, schema: Schema) -> Evidence:
        """Return the evidence that steps of ``schema`` carry."""
        is_init, step_count = schema.number_of(IS_INIT), schema.number_of(STEP_COUNT)
        if is_init is not None and schema.fields[is_init].is_text:
            is_init = None
        if step_count is not None:
            field = schema.fields[step_count]
            if field.is_text or field.dtype == torch.bool or field.dtype.is_complex or np.prod(field.shape) != 1:
                step_count = None
        shifted = {} if schema.number_of(STEPS_TO_NEXT) is not None else shifted_fields(schema)
        of_trajectory = [field.key for field in schema.trajectory_fields]
        sizes = {
            (number, root): COMPARED if schema.fields[root].is_blob else int(np.prod(schema.fields[root].shape))
            for number, root in shifted.items()
            if schema.keys[root] not in NO_OBSERVATIONS
            and not schema.fields[root].is_text
            and presence_key_of(schema.keys[root], of_trajectory) is None  # else it may be zeros
        }
        # Single numbers, such as a mode, are often equal by chance.
        telling = {pair: size for pair, size in sizes.items() if size > 1} or {p: n for p, n in sizes.items() if n}
        widest = sorted(telling, key=lambda pair: -telling[pair])[:MOST_FOLLOWED]
        parts = [() if schema.fields[root].is_blob else _part(schema.fields[root].shape) for _, root in widest]
        followed = [
            Followed(number, root, (slice(None), slice(None, -1), *part), (slice(None), slice(1, None), *part))
            for (number, root), part in zip(widest, parts, strict=True)
        ]
        return cls(is_init, step_count, tuple(followed))

    def one_trajectory(self, rows: Sequence[np.ndarray], sequences: bool) -> bool:
        """Return whether rows without an end before their last step belong to one trajectory, by all that tells.

        Args:
            rows: one array ``[B, T, *shape]`` per field, on the host.
            sequences: whether rows are consecutive steps whatever counts and observations say.
        """
        if self.is_init is not None and flags(rows[self.is_init])[:, 1:].any():
            return False
        return sequences or _follow(self, rows, rows)


def _part(shape: Sequence[int]) -> tuple[slice, ...]:
    """Return some elements of ``shape``, evenly spaced along its outer dimensions, so that they lie together."""
    strides, left = [1] * len(shape), list(shape)
    for axis in range(len(shape)):
        while np.prod(left) > COMPARED and left[axis] > LEAST_COMPARED:
            strides[axis] *= 2
            left[axis] = len(range(strides[axis] // 2, shape[axis], strides[axis]))
    return tuple(slice(stride // 2, None, stride) for stride in strides)


def flags(values: np.ndarray) -> np.ndarray:
    """Return flags ``[B, T, *shape]`` as ``bool`` ``[B, T]``: True where one of a step's is."""
    return np.logical_or.reduce(values.reshape(*values.shape[:2], -1).astype(bool, copy=False), axis=-1)


def differs(earlier: Any, later: Any, judged: np.ndarray | None = None) -> np.ndarray | None:
    """Return where two arrays differ: ``bool`` of their first two dimensions; None where they are equal.

    Args:
        earlier: ``[B, P, *shape]``, an array, or a tensor on any device.
        later: the same.
        judged: ``bool`` ``[B, P]``, where to look; None: everywhere.
    """
    different = earlier != later
    if not different.any():
        return None
    rows = _rows_with_any(different)
    if judged is not None:
        rows = rows & judged
    if not rows.any():
        return None
    if not _are_blobs(earlier):  # of blobs, the bytes are compared
        rows &= _rows_with_any(different & ((earlier == earlier) | (later == later)))  # NaN is as good as NaN
    return rows if rows.any() else None


def _are_blobs(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype.hasobject


def _rows_with_any(values: Any) -> np.ndarray:
    """Return ``bool`` ``[B, P]`` of flags ``[B, P, *shape]`` that lie anywhere."""
    if isinstance(values, torch.Tensor):
        return as_array(values.reshape(*values.shape[:2], -1).any(-1))
    return flags(values)


def beginnings(
    evidence: Evidence,
    rows: Sequence[np.ndarray],
    values: Sequence[Any],
    ends: np.ndarray,
    traj_ids: np.ndarray | None,
    real: np.ndarray | None,
    origin: Origin | None,
    *,
    sequences: bool,
    next_may_cut: bool,
) -> np.ndarray | None:
    """Return the steps that begin a trajectory, whether or not the step before them ends one.

    Args:
        evidence: which fields tell.
        rows: one array ``[B, T, *shape]`` per field, on the host; only fields with control entries are read.
        values: the same, wherever it lies.
        ends: ``bool`` ``[B, T]``: steps that end a trajectory.
        traj_ids: ``[B, T]``; None where there are none.
        real: ``bool`` ``[B, T]``, False where a step is padding; None: all are real.
        origin: what the data says of the order of its steps.
        sequences: whether rows are consecutive steps whatever counts and observations say.
        next_may_cut: whether a next observation that is not the one that follows begins a trajectory.

    Returns:
        ``bool`` ``[B, T]``; None where no step does.

    Raises:
        StepOrderError: when the rows are not consecutive steps.
    """
    begins: np.ndarray | None = None
    initial = None if evidence.is_init is None else flags(rows[evidence.is_init])
    if initial is not None and initial.any():
        begins = initial.copy()
    if origin is not None and origin.sampled:
        begins = np.zeros(ends.shape, dtype=bool) if begins is None else begins
        begins[:, 0] = True
        begins[:, 1:] |= origin.breaks
        return begins
    if sequences or ends.shape[1] == 1:
        return begins
    inner = ends[:, :-1]
    if begins is None and real is None and not inner.any() and _follow(evidence, rows, values):
        return None
    judged = ~inner
    if real is not None:
        judged &= real[:, 1:] & real[:, :-1]
    if not judged.any():
        return begins
    cuts = _Rows(evidence, rows, values, ends, traj_ids, real, judged, initial, origin).cuts(next_may_cut)
    if cuts is not None:
        begins = np.zeros(ends.shape, dtype=bool) if begins is None else begins
        begins[:, 1:] |= cuts
    return begins


def _follow(evidence: Evidence, rows: Sequence[np.ndarray], values: Sequence[Any]) -> bool:
    """Return whether each step is followed by the next one, by all that tells: so it is in most calls."""
    if evidence.step_count is not None:
        count = rows[evidence.step_count]
        if _any(count[:, 1:] != count[:, :-1] + 1):
            return False
    elif not evidence.followed:
        return False
    for followed in evidence.followed:
        earlier, later = followed.neighbours(values)
        if _any(earlier != later):
            return False
    return True


def _any(flags: Any) -> bool:
    """Return whether a flag is set; of an array in a tenth of the time that its ``any()`` takes."""
    return bool(np.count_nonzero(flags) if isinstance(flags, np.ndarray) else flags.any())


@dataclass(slots=True)
class _Rows:
    """The steps of one call, and what is known of the pairs of neighbours among them, ``[B, T - 1]``.

    ``judged`` are the pairs that should belong to one trajectory: real steps, without an end between them.
    """

    evidence: Evidence
    rows: Sequence[np.ndarray]
    values: Sequence[Any]
    ends: np.ndarray
    traj_ids: np.ndarray | None
    real: np.ndarray | None
    judged: np.ndarray
    initial: np.ndarray | None
    origin: Origin | None

    def cuts(self, next_may_cut: bool) -> np.ndarray | None:
        """Return the pairs between which a trajectory begins; None where there is none."""
        if self.initial is not None:
            found = np.count_nonzero(self.initial[:, 1:] & self.judged)
            if 2 * found > np.count_nonzero(self.judged) and (found > 1 or self.initial[:, 0].all()):
                refuse_order("'is_init' is True at one after the other")
        if self.traj_ids is not None:
            same = self.judged & (self.traj_ids[:, 1:] == self.traj_ids[:, :-1])
            if not same.any():
                self._refuse_apart()
                return None
            self.judged = same
        restarts, counts = self._restarts()
        differing = self._differing()
        told = counts or self.traj_ids is not None
        if not differing:
            return restarts if told or self.evidence.followed else self._jumps()
        if not (told or self._followed()):
            # Rows that end with an end are whole trajectories by their own account, where no other account is given.
            if self._lies_apart() or (np.any(differing, axis=(0, 2)) & ~self._ends_last()).any():
                refuse_order("no next observation is the observation of the step after it")
            return restarts
        holding = [d for d in differing if 2 * np.count_nonzero(d) < np.count_nonzero(self.judged)]
        if holding and next_may_cut:
            gaps = np.logical_or.reduce(holding)
            return gaps if restarts is None else gaps | restarts
        return restarts

    def _refuse_apart(self) -> None:
        """Refuse steps of one trajectory each, by their ids, where counts or observations say the same.

        Where nothing else is there to tell, ids are believed: each step goes to its own trajectory.
        """
        if self.evidence.step_count is not None:
            count = self.rows[self.evidence.step_count].reshape(self.ends.shape)
            apart = bool((self.judged & (count[:, 1:] != count[:, :-1] + 1)).any())
        else:
            apart = bool(self._differing()) and not self._followed()
        if apart:
            refuse_order("every step has another trajectory id than the one before it, which is not done")

    def _restarts(self) -> tuple[np.ndarray | None, bool]:
        """Return the pairs between which the count of steps begins anew, and whether there is such a count."""
        if self.evidence.step_count is None:
            return None, False
        count = self.rows[self.evidence.step_count].reshape(self.ends.shape)
        restarts = self.judged & (count[:, 1:] <= count[:, :-1])
        found = np.count_nonzero(restarts)
        if not found:
            return None, True
        if found > np.count_nonzero(self.judged & (count[:, 1:] == count[:, :-1] + 1)):
            if self.traj_ids is None:
                refuse_order("'step_count' does not count up from step to step")
            return None, False
        return restarts, True

    def _differing(self) -> list[np.ndarray]:
        """Return the pairs whose next value is not the value that follows, of each entry that has such pairs."""
        found = [differs(*followed.neighbours(self.values), self.judged) for followed in self.evidence.followed]
        return [different for different in found if different is not None]

    def _followed(self) -> bool:
        """Return whether an entry that changes is, at most steps, the next value of the step before."""
        for followed in self.evidence.followed:
            earlier, later = followed.neighbours(self.values)
            value = self.values[followed.root][followed.but_last]
            changes, different = differs(value, later, self.judged), differs(earlier, later, self.judged)
            if changes is None:
                continue
            if different is None or np.count_nonzero(changes & ~different) > np.count_nonzero(different):
                return True
        return False

    def _ends_last(self) -> np.ndarray:
        """Return whether the last real step of each row ends a trajectory, ``[B]``."""
        if self.real is None:
            return self.ends[:, -1]
        last = self.real.shape[1] - 1 - np.argmax(self.real[:, ::-1], axis=1)
        return self.ends[np.arange(len(last)), last]

    def _lies_apart(self) -> bool:
        """Return whether most pairs lie apart in another buffer."""
        if self.origin is None:
            return False
        return bool(2 * np.count_nonzero(self.origin.breaks & self.judged) > np.count_nonzero(self.judged))

    def _jumps(self) -> np.ndarray | None:
        """Return the pairs that lie apart in another buffer, where nothing else tells."""
        if self._lies_apart():
            refuse_order("'index' says that they lie apart in the buffer they were sampled from")
        return None if self.origin is None else self.origin.breaks & self.judged


def follows_inside(followed: Followed, pieces: Sequence[Sequence[np.ndarray]]) -> bool | None:
    """Return whether an entry is followed within pieces of a trajectory; None where they have one step only.

    Args:
        followed: the entry.
        pieces: consecutive, one array ``[n, *shape]`` per field.
    """
    after = np.concatenate([piece[followed.next] for piece in pieces])
    value = np.concatenate([piece[followed.root] for piece in pieces])
    if len(value) < 2:
        return None
    same = np.logical_and.reduce(same_values(after[:-1], value[1:]).reshape(len(value) - 1, -1), axis=1)
    return 2 * int(np.count_nonzero(same)) > len(same)


def refuse_order(reason: str) -> NoReturn:
    """Refuse rows that are not consecutive steps.

    Raises:
        StepOrderError: always.
    """
    raise StepOrderError(
        f"Got rows that should be consecutive steps of one environment, but {reason}. If they are one step of each of "
        "several environments, [B], write them with rb.add(td), which is rb.extend(td.unsqueeze(1)); data [T, B] with "
        "rb.extend(td.transpose(0, 1)). If a row holds pieces of several trajectories, set ('next', 'done') and "
        "('next', 'truncated') at the last step of each. If they are consecutive, and noise, normalization or n-step "
        "returns make them look otherwise, give the buffer writer=TrajectoryWriter(sequences=True)."
    )
