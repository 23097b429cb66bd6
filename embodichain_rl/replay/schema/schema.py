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

from embodichain_rl.errors import SchemaMismatchError, TrajectoryValueError
from embodichain_rl.replay.schema.arrays import as_array
from embodichain_rl.replay.schema.texts import text_array
from embodichain_rl.replay.schema.trajectory_values import same_values

__all__ = ["MASK", "Key", "Leaf", "Nest", "Schema", "StepField", "leaves_of"]

Key = tuple[str, ...]
Leaf = torch.Tensor | np.ndarray
"""An entry of some steps: a tensor, or strings as an array of objects of the same shape."""

MASK: Key = ("collector", "mask")
"""Where a padded batch says which steps are real (True)."""

ORIGIN_KEYS = (("trajectory", "id"), ("trajectory", "step"))
"""What the buffer adds to what it hands out, besides TorchRL's ``"index"``, and so does not take back as data."""


TRAJECTORY = "trajectory"
"""What stands under it belongs to the trajectory, not to the step."""

TEXT = "text"
"""The dtype of text, in JSON."""


@dataclass(frozen=True, slots=True)
class StepField:
    """One entry of a step: ``key``, shape of one step without any batch dimension, dtype.

    Text is stored as its id in a :class:`~embodichain_rl.replay.schema.texts.TextTable`, ``torch.int32``.
    """

    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_text: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of one step."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Nest:
    """Puts tensors together to TensorDicts that all have the same keys.

    TensorDict's public constructor checks every shape again and takes four times as long, a fifth of a whole
    ``sample()``.

    Args:
        keys: one for each tensor.

    Example:
        >>> step = Nest([("observation",), ("next", "reward")]).build([torch.zeros(4, 3), torch.zeros(4, 1)], [4])
        >>> step["next"].batch_size
        torch.Size([4])
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self._numbers: dict[str, Any] = {}
        for number, key in enumerate(keys):
            node = self._numbers
            for part in key[:-1]:
                node = node.setdefault(part, {})
            node[key[-1]] = number

    def build(self, values: Sequence[torch.Tensor], batch_size: Sequence[int]) -> TensorDict:
        """Puts one tensor ``[*batch_size, ...]`` of each key together."""
        return _nested(self._numbers, values, torch.Size(batch_size))


def _nested(numbers: dict[str, Any], values: Sequence[torch.Tensor], batch_size: torch.Size) -> TensorDict:
    return TensorDict._new_unsafe(
        {
            name: _nested(number, values, batch_size) if isinstance(number, dict) else values[number]
            for name, number in numbers.items()
        },
        batch_size=batch_size,
    )


class Schema:
    """The fields of a step, in a fixed order.

    Args:
        fields: at least one. Those under ``"trajectory"`` are of whole trajectories.

    Attributes:
        fields (tuple[StepField, ...]): those of a step.
        trajectory_fields (tuple[StepField, ...]): those of a trajectory. "Of each field" means both, in this order.

    Example:
        >>> step = TensorDict({"observation": torch.zeros(3), "next": {"done": torch.zeros(1, dtype=torch.bool)}})
        >>> Schema.of(step).keys
        [('observation',), ('next', 'done')]
    """

    def __init__(self, fields: Sequence[StepField]) -> None:
        self.fields = tuple(field for field in fields if field.key[0] != TRAJECTORY)
        self.trajectory_fields = tuple(field for field in fields if field.key[0] == TRAJECTORY)
        self.all_fields = (*self.fields, *self.trajectory_fields)
        self.keys = [field.key for field in self.fields]
        self.nbytes = sum(field.nbytes for field in self.fields)
        self._numbers = {key: number for number, key in enumerate(self.keys)}
        self._expected = {field.key: (field.shape, field.dtype, field.is_text) for field in self.all_fields}
        self._nest = Nest(self.keys)
        self._nest_of_samples = Nest([*self._expected, ("index",), *ORIGIN_KEYS])

    @property
    def text_keys(self) -> list[Key]:
        """The keys of text, of steps and of trajectories."""
        return [field.key for field in self.all_fields if field.is_text]

    @classmethod
    def of(cls, data: TensorDictBase) -> Schema:
        """Reads the schema off data of any batch size.

        Raises:
            SchemaMismatchError: when there is no tensor in it, or something that is neither a tensor nor text.
        """
        return cls.of_leaves(leaves_of(data), data.ndim)

    @classmethod
    def of_leaves(cls, leaves: Mapping[Key, Leaf], batch_dims: int) -> Schema:
        """Reads the schema off what :func:`leaves_of` returns, with so many batch dimensions."""
        if not any(key[0] != TRAJECTORY for key in leaves):
            raise SchemaMismatchError("Got data without any tensor; a step needs at least ('next', 'done').")
        return cls([_field(key, value, batch_dims) for key, value in leaves.items()])

    def leaves(self, data: TensorDictBase) -> list[Leaf]:
        """Returns the entries of ``data``, one of each field.

        Raises:
            SchemaMismatchError: when keys are missing or new, or a shape or dtype differs.
        """
        return self.in_order(leaves_of(data), data.ndim)

    def in_order(self, leaves: Mapping[Key, Leaf], batch_dims: int) -> list[Leaf]:
        """Does the same with what :func:`leaves_of` returns, with so many batch dimensions."""
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
                raise SchemaMismatchError(
                    f"Got {_name(key)} with {tuple(value.shape[batch_dims:])} elements of {got} a step, but the arena "
                    f"was allocated for {shape} of {needed}. Convert it before writing (a TorchRL transform does), or "
                    "allocate the storage with the data that will come."
                )
        return ordered

    def _refuse_keys(self, leaves: Mapping[Key, Leaf]) -> None:
        missing = [key for key in self._expected if key not in leaves]
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
        """Puts one tensor per field of a step, each ``[*batch_size, *shape]``, together to a TensorDict."""
        return self._nest.build(values, batch_size)

    def build_sample(self, values: Sequence[torch.Tensor], origin: Sequence[torch.Tensor]) -> TensorDict:
        """Does what :meth:`build` does, and says of each step where it comes from.

        Args:
            values: one tensor of each field, ``[*B, *shape]``.
            origin: ``"index"``, ``int64`` ``[*B, 2]``: trajectory id and step; and the two apart, ``[*B]``, for
                ``("trajectory", "id")`` and ``("trajectory", "step")``.
        """
        return self._nest_of_samples.build([*values, *origin], origin[1].shape)

    def to_json(self) -> str:
        """Returns the schema as JSON."""
        return json.dumps([[field.key, field.shape, _kind_name(field)] for field in self.all_fields])

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """Reads what :meth:`to_json` wrote.

        Raises:
            ValueError, TypeError, AttributeError: when it is something else.
        """
        fields = [
            StepField(_key(key), _shape(shape), *_dtype_and_is_text(dtype)) for key, shape, dtype in json.loads(text)
        ]
        keys = {field.key for field in fields}
        parents = {key[:n] for key in keys for n in range(1, len(key))}
        schema = cls(fields)
        if not schema.fields or len(keys) < len(fields) or keys & parents or any(map(_is_reserved, keys)):
            raise ValueError(f"not a schema: {text[:200]}")
        return schema

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and self._expected == other._expected

    def __hash__(self) -> int:
        return hash(frozenset(self._expected.items()))

    def __repr__(self) -> str:
        lines = (f"{_name(field.key)}: {list(field.shape)} {_kind_name(field)}" for field in self.all_fields)
        return f"Schema({', '.join(lines)})"


def _key(key: Any) -> Key:
    if not isinstance(key, list) or not key or not all(isinstance(part, str) and part for part in key):
        raise ValueError(f"{key!r} is not a key")
    return tuple(key)


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape!r} is not a shape")
    return tuple(shape)


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


def _is_reserved(key: Key) -> bool:
    """Whether the buffer says there what a step comes from."""
    return key[0] == TRAJECTORY and (len(key) == 1 or key[:2] in ORIGIN_KEYS)


def _name(key: Key) -> str:
    return repr(key[0]) if len(key) == 1 else repr(key)


def leaves_of(data: TensorDictBase) -> dict[Key, Leaf]:
    """Returns what of ``data`` is stored: all but what says where a step comes from.

    What belongs to the trajectory and stands under ``("next", "trajectory")`` again, since environments write all that
    they observe there too, is left out as well.

    Raises:
        SchemaMismatchError: when it is no TensorDict, or there is something in it that is neither a dense tensor nor
            text.
        TrajectoryValueError: when an entry under ``("next", "trajectory")`` is another than that under "trajectory".
    """
    if not is_tensor_collection(data):
        raise SchemaMismatchError(f"Got a {type(data).__name__}; needed is a TensorDict of steps.")
    leaves: dict[Key, Leaf] = {}
    _collect(data.items(), (), leaves)
    leaves.pop(("index",), None)
    for key in [key for key in leaves if TRAJECTORY in key[:2]]:
        if key in ORIGIN_KEYS:
            del leaves[key]
        elif _is_reserved(key):
            raise SchemaMismatchError(
                f"Got {_name(key)}, but that is where the buffer says what a step comes from. Rename it."
            )
        elif key[:2] == ("next", TRAJECTORY):
            _check_echo(key, leaves.pop(key), leaves.get(key[1:]))
    return leaves


def _check_echo(key: Key, value: Leaf, of_trajectory: Leaf | None) -> None:
    if of_trajectory is None:
        raise SchemaMismatchError(
            f"Got {_name(key)} without {_name(key[1:])}; what belongs to a trajectory stands under 'trajectory'."
        )
    ours, theirs = (as_array(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in (of_trajectory, value))
    if ours.shape != theirs.shape or not same_values(ours, theirs).all():
        raise TrajectoryValueError(
            f"Got {_name(key)} that is another than {_name(key[1:])}: what stands under 'trajectory' is the same at "
            "every step of a trajectory. Store what changes under another name."
        )


def _collect(items: Iterable[tuple[str, Any]], prefix: Key, leaves: dict[Key, Leaf]) -> None:
    for name, value in items:
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_meta:
                raise SchemaMismatchError(
                    f"Got {_name((*prefix, name))}, a tensor of layout {value.layout} on {value.device}; the arena "
                    "holds dense tensors. Convert it before writing (to_dense())."
                )
            leaves[(*prefix, name)] = value
        elif is_tensor_collection(value) and hasattr(value, "items") and not _is_non_tensor(value):
            _collect(value.items(), (*prefix, name), leaves)
        elif (texts := text_array(value)) is not None:
            leaves[(*prefix, name)] = texts
        else:
            raise SchemaMismatchError(
                f"Got {_name((*prefix, name))} of type {type(value).__name__}; the arena holds tensors and text. "
                "Encode it as numbers, or leave it out with a transform (ExcludeTransform)."
            )


def _is_non_tensor(value: object) -> bool:
    return bool(getattr(value, "_is_non_tensor", False))
