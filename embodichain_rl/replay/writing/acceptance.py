"""Which trajectories are kept, and when to give up on an environment that gives none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
from tensordict import TensorDictBase, is_tensor_collection

from embodichain_rl._checks import checked_int
from embodichain_rl.errors import GenerationFailedError, InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.schema import Blobs, as_tensor, resolve_texts, resolved
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["Accept", "AcceptFilter", "Admission", "accept_all", "accept_success", "whole_trajectory"]

Accept: TypeAlias = Callable[[TensorDictBase], bool]
"""Judges one whole trajectory ``[T]``."""


class Admission(Protocol):
    """What decides about each whole trajectory before it is stored."""

    @property
    def admits_all(self) -> bool:
        """Whether every trajectory is stored, so that :meth:`admits` need not be asked."""

    def admits(self, steps: int, trajectory: Callable[[], TensorDictBase]) -> bool:
        """Return whether a trajectory is stored.

        Args:
            steps: its length.
            trajectory: builds it, ``[steps]``; called only if it is judged.
        """

    def stored_version(self, version: int) -> int:
        """Return the policy version that a trajectory is stored with.

        Args:
            version: the one in its last step; ``NO_VERSION`` without one.
        """

    def stored(self, steps: int) -> None:
        """Take note of a trajectory of so many steps that was stored."""


def accept_all(trajectory: TensorDictBase) -> bool:
    """Accept every trajectory."""
    return True


def accept_success(trajectory: TensorDictBase) -> bool:
    """Accept a trajectory ``[T]`` whose last step is a success, by ``("next", "success")``.

    The last step, not any: a robot that reached its goal and left it again did not do the task.

    Raises:
        SchemaMismatchError: when the trajectory does not have the key.
    """
    if not is_tensor_collection(trajectory) or ("next", "success") not in trajectory.keys(True):
        raise SchemaMismatchError(
            "Got a trajectory without ('next', 'success'), by which accept_success accepts. Have the environment "
            "report it, or give accept a function of your own."
        )
    return bool(trajectory["next", "success"][-1].all())


class AcceptFilter:
    """A filter that keeps the trajectories of one environment that a predicate accepts, and counts the others.

    Args:
        accept: judges a trajectory ``[T]``.
        max_generation_attempts: failures in a row after which an error is raised. A failure is a trajectory that is not
            accepted, or one that could not be made (:meth:`failed`); an accepted one resets the count. None: no limit.
        environment: name of the environment in an error.

    Attributes:
        num_accepted (int): trajectories kept.
        num_rejected (int): trajectories not accepted.
        num_failed (int): trajectories that could not be made.

    Raises:
        InvalidArgumentError: when an argument can't work.

    Example:
        >>> keep_long = AcceptFilter(lambda trajectory: len(trajectory) > 2)
        >>> short, long = TensorDict(batch_size=[2]), TensorDict(batch_size=[3])
        >>> keep_long.admit(short), keep_long.admit(long), keep_long.num_accepted, keep_long.num_rejected
        (False, True, 1, 1)
    """

    def __init__(
        self, accept: Accept, *, max_generation_attempts: int | None = None, environment: str = "the environment"
    ) -> None:
        if not callable(accept):
            raise InvalidArgumentError(f"accept must be a function of a trajectory, got {accept!r}.")
        if max_generation_attempts is not None:
            max_generation_attempts = checked_int("max_generation_attempts", max_generation_attempts, minimum=1)
        self.accept = accept
        self.max_generation_attempts = max_generation_attempts
        self.environment = environment
        self.num_accepted = 0
        self.num_rejected = 0
        self.num_failed = 0
        self._failures_in_a_row = 0

    def __getstate__(self) -> dict[str, Any]:
        # Workers receive their writer by pickle, which can't pickle functions that are defined in other functions.
        return {**self.__dict__, "accept": cloudpickle.dumps(self.accept)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, accept=cloudpickle.loads(state["accept"]))

    def admit(self, trajectory: TensorDictBase) -> bool:
        """Judge one whole trajectory ``[T]``.

        Returns:
            Whether to keep it.

        Raises:
            GenerationFailedError: when it is not accepted, and is the last failure that is allowed in a row.
        """
        if self.accept(trajectory):
            self.num_accepted += 1
            self._failures_in_a_row = 0
            return True
        self.num_rejected += 1
        self._failures_in_a_row += 1
        self._give_up_after("the last trajectory was not accepted", None)
        return False

    def failed(self, reason: str, error: BaseException | None = None) -> None:
        """Count a trajectory that could not be made.

        Args:
            reason: what went wrong, as part of a sentence.
            error: the exception behind it, which a :class:`GenerationFailedError` is chained to.

        Raises:
            GenerationFailedError: when it is the last failure that is allowed in a row.
        """
        self.num_failed += 1
        self._failures_in_a_row += 1
        self._give_up_after(reason, error)

    def _give_up_after(self, reason: str, error: BaseException | None) -> None:
        count, allowed = self._failures_in_a_row, self.max_generation_attempts
        if allowed is None or count < allowed:
            return
        self._failures_in_a_row = 0  # a caller that continues with this environment allows as many failures again
        raise GenerationFailedError(
            f"{self.environment} failed {count} times in a row to give a trajectory that is kept "
            f"(max_generation_attempts={allowed}): {reason}. So far {self.num_accepted} were accepted, "
            f"{self.num_rejected} rejected and {self.num_failed} could not be made. Look at the task and at accept, or "
            "raise max_generation_attempts where failures are to be expected."
        ) from error


def whole_trajectory(
    storage: TrajectoryStorage, pieces: Sequence[Sequence[np.ndarray]], of_trajectory: Sequence[np.ndarray]
) -> TensorDictBase:
    """Return the trajectory that is judged, ``[T]``, from its pieces.

    Args:
        storage: what it is to be written to.
        pieces: each has one array ``[n, *shape]`` per field.
        of_trajectory: one array ``[*shape]`` per trajectory field.
    """
    schema = storage.schema
    assert schema is not None, "steps are checked against a schema before a trajectory is whole"
    arrays = map(np.concatenate, zip(*pieces, strict=True))
    values = [
        resolved(field, Blobs(array)) if field.is_blob else as_tensor(array, field.dtype)
        for array, field in zip(arrays, schema.fields, strict=True)
    ]
    steps = sum(len(piece[0]) for piece in pieces)
    for of_field, value in zip(schema.trajectory_fields, of_trajectory, strict=True):
        values.append(as_tensor(value, of_field.dtype).expand(steps, *of_field.shape))
    return resolve_texts(schema.build(values, [steps]), schema.text_keys, storage.texts)
