"""Checkpoints: the state of a storage in a directory.

A checkpoint is a directory with one JSON file, ``trajectories.json``, and a folder with one file of raw values per
field, named by number, and for ragged and compressed fields one with the size of each value. The folder has a new name
every time, and the JSON file, which names it, is replaced last, as a whole: an interrupted checkpoint changes nothing,
and an earlier one stays until the new one is there. Reading it executes nothing, opens no path outside, and allocates
nothing before the sizes agree. The files are mapped.

The next checkpoint in the same place writes only what was published or relabelled since; see :mod:`.parts`.

The trajectories are written one after the other, while others write to the storage. Observations that are stored once
are written once: of a field that is read one step later from another one, only the last step of each trajectory.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torchrl.data.replay_buffers.checkpointers import StorageCheckpointerBase
from torchrl.data.replay_buffers.storages import Storage

from embodichain_rl.errors import CheckpointError, CheckpointWriteError, UnsupportedOperationError
from embodichain_rl.replay.schema import Blobs, Schema, shifted_fields
from embodichain_rl.replay.storage.saving.generations import checked_name, new_folder
from embodichain_rl.replay.storage.saving.parts import DESCRIPTION, KEPT, PARTS, VALUES, EarlierParts, earlier_at
from embodichain_rl.replay.storage.saving.state import SavedPart, SavedTrajectories, described, with_shapes
from embodichain_rl.replay.storage.saving.streaming import field_file, sizes_file, write_live
from embodichain_rl.shared import write_durably

__all__ = ["TrajectoryCheckpointer", "writing_to"]

FORMAT, WITH_BLOBS, WITH_PARTS = 2, 3, 4
FORMATS = (1, FORMAT, WITH_BLOBS, WITH_PARTS)


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
        with writing_to(path), new_folder(path, VALUES, DESCRIPTION) as (folder, alone):
            state: dict[str, Any] = {"next_id": storage.ledger.next_id, "steps_written": storage.ledger.steps_written}
            if storage.initialized:
                shifted, identity = storage.shifted_in(storage.schema), storage.ledger.holds.identity
                earlier = EarlierParts(earlier_at(path) if alone else None, identity, storage.schema.to_json(), shifted)
                state |= write_live(storage.view, storage.texts, folder, shifted, earlier) | {"ledger": identity}
            with_blobs = storage.initialized and bool(storage.schema.blob_numbers)
            version = WITH_PARTS if state.get(PARTS) else WITH_BLOBS if with_blobs else FORMAT
            content = {"format": version, "lengths": [], **state, "folder": folder.name}
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
        storage.load_saved(_mapped(path, state))


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


def _mapped(path: Path, state: dict[str, Any]) -> SavedTrajectories:
    """Return the content of a checkpoint, whose values are mapped from its files."""
    if "schema" not in state:
        checked_name(state.get("folder"), VALUES)
        return SavedTrajectories.parse(state)
    others = state.get(PARTS, [])
    if not isinstance(others, list) or not all(isinstance(part, dict) for part in others):
        raise CheckpointError(f"The checkpoint's {PARTS!r} are {others!r}, which is not a list of parts.")
    parts, kept = [], []
    for part in [state, *others]:
        folder = path / checked_name(part.get("folder"), VALUES)
        schema, lengths = described({"schema": state["schema"], "lengths": part.get("lengths")})
        shifted = _checked_shifted(schema, part.get("shifted", {}))
        shapes = enumerate(with_shapes(schema, lengths, shifted))
        values = [
            _mapped_blobs(folder, number, shape[0])
            if field.is_blob
            else _mapped_values(field_file(folder, number), shape, field.dtype)
            for number, (field, shape) in shapes
        ]
        parts.append(SavedPart.parse({**part, "values": values}, schema, lengths, shifted))
        kept.append(_checked_positions(part.get(KEPT), len(lengths)))
    return SavedTrajectories.of_parts(state, schema, parts, kept)


def _checked_positions(kept: Any, count: int) -> Sequence[int]:
    """Return which trajectories of a part count; all if None."""
    if kept is None:
        return range(count)
    if not isinstance(kept, list) or not all(type(position) is int and 0 <= position < count for position in kept):
        raise CheckpointError(f"The checkpoint's {KEPT!r} are not positions among {count:,} trajectories.")
    return kept


def _mapped_blobs(folder: Path, number: int, count: int) -> Blobs:
    sizes = _mapped_values(sizes_file(folder, number), (count,), torch.int64)
    if bool((sizes < 0).any()):
        raise CheckpointError(f"{sizes_file(folder, number).name} of the checkpoint has negative sizes; it is damaged.")
    return Blobs.unpacked(_mapped_values(field_file(folder, number), (int(sizes.sum()),), torch.uint8), sizes)


def _checked_shifted(schema: Schema, shifted: Any) -> dict[int, int]:
    possible = shifted_fields(schema)
    try:
        found = {int(number): source for number, source in shifted.items()}
        if all(possible[number] == source for number, source in found.items()):
            return found
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(f"The checkpoint's 'shifted' is {shifted!r}, which does not fit its schema.")


def _mapped_values(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    size = file.stat().st_size if file.is_file() else -1
    if size != nbytes:
        raise CheckpointError(
            f"{file.name} of the checkpoint has {size:,} bytes, but {nbytes:,} are needed for {shape} of {dtype}. It "
            "is damaged, or was not written to the end; load another one."
        )
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r")).view(dtype).view(shape)
