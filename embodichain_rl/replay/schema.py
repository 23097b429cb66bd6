"""What one step consists of: the keys, their shapes and dtypes.

The schema is fixed when the arena is allocated. Everything that is written afterwards is held against it, before
anything is written; nothing is dropped, broadcast or cast on the way.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection

from embodichain_rl.errors import SchemaMismatchError

__all__ = ["MASK", "Key", "Schema", "StepField", "leaves_of"]

Key = tuple[str, ...]
Skeleton = dict[str, Any]

MASK: Key = ("collector", "mask")
"""Where a padded batch says which steps are real (True)."""

ORIGIN_KEYS = (("trajectory", "id"), ("trajectory", "step"))
"""What the buffer adds to what it hands out, besides TorchRL's ``"index"``, and so does not take back as data."""


@dataclass(frozen=True, slots=True)
class StepField:
    """One entry of a step: ``key``, shape of one step without any batch dimension, dtype."""

    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one step."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Schema:
    """The fields of a step, in a fixed order.

    Args:
        fields: at least one.

    Example:
        >>> step = TensorDict({"observation": torch.zeros(3), "next": {"done": torch.zeros(1, dtype=torch.bool)}})
        >>> Schema.of(step).keys
        [('observation',), ('next', 'done')]
    """

    def __init__(self, fields: Sequence[StepField]) -> None:
        self.fields = tuple(fields)
        self.keys = [field.key for field in self.fields]
        self.nbytes = sum(field.nbytes for field in self.fields)
        self._numbers = {key: number for number, key in enumerate(self.keys)}
        self._expected = {field.key: (field.shape, field.dtype) for field in self.fields}
        self._skeleton = _make_skeleton(self.keys)
        self._sample_skeleton = _make_skeleton([*self.keys, ("index",), *ORIGIN_KEYS])

    @classmethod
    def of(cls, data: TensorDictBase) -> Schema:
        """Reads the schema off data of any batch size.

        Raises:
            SchemaMismatchError: when there is no tensor in it, or something that is not a tensor.
        """
        return cls.of_leaves(leaves_of(data), data.ndim)

    @classmethod
    def of_leaves(cls, leaves: Mapping[Key, torch.Tensor], batch_dims: int) -> Schema:
        """Reads the schema off what :func:`leaves_of` returns, with so many batch dimensions."""
        if not leaves:
            raise SchemaMismatchError("Got data without any tensor; a step needs at least ('next', 'done').")
        return cls([StepField(key, tuple(value.shape[batch_dims:]), value.dtype) for key, value in leaves.items()])

    def leaves(self, data: TensorDictBase) -> list[torch.Tensor]:
        """Returns the tensors of ``data`` in the order of the fields.

        Raises:
            SchemaMismatchError: when keys are missing or new, or a shape or dtype differs.
        """
        return self.in_order(leaves_of(data), data.ndim)

    def in_order(self, leaves: Mapping[Key, torch.Tensor], batch_dims: int) -> list[torch.Tensor]:
        """Does the same with what :func:`leaves_of` returns, with so many batch dimensions."""
        if len(leaves) == len(self.fields):
            try:
                ordered = [leaves[key] for key in self.keys]
            except KeyError:
                self._refuse_keys(leaves)
        else:
            self._refuse_keys(leaves)
        for field, value in zip(self.fields, ordered, strict=True):
            if value.dtype != field.dtype or value.shape[batch_dims:] != field.shape:
                raise SchemaMismatchError(
                    f"Got {_name(field.key)} with {tuple(value.shape[batch_dims:])} elements of {value.dtype} a step, "
                    f"but the arena was allocated for {field.shape} of {field.dtype}. Convert it before writing (a "
                    "TorchRL transform does), or allocate the storage with the data that will come."
                )
        return ordered

    def _refuse_keys(self, leaves: Mapping[Key, torch.Tensor]) -> None:
        missing = [key for key in self.keys if key not in leaves]
        new = [key for key in leaves if key not in self._expected]
        parts = []
        if missing:
            parts.append(f"without {', '.join(map(_name, missing))}")
        if new:
            parts.append(f"with {', '.join(map(_name, new))}, which the arena was not allocated for")
        for key in new:
            if alike := difflib.get_close_matches("/".join(key), ["/".join(k) for k in missing], n=1):
                parts.append(f"{_name(key)} may be meant as {_name(tuple(alike[0].split('/')))}")
        raise SchemaMismatchError(
            f"Got data {'; '.join(parts)}. Every step must have the same keys as the first one that was written: "
            "select or exclude keys with a transform, or call storage.allocate(step) with a step of the data to come."
        )

    def number_of(self, key: Key) -> int | None:
        """Returns the place of ``key`` among the fields; None where it is not stored."""
        return self._numbers.get(key)

    def build(self, values: Sequence[torch.Tensor], batch_size: Sequence[int]) -> TensorDict:
        """Puts one tensor per field, each ``[*batch_size, *shape]``, together to a TensorDict."""
        return _build(self._skeleton, values, torch.Size(batch_size))

    def build_sample(self, values: Sequence[torch.Tensor], index: np.ndarray) -> TensorDict:
        """Does what :meth:`build` does, and says of each step where it comes from.

        Args:
            values: one tensor per field, ``[*B, *shape]``.
            index: ``int64`` ``[*B, 2]``, trajectory id and step, which becomes ``"index"`` and, taken apart,
                ``("trajectory", "id")`` and ``("trajectory", "step")``.
        """
        origin = [torch.from_numpy(index), torch.from_numpy(index[..., 0]), torch.from_numpy(index[..., 1])]
        return _build(self._sample_skeleton, [*values, *origin], torch.Size(index.shape[:-1]))

    def to_json(self) -> str:
        """Returns the schema as JSON."""
        return json.dumps([[f.key, f.shape, str(f.dtype).removeprefix("torch.")] for f in self.fields])

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """Reads what :meth:`to_json` wrote.

        Raises:
            ValueError, TypeError, AttributeError: when it is something else.
        """
        fields = [StepField(_key(key), _shape(shape), _dtype(dtype)) for key, shape, dtype in json.loads(text)]
        keys = {field.key for field in fields}
        parents = {key[:n] for key in keys for n in range(1, len(key))}
        if not fields or len(keys) < len(fields) or keys & parents:
            raise ValueError(f"not a schema: {text[:200]}")
        return cls(fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and self._expected == other._expected

    def __hash__(self) -> int:
        return hash(frozenset(self._expected.items()))

    def __repr__(self) -> str:
        lines = (f"{_name(f.key)}: {list(f.shape)} {str(f.dtype).removeprefix('torch.')}" for f in self.fields)
        return f"Schema({', '.join(lines)})"


def _key(key: Any) -> Key:
    if not isinstance(key, list) or not key or not all(isinstance(part, str) and part for part in key):
        raise ValueError(f"{key!r} is not a key")
    return tuple(key)


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape!r} is not a shape")
    return tuple(shape)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch.{name} is not a dtype")
    return dtype


