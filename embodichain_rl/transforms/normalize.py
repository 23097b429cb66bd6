"""Normalization by the statistics of a buffer, and its inverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs.transforms import Transform

from embodichain_rl._checks import checked_float, checked_key
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError, StateMismatchError

__all__ = ["Normalize"]

Key = tuple[str, ...]

MODES: dict[str, tuple[str, ...]] = {
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantiles": ("q01", "q99"),
    "identity": (),
}
"""The statistics that each mode takes."""

ALSO_CALLED = {"quantile": "quantiles"}


class Normalize(Transform):
    """Transform that normalizes the entries of a batch by the statistics of a buffer.

    The statistics are part of the transform's state: ``rb.dumps`` and ``rb.state_dict`` save them, and ``rb.loads``
    brings them back, also into a transform without statistics. What is written to a buffer is not changed.

    If a batch has a next observation ``("next", *key)`` of a normalized ``key``, it is normalized by the same
    statistics, unless it has its own.

    Args:
        statistics: what :func:`~embodichain_rl.buffer_statistics` returns, or a dict of the same form, such as
            LeRobot's ``dataset.meta.stats``: for each key, tensors by name. None: they will be loaded.
        mode: how values are normalized, as in LeRobot: ``"mean_std"``: to mean 0 and standard deviation 1;
            ``"min_max"``: from the smallest and the largest value to -1 and 1; ``"quantiles"``: from ``"q01"`` and
            ``"q99"`` to -1 and 1; ``"identity"``: not at all. What never changes becomes 0 or -1. Or a mapping from
            keys to modes.

    Keyword Args:
        keys: the keys that are normalized; by default all of the statistics.
        eps: added to the standard deviation.

    Raises:
        InvalidArgumentError: for modes and statistics that can't be; by a call, as long as there are no statistics.
        SchemaMismatchError: by a call, when a key is not in the batch.
        StateMismatchError: when a state that is loaded is damaged.

    Example:
        >>> from embodichain_rl.transforms import Normalize
        >>> rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=30_000, chunk_size=3, batch_size=1)
        >>> done = torch.tensor([[0], [0], [1]]).bool()
        >>> _ = rb.extend(TensorDict({"action": torch.tensor([[1.0], [2.0], [5.0]]), "next": {"done": done}}, [3]))
        >>> normalize = Normalize(buffer_statistics(rb, ["action"]), "min_max")
        >>> _ = rb.append_transform(normalize)
        >>> batch = rb.sample()
        >>> batch["action"].flatten()
        tensor([-1.0000, -0.5000,  1.0000])
        >>> normalize.unnormalize(batch["action"], "action").flatten()
        tensor([1., 2., 5.])
    """

    def __init__(
        self,
        statistics: Mapping[Any, Mapping[str, Any]] | None = None,
        mode: str | Mapping[NestedKey, str] = "mean_std",
        *,
        keys: list[NestedKey] | None = None,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.eps = checked_float("eps", eps, minimum=0.0)
        if isinstance(mode, Mapping):
            self._modes: dict[Key, str] | str = {checked_key(key): _checked_mode(name) for key, name in mode.items()}
        else:
            self._modes = _checked_mode(mode)
        if keys is None and isinstance(self._modes, dict):
            self._chosen: list[Key] | None = [*self._modes]
        else:
            self._chosen = None if keys is None else [checked_key(key) for key in keys]
        self._ranges: dict[Key, tuple[str, list[torch.Tensor]]] = {}
        self._affine: dict[tuple[Key, torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        if statistics is not None:
            self.update(statistics)

    @property
    def normalized_keys(self) -> list[Key]:
        """The keys that are normalized."""
        return [*self._ranges]

    def update(self, statistics: Any) -> None:
        """Replace the statistics, for instance by those of what a buffer holds by now.

        Args:
            statistics: see the class.

        Raises:
            InvalidArgumentError: when a key, or what its mode takes, is missing, or a number is not finite.
        """
        if not isinstance(statistics, Mapping) or not statistics:
            raise InvalidArgumentError(
                f"Got statistics={statistics!r}; needed is what buffer_statistics(rb, keys) returns."
            )
        given = {checked_key(key): of_key for key, of_key in statistics.items()}
        chosen = [*given] if self._chosen is None else self._chosen
        ranges = {}
        for key in chosen:
            mode = self._modes if isinstance(self._modes, str) else self._modes.get(key, "identity")
            if key not in given and mode != "identity":
                raise InvalidArgumentError(f"Got statistics of {[*given]}, but not of {key}. Compute them for it too.")
            ranges[key] = mode, [_statistic(key, given.get(key, {}), name, mode) for name in MODES[mode]]
        self._set(ranges)

    def _set(self, ranges: dict[Key, tuple[str, list[torch.Tensor]]]) -> None:
        self._affine = {}
        self._ranges = ranges

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if not self._ranges:
            raise InvalidArgumentError(
                "Normalize has no statistics yet: call update(buffer_statistics(rb, keys)), or load a checkpoint."
            )
        for key in self._ranges:
            value = tensordict.get(key, None)
            if not isinstance(value, torch.Tensor):
                names = sorted(map(str, tensordict.keys(True, True)))
                raise SchemaMismatchError(f"Got a batch without a tensor at {key}, to be normalized; it has {names}.")
            tensordict.set(key, self.normalize(value, key))
            following = ("next", *key)
            if following not in self._ranges:
                value = tensordict.get(following, None)
                if isinstance(value, torch.Tensor):
                    tensordict.set(following, self.normalize(value, key))
        return tensordict

    def normalize(self, value: torch.Tensor, key: NestedKey) -> torch.Tensor:
        """Return normalized values, such as the observations of an environment.

        Args:
            value: ``[*batch, *shape]``.
            key: whose statistics are used.
        """
        if self._mode_of(key) == "identity":
            return value
        offset, scale = self._offset_and_scale(key, value)
        result = (value.to(offset.dtype) - offset) / scale
        return result.to(value.dtype) if value.is_floating_point() else result

    def unnormalize(self, value: Any, key: NestedKey | None = None) -> Any:
        """Return values as they were before normalization, such as the actions of a policy.

        Args:
            value: a tensor ``[*batch, *shape]``; or a TensorDict, of which all normalized keys that it has are replaced
                in a copy.
            key: whose statistics are used for a tensor.
        """
        if isinstance(value, TensorDictBase):
            copied = value.copy()
            for name in self._ranges:
                for place in (name, ("next", *name)):
                    entry = None if place != name and place in self._ranges else copied.get(place, None)
                    if isinstance(entry, torch.Tensor):
                        copied.set(place, self.unnormalize(entry, name))
            return copied
        if key is None:
            raise InvalidArgumentError("Give the key whose statistics are used: unnormalize(action, 'action').")
        if self._mode_of(key) == "identity":
            return value
        offset, scale = self._offset_and_scale(key, value)
        result = value.to(offset.dtype) * scale + offset
        return result.to(value.dtype) if value.is_floating_point() else result

    def _mode_of(self, key: NestedKey) -> str:
        found = self._ranges.get(checked_key(key))
        if found is None:
            raise InvalidArgumentError(f"Got the key {key!r}, but the statistics are of {[*self._ranges]}.")
        return found[0]

    def _offset_and_scale(self, key: NestedKey, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32  # half precision has no 1e-8
        place = checked_key(key), value.device, dtype
        found = self._affine.get(place)
        if found is None:
            mode, (first, second) = self._ranges[place[0]]
            if mode == "mean_std":
                offset, scale = first, second + self.eps
            else:
                span = second - first
                offset, scale = (first + second) / 2, torch.where(span == 0, 2.0, span) / 2
                offset = torch.where(span == 0, first + 1.0, offset)
            found = self._affine[place] = (offset.to(value.device, dtype), scale.to(value.device, dtype))
        return found

    # The statistics differ in number and shape: they are saved as one entry, and can be loaded into any Normalize.

    def get_extra_state(self) -> dict[str, Any]:
        """Return the statistics for ``state_dict``."""
        return {"keys": [list(key) for key in self._ranges], "ranges": [list(found) for found in self._ranges.values()]}

    def set_extra_state(self, state: Any) -> None:
        """Replace the statistics by those of a ``state_dict``."""
        try:
            ranges = {
                checked_key(tuple(key)): (_checked_mode(mode), [torch.as_tensor(value) for value in values])
                for key, (mode, values) in zip(state["keys"], state["ranges"], strict=True)
            }
            if any(len(values) != len(MODES[mode]) for mode, values in ranges.values()):
                raise ValueError("another number of statistics")
        except (InvalidArgumentError, KeyError, TypeError, ValueError) as error:
            raise StateMismatchError(f"The state of Normalize can't be read: {error!r}") from error
        self._set(ranges)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_affine": {}}

    def __repr__(self) -> str:
        entries = ", ".join(f"{key[0] if len(key) == 1 else key!r}: {mode}" for key, (mode, _) in self._ranges.items())
        return f"Normalize({entries})"


def _checked_mode(mode: Any) -> str:
    name = str(getattr(mode, "value", mode)).lower()
    name = ALSO_CALLED.get(name, name)
    if name not in MODES:
        raise InvalidArgumentError(f"Got the mode {mode!r}; it must be one of {[*MODES]}.")
    return name


def _statistic(key: Key, of_key: Mapping[str, Any], name: str, mode: str) -> torch.Tensor:
    if name not in of_key:
        raise InvalidArgumentError(
            f"Got the statistics {[*of_key]} of {key}, but mode {mode!r} takes {list(MODES[mode])}."
        )
    value = torch.as_tensor(of_key[name]).detach().cpu().double()
    if not bool(value.isfinite().all()):
        raise InvalidArgumentError(f"Got {name!r} of {key} that is not finite everywhere: {value}.")
    return value
