"""A mixture of sources: the chunks of a batch come from several buffers, in given proportions."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_leaf_nontensor

from embodichain_rl._checks import checked_float, checked_key
from embodichain_rl.datasets.sources import ChunkSource, draws_streams, for_worker, takes_chunk_queries
from embodichain_rl.errors import EmbodiChainRLError, InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.host import gathering_into
from embodichain_rl.replay.sampling import ChunkQuery, RandomSource, part_of, random_numbers
from embodichain_rl.replay.schema import TextTable, as_non_tensor, text_array
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["SOURCE", "Mixture", "checked_source_weights"]

SOURCE = ("trajectory", "source")
"""The key of the number of the source that a chunk came from."""


class _Column(NamedTuple):
    """What the chunks of a source have under one key."""

    dtype: torch.dtype | None
    """None for data that is not a tensor."""
    shape: tuple[int, ...]
    device: str

    def __repr__(self) -> str:
        return f"{list(self.shape)} of {self.dtype or 'non-tensor data'} on {self.device}"


Key = tuple[str, ...]


class Mixture:
    """Several chunk sources as one. Each chunk is from a source that is drawn by its weight.

    The chunks have the number of their source under ``source_key``, ``int64``. Ids of text are those of the first
    source's table of texts, whichever source they are from.

    Args:
        sources: the sources.
        weights: the weight of each source; they need not sum to 1.
        source_key: the key of the number of the source.
        common_keys: whether keys that only some of the sources have are left out. Otherwise they are refused.
    """

    def __init__(
        self, sources: Sequence[ChunkSource], weights: Sequence[float], source_key: NestedKey, common_keys: bool
    ) -> None:
        self._sources = list(sources)
        self._drawn = [number for number, weight in enumerate(weights) if weight > 0.0]
        sums = np.cumsum([weights[number] for number in self._drawn])
        self._bounds = sums / sums[-1]
        self._source_key = checked_key(source_key)
        self._common_keys = common_keys
        self._left_out: list[Key] | None = None  # None until a chunk of every source was seen
        self.takes_chunk_queries = all(map(takes_chunk_queries, sources))

    @property
    def draws_streams(self) -> bool:
        """Whether a generator may be a ``RandomStreams``."""
        return all(map(draws_streams, self._sources))

    def sample_chunks(
        self, batch_size: int, chunk_size: int | ChunkQuery, *, generator: RandomSource = None
    ) -> TensorDict:
        """Return ``batch_size`` chunks, each of a source that is drawn anew; see :class:`ChunkSource`.

        Raises:
            SchemaMismatchError: the chunks of two sources differ in a key, its shape, dtype or device; or the data has
                the ``source_key``.
        """
        if self._left_out is None:
            apart = torch.Generator().manual_seed(0)  # so that the batches do not depend on this draw
            self._left_out = self._compare([self._sample(number, 1, chunk_size, apart) for number in self._drawn])
        numbers = random_numbers(batch_size, generator)
        which = np.minimum(np.searchsorted(self._bounds, numbers, side="right"), len(self._drawn) - 1)
        drawn = [(number, np.flatnonzero(which == at)) for at, number in enumerate(self._drawn)]
        drawn = [(number, rows) for number, rows in drawn if len(rows)]
        if len(drawn) == 1:
            data = self._sample(drawn[0][0], batch_size, chunk_size, generator).exclude(*self._left_out)
        else:
            with gathering_into(None):
                parts = [
                    self._sample(number, len(rows), chunk_size, part_of(generator, rows)) for number, rows in drawn
                ]
            data = _put_together([part.exclude(*self._left_out) for part in parts], [rows for _, rows in drawn])
        sources = torch.from_numpy(np.array(self._drawn)[which]).to(data.device or "cpu")
        sources = sources.reshape(batch_size, *[1] * (data.ndim - 1)).expand(data.shape)
        return data.set(self._source_key, sources.contiguous())

    def _sample(self, number: int, count: int, chunk_size: int | ChunkQuery, generator: RandomSource) -> TensorDict:
        source: Any = self._sources[number]
        try:
            data: TensorDict = source.sample_chunks(count, chunk_size, generator=generator)
        except EmbodiChainRLError as error:
            error.add_note(f"Raised by source {number} of a mixture, {source!r}.")
            raise
        return self._with_common_texts(number, data)

    def _with_common_texts(self, number: int, data: TensorDict) -> TensorDict:
        """Replace ids of text of the source's table by those of the first source's table."""
        storage, first = _storage_of(self._sources[number]), _storage_of(self._sources[0])
        if storage is None or first is None or storage.texts is first.texts or storage.schema is None:
            return data
        for field in storage.schema.all_fields:
            ids = data.get(field.key, None) if field.is_text else None
            if isinstance(ids, torch.Tensor) and not ids.dtype.is_floating_point:
                data.set(field.key, _translated(ids, storage.texts, first.texts))
        return data

    def _compare(self, chunks: Sequence[TensorDict]) -> list[Key]:
        """Return the keys that only some of the sources have; refuse what can't be mixed."""
        columns = [dict(_columns_of(chunk)) for chunk in chunks]
        for number, of_source in zip(self._drawn, columns, strict=True):
            if any(key[: len(self._source_key)] == self._source_key for key in of_source):
                raise SchemaMismatchError(
                    f"Got {self._source_key} in the data of source {number}, where the number of the source belongs. "
                    'Give source_key= another name, such as ("trajectory", "buffer").'
                )
        everywhere = set.intersection(*(set(of_source) for of_source in columns))
        somewhere = set.union(*(set(of_source) for of_source in columns)) - everywhere
        if somewhere and not self._common_keys:
            owners = {
                key: [number for number, of_source in zip(self._drawn, columns, strict=True) if key in of_source]
                for key in sorted(somewhere)
            }
            listed = ", ".join(f"{key} in source {numbers} only" for key, numbers in owners.items())
            raise SchemaMismatchError(
                f"Got sources with different keys: {listed}. Write the same keys to all of them, or leave the others "
                "out with common_keys=True."
            )
        for key in sorted(everywhere):
            different = {number: of_source[key] for number, of_source in zip(self._drawn, columns, strict=True)}
            if len(set(different.values())) > 1:
                raise SchemaMismatchError(
                    f"Got sources with different values of {key}, by source: {different}. They must have the same "
                    "shape, dtype and device in all sources."
                )
        return sorted(somewhere)

    def for_worker(self) -> Mixture:
        """Return the same mixture for a ``DataLoader`` worker that is being started.

        Returns:
            One that loads no TorchRL; the mixture itself, if one of its sources needs it.
        """
        sources = [for_worker(source) for source in self._sources]
        if any(map(operator.is_, sources, self._sources)):
            return self
        mixture = copy.copy(self)
        mixture._sources = sources
        return mixture

    def __repr__(self) -> str:
        return f"Mixture({self._sources!r})"


