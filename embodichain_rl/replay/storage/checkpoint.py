"""Saving what a storage holds, and filling a storage from it.

A checkpoint is a directory with one JSON file, ``trajectories.json``, and one file of raw values per field, named by
number. Reading one executes nothing, opens no path that the checkpoint names, and allocates nothing before the sizes
agree. The JSON file is taken away first and written last, so that one that was broken off can't be taken for whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torchrl.data.replay_buffers.checkpointers import StorageCheckpointerBase
from torchrl.data.replay_buffers.storages import Storage

from embodichain_rl.errors import CheckpointError, CheckpointWriteError, UnsupportedOperationError
from embodichain_rl.replay.schema import Schema, StepField, TextTable, as_array

__all__ = ["SavedTrajectories", "TrajectoryCheckpointer", "with_own_texts", "writing_to"]

FORMAT = 1
DESCRIPTION = "trajectories.json"


class TrajectoryCheckpointer(StorageCheckpointerBase):
    """Saves a :class:`TrajectoryStorage` to a directory and loads it; used by ``rb.dumps`` and ``rb.loads``."""

    def register_save_hook(self, hook: Any) -> NoReturn:
        """Refuses: there is no form of the data in between that a hook could change."""
        raise UnsupportedOperationError(
            "A TrajectoryStorage is saved as it is, without hooks: change the data with a transform when it is written "
            "or sampled."
        )

    register_load_hook = register_save_hook

    def dumps(self, storage: Storage, path: str | Path) -> None:
        """Writes the live trajectories to the directory ``path``; writers of the storage go on meanwhile.

        An earlier checkpoint there is given up when this begins: if it is broken off, there is none.

        Raises:
            CheckpointWriteError: when the directory can't be written to, or the disk is full.
        """
        path = Path(path)
        state = storage.state_dict()
        values = state.pop("values", [])
        lengths = state.pop("lengths", torch.zeros(0, dtype=torch.int64))
        with writing_to(path):
            path.mkdir(parents=True, exist_ok=True)
            (path / DESCRIPTION).unlink(missing_ok=True)
            for number, value in enumerate(values):
                # Not ndarray.tofile, which says nothing of the last 4 KB that find no place.
                _field_file(path, number).write_bytes(
                    np.ascontiguousarray(as_array(value)).reshape(-1).view(np.uint8).data
                )
            (path / DESCRIPTION).write_text(json.dumps({"format": FORMAT, "lengths": lengths.tolist(), **state}))

    def loads(self, storage: Storage, path: str | Path) -> None:
        """Replaces what ``storage`` holds by the trajectories of the checkpoint at ``path``.

        Raises:
            CheckpointError: when the checkpoint is damaged; the storage is as it was.
            SchemaMismatchError: when the storage was allocated for other steps.
        """
        path = Path(path)
        try:
            state = json.loads((path / DESCRIPTION).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"No readable {DESCRIPTION} in {path}: {error}") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CheckpointError(f"{path / DESCRIPTION} is not a checkpoint of format {FORMAT}.")
        if "schema" in state:
            schema, lengths = _described(state)
            state["lengths"] = lengths
            state["values"] = [
                _read_values(_field_file(path, number), shape, field.dtype)
                for number, (field, shape) in enumerate(_with_shapes(schema, lengths))
            ]
        storage.load_state_dict(state)


@dataclass(frozen=True)
class SavedTrajectories:
    """The checked content of a ``state_dict`` of a storage.

    Attributes:
        next_id (int): the lowest id that was not given out.
        steps_written (int): the count of steps written.
        schema (Schema | None): the fields; None for a storage that was not allocated.
        lengths (torch.Tensor): ``int64`` ``[n]``, the length of each trajectory, oldest first.
        values (list[torch.Tensor]): one tensor per field, as :meth:`TrajectoryStorage.state_dict` describes them.
        texts (numpy.ndarray): strings, ``[k]``; text fields hold indices into it.
    """

    next_id: int
    steps_written: int
    schema: Schema | None
    lengths: torch.Tensor
    values: list[torch.Tensor]
    texts: np.ndarray

    @classmethod
    def parse(cls, state: dict[str, Any]) -> SavedTrajectories:
        """Check a ``state_dict``.

        Raises:
            CheckpointError: when it is damaged.
        """
        next_id, steps_written = (_counter(state, name) for name in ("next_id", "steps_written"))
        if "schema" not in state:
            none = torch.zeros(0, dtype=torch.int64)
            return cls(next_id, steps_written, None, none, [], np.empty(0, dtype=object))
        schema, lengths = _described(state)
        values = _checked_values(schema, state.get("values"), lengths)
        texts = _checked_texts(schema, values, state.get("texts", []))
        return cls(next_id, steps_written, schema, lengths, values, texts)

    @property
    def longest(self) -> int:
        """Steps of the longest trajectory; 0 without any."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    def trajectories(self, schema: Schema, text_ids: np.ndarray) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
        """Return the trajectories, oldest first.

        Args:
            schema: the same fields, in the order in which the storage that takes them has them.
            text_ids: ``int32`` ``[k]``, the id of each of ``texts`` there.

        Returns:
            For each trajectory, one array ``[T, *shape]`` per field of a step and one ``[*shape]`` per field of a
            trajectory.
        """
        assert self.schema is not None, "nothing was saved"
        arrays = {
            field.key: text_ids[as_array(value)] if field.is_text else as_array(value)
            for field, value in zip(self.schema.all_fields, self.values, strict=True)
        }
        of_steps = [arrays[field.key] for field in schema.fields]
        of_trajectories = [arrays[field.key] for field in schema.trajectory_fields]
        ends = self.lengths.cumsum(0).tolist()
        starts = [0, *ends][: len(ends)]
        return [
            ([values[start:end] for values in of_steps], [values[number, ...] for values in of_trajectories])
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Says of an error of the operating system that it broke off a checkpoint."""
    try:
        yield
    except CheckpointWriteError:
        raise
    except OSError as error:
        raise CheckpointWriteError(
            f"The checkpoint could not be written to the end at {path}: {error}. What is there now can't be loaded. "
            "See whether the disk is full and the directory may be written to, or save to another one."
        ) from error


def _field_file(path: Path, number: int) -> Path:
    return path / f"field_{number:04d}.bin"


def _counter(state: dict[str, Any], name: str) -> int:
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise CheckpointError(f"The checkpoint's {name!r} is {value!r}, not a count.")
    return value


def _described(state: dict[str, Any]) -> tuple[Schema, torch.Tensor]:
    try:
        schema = Schema.from_json(state["schema"])
        schema.tensorclasses()  # known here already: a checkpoint imports nothing
        lengths = torch.as_tensor(state["lengths"], dtype=torch.int64)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The checkpoint's description can't be read: {error!r}") from error
    if lengths.ndim != 1 or bool((lengths < 1).any()) or bool((lengths > 2**40).any()):
        raise CheckpointError("The checkpoint's lengths are not a list of step counts.")
    return schema, lengths


def _read_values(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    size = file.stat().st_size if file.is_file() else -1
    if size != nbytes:
        raise CheckpointError(
            f"{file.name} of the checkpoint has {size:,} bytes, but {nbytes:,} are needed for {shape} of {dtype}. It "
            "is damaged, or was not written to the end; load another one."
        )
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.fromfile(file, dtype=np.uint8)).view(dtype).view(shape)


def _with_shapes(schema: Schema, lengths: torch.Tensor) -> Iterator[tuple[StepField, tuple[int, ...]]]:
    """Each field, with the shape of the values of all trajectories."""
    for field in schema.fields:
        yield field, (int(lengths.sum()), *field.shape)
    for field in schema.trajectory_fields:
        yield field, (len(lengths), *field.shape)


def _checked_values(schema: Schema, values: Any, lengths: torch.Tensor) -> list[torch.Tensor]:
    if not isinstance(values, list) or len(values) != len(schema.all_fields):
        raise CheckpointError(f"The checkpoint describes {len(schema.all_fields)} fields, but does not hold as many.")
    for (field, shape), value in zip(_with_shapes(schema, lengths), values, strict=True):
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"The checkpoint's {field.key} is a {type(value).__name__}, not a tensor.")
        if value.dtype != field.dtype or value.shape != shape:
            raise CheckpointError(
                f"The checkpoint's {field.key} is {tuple(value.shape)} of {value.dtype}, not {shape} of {field.dtype}."
            )
    return values


def _checked_texts(schema: Schema, values: list[torch.Tensor], texts: Any) -> np.ndarray:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise CheckpointError("The checkpoint's texts are not a list of strings.")
    for field, value in zip(schema.all_fields, values, strict=True):
        if field.is_text and bool(((value < 0) | (value >= len(texts))).any()):
            raise CheckpointError(f"The checkpoint's {field.key} names a text beyond the {len(texts):,} that it holds.")
    return np.array(texts, dtype=object)


def with_own_texts(
    schema: Schema, values: Sequence[torch.Tensor], table: TextTable
) -> tuple[list[torch.Tensor], list[str]]:
    """Returns the values with the ids of text replaced by places in a list of the texts that occur, and that list.

    Args:
        schema: the fields.
        values: one tensor of each field.
        table: of the ids.
    """
    ids = [as_array(value) for field, value in zip(schema.all_fields, values, strict=True) if field.is_text]
    used = np.unique(np.concatenate([array.reshape(-1) for array in ids])) if ids else np.empty(0, np.int32)
    own = [
        torch.from_numpy(np.searchsorted(used, as_array(value)).astype(np.int32)) if field.is_text else value
        for field, value in zip(schema.all_fields, values, strict=True)
    ]
    return own, table.resolve(used)
