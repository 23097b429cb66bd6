"""Steps that arrive while no trajectory ends: a warning, once, that names the cause."""

from __future__ import annotations

import multiprocessing
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence

from embodichain_rl.errors import EmptyBufferError, WorkerDiedError
from embodichain_rl.replay.schema import Key, Schema, key_name
from embodichain_rl.replay.storage import HandedOver
from embodichain_rl.replay.writing.boundary_keys import END_KEYS, FLAT_END_KEYS, BoundaryFields
from embodichain_rl.replay.writing.pending import PendingSteps

__all__ = ["StarvationWatch", "explained"]

FIRST_LOOK = 64
"""Steps without a published trajectory after which the pending ones are looked at."""

MANY_TRAJECTORIES = 16
"""Pending trajectories that are many, where there are also 4 times as many as one call continues."""

LONG_WITHOUT_TRUNCATION = 500
"""Steps of a pending trajectory that are many where only ``terminated`` could end it: few time limits are longer."""

VERY_LONG = 20_000
"""Steps of a pending trajectory that are many whatever could end it; Atari's longest episodes are of this order."""

MANY_REJECTED = 100
"""Rejected trajectories that are many, where none was accepted."""

WORTH_A_WORD = 200
"""Steps that never became a trajectory, of which a program is told when it ends."""

_FLAG_NAMES = ("done", "terminated", "truncated")


