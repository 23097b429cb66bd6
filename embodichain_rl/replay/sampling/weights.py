"""How likely each trajectory is to be drawn: the values of ``ChunkSampler(weights=...)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tensordict import NestedKey

from embodichain_rl._checks import checked_float, checked_int, checked_key
from embodichain_rl.errors import InvalidArgumentError

__all__ = ["ByGroup", "ByPriority", "ByRecency", "ByStep", "Weights", "checked_weights"]

NAMES = ("uniform", "steps")


@dataclass(frozen=True)
class ByRecency:
    """Draw newer trajectories more often: each is ``2 ** (1 / half_life)`` times as likely as the one before it.

    Args:
        half_life: the number of newer trajectories after which a trajectory is half as likely; positive.

    Example:
        >>> sampler = ChunkSampler(16, weights=ByRecency(half_life=100))
    """

    half_life: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "half_life", checked_float("half_life", self.half_life, minimum=1e-3))


@dataclass(frozen=True)
class ByGroup:
    """Draw groups of trajectories, such as tasks, in given proportions, and uniformly within a group.

    Args:
        key: the key of the group, an integer or text: a key of whole trajectories, such as ``("trajectory", "task")``,
            or a key of steps, of which the first step counts. ``"task"`` stands for ``("trajectory", "task")`` too, if
            there is no key ``"task"`` of steps.
        mixture: the weight of each group that is drawn; weights need not sum to 1. None: all existing groups, equally
            often.

    Raises:
        InvalidArgumentError: for a mixture without a positive weight, or with one that is negative.

    Example:
        >>> sampler = ChunkSampler(16, weights=ByGroup("task", mixture={0: 0.8, 1: 0.2}))
        >>> sampler = ChunkSampler(16, weights=ByGroup(("trajectory", "task"), mixture={"lift": 1, "pour": 3}))
    """

    key: NestedKey
    mixture: Mapping[int | str, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", checked_key(self.key))
        object.__setattr__(self, "mixture", _checked_mixture(self.mixture))

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class ByStep:
    """Draw chunks by a label of their first step, such as who acted there, in given proportions.

    All chunks whose first step has the same label are equally likely. With windows, the label is that of the drawn
    step. This is for labels that change within a trajectory, such as a person who takes over from a policy; for whole
    trajectories see :class:`ByGroup`. ``ChunkSampler`` refuses it with ``sampling_mode`` other than ``"episode"``, and
    with chunks that begin before the first step of a trajectory.

    Args:
        key: the key of the label, an integer or text of each step, such as ``("collector", "source")``.
        mixture: the weight of each label that is drawn; weights need not sum to 1. None: all existing labels, equally
            often.

    Raises:
        InvalidArgumentError: for a mixture without a positive weight, or with one that is negative.

    Example:
        >>> sampler = ChunkSampler(16, weights=ByStep(("collector", "source"), {"human": 1, "policy": 1}))
    """

    key: NestedKey
    mixture: Mapping[int | str, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", checked_key(self.key))
        object.__setattr__(self, "mixture", _checked_mixture(self.mixture))

    def __hash__(self) -> int:
        return hash(self.key)


def _checked_mixture(mixture: Any) -> dict[int | str, float] | None:
    """Return the groups of a mixture that have a positive weight."""
    if mixture is None:
        return None
    if not isinstance(mixture, Mapping):
        raise InvalidArgumentError(f"Got mixture={mixture!r}; it must map groups to their weights.")
    weights = {
        group if isinstance(group, str) else checked_int("a group of the mixture", group): checked_float(
            f"the weight of group {group!r}", weight, minimum=0
        )
        for group, weight in mixture.items()
    }
    if len({type(group) for group in weights}) > 1:
        raise InvalidArgumentError(f"Got mixture={mixture!r}; groups are integers or text, not both.")
    if not any(weights.values()):
        raise InvalidArgumentError(f"Got mixture={mixture!r}; at least one group must have a positive weight.")
    return {group: weight for group, weight in weights.items() if weight > 0}


@dataclass(frozen=True)
class ByPriority:
    """Draw in proportion to ``(priority + eps) ** alpha`` (Schaul et al., 2016, "Prioritized Experience Replay").

    Priorities belong to whole trajectories. Set them after a training step with one of

    * ``rb.update_tensordict_priority(batch)``: each trajectory of the batch gets the largest value of
      ``batch[rb.priority_key]`` (``"td_error"``) among its steps there;
    * ``rb.update_priority(batch["index"], priorities)``, with one priority for all, per chunk ``[B]`` or per step
      ``[B, L]``;
    * ``rb.update_priority(ids, priorities)``, by trajectory id.

    The buffer's own sampler must draw by priority, also if an :class:`~embodichain_rl.datasets.OnlineDataset` with such
    weights draws from the buffer. A new trajectory gets the largest weight of the trajectories that are live with it.
    Priorities are shared by all processes that share the buffer, and are saved with it.

    A batch has ``"priority_weight"``, ``float32`` ``[B, L]`` (``[B]`` with windows): the importance weights
    ``weight ** -beta``, divided by the largest one of the batch.

    Args:
        alpha: 0 = uniform, 1 = in proportion to the priority; not negative.
        beta: how far the importance weights correct for it, 0 = not at all, 1 = fully; not negative.
        eps: added to each priority, so that every trajectory can be drawn; positive.

    Example:
        >>> sampler = ChunkSampler(16, weights=ByPriority(alpha=0.7, beta=0.5))
    """

    alpha: float = 0.6
    beta: float = 0.4
    eps: float = field(default=1e-8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", checked_float("alpha", self.alpha, minimum=0.0))
        object.__setattr__(self, "beta", checked_float("beta", self.beta, minimum=0.0))
        object.__setattr__(self, "eps", checked_float("eps", self.eps, minimum=1e-300))


Weights: TypeAlias = str | ByRecency | ByGroup | ByStep | ByPriority
"""``"uniform"``, ``"steps"`` (in proportion to the number of chunks in a trajectory), or one of the classes here."""


def checked_weights(weights: Any) -> Weights:
    """Return ``weights``, which must be one of :data:`Weights`.

    Raises:
        InvalidArgumentError: when they are something else.
    """
    if weights in NAMES if isinstance(weights, str) else isinstance(weights, ByRecency | ByGroup | ByStep | ByPriority):
        return weights
    raise InvalidArgumentError(
        f"Got weights={weights!r}; needed is 'uniform', 'steps', ByRecency(...), ByGroup(...), ByStep(...) or "
        "ByPriority(...)."
    )
