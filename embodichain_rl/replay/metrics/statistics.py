"""Statistics of what a buffer holds, for normalization: over the steps of all live trajectories, without padding.

The moments of each trajectory are computed once, when a call first finds it, and kept until it is evicted. A call adds
up the moments of the live trajectories. Quantiles have no such sum: they are computed from all values, except for
bytes, whose histograms can be added.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import NestedKey

from embodichain_rl._checks import checked_float, checked_int, checked_key
from embodichain_rl.errors import EmptyBufferError, InvalidArgumentError, SchemaMismatchError, TrajectoryEvictedError
from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.schema import Key, Schema, as_array, key_name, presence_key_of
from embodichain_rl.replay.storage import TrajectoryStorage, storage_of

__all__ = ["Statistics", "buffer_statistics"]

Statistics = dict[NestedKey, dict[str, torch.Tensor]]
"""For each key its statistics by name, as in LeRobot: ``"mean"``, ``"std"``, ``"min"``, ``"max"``, ``"q01"``, ..."""

READ_BYTES = 1 << 26
"""The number of bytes that are read at once."""

KEPT_ELEMENTS = 4096
"""The number of elements of a mean up to which the moments of each trajectory are kept between calls."""

ATTEMPTS = 20
"""The number of times that trajectories are looked for again if all were evicted while they were read."""

MOST_CHANNELS = 4
"""The number of channels up to which an axis of an image is taken for that of its channels."""


def buffer_statistics(
    source: Any,
    keys: NestedKey | Iterable[NestedKey] | None = None,
    *,
    quantiles: Sequence[float] | None = (0.01, 0.99),
    per_channel: Iterable[NestedKey] | Mapping[NestedKey, int] = (),
) -> Statistics:
    """Return the statistics of some keys over all steps that a buffer holds at the moment.

    Every step of every live trajectory counts once, whatever its trajectory's length: padding and the chunks that were
    drawn have no influence. Of optional keys, only the trajectories that have them count. Trajectories that are
    published or evicted during the call are not counted.

    A call costs what has changed since the last one, and the quantiles: they read all values of the keys, so give
    ``quantiles=None`` where they are not needed.

    Args:
        source: a buffer, a storage or an engine.
        keys: a key of steps, or several; by default all floating-point keys of steps.

    Keyword Args:
        quantiles: from 0 to 1; ``0.01`` is returned as ``"q01"``. None: none are computed.
        per_channel: keys of images ``[C, H, W]`` or ``[H, W, C]`` that get one number for each channel, of shape
            ``[C, 1, 1]`` (as in LeRobot) or ``[1, 1, C]``; or a mapping from keys to the axis of the channels.

    Returns:
        A dict of dicts: ``statistics[key]["mean"]``, ``"std"`` (of all values, not an estimate: divided by their
        number), ``"min"``, ``"max"`` and the quantiles are tensors of the shape of a step, of its dtype if that is
        ``float32`` or ``float64`` and else ``float32``, on the CPU. ``"count"``, ``int64`` ``[1]``, is the number of
        steps. A key is as it was given.

    Raises:
        EmptyBufferError: when there is no trajectory.
        SchemaMismatchError: when a key is not one of steps, or has no numbers.
        InvalidArgumentError: for quantiles and channels that can't be.

    Example:
        >>> rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=30_000, chunk_size=2)
        >>> done = torch.tensor([[0], [0], [1]]).bool()
        >>> data = {"observation": torch.tensor([[1.0], [2.0], [6.0]]), "next": {"done": done}}
        >>> _ = rb.extend(TensorDict(data, [3]))
        >>> statistics = buffer_statistics(rb, ["observation"])
        >>> statistics["observation"]["mean"], statistics["observation"]["max"]
        (tensor([3.]), tensor([6.]))
    """
    storage = storage_of(source, "buffer_statistics")
    named = _names(quantiles)
    axes = {checked_key(key): axis for key, axis in _axes(per_channel).items()}
    schema = storage.schema
    if schema is None or not len(storage):
        raise EmptyBufferError("Got a buffer without a trajectory, which has no statistics. Wait until len(rb) > 0.")
    asked = _asked(schema, keys)
    missing = [key for key in axes if key not in map(checked_key, asked)]
    if missing:
        raise InvalidArgumentError(f"Got per_channel={missing}, which is not one of the keys {asked}.")
    readers = {key: _Reader.of(storage, checked_key(key), axes) for key in asked}
    for _ in range(ATTEMPTS):
        found = _read(storage, [*readers.values()], [*named.values()])
        if found is not None:
            return {
                key: reader.named(moments, dict(zip(named, values, strict=True)))
                for (key, reader), (moments, values) in zip(readers.items(), found, strict=True)
            }
    raise TrajectoryEvictedError(
        f"{ATTEMPTS} times in a row every trajectory was evicted while it was read. Make the buffer larger."
    )


class _Moments(NamedTuple):
    """The moments of some trajectories, one row each; all ``float64`` ``[n, *elements]`` but the numbers of values."""

    values: np.ndarray
    """The number of values of each element, ``int64`` ``[n]``."""
    mean: np.ndarray
    squares: np.ndarray
    """The sums of the squared distances from the mean."""
    least: np.ndarray
    largest: np.ndarray
    histogram: np.ndarray
    """How often each byte occurs, ``int64`` ``[n, channels, 256]``; of other values ``[n, 0]``."""

    def select(self, which: Any) -> _Moments:
        return _Moments(*(part[which] for part in self))

    def together(self) -> _Moments:
        """Return the moments of all trajectories as one."""
        weights = self.values.reshape(-1, *(1 for _ in self.mean.shape[1:])).astype(np.float64)
        total = self.values.sum()
        mean = (weights * self.mean).sum(axis=0) / total
        squares = (self.squares + weights * (self.mean - mean) ** 2).sum(axis=0)
        parts = (mean, squares, self.least.min(axis=0), self.largest.max(axis=0), self.histogram.sum(axis=0))
        return _Moments(np.array([total]), *(part[None] for part in parts))


@dataclass(frozen=True)
class _Reader:
    """Reads the values of one key.

    Attributes:
        storage: where they are.
        key: a key of steps.
        number: the number of its field.
        axis: the axis of the channels, 0 or -1; None if every element has statistics of its own.
    """

    storage: TrajectoryStorage
    key: Key
    number: int
    axis: int | None

    @classmethod
    def of(cls, storage: TrajectoryStorage, key: Key, axes: Mapping[Key, int | None]) -> _Reader:
        """Return the reader of a key; refuse one without numbers."""
        schema = storage.arena.schema
        number = schema.number_of(key)
        if number is None:
            raise SchemaMismatchError(f"Got the key {key_name(key)}, but the steps that are stored have {schema.keys}.")
        field = schema.fields[number]
        if field.is_text or field.dtype.is_complex or field.is_ragged:
            kind = "text" if field.is_text else "ragged values" if field.is_ragged else str(field.dtype)
            raise SchemaMismatchError(f"Got the key {key_name(key)} of {kind}, which has no statistics.")
        return cls(storage, key, number, _channel_axis(key, field.shape, axes[key]) if key in axes else None)

    @property
    def is_bytes(self) -> bool:
        """Whether quantiles come from histograms."""
        return self.axis is not None and self.storage.arena.schema.fields[self.number].dtype == torch.uint8

    @property
    def kept(self) -> bool:
        """Whether the moments of each trajectory are small enough to be kept."""
        field = self.storage.arena.schema.fields[self.number]
        return self.axis is not None or torch.Size(field.shape).numel() <= KEPT_ELEMENTS

    def has(self, rows: Rows) -> np.ndarray:
        """Return a mask of the trajectories that have the key."""
        schema = self.storage.arena.schema
        flag = presence_key_of(self.key, [field.key for field in schema.trajectory_fields])
        if flag is None:
            return np.ones(len(rows.ids), dtype=bool)
        return self.storage.trajectory_values(flag, rows.ids).reshape(-1).astype(bool)

    def values(self, rows: Rows) -> np.ndarray:
        """Return the values of all steps of some trajectories: ``[steps, *elements]``, or ``[pixels, channels]``."""
        steps = np.repeat(rows.starts - (np.cumsum(rows.lengths) - rows.lengths), rows.lengths)
        copied = self.storage.values_at(self.number, steps + np.arange(len(steps)), rows).cpu()
        copied = copied if copied.dtype in _EXACT else copied.double()
        values = as_array(copied)
        if self.axis is None:
            return values
        return np.moveaxis(values, 1 + self.axis % (values.ndim - 1), -1).reshape(-1, values.shape[1:][self.axis])

    def moments(self, rows: Rows) -> _Moments:
        """Return the moments of each of some trajectories, read in blocks."""
        found = []
        field = self.storage.arena.schema.fields[self.number]
        per_block = max(1, READ_BYTES // max(8 * torch.Size(field.shape).numel(), 1))
        for block in _blocks(rows.lengths, per_block):
            part = rows.select(block)
            values = self.values(part)
            pixels = len(values) // max(int(part.lengths.sum()), 1)
            ends = np.cumsum(part.lengths) * pixels
            found += [
                self._of_values(values[end - n * pixels : end]) for end, n in zip(ends, part.lengths, strict=True)
            ]
        return _Moments(*(np.stack(parts) for parts in zip(*found, strict=True)))

    def _of_values(self, values: np.ndarray) -> _Moments:
        exact = values.astype(np.float64)
        mean = exact.mean(axis=0)
        histogram = np.empty(0, dtype=np.int64)
        if self.is_bytes:
            histogram = np.stack([np.bincount(channel, minlength=256) for channel in values.T.astype(np.uint8)])
        squares = ((exact - mean) ** 2).sum(axis=0)
        return _Moments(np.int64(len(values)), mean, squares, exact.min(axis=0), exact.max(axis=0), histogram)  # type: ignore[arg-type]

    def quantiles(self, values: np.ndarray | None, moments: _Moments, at: Sequence[float]) -> list[np.ndarray]:
        """Return the quantiles of all values, or of their histogram, with linear interpolation."""
        if not at:
            return []
        if values is None:
            counts = moments.histogram[0].cumsum(axis=-1)
            return [np.array([_quantile_of(channel, q) for channel in counts]) for q in at]
        return _quantiles_of(values, at)

    def named(self, moments: _Moments, quantiles: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Return the statistics by name."""
        field = self.storage.arena.schema.fields[self.number]
        dtype = field.dtype if field.dtype in (torch.float32, torch.float64) else torch.float32
        shape: tuple[int, ...] = field.shape
        if self.axis is not None:
            shape = tuple(n if axis == self.axis % len(field.shape) else 1 for axis, n in enumerate(field.shape))
        count = int(moments.values[0])
        arrays = {
            "mean": moments.mean[0],
            "std": np.sqrt(moments.squares[0] / count),
            "min": moments.least[0],
            "max": moments.largest[0],
            **quantiles,
        }
        found = {name: torch.from_numpy(np.asarray(array).reshape(shape)).to(dtype) for name, array in arrays.items()}
        pixels = torch.Size(field.shape).numel() // max(torch.Size(shape).numel(), 1) if self.axis is not None else 1
        return {**found, "count": torch.tensor([count // pixels])}


_EXACT = (torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class _Kept:
    """The moments of the trajectories of one storage, by key, as far as this process has computed them."""

    def __init__(self) -> None:
        self.edits = (-1, 0, 0)
        self.of_keys: dict[tuple[Key, int | None], tuple[np.ndarray, _Moments]] = {}


_kept: weakref.WeakKeyDictionary[Ledger, _Kept] = weakref.WeakKeyDictionary()
"""Threads that add to the same entry at the same time do some work twice: each replaces it by a whole one."""


def _read(
    storage: TrajectoryStorage, readers: Sequence[_Reader], at: Sequence[float]
) -> list[tuple[_Moments, list[np.ndarray]]] | None:
    """Return the moments and the quantiles of each reader, over the trajectories that are live when this begins.

    Those that are overwritten before all is read are left out; None if all are.
    """
    ledger = storage.ledger
    kept = _kept.setdefault(ledger, _Kept())
    edits = ledger.edits
    if kept.edits != edits:  # a loaded checkpoint may bring ids back; values may be others
        kept.of_keys, kept.edits = {}, edits
    rows = ledger.live_rows()
    if not len(rows.ids):
        return None
    of_readers = []
    for reader in readers:
        own = rows.select(reader.has(rows))
        moments = _moments_of(kept, reader, own) if len(own.ids) else None
        of_readers.append((own, moments, None if reader.is_bytes or not at else reader.values(own)))
    found = []
    for reader, (own, moments, of_steps) in zip(readers, of_readers, strict=True):
        whole = ledger.unchanged(own)
        if not len(own.ids) and ledger.still_valid(rows.ids).all():
            raise EmptyBufferError(f"No trajectory has the optional key {key_name(reader.key)}. Wait for one that has.")
        if moments is None or not whole.any():
            return None
        part = moments.select(whole)
        if reader.kept:
            kept.of_keys[reader.key, reader.axis] = own.ids[whole], part
        if of_steps is not None and not whole.all():
            of_steps = of_steps[np.repeat(whole, moments.values)]
        together = part.together()
        found.append((together, reader.quantiles(of_steps, together, at)))
    return found


def _moments_of(kept: _Kept, reader: _Reader, rows: Rows) -> _Moments:
    """Return the moments of each of some trajectories, in their order; read those that are not kept."""
    ids, moments = kept.of_keys.get((reader.key, reader.axis), (np.empty(0, dtype=np.int64), None))
    there = np.isin(ids, rows.ids)
    new = rows.select(~np.isin(rows.ids, ids))
    parts = [] if moments is None else [moments.select(there)]
    if len(new.ids):
        parts.append(reader.moments(new))
    together = _Moments(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return together.select(np.argsort(np.concatenate([ids[there], new.ids])))


def _blocks(lengths: np.ndarray, steps: int) -> Iterable[np.ndarray]:
    """Yield the numbers of consecutive trajectories that have at most about ``steps`` steps together."""
    block = (np.cumsum(lengths) - 1) // steps
    for number in np.unique(block).tolist():
        yield np.flatnonzero(block == number)


def _quantiles_of(values: np.ndarray, at: Sequence[float]) -> list[np.ndarray]:
    """Return the quantiles of values ``[n, *elements]``, linearly interpolated: ``float64`` ``[*elements]`` each."""
    columns = np.ascontiguousarray(values.reshape(len(values), -1).T)
    places = np.array(at) * (len(values) - 1)
    low, high = np.floor(places).astype(np.int64), np.ceil(places).astype(np.int64)
    columns.partition(np.unique([*low, *high, len(values) - 1]), axis=1)  # NaN is sorted to the end
    below, above = columns[:, low].astype(np.float64), columns[:, high].astype(np.float64)
    found = below + (above - below) * (places - low)
    found[columns[:, -1] != columns[:, -1]] = np.nan
    return list(found.T.reshape(len(at), *values.shape[1:]))


def _quantile_of(counts: np.ndarray, q: float) -> float:
    """Return a quantile of bytes, with linear interpolation, from the cumulated counts of their values."""
    at = q * (counts[-1] - 1)
    low, high = (int(np.searchsorted(counts, place, side="right")) for place in (np.floor(at), np.ceil(at)))
    return low + (high - low) * (at - np.floor(at))


def _names(quantiles: Sequence[float] | None) -> dict[str, float]:
    named = {}
    for quantile in quantiles or ():
        q = checked_float("quantiles", quantile, minimum=0.0, maximum=1.0)
        percent = round(100 * q, 6)
        named[f"q{percent:02.0f}" if percent == round(percent) else f"q{percent:g}"] = q
    return named


def _axes(per_channel: Iterable[NestedKey] | Mapping[NestedKey, int]) -> dict[NestedKey, int | None]:
    if isinstance(per_channel, Mapping):
        return {key: checked_int("per_channel", axis, minimum=-1, maximum=2) for key, axis in per_channel.items()}
    if isinstance(per_channel, str):
        raise InvalidArgumentError(f"Got per_channel={per_channel!r}; it must be a list of keys.")
    return dict.fromkeys(per_channel)


def _channel_axis(key: Key, shape: Sequence[int], axis: int | None) -> int:
    if len(shape) != 3:
        raise InvalidArgumentError(
            f"Got per_channel for {key_name(key)} of shape {list(shape)}; images are [C, H, W] or [H, W, C]."
        )
    if axis is not None:
        return axis
    if shape[0] <= MOST_CHANNELS:
        return 0
    if shape[-1] <= MOST_CHANNELS:
        return -1
    raise InvalidArgumentError(
        f"Got per_channel for {key_name(key)} of shape {list(shape)}, of which no axis has at most {MOST_CHANNELS} "
        f"channels. Give the axis: per_channel={{{key_name(key)}: 0}}."
    )


def _asked(schema: Schema, keys: NestedKey | Iterable[NestedKey] | None) -> list[NestedKey]:
    if keys is None:
        floats = [f.key for f in schema.fields if f.dtype.is_floating_point and not f.is_ragged]
        return [key[0] if len(key) == 1 else key for key in floats]
    if isinstance(keys, str) or (isinstance(keys, tuple) and checked_key(keys) in schema):
        return [keys]
    return list(keys)
