"""Trajectories that are written to files one after the other, without a copy of all of them in memory.

The files that have them are not changed any more. What an earlier checkpoint has written, and is unchanged since, is
linked into the next one; see :mod:`.checkpoint`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from embodichain_rl.replay.schema import TextTable, as_array
from embodichain_rl.replay.storage.reads import (
    OPTIMISTIC_READS,
    ReadView,
    WholeTrajectories,
    read_existing,
    read_live,
)
from embodichain_rl.replay.storage.saving.parts import (
    KEPT,
    PARTS,
    VERSIONS_OF_ROWS,
    EarlierParts,
    KeptPart,
    row_versions,
)
from embodichain_rl.replay.storage.saving.state import IDS, PINNED, POLICY_VERSIONS, PRIORITY_WEIGHTS
from embodichain_rl.shared import sync_folder

__all__ = ["field_file", "sizes_file", "write_live"]

PIECE = 8 << 20
"""Trajectories are copied in pieces of about this size, in bytes."""


def field_file(folder: Path, number: int) -> Path:
    """Return the file of field ``number``."""
    return folder / f"field_{number:04d}.bin"


def sizes_file(folder: Path, number: int) -> Path:
    """Return the file with the size of each value of field ``number``, if it is ragged or compressed."""
    return folder / f"field_{number:04d}_sizes.bin"


def write_live(
    view: ReadView, texts: TextTable, folder: Path, shifted: Mapping[int, int], written: EarlierParts
) -> dict[str, Any]:
    """Write the live trajectories to a folder; return what describes them, as :func:`state_of` does.

    Trajectories that are evicted before they are copied are left out. If these are more than half, all is written
    again, the last time from a copy in memory.

    Args:
        view: the storage.
        texts: its table of texts.
        folder: where to write one file per field.
        shifted: the fields of which only the last step of each trajectory is written; see :func:`shifted_fields`.
        written: what an earlier checkpoint has, which is not written again.
    """
    with texts.held(all_of_it=True):
        for _ in range(OPTIMISTIC_READS - 1):
            live = view.ledger.live()
            rows = view.ledger.existing(live.all())
            kept = written.that_have(rows)
            new = rows.ids[~np.isin(rows.ids, [number for part in kept for number in part.ids])]
            state = _write(view, texts, folder, shifted, _pieces(view, new))
            if 2 * (len(state["lengths"]) + len(rows.ids) - len(new)) >= len(live):
                return _with_parts(view, folder, state, kept)
        return _with_parts(view, folder, _write(view, texts, folder, shifted, iter([read_live(view)])), [])


def _pieces(view: ReadView, ids: np.ndarray) -> Iterator[WholeTrajectories]:
    """Yield the trajectories that are still there, a few at a time."""
    step = view.arena.schema.bytes_of_step
    while len(ids):
        lengths = view.ledger.rows_of(ids[:1024]).lengths.clip(min=0)
        count = max(1, int(np.searchsorted(lengths.cumsum() * step, PIECE, side="right")))
        yield read_existing(view, ids[:count])
        ids = ids[count:]


def _write(
    view: ReadView, texts: TextTable, folder: Path, shifted: Mapping[int, int], pieces: Iterator[WholeTrajectories]
) -> dict[str, Any]:
    schema = view.arena.schema
    lengths: list[int] = []
    ids: list[int] = []
    versions: list[int] = []
    changes: list[list[int]] = []
    own_texts: dict[int, int] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(open(field_file(folder, n), "wb")) for n in range(len(schema.all_fields))]
        sizes_of = {n: stack.enter_context(open(sizes_file(folder, n), "wb")) for n in schema.blob_numbers}
        for whole in pieces:
            ends = whole.rows.lengths.cumsum()
            for number, (field, value) in enumerate(
                zip(schema.all_fields, (*whole.values, *whole.of_trajectories), strict=True)
            ):
                if field.is_blob:
                    _append_blobs(files[number], sizes_of[number], value[ends - 1] if number in shifted else value)
                    continue
                array = as_array(value.cpu())
                if number in shifted:
                    array = array[ends - 1]
                if field.is_text:
                    for text in np.unique(array).tolist():
                        own_texts.setdefault(text, len(own_texts))
                    array = np.vectorize(own_texts.__getitem__, otypes=[np.int32])(array) if array.size else array
                _append(files[number], array)
            lengths += whole.rows.lengths.tolist()
            ids += whole.rows.ids.tolist()
            versions += whole.rows.policy_versions.tolist()
            changes += row_versions(whole.rows)
        for file in (*files, *sizes_of.values()):
            file.flush()
            os.fsync(file.fileno())
    sync_folder(folder)
    return {
        "schema": schema.to_json(),
        "texts": texts.resolve(list(own_texts)),
        "lengths": lengths,
        IDS: ids,
        POLICY_VERSIONS: versions,
        VERSIONS_OF_ROWS: changes,
        "sizes": {file.name: file.stat().st_size for file in folder.iterdir()},
        "shifted": {str(number): source for number, source in shifted.items()},
    }


def _with_parts(view: ReadView, folder: Path, state: dict[str, Any], kept: list[KeptPart]) -> dict[str, Any]:
    """Add what the ledger says of the trajectories now, and the parts of an earlier checkpoint."""
    ids = np.array(state[IDS] + [number for part in kept for number in part.ids], dtype=np.int64)
    if len(ids):  # more may have been published since the counters were read
        state["next_id"] = max(view.ledger.next_id, int(ids.max()) + 1)
    pinned = view.ledger.pinned_ids()
    weights = view.ledger.live_weights(ids)
    begin = 0
    for described in (state, *(part.description for part in kept)):
        counting = described.get(KEPT, range(len(described[IDS])))
        end = begin + len(counting)
        if len(pinned):
            described[PINNED] = np.isin(described[IDS], pinned).tolist()
        if weights is not None:
            of_all = np.ones(len(described[IDS]))
            of_all[counting] = weights[begin:end]
            described[PRIORITY_WEIGHTS] = of_all.tolist()
        begin = end
    if not kept and len(ids) and state["next_id"] - ids[0] == len(ids):
        del state[IDS]  # consecutive
    for part in kept:
        part.bring_to(folder.parent)
    return {**state, PARTS: [part.description for part in kept]}


def _append_blobs(file: BinaryIO, sizes: BinaryIO, blobs: Any) -> None:
    file.write(b"".join(blobs.array.flat))
    _append(sizes, blobs.sizes())


def _append(file: BinaryIO, array: np.ndarray) -> None:
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
