"""The kernels in NumPy: the same signatures and the same results, to the bit. ``kernels.c`` explains each of them.

They are used where there are no compiled ones, and the compiled ones are tested against them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np

from embodichain_rl.replay.kernels.plans import (
    CHUNKS,
    EMPTY,
    IDS,
    LENGTHS,
    MISSING,
    OFFSETS,
    PUBLISHED,
    STARTS,
    TODO,
    TODO_SIZE,
    VERSIONS,
    Column,
    Draws,
    SamplePlan,
    Targets,
)
from embodichain_rl.replay.ledger import NO_VERSION
from embodichain_rl.shared import Part

__all__ = ["check", "copy", "draw", "gather", "sample", "write_index"]


def draw(plan: SamplePlan, numbers: int, missing: int, draws: Draws) -> int:
    """Draw a trajectory, and an offset in it, for each of the chunks that have none yet."""
    arrays = draws.arrays
    if not missing:
        missing = draws.header[TODO_SIZE] = plan.count
        arrays[TODO] = arrays[MISSING] = np.arange(plan.count)
    first, end = plan.ledger.live_range()
    if first == end:
        return EMPTY
    chunks = arrays[MISSING, :missing].copy()
    # One random number for both: its integer part is the trajectory, its fraction the offset.
    scaled = _bytes_at(numbers, 8 * missing).view(np.float64) * (end - first)
    which = scaled.astype(np.int64)
    rows = plan.ledger.rows_of(which + first)
    arrays[IDS, chunks] = rows.ids
    arrays[VERSIONS, chunks], arrays[PUBLISHED, chunks] = rows.policy_versions, rows.published_at
    fits = rows.lengths >= 1 - plan.extra
    fitting = chunks[fits]
    arrays[STARTS, fitting], arrays[LENGTHS, fitting] = rows.starts[fits], rows.lengths[fits]
    offsets = ((scaled - which) * (rows.lengths + plan.extra))[fits].astype(np.int64)
    arrays[OFFSETS, fitting] = offsets + plan.first
    left = missing - len(fitting)
    if left:
        arrays[MISSING, :left] = chunks[~fits]
    return left


def gather(plan: SamplePlan, draws: Draws, base: int, targets: Targets, threads: int) -> None:
    """Copy the chunks that are drawn but not copied yet."""
    chunks = draws.arrays[TODO, : draws.header[TODO_SIZE]]
    ids, starts = draws.arrays[IDS, chunks], draws.arrays[STARTS, chunks] + draws.arrays[OFFSETS, chunks]
    with nullcontext() if plan.ahead is None else plan.ahead.reading(_parts(plan, starts)):
        _copy_columns(plan, chunks, ids, starts, base, targets)


def _parts(plan: SamplePlan, starts: np.ndarray) -> Iterator[Part]:
    """Return where the steps of the chunks are, as far as they do not lie in the table of trajectory values."""
    for column in plan.columns:
        if not column.per_trajectory:
            yield column.steps.ctypes.data + starts * column.steps.shape[1], column.chunk_bytes


def _copy_columns(
    plan: SamplePlan, chunks: np.ndarray, ids: np.ndarray, starts: np.ndarray, base: int, targets: Targets
) -> None:
    everything = len(chunks) == plan.count  # in order
    for column, target in zip(plan.columns, targets.offsets.tolist(), strict=False):
        output = _bytes_at(base + target, plan.count * column.chunk_bytes).reshape(plan.count, column.chunk_bytes)
        if column.per_trajectory:
            values = column.steps[ids % plan.ledger.num_rows]
            output.reshape(plan.count, column.chunk_steps, -1)[chunks] = values[:, None]
        elif column.chunk_bytes < MEMCPY_FROM:
            items = _items(column)[starts]
            output.view(items.dtype)[slice(None) if everything else chunks, 0] = items
        else:
            source, step_bytes = column.steps.reshape(-1), column.steps.shape[1]
            for chunk, start in zip(chunks.tolist(), (starts * step_bytes).tolist(), strict=True):
                output[chunk] = source[start : start + column.chunk_bytes]


MEMCPY_FROM = 64 * 1024
"""Size of a chunk in bytes from which it is copied by its own memcpy. Below it, NumPy copies all chunks in one call."""


def _items(column: Column) -> np.ndarray:
    """Return the chunks of a column as overlapping items of raw bytes, one per first step."""
    steps, step_bytes = column.steps.shape
    # By name: where the dtype is given as a pair, NumPy swallows a Ctrl-C that arrives meanwhile.
    item = np.dtype(f"V{column.chunk_bytes}")
    return np.ndarray((steps - column.chunk_steps + 1,), item, column.steps, strides=(step_bytes,))


def write_index(plan: SamplePlan, draws: Draws, base: int, targets: Targets) -> None:
    """Write the trajectory id and the step of each step of the copied chunks."""
    chunks = draws.arrays[TODO, : draws.header[TODO_SIZE]]
    ids, steps = (
        _bytes_at(base + offset, 8 * plan.count * plan.length).view(np.int64).reshape(plan.count, plan.length)
        for offset in targets.offsets[-2:].tolist()
    )
    ids[chunks] = draws.arrays[IDS, chunks, None]
    steps[chunks] = draws.arrays[OFFSETS, chunks, None] + np.arange(plan.length)


def check(plan: SamplePlan, draws: Draws) -> int:
    """Return minus the number of chunks whose trajectory was evicted meanwhile; if there is none, note their ages."""
    ledger, arrays = plan.ledger, draws.arrays
    valid = ledger.still_valid(arrays[IDS])
    torn = plan.count - int(np.count_nonzero(valid))
    draws.header[TODO_SIZE] = torn
    if torn:
        arrays[TODO, :torn] = arrays[MISSING, :torn] = np.flatnonzero(~valid)
        return -torn
    ages = time.monotonic_ns() - arrays[PUBLISHED]
    known = arrays[VERSIONS] != NO_VERSION
    # The newest may have been evicted since it was drawn: then it is newer than the newest live one.
    lags = np.maximum(ledger.newest_policy_version - arrays[VERSIONS], 0)[known]
    draws.header[CHUNKS : CHUNKS + 3] = plan.count, ages.sum(), ages.max(initial=0)
    draws.header[CHUNKS + 3 : CHUNKS + 6] = len(lags), lags.sum(), lags.max(initial=0)
    return 0


def copy(plan: SamplePlan, draws: Draws, base: int, targets: Targets, threads: int) -> int:
    """Copy and check what is drawn; return 0 if the batch is whole, else minus the number of chunks to draw again."""
    gather(plan, draws, base, targets, threads)
    write_index(plan, draws, base, targets)
    return check(plan, draws)


def sample(
    plan: SamplePlan, numbers: int, missing: int, draws: Draws, base: int, targets: Targets, threads: int
) -> int:
    """Draw, copy and check; return what :func:`draw` returns if that is not 0, else what :func:`copy` returns."""
    return draw(plan, numbers, missing, draws) or copy(plan, draws, base, targets, threads)


def _bytes_at(address: int, nbytes: int) -> np.ndarray:
    """Return bytes of this process as an array. The caller keeps them allocated."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
