"""Saving what a storage holds, and filling a storage from it.

A checkpoint is a directory with one JSON file, ``trajectories.json``, and one file of raw values per field, named by
number. Reading one executes nothing, opens no path that the checkpoint names, and allocates nothing before the sizes
agree.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torchrl.data.replay_buffers.checkpointers import StorageCheckpointerBase

from embodichain_rl.errors import CheckpointError, SchemaMismatchError, UnsupportedOperationError
from embodichain_rl.replay.schema import Schema
from embodichain_rl.replay.shifted import refuse_unshifted
from embodichain_rl.replay.windows import as_array

if TYPE_CHECKING:
    from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["TrajectoryCheckpointer"]

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

    def dumps(self, storage: TrajectoryStorage, path: str | Path) -> None:
        """Writes the live trajectories to the directory ``path``; writers of the storage go on meanwhile."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        state = storage.state_dict()
        values = state.pop("values", [])
        for number, value in enumerate(values):
            as_array(value).tofile(_field_file(path, number))
        lengths = state.pop("lengths", torch.zeros(0, dtype=torch.int64))
        (path / DESCRIPTION).write_text(json.dumps({"format": FORMAT, "lengths": lengths.tolist(), **state}))

    def loads(self, storage: TrajectoryStorage, path: str | Path) -> None:
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
                _read_values(_field_file(path, number), (int(lengths.sum()), *field.shape), field.dtype)
                for number, field in enumerate(schema.fields)
            ]
        self.restore(storage, state)

    def restore(self, storage: TrajectoryStorage, state: dict[str, Any]) -> None:
        """Replaces what ``storage`` holds by the trajectories of a ``state_dict``."""
        next_id, steps_written = (_counter(state, name) for name in ("next_id", "steps_written"))
        trajectories: list[list[np.ndarray]] = []
        if "schema" in state:
            schema, lengths = _described(state)
            values = _checked_values(schema, state.get("values"), int(lengths.sum()))
            longest = int(lengths.max()) if len(lengths) else 0
            if longest > storage.max_total_steps:
                raise CheckpointError(
                    f"The checkpoint holds a trajectory of {longest:,} steps, the storage at most "
                    f"{storage.max_total_steps:,} in all. Load it into a storage with a larger max_total_steps."
                )
            if storage.initialized and storage.schema != schema:
                raise SchemaMismatchError(
                    f"The checkpoint holds {schema}, the storage was allocated for {storage.schema}."
                )
            storage.allocate_schema(schema)
            ends = lengths.cumsum(0).tolist()
            starts = [0, *ends][: len(ends)]
            # The order of the storage's fields, which need not be that of the checkpoint.
            value_of = dict(zip(schema.keys, values, strict=True))
            arrays = [as_array(value_of[key]) for key in storage.schema.keys] if storage.schema else []
            trajectories = [[array[start:end] for array in arrays] for start, end in zip(starts, ends, strict=True)]
            arena = storage.arena
            for trajectory in trajectories:
                refuse_unshifted(arena.schema, arena.shifted, trajectory, before=None, step=0)
        storage.ledger.resume_from(next_id=next_id)
        for trajectory in trajectories:
            storage.write([trajectory])
        storage.ledger.count_steps_from(steps_written)


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
        raise CheckpointError(f"{file.name} has {size:,} bytes, but {nbytes:,} are needed for {shape} of {dtype}.")
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.fromfile(file, dtype=np.uint8)).view(dtype).view(shape)


def _checked_values(schema: Schema, values: Any, steps: int) -> list[torch.Tensor]:
    if not isinstance(values, list) or len(values) != len(schema.fields):
        raise CheckpointError(f"The checkpoint describes {len(schema.fields)} fields, but does not hold as many.")
    for field, value in zip(schema.fields, values, strict=True):
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"The checkpoint's {field.key} is a {type(value).__name__}, not a tensor.")
        if value.dtype != field.dtype or value.shape != (steps, *field.shape):
            raise CheckpointError(
                f"The checkpoint's {field.key} is {tuple(value.shape)} of {value.dtype}, not "
                f"{(steps, *field.shape)} of {field.dtype}."
            )
    return values
