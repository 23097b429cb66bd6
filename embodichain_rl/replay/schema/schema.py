"""What a step consists of: its keys, their shapes and dtypes, and how they are nested.

The schema is fixed when the arena is allocated. All later data is checked against it before anything is written.
Nothing is dropped, broadcast or cast.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema.codecs import codec_from_json, codec_to_json
from embodichain_rl.replay.schema.leaves import SHARED_NODES, Leaf, Leaves, leaves_of
from embodichain_rl.replay.schema.nest import Key, Nest, Node, key_name
from embodichain_rl.replay.schema.origin_entries import INDEX, MASK, ORIGIN_KEYS, PAIR, TRAJECTORY, is_reserved

__all__ = ["BlobSizes", "Schema", "StepField"]

TEXT = "text"
"""The dtype of text, in JSON."""

RAGGED = (-1,)
"""What the shape of a ragged field begins with."""

MOST_SLOTS = 8
"""Into how many slots the bytes of an average step are divided at most."""


@dataclass(frozen=True, slots=True)
class StepField:
    """One entry of a step: its key, its shape without batch dimensions, and its dtype.

    Text is stored as its id in a :class:`~embodichain_rl.replay.schema.texts.TextTable`, ``torch.int32``. A ragged
    field has the shape ``[-1, *element]``. The values of a ragged field, and of one with a codec, are *blobs*: their
    bytes lie beside the columns, and their column says where: ``int64`` ``[2]``, offset and size.
    """

    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_text: bool = False
    codec: Any = dataclasses.field(default=None, compare=False)

    @property
    def is_ragged(self) -> bool:
        """Whether the size of a value changes from step to step."""
        return self.shape[:1] == RAGGED

    @property
    def is_blob(self) -> bool:
        """Whether the bytes of its values lie beside the columns."""
        return self.codec is not None or self.is_ragged

    @property
    def column(self) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and the dtype of a step of its column."""
        return ((2,), torch.int64) if self.is_blob else (self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of one step of its column."""
        shape, dtype = self.column
        return dtype.itemsize * math.prod(shape)


@dataclass(frozen=True, slots=True)
class BlobSizes:
    """The room for the bytes of blobs.

    Attributes:
        slot: bytes beside each step of the arena. A region has so many steps that the bytes of its trajectory fit.
        expected: bytes that the blobs of a step are expected to take.
    """

    slot: int
    expected: int

    @classmethod
    def of(cls, schema: Schema, expected: int) -> BlobSizes:
        """Return the sizes for a schema, given the expected bytes.

        A small slot fits values of any size, but needs more steps, each with its columns. So the columns take about an
        eighth of what the bytes take at most.
        """
        slot = min(expected, max(expected // MOST_SLOTS, MOST_SLOTS * schema.nbytes))
        return cls(-(-slot // 16) * 16, expected)

    @property
    def slots_per_step(self) -> float:
        """How many steps of the arena are expected to be taken by a step, at least 1."""
        return max(1.0, self.expected / self.slot)


class Schema:
    """The fields of a step, in a fixed order, and the nested TensorDicts that have a structure of their own.

    Args:
        fields: at least one. Those under ``"trajectory"`` belong to whole trajectories.
        nodes: the nested TensorDicts with batch dimensions of their own, such as ``[T, n_agents]`` in data ``[T]``,
            and the tensorclasses. They decide how samples are built, not what is accepted: two schemas are equal when
            their fields are.

    Attributes:
        fields (tuple[StepField, ...]): the fields of a step.
        trajectory_fields (tuple[StepField, ...]): the fields of a trajectory.
        all_fields (tuple[StepField, ...]): both, in this order. "Per field" means per one of these.
        nodes (tuple[Node, ...]): see above.
        keys (list[tuple[str, ...]]): the keys of ``fields``.
        index_key (tuple[str, ...]): where samples have the pair of trajectory id and step: ``"index"``, or
            ``("trajectory", "index")`` if ``"index"`` is a column of the user.
        nbytes (int): bytes of a step, without the trajectory fields, and without the bytes of blobs.
        has_text (bool): whether any key is text.
        blob_numbers (tuple[int, ...]): the numbers of the fields whose values are blobs.
        blobs (BlobSizes | None): the room for them; None without such fields, and before it is known.
        nest_of_samples (Nest): builds what :meth:`build_sample` does.

    Example:
        >>> step = TensorDict({"observation": torch.zeros(3), "next": {"done": torch.zeros(1, dtype=torch.bool)}})
        >>> Schema.of(step).keys
        [('observation',), ('next', 'done')]
    """

    def __init__(self, fields: Sequence[StepField], nodes: Iterable[Node] = (), blobs: BlobSizes | None = None) -> None:
        self.fields = tuple(field for field in fields if field.key[0] != TRAJECTORY)
        self.trajectory_fields = tuple(field for field in fields if field.key[0] == TRAJECTORY)
        self.all_fields = (*self.fields, *self.trajectory_fields)
        self.nodes = tuple(nodes)
        self.keys = [field.key for field in self.fields]
        self.nbytes = sum(field.nbytes for field in self.fields)
        self.has_text = any(field.is_text for field in self.all_fields)
        self.blob_numbers = tuple(number for number, field in enumerate(self.fields) if field.is_blob)
        self.blobs = blobs
        self._numbers = {key: number for number, key in enumerate(self.keys)}
        self._expected = {field.key: (field.shape, field.dtype, field.is_text) for field in self.all_fields}
        self._nest = Nest(self.keys, [node for node in self.nodes if node.key[0] != TRAJECTORY])
        self._nest_of_all = Nest(self._expected, self.nodes)
        self.index_key = PAIR if any(key[0] == INDEX[0] for key in self.keys) else INDEX
        self.nest_of_samples = Nest([*self._expected, self.index_key, *ORIGIN_KEYS], self.nodes)

    @property
    def kinds(self) -> Mapping[Key, tuple[tuple[int, ...], torch.dtype, bool]]:
        """By key the shape of a step, the dtype, and whether it is text."""
        return self._expected

    @property
    def bytes_of_step(self) -> int:
        """Bytes of a step with those that its blobs are expected to take."""
        return self.nbytes + (0 if self.blobs is None else self.blobs.expected)

    def with_blobs(self, blobs: BlobSizes) -> Schema:
        """Return the same schema with the sizes of blobs."""
        return Schema(self.all_fields, self.nodes, blobs)

    @property
    def text_keys(self) -> list[Key]:
        """The keys of text, of steps and of trajectories."""
        return [field.key for field in self.all_fields if field.is_text]

    @classmethod
    def of(cls, data: TensorDictBase, fill: Any = None) -> Schema:
        """Read the schema off data of any batch size.

        Args:
            data: steps.
            fill: see :func:`leaves_of`.

        Raises:
            SchemaMismatchError: when there is no tensor in it, or an entry is neither a tensor nor text.
        """
        return cls.of_leaves(_without_mask(leaves_of(data, fill=fill)))

    @classmethod
    def of_leaves(cls, leaves: Leaves) -> Schema:
        """Read the schema off what :func:`leaves_of` returns.

        Raises:
            SchemaMismatchError: when there is no tensor in it, or a tensorclass where the buffer adds entries.
        """
        if not any(key[0] != TRAJECTORY for key in leaves):
            raise SchemaMismatchError("Got data without any tensor; a step needs at least ('next', 'done').")
        if PAIR in leaves and any(key[0] == INDEX[0] for key in leaves):
            raise SchemaMismatchError(
                f"Got {key_name(INDEX)} and {key_name(PAIR)}, but samples need one of these names for the trajectory "
                "id and the step of each row. Rename one of them."
            )
        return cls([_field(key, value, len(leaves.batch_size)) for key, value in leaves.items()], leaves.nodes())

    def leaves(self, data: TensorDictBase, fill: Any = None) -> list[Leaf]:
        """Return the entries of ``data``, one per field.

        Args:
            data: steps.
            fill: see :func:`leaves_of`.

        Raises:
            SchemaMismatchError: when keys are missing or new, or a shape or dtype differs.
        """
        leaves = _without_mask(leaves_of(data, stored=self, fill=fill))
        return self.in_order(leaves, len(leaves.batch_size))

    def in_order(self, leaves: Mapping[Key, Leaf], batch_dims: int) -> list[Leaf]:
        """Return what :func:`leaves_of` returned as a list, one entry per field.

        Args:
            leaves: entries ``[*batch, *shape]``.
            batch_dims: how many batch dimensions they have.

        Raises:
            SchemaMismatchError: when keys are missing or new, or a shape or dtype differs.
        """
        if len(leaves) == len(self._expected):
            try:
                ordered = [leaves[key] for key in self._expected]
            except KeyError:
                self._refuse_keys(leaves)
        else:
            self._refuse_keys(leaves)
        for (key, (shape, dtype, is_text)), value in zip(self._expected.items(), ordered, strict=True):
            fits = isinstance(value, np.ndarray) == is_text and (is_text or value.dtype == dtype)
            if not fits or value.shape[batch_dims:] != shape:
                got, needed = "text" if isinstance(value, np.ndarray) else value.dtype, "text" if is_text else dtype
                got_shape = tuple(value.shape[batch_dims:])
                resized = f" If its size changes: ragged=[{key_name(key)}]." if _is_resized(got_shape, shape) else ""
                raise SchemaMismatchError(
                    f"Got {key_name(key)} with {got_shape} elements of {got} a step, but the arena was allocated "
                    f"for {shape} of {needed}. Convert it before writing (a TorchRL transform "
                    f"does), or allocate the storage with the data that will come.{resized}"
                )
        return ordered

    def _refuse_keys(self, leaves: Mapping[Key, Leaf]) -> None:
        missing = [key for key in self._expected if key not in leaves]
        new = [key for key in leaves if key not in self._expected]
        parts = []
        if missing:
            parts.append(f"without {', '.join(map(key_name, missing))}")
        if new:
            parts.append(f"with {', '.join(map(key_name, new))}, which the arena was not allocated for")
        for key in new:
            if alike := difflib.get_close_matches("/".join(key), ["/".join(k) for k in missing], n=1):
                parts.append(f"{key_name(key)} may be meant as {key_name(tuple(alike[0].split('/')))}")
        raise SchemaMismatchError(
            f"Got data {'; '.join(parts)}. Every step must have the same keys as the first one that was written: "
            "select or exclude keys with a transform, or call storage.allocate(step) with a step of the data to come. "
            "Keys that only some trajectories have can be declared: optional_keys=[...]."
        )

    def __contains__(self, key: object) -> bool:
        """Return whether ``key`` is the key of a field, of a step or of a trajectory."""
        return key in self._expected

    def number_of(self, key: Key) -> int | None:
        """Return the index of ``key`` in ``fields``; None where it is not one of them."""
        return self._numbers.get(key)

    def build(self, values: Sequence[torch.Tensor], batch_size: Sequence[int]) -> TensorDict:
        """Build a TensorDict from one tensor ``[*batch_size, *shape]`` per field.

        Args:
            values: one per field of a step, or one per field of a step and of a trajectory.
            batch_size: of the TensorDict.
        """
        nest = self._nest if len(values) == len(self.fields) else self._nest_of_all
        return nest.build(values, batch_size)

    def build_sample(self, values: Sequence[torch.Tensor], origin: Sequence[torch.Tensor]) -> TensorDict:
        """Build a TensorDict with the origin of each step.

        Args:
            values: one tensor ``[*B, *shape]`` per field of a step and of a trajectory.
            origin: for ``index_key``, ``int64`` ``[*B, 2]``, the trajectory id and the step; and the two separately,
                ``[*B]`` each, for ``("trajectory", "id")`` and ``("trajectory", "step")``.
        """
        return self.nest_of_samples.build([*values, *origin], origin[1].shape, origin[1].device)

    def to_json(self) -> str:
        """Return the schema as JSON: a list of fields, or a dict with these and the nodes where there are any."""
        fields = [[field.key, field.shape, _kind_name(field)] for field in self.all_fields]
        if not self.nodes and not self.blob_numbers:
            return json.dumps(fields)
        nodes = [[node.key, node.shape, node.names, node.tensorclass] for node in self.nodes]
        described: dict[str, Any] = {"fields": fields, "nodes": nodes}
        if self.blob_numbers:
            codecs = [[n, codec_to_json(self.fields[n].codec)] for n in self.blob_numbers if self.fields[n].codec]
            blobs = None if self.blobs is None else [self.blobs.slot, self.blobs.expected]
            described |= {"codecs": codecs, "blobs": blobs}
        return json.dumps(described)

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """Read what :meth:`to_json` wrote. Nothing is imported.

        Raises:
            ValueError, TypeError, AttributeError, KeyError: when it is something else.
        """
        described = json.loads(text)
        described = described if isinstance(described, dict) else {"fields": described, "nodes": []}
        fields = [
            StepField(_key(key), _shape(shape), *_dtype_and_is_text(dtype)) for key, shape, dtype in described["fields"]
        ]
        known: dict[str, Any] = {}  # one object for equal ones
        for number, codec in described.get("codecs", ()):
            made = known.setdefault(json.dumps(codec, sort_keys=True), codec_from_json(codec))
            fields[number] = dataclasses.replace(fields[number], codec=made)
        sizes = described.get("blobs")
        nodes = [_node(*parts) for parts in described["nodes"]]
        keys = {field.key for field in fields}
        parents = {key[:n] for key in keys for n in range(1, len(key))}
        without_index = PAIR in keys and any(key[0] == INDEX[0] for key in keys)
        if len(keys) < len(fields) or keys & parents or any(map(is_reserved, keys)) or without_index:
            raise ValueError(f"not the fields of a schema: {text[:200]}")
        if not {node.key for node in nodes} <= parents - {*SHARED_NODES} or not _fit(nodes, fields):
            raise ValueError(f"not the nodes of a schema: {text[:200]}")
        schema = cls(fields, nodes, None if sizes is None else BlobSizes(*map(_size, sizes)))
        if schema.blob_numbers and schema.blobs is None:
            raise ValueError(f"a schema of ragged values without their sizes: {text[:200]}")
        if not schema.fields:
            raise ValueError(f"a schema without fields: {text[:200]}")
        return schema

    def tensorclasses(self) -> list[type]:
        """Return the tensorclasses of the nodes, none of which is imported for it.

        Raises:
            SchemaMismatchError: when this process does not know one of them.
        """
        return [node.resolve_class(import_it=False) for node in self.nodes if node.tensorclass]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and self._expected == other._expected

    def __hash__(self) -> int:
        return hash(frozenset(self._expected.items()))

    def __repr__(self) -> str:
        lines = (f"{key_name(field.key)}: {list(field.shape)} {_kind_name(field)}" for field in self.all_fields)
        return f"Schema({', '.join(lines)})"


def _is_resized(got: Sequence[int], needed: Sequence[int]) -> bool:
    """Return whether two shapes differ in their first dimension only."""
    return len(got) == len(needed) > 0 and got[0] != needed[0] and tuple(got[1:]) == tuple(needed[1:])


def _without_mask(leaves: Leaves) -> Leaves:
    leaves.pop(MASK, None)  # says which steps are real, and is not stored
    return leaves


def _key(key: Any) -> Key:
    if not isinstance(key, list) or not key or not all(isinstance(part, str) and part for part in key):
        raise ValueError(f"{key!r} is not a key")
    return tuple(key)


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int and n >= -(not at) for at, n in enumerate(shape)):
        raise ValueError(f"{shape!r} is not a shape")
    return tuple(shape)


def _size(size: Any) -> int:
    if type(size) is not int or size < 1:
        raise ValueError(f"{size!r} is not a size")
    return size


def _fit(nodes: Iterable[Node], fields: Sequence[StepField]) -> bool:
    """Return whether the entries of each node begin with its batch dimensions."""
    return all(
        field.shape[: len(node.shape)] == node.shape
        for node in nodes
        for field in fields
        if field.key[: len(node.key)] == node.key
    )


def _node(key: Any, shape: Any, names: Any, tensorclass: Any) -> Node:
    if not isinstance(names, list) or not all(name is None or isinstance(name, str) for name in names):
        raise ValueError(f"{names!r} are not names of dimensions")
    if not isinstance(tensorclass, str) or len(names) not in (0, len(_shape(shape))):
        raise ValueError(f"{tensorclass!r} is not a tensorclass")
    return Node(_key(key), _shape(shape), tuple(names), tensorclass)


def _dtype_and_is_text(name: str) -> tuple[torch.dtype, bool]:
    if name == TEXT:
        return torch.int32, True
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch.{name} is not a dtype")
    return dtype, False


def _kind_name(field: StepField) -> str:
    return TEXT if field.is_text else str(field.dtype).removeprefix("torch.")


def _field(key: Key, value: Leaf, batch_dims: int) -> StepField:
    shape = tuple(value.shape[batch_dims:])
    if isinstance(value, np.ndarray):
        return StepField(key, shape, torch.int32, is_text=True)
    return StepField(key, shape, value.dtype)
