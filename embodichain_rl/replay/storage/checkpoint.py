"""Checkpoints: the state of a storage in a directory.

A checkpoint is a directory with one JSON file, ``trajectories.json``, and one file of raw values per field, named by
number. Reading it executes nothing, opens no path that the checkpoint names, and allocates nothing before the sizes
agree. The JSON file is deleted first and written last: an interrupted checkpoint is never taken for a whole one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torchrl.data.replay_buffers.checkpointers import StorageCheckpointerBase
from torchrl.data.replay_buffers.storages import Storage

from embodichain_rl.errors import CheckpointError, CheckpointWriteError, UnsupportedOperationError
from embodichain_rl.replay.schema import as_array
from embodichain_rl.replay.storage.state import described, with_shapes

__all__ = ["TrajectoryCheckpointer", "writing_to"]

FORMAT = 1
DESCRIPTION = "trajectories.json"


class TrajectoryCheckpointer(StorageCheckpointerBase):
    """Saves a :class:`TrajectoryStorage` to a directory and loads it; used by ``rb.dumps`` and ``rb.loads``."""

    def register_save_hook(self, hook: Any) -> NoReturn:
        """Refuse a hook: the data takes no intermediate form that a hook could change."""
        raise UnsupportedOperationError(
            "A TrajectoryStorage is saved as it is, without hooks: change the data with a transform when it is written "
            "or sampled."
        )

    register_load_hook = register_save_hook

    def dumps(self, storage: Storage, path: str | Path) -> None:
        """Write the live trajectories to the directory ``path``; writers of the storage go on meanwhile.

        An earlier checkpoint there is deleted first: if this call is interrupted, there is none.

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
                # Not ndarray.tofile, which reports no error if the disk is full at the last 4 KB.
                _field_file(path, number).write_bytes(
                    np.ascontiguousarray(as_array(value)).reshape(-1).view(np.uint8).data
                )
            (path / DESCRIPTION).write_text(json.dumps({"format": FORMAT, "lengths": lengths.tolist(), **state}))

    def loads(self, storage: Storage, path: str | Path) -> None:
        """Replace the content of ``storage`` by the trajectories of the checkpoint at ``path``.

        Raises:
            CheckpointError: when the checkpoint is damaged; the storage is unchanged.
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
            schema, lengths = described(state)
            state["lengths"] = lengths
            state["values"] = [
                _read_values(_field_file(path, number), shape, field.dtype)
                for number, (field, shape) in enumerate(with_shapes(schema, lengths))
            ]
        storage.load_state_dict(state)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into one that says that it interrupted a checkpoint."""
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