def checked_source_weights(weights: Any, count: int) -> list[float]:
    """Return the weights of the sources as floats.

    Raises:
        InvalidArgumentError: there is not one for each source, one is negative or not finite, or none is positive.
    """
    numbers = weights.tolist() if isinstance(weights, np.ndarray | torch.Tensor) else list(weights)
    if len(numbers) != count:
        raise InvalidArgumentError(f"Got {len(numbers)} weights for {count} sources; give one for each source.")
    checked = [checked_float(f"weights[{i}]", number, minimum=0.0) for i, number in enumerate(numbers)]
    if not any(checked):
        raise InvalidArgumentError(f"Got weights={numbers}; at least one source must have a positive weight.")
    return checked


def _storage_of(source: Any) -> TrajectoryReader | None:
    for name in ("replay_buffer", "buffer"):
        source = getattr(source, name, source)
    storage = getattr(source, "storage", None)
    return storage if isinstance(storage, TrajectoryReader) else None


def _translated(ids: torch.Tensor, texts: TextTable, to: TextTable) -> torch.Tensor:
    used, inverse = np.unique(ids.cpu().numpy(), return_inverse=True)
    translated = to.ids_of(np.array(texts.resolve(used), dtype=object), for_good=False)
    return torch.from_numpy(translated[inverse].reshape(ids.shape)).to(ids)


def _keys_of(data: TensorDictBase) -> list[Key]:
    return [key if isinstance(key, tuple) else (key,) for key in data.keys(True, True, is_leaf=is_leaf_nontensor)]


def _columns_of(data: TensorDictBase) -> list[tuple[Key, _Column]]:
    columns = []
    for key in _keys_of(data):
        value = data.get(key)
        is_tensor = isinstance(value, torch.Tensor)
        shape = tuple(value.shape[data.ndim :]) if is_tensor else ()
        columns.append((key, _Column(value.dtype if is_tensor else None, shape, str(value.device))))
    return columns


def _put_together(parts: Sequence[TensorDict], rows: Sequence[np.ndarray]) -> TensorDict:
    """Return the batch whose rows ``rows[i]`` are those of ``parts[i]``."""
    texts = [key for key in _keys_of(parts[0]) if not isinstance(parts[0].get(key), torch.Tensor)]
    order = torch.from_numpy(np.argsort(np.concatenate(rows)))
    merged: TensorDict = torch.cat([part.exclude(*texts) for part in parts])[order]
    for key in texts:
        texts_of_parts = [part.get(key) for part in parts]
        merged.set(key, _put_texts_together(key, texts_of_parts, rows, len(order), merged.device))
    return merged


def _put_texts_together(
    key: Key, values: Sequence[Any], rows: Sequence[np.ndarray], count: int, device: torch.device | None
) -> Any:
    merged: list[Any] = [None] * count
    for value, at in zip(values, rows, strict=True):
        texts = text_array(value)
        if texts is None:
            raise SchemaMismatchError(
                f"Got {key}, which is neither a tensor nor text; it can't be mixed. Remove it in a transform of the "
                "buffers."
            )
        for number, text in zip(at.tolist(), texts.tolist(), strict=True):
            merged[number] = text
    return as_non_tensor(merged, device)
