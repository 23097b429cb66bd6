"""The options of a sampler: their types, their names, and the draws that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from tensordict import NestedKey

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.sampling.draws import (
    GroupDraws,
    LabelDraws,
    Limits,
    PriorityDraws,
    RecencyDraws,
    StepDraws,
    TrajectoryDraws,
)
from embodichain_rl.replay.sampling.passes import Deal, DealtDraws, OnePassDraws, PassPosition
from embodichain_rl.replay.sampling.subsets import Subset, TrajectorySubset
from embodichain_rl.replay.sampling.weights import ByGroup, ByPriority, ByRecency, ByStep, Weights

__all__ = ["MixtureOptions", "SamplingOptions", "check_replacement", "make_draws", "option_name"]


class _OtherOptions(TypedDict, total=False):
    pad: str
    pad_before: int | None
    pad_after: int | None
    windows: Mapping[NestedKey, tuple[int, int] | Sequence[int]] | None
    delta_timestamps: Mapping[NestedKey, Sequence[float]] | None
    fps: float | NestedKey | None
    tolerance_s: float | None
    stride: int
    drop_n_first_frames: int
    drop_n_last_frames: int
    strict_length: bool
    init_key: NestedKey | None
    replacement: bool
    max_age: float | None
    max_policy_lag: int | None
    subset: Subset


class SamplingOptions(_OtherOptions, total=False):
    """The keyword arguments of :class:`ChunkSampler` except ``sampling_mode``, for callers that pass them on."""

    weights: Weights


class MixtureOptions(_OtherOptions, total=False):
    """The same, for callers that also take one weight for each of several sources."""

    weights: Weights | Sequence[float]


def option_name(value: Any) -> str:
    """Return a name that equal values of an option share in any two processes, without addresses in memory."""
    return value.name if isinstance(value, TrajectorySubset) else repr(value)


def check_replacement(replacement: Any, weights: Weights, chunk_size: int | Callable[[], int] | None) -> None:
    """Refuse combinations of options that draws without replacement do not have.

    Raises:
        InvalidArgumentError: for ``replacement`` that is no bool, and without replacement for weights or chunk sizes
            that no pass over all chunks can have.
    """
    if not isinstance(replacement, bool):
        raise InvalidArgumentError(f"Got replacement={replacement!r}; it must be True or False.")
    if not replacement and (weights != "uniform" or callable(chunk_size)):
        raise InvalidArgumentError(
            f"Got replacement=False with weights={weights!r} and chunk_size={chunk_size!r}: a pass over all chunks "
            "needs weights='uniform' and chunks of one size."
        )


def make_draws(
    weights: Weights, replacement: bool, limits: Limits, dealt: tuple[Deal, PassPosition | None] | None = None
) -> TrajectoryDraws:
    """Return the draws that the options ask for.

    Args:
        weights: how likely each trajectory is.
        replacement: whether a chunk can be drawn again before all others.
        limits: which trajectories may be drawn.
        dealt: without replacement, the share of the passes of this process and how far it has come; None for passes
            that no other process shares.
    """
    if not replacement:
        return OnePassDraws(limits) if dealt is None else DealtDraws(limits, *dealt)
    if isinstance(weights, ByGroup):
        return GroupDraws(weights, limits)
    if isinstance(weights, ByStep):
        return LabelDraws(weights, limits)
    if isinstance(weights, ByPriority):
        return PriorityDraws(weights, limits)
    if isinstance(weights, ByRecency):
        return RecencyDraws(weights, limits)
    return StepDraws(limits) if weights == "steps" else TrajectoryDraws(limits)
