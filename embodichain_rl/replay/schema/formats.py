"""What a user declares of the fields of a step: which ones are ragged, and which ones are kept encoded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from embodichain_rl._checks import checked_int, checked_key
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.schema.arrays import as_array
from embodichain_rl.replay.schema.blobs import Blobs, lengths_key
from embodichain_rl.replay.schema.codecs import (
    RawCodec,
    UnknownCodec,
    checked_codec,
    codec_from_json,
    codec_to_json,
    is_built_in,
    least_bytes,
    refuse_frames,
)
from embodichain_rl.replay.schema.frames import encoded, resolved
from embodichain_rl.replay.schema.leaves import Leaves
from embodichain_rl.replay.schema.nest import Key, key_name
from embodichain_rl.replay.schema.origin_entries import TRAJECTORY
from embodichain_rl.replay.schema.ragged import RaggedLeaf, ragged_leaf
from embodichain_rl.replay.schema.schema import BlobSizes, Schema, StepField
from embodichain_rl.replay.schema.shifted import shifted_fields

__all__ = ["Formats"]

SPARE = 1.25
"""Room for values that are larger than the first ones, as a factor."""

MEASURED = 8
"""Number of the first frames that are encoded to know how large they are."""

LEAST_RAGGED = 64.0
"""Bytes that a ragged value is expected to take at least."""


class Formats:
    """The fields that are ragged, and those whose frames are kept encoded.

    Args:
        ragged: keys of values whose size changes from step to step. ``("next", key)`` is one as well.
        compress: by key, the codec of its frames: ``"png"``, ``"jpeg"`` or a :class:`Codec`; also of ``("next", key)``.
        ragged_bytes: bytes that all of these are expected to take a step; None: measured when the first data arrives.
        every: by key, the number of steps for which a value stays the same, such as that of a slow camera. Without a
            codec of its own, the key has :class:`RawCodec`.

    Raises:
        InvalidArgumentError: for arguments that can't work, or a key that is both.
        MissingPackageError: for a codec whose library is not installed.

    Example:
        >>> Formats(["points"], {}, None).is_ragged(("next", "points"))
        True
    """

    def __init__(
        self, ragged: Any = (), compress: Any = None, ragged_bytes: int | None = None, every: Any = None
    ) -> None:
        if isinstance(ragged, str) or not isinstance(ragged, Iterable):
            raise InvalidArgumentError(f"Got ragged={ragged!r}; it must be a list of keys, such as ragged=['points'].")
        compress = {} if compress is None else compress
        if not isinstance(compress, Mapping):
            raise InvalidArgumentError(
                f"Got compress={compress!r}; it must say the codec of each key, such as compress={{'pixels': 'png'}}."
            )
        self.ragged: tuple[Key, ...] = tuple(_root(key) for key in ragged)
        self.codecs: dict[Key, Any] = {_root(key): checked_codec(key, codec) for key, codec in compress.items()}
        every = {} if every is None else every
        if not isinstance(every, Mapping):
            raise InvalidArgumentError(
                f"Got every={every!r}; it must say for how many steps each key stays the same, such as "
                "every={'camera': 8}."
            )
        self.every: dict[Key, int] = {
            _root(key): checked_int(f"every[{key!r}]", steps, minimum=1) for key, steps in every.items()
        }
        self.codecs = {key: RawCodec() for key in self.every} | self.codecs
        self.ragged_bytes = None if ragged_bytes is None else checked_int("ragged_bytes", ragged_bytes, minimum=1)
        both = [key_name(key) for key in self.ragged if key in self.codecs]
        if both:
            raise InvalidArgumentError(
                f"Got {both} in ragged and in compress or every; encoded frames, and values that stay, have one shape."
            )

    @property
    def given(self) -> dict[str, Any]:
        """The arguments, as a storage takes them."""
        return {
            "ragged": list(self.ragged),
            "compress": dict(self.codecs) or None,
            "ragged_bytes": self.ragged_bytes,
            "every": dict(self.every) or None,
        }

    def __bool__(self) -> bool:
        return bool(self.ragged or self.codecs)

    def to_json(self) -> dict[str, Any]:
        """Return the arguments as JSON; of codecs of the user's own only the keys."""
        compress = [[list(key), codec_to_json(codec)] for key, codec in self.codecs.items()]
        return {
            "ragged": [list(key) for key in self.ragged],
            "compress": compress,
            "ragged_bytes": self.ragged_bytes,
            "every": [[list(key), steps] for key, steps in self.every.items()],
        }

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> Formats:
        """Return what :meth:`to_json` described."""
        compress = {tuple(key): codec_from_json(codec) for key, codec in described["compress"]}
        every = {tuple(key): steps for key, steps in described.get("every", [])}
        return cls([tuple(key) for key in described["ragged"]], compress, described["ragged_bytes"], every)

    def is_ragged(self, key: Key) -> bool:
        """Return whether a key is declared as ragged."""
        return bool(self.ragged) and _root(key) in self.ragged

    def codec_of(self, key: Key) -> Any:
        """Return the codec of a key; None if it has none."""
        return self.codecs.get(_root(key)) if self.codecs else None

    # ------------------------------------------------------------------------------------------------- of data

    def take(self, leaves: Leaves, schema: Schema | None) -> None:
        """Make ragged leaves of those entries that are ragged, in place, and add their lengths.

        Args:
            leaves: the entries of some steps.
            schema: what they are to be stored as; None as long as nothing is.

        Raises:
            SchemaMismatchError: for an entry that can't be one.
        """
        entries: dict[Key, Any] = leaves
        for key in list(entries):
            value = entries[key]
            of = None if schema is None else schema.kinds.get(key)
            ragged = self.is_ragged(key) if of is None else of[0][:1] == (-1,)
            lengths = leaves.get(lengths_key(key))
            if ragged or isinstance(value, RaggedLeaf):
                if key[0] == TRAJECTORY:
                    raise SchemaMismatchError(
                        f"Got ragged values at {key_name(key)}; what belongs to whole trajectories has one shape. Pad "
                        "it, or store it under a key of steps."
                    )
                if of is not None and not ragged:
                    raise SchemaMismatchError(
                        f"Got {key_name(key)} with values whose size changes from step to step, but the arena was "
                        f"allocated for {list(of[0])} of {of[1]} at every step. Build the buffer with "
                        f"ragged=[{key_name(key)}]."
                    )
                value = ragged_leaf(key, value, leaves.batch_size, lengths, None if of is None else of[1])
                entries[key] = value
                entries[lengths_key(key)] = torch.from_numpy(value.lengths())

    def applied(self, schema: Schema, leaves: Mapping[Key, Any], batch_dims: int) -> Schema:
        """Return the schema of steps as they are to be stored: with codecs, and the sizes of the blobs.

        Args:
            schema: of what :meth:`take` left.
            leaves: that data.
            batch_dims: how many batch dimensions it has.

        Raises:
            SchemaMismatchError: for frames that their codec can't encode, and keys that are not in the data.
        """
        missing = [k for k in (*self.ragged, *self.codecs) if k not in schema and ("next", *k) not in schema]
        if missing:
            raise SchemaMismatchError(
                f"Got data without {', '.join(map(key_name, missing))}, which ragged, compress or every names. Write "
                "data that has it, or leave the name out."
            )
        fields = []
        for field in schema.all_fields:
            codec = self.codec_of(field.key)
            if codec is not None:
                refuse_frames(key_name(field.key), codec, field.shape, field.dtype)
                field = dataclasses.replace(field, codec=codec)
            fields.append(field)
        schema = Schema(fields, schema.nodes)
        if not schema.blob_numbers:
            return schema
        return schema.with_blobs(BlobSizes.of(schema, self.ragged_bytes or self._expected(schema, leaves, batch_dims)))

    def for_saved(self, saved: Schema, values: Sequence[Any]) -> Schema:
        """Return the schema for steps that were saved with another one; codecs that are given here replace its own.

        Args:
            saved: the schema of what was saved.
            values: that, one entry per field.
        """
        if not saved.blob_numbers and not self:
            return saved
        own = {_root(field.key): field.codec for field in saved.fields if field.codec is not None}
        codecs = own | {key: codec for key, codec in self.codecs.items() if key in saved or ("next", *key) in saved}
        every = {key: steps for key, steps in self.every.items() if key in codecs}
        formats = Formats([key for key in self.ragged if key in saved], codecs, self.ragged_bytes, every)
        if codecs == own and saved.blobs is not None and self.ragged_bytes is None:
            return formats.bound(saved)
        plain = Schema([dataclasses.replace(field, codec=None) for field in saved.all_fields], saved.nodes)
        leaves: dict[Key, Any] = {}
        for field, value in zip(saved.fields, values, strict=False):
            if field.is_ragged:
                value = RaggedLeaf(value, field.shape[1:], field.dtype)
            elif field.codec is not None:
                value = resolved(self.with_codec(field), value[:MEASURED])
            leaves[field.key] = value
        return formats.applied(plain, leaves, 1)

    def with_codec(self, field: StepField) -> StepField:
        """Return a field with the codec of the user's own, if its schema only says that there is one."""
        if not isinstance(field.codec, UnknownCodec):
            return field
        own = self.codec_of(field.key)
        return field if own is None or is_built_in(own) else dataclasses.replace(field, codec=own)

    def converted(self, value: Any, saved: StepField, stored: StepField) -> np.ndarray:
        """Return saved values, blobs or a tensor, as an array of what is stored, which may have another codec."""
        saved = self.with_codec(saved)
        if isinstance(value, Blobs) and (saved.codec is None or saved.codec == stored.codec):
            return value.array
        array = as_array(resolved(saved, value) if isinstance(value, Blobs) else value)
        return array if stored.codec is None else encoded(stored.codec, array, 1).array

    def bound(self, schema: Schema) -> Schema:
        """Return a schema with the codecs of the user's own, of which its JSON only says that there are some."""
        if not any(isinstance(field.codec, UnknownCodec) for field in schema.fields):
            return schema
        return Schema(list(map(self.with_codec, schema.all_fields)), schema.nodes, schema.blobs)

    def _expected(self, schema: Schema, leaves: Mapping[Key, Any], batch_dims: int) -> int:
        """Return how many bytes the blobs of a step are expected to take."""
        again = shifted_fields(schema)  # which are mostly stored once, compact or not
        total = 0.0
        for number in schema.blob_numbers:
            field = schema.fields[number]
            if number in again:
                continue
            value = leaves[field.key]
            if isinstance(value, RaggedLeaf):
                mean = value.blobs.nbytes / max(value.blobs.array.size, 1)
                total += max(LEAST_RAGGED, mean)
                continue
            assert isinstance(value, torch.Tensor), "frames are tensors"
            frames = as_array(value.cpu()).reshape(-1, *field.shape)
            some = frames[:: max(1, len(frames) // MEASURED)][:MEASURED]
            mean = encoded(field.codec, some, 1).nbytes / max(len(some), 1)
            expected = max(least_bytes(field.codec, field.shape, field.dtype), mean)
            total += expected / self.every.get(_root(field.key), 1)
        return math.ceil(SPARE * total)

    def encode(self, schema: Schema, values: list[Any], batch_dims: int) -> None:
        """Replace the values of blob fields by arrays of blobs, ``object`` ``[*batch]``, in place; encode frames.

        A next observation that is the observation of the step after it is encoded once.

        Args:
            schema: the fields.
            values: one entry per field: ragged leaves, or arrays of frames ``[*batch, *shape]``.
            batch_dims: how many batch dimensions they have.
        """
        roots, frames = shifted_fields(schema), list(values)
        for number in schema.blob_numbers:
            if isinstance(values[number], RaggedLeaf):
                values[number] = values[number].blobs.array
            elif number not in roots:
                values[number] = encoded(schema.fields[number].codec, frames[number], batch_dims).array
        for number, root in roots.items():
            codec = schema.fields[number].codec
            if codec is not None:
                values[number] = _next_blobs(codec, frames[number], frames[root], values[root], batch_dims)


def _next_blobs(
    codec: Any, following: np.ndarray, frames: np.ndarray, blobs: np.ndarray, batch_dims: int
) -> np.ndarray:
    """Return the blobs of next observations; where they are the observations of the step after, these."""
    shape = frames.shape[:batch_dims]
    rows = following.reshape(-1, shape[-1], *frames.shape[batch_dims:])
    roots, of_roots = frames.reshape(rows.shape), blobs.reshape(rows.shape[:2])
    found = np.empty(rows.shape[:2], dtype=object)
    left = []
    for row in range(rows.shape[0]):
        for step in range(rows.shape[1]):
            if step + 1 < rows.shape[1] and np.array_equal(rows[row, step], roots[row, step + 1]):
                found[row, step] = of_roots[row, step + 1]
            else:
                left.append((row, step))
    if left:
        at = tuple(np.array(left).T)
        found[at] = encoded(codec, rows[at], 1).array
    return found.reshape(shape)


def _root(key: Any) -> Key:
    """Return the key of an observation for that of a next observation."""
    key = checked_key(key)
    return key[1:] if len(key) > 1 and key[0] == "next" else key
