"""Checkpoints: the state of a storage in a directory.

A checkpoint is a directory with one JSON file, ``trajectories.json``, and a folder with one file of raw values per
field, named by number, and for ragged and compressed fields one with the size of each value. The folder has a new name
every time, and the JSON file, which names it, is replaced last, as a whole: an interrupted checkpoint changes nothing,
and an earlier one stays until the new one is there. Reading it executes nothing, opens no path outside, and allocates
nothing before the sizes agree.

The trajectories are written one after the other, while others write to the storage. Observations that are stored once
are written once: of a field that is read one step later from another one, only the last step of each trajectory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torchrl.data.replay_buffers.checkpointers import StorageCheckpointerBase
from torchrl.data.replay_buffers.storages import Storage

from embodichain_rl.errors import CheckpointError, CheckpointWriteError, UnsupportedOperationError
from embodichain_rl.replay.schema import Blobs, Schema, shifted_fields
from embodichain_rl.replay.storage.generations import checked_name, new_folder
from embodichain_rl.replay.storage.state import described, with_shapes
from embodichain_rl.replay.storage.streaming import field_file, sizes_file, write_live
from embodichain_rl.shared import write_durably

__all__ = ["TrajectoryCheckpointer", "writing_to"]

FORMAT, WITH_BLOBS, FORMATS = 2, 3, (1, 2, 3)
VALUES = "values"
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

        An earlier checkpoint there is replaced when the new one is whole: if this call is interrupted, it is kept.

        Raises:
            CheckpointWriteError: when the directory can't be written to, or the disk is full.
        """
        path = Path(path)
        with writing_to(path), new_folder(path, VALUES, DESCRIPTION) as folder:
            state: dict[str, Any] = {"next_id": storage.ledger.next_id, "steps_written": storage.ledger.steps_written}
            if storage.initialized:
                shifted = storage.shifted_in(storage.schema)
                state |= write_live(storage.view, storage.texts, folder, shifted)
            with_blobs = storage.initialized and bool(storage.schema.blob_numbers)
            content = {"format": WITH_BLOBS if with_blobs else FORMAT, "lengths": [], **state, "folder": folder.name}
            write_durably(path / DESCRIPTION, json.dumps(content).encode())
        for file in path.glob("field_*.bin"):  # of an earlier version
            file.unlink(missing_ok=True)

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
        if not isinstance(state, dict) or state.get("format") not in FORMATS:
            raise CheckpointError(f"{path / DESCRIPTION} is not a checkpoint of format {FORMATS}.")
        folder = path / checked_name(state.pop("folder", None), VALUES)
        if "schema" in state:
            schema, lengths = described(state)
            state["lengths"] = lengths
            state["values"] = _read_all(folder, schema, lengths, _checked_shifted(schema, state.pop("shifted", {})))
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
            f"The checkpoint could not be written to the end at {path}: {error}. An earlier "
            "checkpoint there is as it was. See whether the disk is full and the directory may be written to, or save "
            "to another one."
        ) from error


def _read_all(folder: Path, schema: Schema, lengths: torch.Tensor, shifted: Mapping[int, int]) -> list[Any]:
    """Return the values of all fields."""
    values: list[Any] = []
    for number, (field, shape) in enumerate(with_shapes(schema, lengths)):
        if field.is_blob:
            values.append(_read_blobs(folder, number, len(lengths) if number in shifted else shape[0]))
            continue
        stored = (len(lengths), *field.shape) if number in shifted else shape
        values.append(_read_values(field_file(folder, number), stored, field.dtype))
    last = lengths.cumsum(0) - 1
    for number, source in shifted.items():
        whole = values[source].clone()
        whole[:-1] = values[source][1:]
        whole[last] = values[number]
        values[number] = whole
    return values


def _read_blobs(folder: Path, number: int, count: int) -> Blobs:
    sizes = _read_values(sizes_file(folder, number), (count,), torch.int64)
    if bool((sizes < 0).any()):
        raise CheckpointError(f"{sizes_file(folder, number).name} of the checkpoint has negative sizes; it is damaged.")
    return Blobs.unpacked(_read_values(field_file(folder, number), (int(sizes.sum()),), torch.uint8), sizes)


def _checked_shifted(schema: Schema, shifted: Any) -> dict[int, int]:
    possible = shifted_fields(schema)
    try:
        found = {int(number): source for number, source in shifted.items()}
        if all(possible[number] == source for number, source in found.items()):
            return found
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(f"The checkpoint's 'shifted' is {shifted!r}, which does not fit its schema.")


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