class StarvationWatch:
    """Looks at what is pending in one writer while nothing is published, and warns once.

    Long episodes are no reason to warn: one that goes on has one pending trajectory per environment. Reasons are ids of
    trajectories that change without an end, an episode that only ``("next", "terminated")`` could end, and one that
    fills the buffer.

    Args:
        pending: the unfinished trajectories of the writer.

    Attributes:
        published (int): the number of trajectories that the writer has published.
    """

    def __init__(self, pending: PendingSteps) -> None:
        self.published = 0
        self._state = _State(pending)
        self._finalizer = weakref.finalize(self, _State.report, self._state)

    def stored(self) -> None:
        """Take note of a published trajectory."""
        self.published += 1
        self._state.steps, self._state.next_look = 0, FIRST_LOOK

    def kept(self, steps: int, begun_or_continued: int, schema: Schema, keys: BoundaryFields, max_steps: int) -> None:
        """Take note of steps of trajectories that did not end; warn if too many of them wait.

        Args:
            steps: the number of steps.
            begun_or_continued: the number of trajectories that they belong to.
            schema: the fields of the steps.
            keys: what says where trajectories end.
            max_steps: the steps that the buffer holds at most.
        """
        state = self._state
        state.steps += steps
        state.widest = max(state.widest, begun_or_continued)
        state.fields = schema, keys
        if state.steps < state.next_look or state.warned:
            return
        state.next_look = max(state.steps * 5 // 4, state.steps + FIRST_LOOK)
        if state.starved(self.published, max_steps):
            state.warned = True
            warnings.warn(self.explanation(), stacklevel=4)

    def rejected(self, rejected: int) -> None:
        """Take note of a trajectory that ``accept`` rejected, one of ``rejected``; warn if none is ever accepted."""
        if self.published or rejected < MANY_REJECTED or self._state.warned:
            return
        self._state.warned = True
        warnings.warn(
            f"accept rejected all of the first {rejected:,} trajectories, so nothing is published, and nothing can be "
            "sampled. See whether accept returns what it should (accept_success looks at ('next', 'success') of the "
            "last step), or give the writer no accept.",
            stacklevel=2,
        )

    def emptied(self) -> None:
        """Warn, once, that ``rb.empty()`` drops steps of trajectories that did not end, where others did.

        One step a trajectory is what collectors of TorchRL try a buffer with.
        """
        state = self._state
        steps, trajectories = state.pending.steps, len(state.pending)
        if steps <= trajectories or not self.published or state.told_of_dropped:
            return
        state.told_of_dropped = True
        warnings.warn(
            f"rb.empty() drops {steps:,} steps of {trajectories:,} unfinished trajectories, which were never sampled. "
            "A program that empties the buffer after each batch (on-policy) loses the end of each batch in this way: "
            "build the collector with set_truncated=True, or call rb.writer.truncate_pending() after rb.extend().",
            stacklevel=4,
        )

    def explanation(self) -> str:
        """Return what is pending, why, and what to do."""
        return self._state.message("nothing so far" if not self.published else "nothing of them")

    def forget(self) -> None:
        """End without a last look."""
        self._finalizer.detach()

    def forgive(self) -> None:
        """Begin anew: what was pending was dropped or stored on request."""
        self._state.steps, self._state.next_look = 0, FIRST_LOOK


class _Names:
    """What the keys of some data are called, for messages."""

    def __init__(self, flags: Sequence[Key], ids: Key | None, others: Sequence[Key]) -> None:
        self.flags, self.ids, self.others = flags, ids, others

    @classmethod
    def of(cls, schema: Schema, keys: BoundaryFields) -> _Names:
        flags = [schema.fields[number].key for number in keys.flags]
        ids = None if keys.traj_ids is None else schema.all_fields[keys.traj_ids].key
        known = {*flags, *END_KEYS, *FLAT_END_KEYS}
        others = [key for key in schema.keys if key[-1].split(".")[-1] in _FLAG_NAMES and key not in known]
        return cls(flags, ids, others)

    @property
    def only_terminated(self) -> bool:
        return {key[-1].split(".")[-1] for key in self.flags} == {"terminated"}

    def expected(self) -> str:
        """Return which keys could end a trajectory, and which of them the data has."""
        if not self.flags:
            return f"the data has no end flags, so a trajectory ends where {key_name(self.ids or ())} changes"
        known = END_KEYS if any(key in END_KEYS for key in self.flags) else FLAT_END_KEYS
        if not any(key in known for key in self.flags):  # the user named them
            return f"trajectories end where {_listed(self.flags)} is True, which it never was"
        missing = [key for key in known if key not in self.flags]
        lacks = f", and not {_listed(missing)}" if missing else ""
        return (
            f"trajectories end where {_listed(known, 'or')} is True; of these the data has {_listed(self.flags)}{lacks}"
        )

    def advice(self) -> str:
        """Return what to do where end flags are missing or never set."""
        hints = []
        if self.only_terminated:
            hints.append(
                "an episode that ends by a time limit is truncated, not terminated: keep ('next', 'done') or "
                "('next', 'truncated') too, wherever keys are selected"
            )
        hints += [f"name the end flags of your data: end_key={key_name(key)}" for key in self.others[:1]]
        if not hints:
            hints.append("let episodes end (StepCounter(max_steps=...))")
        hints.append("let the collector truncate what it breaks off (set_truncated=True)")
        hints.append("rb.writer.truncate_pending() stores what waits")
        return "; or ".join(hints)


class _State:
    """What a watch has seen; it outlives the writer for one last look."""

    def __init__(self, pending: PendingSteps) -> None:
        self.pending = pending
        self.steps = 0
        self.next_look = FIRST_LOOK
        self.widest = 0
        self.warned = False
        self.told_of_dropped = False
        self.fields: tuple[Schema, BoundaryFields] | None = None

    @property
    def ids_change(self) -> bool:
        """Whether there are more unfinished trajectories than anything goes on with."""
        return len(self.pending) >= max(MANY_TRAJECTORIES, 4 * self.widest)

    def starved(self, published: int, max_steps: int) -> bool:
        """Return whether what is pending is too much to be healthy."""
        if published:
            return len(self.pending) >= 4 * max(MANY_TRAJECTORIES, 4 * self.widest)
        if self.ids_change:
            return True
        longest = self.pending.most_steps
        if longest >= LONG_WITHOUT_TRUNCATION and self._names().only_terminated:
            return True
        return longest >= VERY_LONG or self.pending.steps > max_steps

    def _names(self) -> _Names:
        assert self.fields is not None, "set with the first steps"
        return _Names.of(*self.fields)

    def message(self, when: str) -> str:
        """Return what was seen, why, and what to do."""
        names = self._names()
        seen = (
            f"{self.pending.steps:,} steps of {len(self.pending):,} unfinished trajectories wait for their end, and "
            f"this process has published {when}. What waits can't be sampled, and len(rb) does not count it."
        )
        if self.ids_change and names.ids is not None:
            return (
                f"{seen} The id of the trajectory, {key_name(names.ids)}, changes, but no end flag is True before it "
                f"does: {names.expected()}. If an episode ends where the id changes, give the buffer, or the writer, "
                f"traj_key={key_name(names.ids)}; or let the collector truncate what it breaks off "
                f"(set_truncated=True). If not, {names.advice()}."
            )
        expected = names.expected()
        return f"{seen} {expected[0].upper()}{expected[1:]}. What to do: {names.advice()}."

    def report(self) -> None:
        """Warn at the end of the writer if nothing that it was given became a trajectory."""
        if self.warned or self.steps < WORTH_A_WORD or self.pending.steps < self.steps:
            return
        if multiprocessing.parent_process() is None:
            self.warned = True
            warnings.warn(self.message("nothing to the end"), stacklevel=2)


def explained(
    error: EmptyBufferError,
    handed_over: HandedOver,
    failures: Iterable[tuple[threading.Thread, Exception]],
    watch: StarvationWatch | None,
) -> EmptyBufferError | WorkerDiedError:
    """Return the error to raise for a buffer without a trajectory; see :meth:`TrajectoryWriter.explained`.

    Args:
        error: the error of the draw.
        handed_over: the child processes of the storage.
        failures: threads of this process in which ``extend`` has failed.
        watch: looks at what is pending in this process; None: nothing is.
    """
    alive = handed_over.look()
    failed = handed_over.failed
    for thread, reason in failures:
        failed.append(f"{thread.name} of this process could not extend: {type(reason).__name__}: {reason}")
        alive = alive or thread.is_alive()
    pending = f" {watch.explanation()}" if watch is not None else ""
    if not failed:
        return EmptyBufferError(f"{error}{pending}") if pending else error
    message = f"{error} Writers have failed: {'; '.join(failed)}.{pending}"
    return EmptyBufferError(message) if alive else WorkerDiedError(message)


def _listed(keys: Sequence[Key], word: str = "and") -> str:
    names = [str(key_name(key)) for key in keys]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