def _name(key: Key) -> str:
    return repr(key[0]) if len(key) == 1 else repr(key)


def _make_skeleton(keys: Sequence[Key]) -> Skeleton:
    """Nested dict with the number of the key at each leaf."""
    skeleton: Skeleton = {}
    for number, key in enumerate(keys):
        node = skeleton
        for part in key[:-1]:
            node = node.setdefault(part, {})
        node[key[-1]] = number
    return skeleton


def _build(skeleton: Skeleton, values: Sequence[torch.Tensor], batch_size: torch.Size) -> TensorDict:
    # The public constructor checks every shape again and takes four times as long, a fifth of a whole sample().
    return TensorDict._new_unsafe(
        {
            name: _build(node, values, batch_size) if isinstance(node, dict) else values[node]
            for name, node in skeleton.items()
        },
        batch_size=batch_size,
    )


def leaves_of(data: TensorDictBase) -> dict[Key, torch.Tensor]:
    """Returns the tensors of ``data`` that are stored: all but those that say where a step comes from.

    Raises:
        SchemaMismatchError: when there is something other than tensors in it.
    """
    leaves: dict[Key, torch.Tensor] = {}
    _collect(data.items(), (), leaves)
    leaves.pop(("index",), None)
    for key in [key for key in leaves if key[0] == "trajectory"]:
        if key not in ORIGIN_KEYS:
            raise SchemaMismatchError(
                f"Got {_name(key)}, but 'trajectory' is where the buffer says what a step comes from. Rename it."
            )
        del leaves[key]
    return leaves


def _collect(items: Iterable[tuple[str, Any]], prefix: Key, leaves: dict[Key, torch.Tensor]) -> None:
    for name, value in items:
        if isinstance(value, torch.Tensor):
            leaves[(*prefix, name)] = value
        elif is_tensor_collection(value) and hasattr(value, "items") and not _is_non_tensor(value):
            _collect(value.items(), (*prefix, name), leaves)
        else:
            raise SchemaMismatchError(
                f"Got {_name((*prefix, name))} of type {type(value).__name__}; the arena holds tensors only. Encode it "
                "as numbers, or leave it out with a transform (ExcludeTransform)."
            )


def _is_non_tensor(value: object) -> bool:
    return bool(getattr(value, "_is_non_tensor", False))
