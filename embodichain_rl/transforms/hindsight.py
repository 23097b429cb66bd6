"""Goals in hindsight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs.transforms import Transform

from embodichain_rl._checks import checked_float, checked_key
from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.sampling import current_generator
from embodichain_rl.replay.schema import as_array
from embodichain_rl.replay.storage import storage_of

__all__ = ["HindsightRelabel"]

DONE, TERMINATED, TRUNCATED = ("next", "done"), ("next", "terminated"), ("next", "truncated")

STRATEGIES = ("future", "final", "episode")
GOALS_PER = ("chunk", "step")


class HindsightRelabel(Transform):
    """Transform for hindsight experience replay: relabel chunks with goals that their own trajectories achieved.

    See Andrychowicz et al. 2017, arXiv:1707.01495. Goals are read from the whole trajectory in the buffer, not only
    from the sampled chunk, and never from another trajectory. Rewards are computed anew for the new goals.

    Use it with ``rb.append_transform(...)`` or ``OnlineDataset(transform=...)``. It replaces TorchRL's
    ``HERReplayBuffer``, which needs single steps in a ring. It accepts chunks ``[B, L]``, also padded ones, single
    chunks ``[L]``, the flat chunks of :class:`FlatChunks`, and batches of windows ``[B]``.

    Each chunk is relabelled with the probability ``fraction``. The others keep their goals and rewards.

    Args:
        source: the buffer, storage or engine that the batches come from.
        reward_fn: a function of the batch with the new goals. It returns the rewards, ``[*batch]`` or ``[*batch, 1]``;
            those of relabelled steps are used. With None no reward changes, for goal-conditioned imitation learning.

    Keyword Args:
        fraction: the probability that a chunk is relabelled. 0.8 means four hindsight goals for one original goal.
        strategy: where in the trajectory a goal is read. ``"future"``: at the last step of the chunk or any later step,
            uniformly. ``"final"``: at the last step of the trajectory. ``"episode"``: at any step, uniformly.
        goals_per: ``"chunk"``: all steps of a chunk get one goal, for policies of sequences; in a batch of windows
            every item is a chunk of its own. ``"step"``: every step gets its own goal, at or after that step with
            ``"future"``, for policies of single transitions; ``fraction`` is then the probability of a step.
        achieved_goal_key: the stored key of the goals. The default, ``("next", "achieved_goal")``, is what a step
            achieves; ``"achieved_goal"`` is what was achieved before the step.
        desired_goal_key: the key of the goals in a batch. The same key under ``"next"`` is relabelled too, if present.
        reward_key: the key of the rewards in a batch.
        terminated_fn: a function of the batch with the new goals that returns which steps are terminal. By default
            ``done``, ``terminated`` and ``truncated`` keep their stored values, which is right for environments whose
            episodes do not end at the goal. With it, ``("next", "terminated")`` of relabelled steps is what it returns,
            and ``("next", "done")`` is ``terminated | truncated``.

    Attributes:
        evicted (int): chunks (or steps) that kept their original goals because their trajectory was evicted between the
            draw and the relabelling.

    Goals are drawn with the generator of the batch: that of the buffer, of ``sample_chunks``, or of the seeded stream
    of an ``OnlineDataset``.

    Raises:
        InvalidArgumentError: when an argument is invalid, a batch comes from another buffer, or ``reward_fn`` does not
            return one number for each step.
        SchemaMismatchError: when a batch has no ``("trajectory", "id")``, ``("trajectory", "step")`` or desired goal,
            or when no achieved goal of the same shape and dtype is stored.

    Example:
        >>> from embodichain_rl.transforms import HindsightRelabel
        >>> rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=30_000, chunk_size=2, batch_size=8)
        >>> def reached(batch):
        ...     return (batch["next", "achieved_goal"] == batch["desired_goal"]).all(-1, keepdim=True).float()
        >>> rb.append_transform(HindsightRelabel(rb, reached, strategy="final", fraction=1.0)) is rb
        True
        >>> steps = TensorDict({"desired_goal": torch.full((3, 1), 9.0)}, [3])
        >>> steps["next"] = {"achieved_goal": torch.tensor([[1.0], [2.0], [3.0]]), "reward": torch.zeros(3, 1)}
        >>> steps["next", "done"] = torch.tensor([[0], [0], [1]]).bool()
        >>> _ = rb.extend(steps)
        >>> batch = rb.sample()
        >>> batch["desired_goal"].unique(), batch["next", "reward"].sum() == batch["next", "done"].sum()
        (tensor([3.]), tensor(True))
    """

    def __init__(
        self,
        source: Any,
        reward_fn: Callable[[TensorDictBase], torch.Tensor] | None,
        *,
        fraction: float = 0.8,
        strategy: str = "future",
        goals_per: str = "chunk",
        achieved_goal_key: NestedKey = ("next", "achieved_goal"),
        desired_goal_key: NestedKey = "desired_goal",
        reward_key: NestedKey = ("next", "reward"),
        terminated_fn: Callable[[TensorDictBase], torch.Tensor] | None = None,
    ) -> None:
        storage = storage_of(source, "HindsightRelabel")
        for name, function in (("reward_fn", reward_fn), ("terminated_fn", terminated_fn)):
            if function is not None and not callable(function):
                raise InvalidArgumentError(f"Got {name}={function!r}; it must be a function of a batch, or None.")
        if strategy not in STRATEGIES:
            raise InvalidArgumentError(f"Got strategy={strategy!r}; it must be one of {STRATEGIES}.")
        if goals_per not in GOALS_PER:
            raise InvalidArgumentError(f"Got goals_per={goals_per!r}; it must be one of {GOALS_PER}.")
        self._achieved, self._desired = checked_key(achieved_goal_key), checked_key(desired_goal_key)
        self._reward = checked_key(reward_key)
        super().__init__(in_keys=[self._desired, self._reward], out_keys=[self._desired, self._reward])
        self.storage = storage
        self.reward_fn = reward_fn
        self.terminated_fn = terminated_fn
        self.fraction = checked_float("fraction", fraction, minimum=0.0, maximum=1.0)
        self.strategy = strategy
        self.goals_per = goals_per
        self.evicted = 0

    @graph_break
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        ids, steps = self._origin(tensordict)
        chunk_of, ids, last = self._chunks(tensordict, ids, steps)
        drawn = torch.rand(2, len(ids), dtype=torch.float64, generator=current_generator(self.storage._rng)).numpy()
        chosen = np.flatnonzero(drawn[0] < self.fraction)
        if not len(chosen):
            return tensordict
        goals, there = self._goals(ids[chosen], last[chosen], drawn[1, chosen])
        goal_of_chunk = np.full(len(ids), -1)
        goal_of_chunk[chosen[there]] = np.arange(len(goals))
        goal_of = goal_of_chunk[chunk_of]
        if (goal_of >= 0).any():
            tensor = self.storage.arena.tensor
            mask = tensor(goal_of >= 0).view(tensordict.shape)
            self._set_goals(tensordict, mask, goals[tensor(np.maximum(goal_of, 0))])
            self._compute_anew(tensordict, mask)
        return tensordict

    def _origin(self, tensordict: TensorDictBase) -> tuple[np.ndarray, np.ndarray]:
        """Return the trajectory id and the step of each step of a batch, flat."""
        ids, steps = tensordict.get(("trajectory", "id"), None), tensordict.get(("trajectory", "step"), None)
        if ids is None or steps is None or tensordict.get(self._desired, None) is None:
            raise SchemaMismatchError(
                f"Got a batch with the keys {sorted(map(str, tensordict.keys(True, True)))}; HindsightRelabel needs "
                f"('trajectory', 'id'), ('trajectory', 'step') and the desired goal, {self._desired!r}. Put it before "
                "transforms that drop them."
            )
        return tuple(as_array(value.cpu()).reshape(-1) for value in (ids, steps))  # type: ignore[return-value]

    def _chunks(
        self, tensordict: TensorDictBase, ids: np.ndarray, steps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the chunk of each step, and of each chunk the trajectory and the last step."""
        if self.goals_per == "step" or _has_windows(tensordict):
            chunk_of = np.arange(len(ids))
        elif tensordict.ndim > 1:
            chunk_of = np.arange(len(ids)) // tensordict.shape[-1]
        else:
            # One chunk, or several one behind the other. Where a chunk is padded the same step comes again.
            ahead = np.diff(steps)
            begins = (np.diff(ids) != 0) | (ahead < 0) | (ahead > 1)
            marks = tensordict.get("is_init", None)
            if marks is not None:
                begins |= as_array(marks.cpu()).reshape(len(ids), -1)[1:, 0]
            chunk_of = np.concatenate([[0], np.cumsum(begins)])[: len(ids)]
        ends = np.flatnonzero(np.diff(chunk_of, append=-1))
        return chunk_of, ids[ends], steps[ends]

    def _goals(self, ids: np.ndarray, last: np.ndarray, uniform: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Return a goal for each chunk whose trajectory is still there, and which of the chunks these are."""
        storage, ledger = self.storage, self.storage.ledger
        arena = storage.arena
        number = arena.schema.number_of(self._achieved)
        if number is None:
            raise SchemaMismatchError(
                f"Got achieved_goal_key={self._achieved!r}, but what is stored has the keys {arena.schema.keys}."
            )
        if not ledger.published(ids).all():
            raise InvalidArgumentError("Got a batch of another buffer; HindsightRelabel takes those of its source.")
        rows = ledger.rows_of(ids)
        there = np.flatnonzero(rows.lengths > 0)
        lengths = rows.lengths[there]
        if self.strategy == "episode":
            first = np.zeros_like(lengths)
        else:
            first = lengths - 1 if self.strategy == "final" else np.minimum(last[there], lengths - 1)
        steps = first + (uniform[there] * (lengths - first)).astype(np.int64)
        goals = storage.values_at(number, rows.starts[there] + steps, rows.select(there))
        valid = ledger.unchanged(rows.select(there))
        self.evicted += len(ids) - int(np.count_nonzero(valid))
        return (goals, there) if valid.all() else (goals[arena.tensor(valid)], there[valid])

    def _set_goals(self, tensordict: TensorDictBase, mask: torch.Tensor, goals: torch.Tensor) -> None:
        shape = goals.shape[1:]
        for key in (self._desired, ("next", *self._desired)):
            desired = tensordict.get(key, None)
            if desired is None:
                continue
            # A window has an axis of its own, and the same goal at each of its steps.
            window = desired.shape[tensordict.ndim : desired.ndim - len(shape)] if _has_windows(tensordict) else ()
            if desired.shape != (*tensordict.shape, *window, *shape) or desired.dtype != goals.dtype:
                raise SchemaMismatchError(
                    f"Got {key!r} of shape {list(desired.shape)} and {desired.dtype} in a batch "
                    f"{list(tensordict.shape)}, but the achieved goals ({self._achieved!r}) are of shape {list(shape)} "
                    f"and {goals.dtype}; they must be the same."
                )
            tensordict.set(key, _where(mask, goals.view(*mask.shape, *(1 for _ in window), *shape), desired))

    def _compute_anew(self, tensordict: TensorDictBase, mask: torch.Tensor) -> None:
        if self.reward_fn is not None:
            self._replace(tensordict, "reward_fn", self.reward_fn, self._reward, mask)
        if self.terminated_fn is not None:
            self._replace(tensordict, "terminated_fn", self.terminated_fn, TERMINATED, mask)
            terminated, truncated = tensordict.get(TERMINATED), tensordict.get(TRUNCATED, None)
            done = terminated if truncated is None else terminated | truncated
            tensordict.set(DONE, _where(mask, done, tensordict.get(DONE, done)))

    @staticmethod
    def _replace(
        tensordict: TensorDictBase,
        name: str,
        function: Callable[[TensorDictBase], torch.Tensor],
        key: tuple[str, ...],
        mask: torch.Tensor,
    ) -> None:
        computed, stored = torch.as_tensor(function(tensordict)), tensordict.get(key, None)
        needed = (*tensordict.shape, 1) if stored is None else stored.shape
        if computed.numel() != torch.Size(needed).numel():
            raise InvalidArgumentError(
                f"{name} returned a tensor of shape {list(computed.shape)} for a batch {list(tensordict.shape)}; "
                f"needed is one number for each step, {list(needed)}."
            )
        computed = computed.reshape(needed)
        if stored is not None:
            computed = _where(mask, computed.to(stored.dtype), stored)
        tensordict.set(key, computed)


def _has_windows(tensordict: TensorDictBase) -> bool:
    """Return whether it is a batch of windows, ``[B]`` or ``[]``: they come with padding masks of their own."""
    if tensordict.ndim > 1:
        return False
    names = (key if isinstance(key, str) else key[-1] for key in tensordict.keys(True, True))
    return any(name.endswith("_is_pad") for name in names)


def _where(mask: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return ``new`` at the steps of a mask ``[*batch]`` and ``old``, ``[*batch, ...]``, at all others."""
    return torch.where(mask.view(*mask.shape, *(1 for _ in range(old.ndim - mask.ndim))), new, old)
