"""The names, shapes and dtypes of LeRobot, for the fields of a schema.

A LeRobot feature is named by a flat key with dots. So a key of a buffer and a feature correspond::

    ("next", "reward")              "next.reward"
    ("observation", "images", "top")   "observation.images.top"
    "observation"                   "observation.state"     a vector; LeRobot's policies know it by this name
    "pixels"                        "observation.image"     TorchRL's name of a rendered image
    ("trajectory", "task")          the task

Entries that LeRobot computes itself are not features of their own: ``index``, ``episode_index``, ``frame_index``,
``task_index``. Neither are entries that only TorchRL needs: the end flags at the root, which are False at every step,
the entries of a collector, and ``("next", key)`` if ``key`` is in the steps as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey

from embodichain_rl._checks import checked_key
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.schema import TRAJECTORY, Key, Schema, StepField, key_name

__all__ = ["DEFAULT_FEATURES", "Column", "Columns", "buffer_key", "columns_of", "feature_name"]

DEFAULT_FEATURES: dict[str, dict[str, Any]] = {
    name: {"dtype": dtype, "shape": (1,), "names": None}
    for name, dtype in [
        ("timestamp", "float32"),
        ("frame_index", "int64"),
        ("episode_index", "int64"),
        ("index", "int64"),
        ("task_index", "int64"),
    ]
}
"""The features that every LeRobot dataset has."""

RENAMED: dict[Key, str] = {("observation",): "observation.state", ("pixels",): "observation.image"}
"""Keys that have another name in LeRobot than their own."""

TASK_NAMES = ("task", "instruction", "language_instruction")
"""The last part of keys of text that name the task of a step or of a trajectory, the first one first."""

TIMESTAMP: Key = ("timestamp",)

_COMPUTED = {*DEFAULT_FEATURES, "task"}
_FLAGS = {"done", "terminated", "truncated", "is_init"}
_DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "float32",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bool: "bool",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
}
CHANNELS = 3
"""The number of channels of what LeRobot takes for an image."""

MOST_AXES = 5
"""The number of axes up to which LeRobot stores arrays."""


def feature_name(key: NestedKey) -> str:
    """Return the name of a LeRobot feature for a key of a buffer.

    Example:
        >>> feature_name(("next", "reward")), feature_name("observation"), feature_name("action")
        ('next.reward', 'observation.state', 'action')
    """
    checked = checked_key(key)
    return RENAMED.get(checked) or ".".join(checked)


def buffer_key(name: str) -> NestedKey:
    """Return the key of a buffer for the name of a LeRobot feature.

    Example:
        >>> buffer_key("next.reward"), buffer_key("observation.images.top"), buffer_key("action")
        (('next', 'reward'), ('observation', 'images', 'top'), 'action')
    """
    parts = tuple(name.split("."))
    return parts[0] if len(parts) == 1 else parts


@dataclass(frozen=True)
class Column:
    """A LeRobot feature, and the field of a schema that it is read from.

    Attributes:
        name: of the feature.
        field: of a step or of a trajectory.
        number: of the field among the fields of a step; None for a field of a trajectory.
        kind: what it is for LeRobot.
        channels_first: for an image, whether the field is ``[C, H, W]`` rather than ``[H, W, C]``.
    """

    name: str
    field: StepField
    number: int | None
    kind: Literal["image", "value", "text"]
    channels_first: bool = False

    @property
    def is_scalar(self) -> bool:
        """Whether LeRobot's items have a number without an axis, or one string."""
        return self.kind != "image" and torch.Size(self.field.shape).numel() == 1 and len(self.field.shape) <= 1

    def feature(self, camera_dtype: str) -> dict[str, Any]:
        """Return the description of the feature, as ``info.json`` has it.

        Args:
            camera_dtype: ``"image"`` or ``"video"``.
        """
        shape = tuple(self.field.shape)
        if self.kind == "image":
            height_width_channels = (*shape[1:], shape[0]) if self.channels_first else shape
            names = ["height", "width", "channels"]
            return {"dtype": camera_dtype, "shape": height_width_channels, "names": names}
        dtype = "string" if self.kind == "text" else _DTYPES[self.field.dtype]
        return {"dtype": dtype, "shape": shape or (1,), "names": None}


@dataclass(frozen=True)
class Columns:
    """What a LeRobot dataset over a schema consists of.

    Attributes:
        columns: the features, other than those that every dataset has.
        task: the text field of the task, and its number among the fields of a step; None if there is none.
        timestamp: the number of the field of the time of a step; None if the time follows from the frame.
    """

    columns: tuple[Column, ...]
    task: tuple[StepField, int | None] | None
    timestamp: int | None

    def keys(self) -> dict[str, list[str]]:
        """Return the keys of the features whose names don't tell them."""
        named = {column.name: column.field.key for column in self.columns}
        return {name: list(key) for name, key in named.items() if checked_key(buffer_key(name)) != key}

    def features(self, camera_dtype: str = "image") -> dict[str, dict[str, Any]]:
        """Return all features by name, as ``info.json`` has them."""
        own = {column.name: column.feature(camera_dtype) for column in self.columns}
        return {**own, **{name: dict(feature) for name, feature in DEFAULT_FEATURES.items()}}


