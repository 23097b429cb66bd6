"""What a buffer counts of the batches that it hands out, beyond their number: ages, places, padding, groups."""

from __future__ import annotations

import time

import numpy as np
import torch
from tensordict import TensorDictBase

from embodichain_rl.replay.ledger import GONE, NO_VERSION, Meter, MetricWord
from embodichain_rl.replay.sampling import ChunkDrawer
from embodichain_rl.replay.schema import as_array
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["look_into", "note_draws", "note_sampled"]

ID, STEP, MASK = ("trajectory", "id"), ("trajectory", "step"), ("collector", "mask")


# Plain integers: a look at the class for each would take a tenth of a microsecond.
BATCHES, CHUNKS, DATA_NS, LAST_SAMPLE_AT = (
    MetricWord.BATCHES,
    MetricWord.CHUNKS,
    MetricWord.DATA_NS,
    MetricWord.LAST_SAMPLE_AT,
)


def note_sampled(
    storage: TrajectoryReader, sampler: ChunkDrawer, data: TensorDictBase, batch_size: int, began: int
) -> None:
    """Count a batch that was sampled just now, before it is transformed.

    Args:
        storage: what it was sampled from.
        sampler: what drew it.
        data: the batch.
        batch_size: the number of chunks that were asked for.
        began: when the call began, in nanoseconds.
    """
    meter, now = storage.ledger.metrics.own, time.monotonic_ns()
    words = meter.words
    words[BATCHES] += 1
    words[CHUNKS] += batch_size if sampler.replacement else data.shape[0]
    words[DATA_NS] += now - began
    words[LAST_SAMPLE_AT] = now
    if now >= meter.detail_at:
        look_into(meter, storage, sampler, data, began, now)


def look_into(
    meter: Meter, storage: TrajectoryReader, sampler: ChunkDrawer, data: TensorDictBase, began: int, now: int
) -> None:
    """Count what is in a batch, before it is transformed.

    Batches on a device are not looked into, since that would wait for the device.

    Args:
        meter: that of this process.
        storage: what the batch was sampled from.
        sampler: what drew it.
        data: the batch; each step has its trajectory and step.
        began: when the call began, in nanoseconds.
        now: when it was sampled.
    """
    row = meter.row
    if not row[MetricWord.FIRST_SAMPLE_BEGAN]:
        row[MetricWord.FIRST_SAMPLE_BEGAN] = began
    if storage.staged:
        return
    ledger = storage.ledger
    ids, steps = as_array(data.get(ID)), as_array(data.get(STEP))
    if ids.ndim > 1:
        ids, steps = ids[:, 0], steps[:, 0]
    rows = ledger.rows_of(ids.reshape(-1))
    there = rows.lengths != GONE
    rows, steps = rows.select(there), steps.reshape(-1)[there]
    if not len(steps):
        return
    versions = rows.policy_versions[rows.policy_versions != NO_VERSION]
    places = np.clip(steps / np.maximum(rows.lengths - 1, 1), 0.0, 1.0)
    lags = np.maximum(ledger.newest_policy_version - versions, 0)
    total, padded = _padding(data)
    meter.looked_into(np.maximum(now - rows.published_at, 0) / 1e9, lags, places, total, padded, now - began, now)
    note_draws(meter, storage, sampler)


def note_draws(meter: Meter, storage: TrajectoryReader, sampler: ChunkDrawer) -> None:
    """Set the counters of the draws of this process."""
    counts = sampler.stats(storage)
    meter.row[MetricWord.REDRAWN] = counts["redrawn"]
    meter.row[MetricWord.UNFIT] = counts.get("unfit", 0)
    groups = sampler.groups_drawn(storage)
    if groups is not None:
        meter.set_groups(*groups)


def _padding(data: TensorDictBase) -> tuple[int, int]:
    """Return the number of steps of a batch, or of elements of its windows, and how many of them are padding."""
    mask = data.get(MASK, None)
    if mask is not None:
        return mask.numel(), int(mask.numel() - torch.count_nonzero(mask))
    masks = [
        value
        for key, value in data.items(True, True)
        if (key if isinstance(key, str) else key[-1]).endswith("_is_pad") and value.dtype == torch.bool
    ]
    if masks:
        return sum(mask.numel() for mask in masks), sum(int(torch.count_nonzero(mask)) for mask in masks)
    return data.numel(), 0