def columns_of(
    schema: Schema,
    *,
    keys: Iterable[NestedKey] | None = None,
    names: Mapping[NestedKey, str] | None = None,
    task_key: NestedKey | None = None,
) -> Columns:
    """Return the LeRobot features of a schema.

    Args:
        schema: of the steps.
        keys: the keys of the buffer that become features; by default all but those named in the module's docstring.
        names: names of features for some keys.
        task_key: the key of the text that is the task; by default a key that ends in ``"task"``, ``"instruction"`` or
            ``"language_instruction"``.

    Raises:
        SchemaMismatchError: when a key is not in the schema, has values that LeRobot can't store, or two keys get the
            same name.
        InvalidArgumentError: when a name has a slash, or is one that LeRobot computes.
    """
    numbers = {field.key: number for number, field in enumerate(schema.fields)}
    fields = {field.key: field for field in schema.all_fields}
    renamed = {_field_key(key, fields): name for key, name in (names or {}).items()}
    task = _task_field(fields, task_key)
    wanted = None if keys is None else [_field_key(key, fields) for key in keys]
    for key in (*(wanted or ()), *renamed):
        if key not in fields:
            raise SchemaMismatchError(f"Got the key {key_name(key)}, but the steps that are stored have {[*fields]}.")
    chosen = [key for key in fields if _is_feature(key, fields, task)] if wanted is None else wanted
    columns = []
    for key in chosen:
        if task is not None and key == task.key:
            continue
        name = renamed.get(key) or feature_name(key)
        if "/" in name or name in _COMPUTED:
            if wanted is None and key not in renamed:
                continue
            raise InvalidArgumentError(
                f"Got the name {name!r} for {key_name(key)}; a feature has a name without a slash, other than "
                f"{sorted(_COMPUTED)}, which LeRobot computes."
            )
        columns.append(_column(name, fields[key], numbers.get(key)))
    _refuse_equal_names(columns)
    timestamp = fields.get(TIMESTAMP)
    timed = timestamp is not None and timestamp.dtype.is_floating_point
    return Columns(
        tuple(columns),
        None if task is None else (task, numbers.get(task.key)),
        numbers[TIMESTAMP] if timed else None,
    )


def _field_key(key: NestedKey, fields: Mapping[Key, StepField]) -> Key:
    """Return a key of the buffer; one with dots may be meant as a nested key."""
    checked = checked_key(key)
    nested = tuple(part for name in checked for part in name.split("."))
    return nested if checked not in fields and nested in fields else checked


def _is_feature(key: Key, fields: Mapping[Key, StepField], task: StepField | None) -> bool:
    if key[0] == "collector" or (len(key) == 1 and key[0] in _FLAGS | _COMPUTED):
        return False
    parts = tuple(".".join(key).split("."))  # a key may be flat already
    if parts[0] == "next":
        following = parts[1:]
        return (following not in fields and (".".join(following),) not in fields) or parts[-1] in _FLAGS
    if key[0] == TRAJECTORY:
        return key[1] not in ("has", "fps")
    return True


def _task_field(fields: Mapping[Key, StepField], task_key: NestedKey | None) -> StepField | None:
    if task_key is not None:
        field = fields.get(_field_key(task_key, fields))
        if field is None or not field.is_text:
            texts = [key for key, field in fields.items() if field.is_text]
            raise SchemaMismatchError(f"Got task_key={task_key!r}, which is no text; the keys of text are {texts}.")
        return field
    for name in TASK_NAMES:
        for key, field in fields.items():
            if field.is_text and key[-1] == name and key[0] != "next":
                return field
    return None


def _column(name: str, field: StepField, number: int | None) -> Column:
    if field.is_text:
        if torch.Size(field.shape).numel() != 1:
            raise SchemaMismatchError(
                f"Got {list(field.shape)} strings a step at {key_name(field.key)}; LeRobot stores one. Leave the key "
                "out: keys=[...]."
            )
        return Column(name, field, number, "text")
    shape = field.shape
    if field.dtype == torch.uint8 and len(shape) == 3 and number is not None:
        if shape[-1] == CHANNELS:
            return Column(name, field, number, "image")
        if shape[0] == CHANNELS:
            return Column(name, field, number, "image", channels_first=True)
    if field.dtype not in _DTYPES or len(shape) > MOST_AXES or 0 in shape or field.is_ragged:
        raise SchemaMismatchError(
            f"Got {key_name(field.key)} of {field.dtype} and shape {list(shape)}, which LeRobot can't store. Leave the "
            "key out: keys=[...]."
        )
    return Column(name, field, number, "value")


def _refuse_equal_names(columns: Iterable[Column]) -> None:
    keys: dict[str, Key] = {}
    for column in columns:
        other = keys.setdefault(column.name, column.field.key)
        if other != column.field.key:
            raise SchemaMismatchError(
                f"Got two entries that LeRobot would name {column.name!r}: {key_name(other)} and "
                f"{key_name(column.field.key)}. Name one of them: names={{{other!r}: 'another.name'}}."
            )
