"""Batches that the kernels draw, copy and check in one call: plain chunks, uniformly drawn.

Chunks that are drawn by steps are copied and checked in one call; the draws are NumPy's.

They use the same random numbers, in the same order, as any other batch, and return the same bits.
"""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict

from embodichain_rl.errors import TrajectoryEvictedError
from embodichain_rl.replay.device import DeviceBatches
from embodichain_rl.replay.host import ChunkBatches
from embodichain_rl.replay.kernels import EMPTY
from embodichain_rl.replay.sampling.draws import REJECTION_ROUNDS, ChunkQuery
from embodichain_rl.replay.sampling.random_streams import RandomSource, part_of, uniform_tensor
from embodichain_rl.replay.sampling.sampled_ages import SampledAges
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["REDRAW_ROUNDS", "evicted_while_read", "sample_in_one_call"]

REDRAW_ROUNDS = 100
"""The number of times that chunks are drawn again whose trajectory was evicted while it was read."""


def sample_in_one_call(
    batches: ChunkBatches | DeviceBatches,
    storage: TrajectoryReader,
    query: ChunkQuery,
    generator: RandomSource,
    ages: SampledAges,
) -> TensorDict:
    """Draw and copy a batch; chunks that are evicted meanwhile are drawn again.

    Args:
        batches: makes batches of this size from the storage.
        storage: the storage to draw from.
        query: what is drawn, of which ``in_one_call`` is true.
        generator: for the draws.
        ages: where the ages of the chunks are noted.
    """
    draws = batches.draws()
    # The memory of a large batch is allocated only when it is known that there are such chunks.
    output: Any = None if batches.is_large else batches.output()
    missing = batches.count
    rejected = redrawn = 0
    if query.draws.is_uniform:
        result = batches.sample(uniform_tensor(missing, generator), 0, draws, output)
    else:
        rejected = REJECTION_ROUNDS  # the draws do all of it
        drawn = query.draws.draw(storage, missing, query.request, generator)
        draws.set_all(drawn.rows, query.request.place(storage, drawn.rows, drawn.uniform, generator))
        result = 0 if output is None else batches.copy(draws, output)
    while result or output is None:
        if not result:  # all are drawn
            output = batches.output()
            result = batches.copy(draws, output)
            continue
        if result == EMPTY:
            rejected = REJECTION_ROUNDS  # the error is raised below
        elif result > 0:  # so many drew a trajectory that does not fit
            missing = result
            rejected += 1
            query.draws.count_unfit(storage.ledger, missing)
        else:  # so many were evicted while they were copied
            missing, rejected = -result, 0 if query.draws.is_uniform else REJECTION_ROUNDS
            redrawn += 1
            ages.redrawn += missing
            if redrawn == REDRAW_ROUNDS:
                raise evicted_while_read(storage, batches.count)
        of_missing = part_of(generator, draws.missing(missing))
        if rejected < REJECTION_ROUNDS:
            numbers = uniform_tensor(missing, of_missing)
            result = batches.sample(numbers, missing, draws, output)
        else:
            drawn = query.draws.draw(
                storage, missing, query.request, of_missing, rejected=rejected if query.draws.is_uniform else 0
            )
            draws.set_missing(drawn.rows, query.request.place(storage, drawn.rows, drawn.uniform, of_missing))
            result = 0 if output is None else batches.copy(draws, output)
    ages.note_sums(draws.notes.tobytes())
    return batches.finish(draws, output)


def evicted_while_read(storage: TrajectoryReader, batch_size: int) -> TrajectoryEvictedError:
    """Return the error to raise if some chunks are always evicted while they are read."""
    return TrajectoryEvictedError(
        f"In {REDRAW_ROUNDS} rounds some of {batch_size} chunks were always evicted while they were read: the "
        f"buffer of {storage.max_size:,} trajectories turns over faster than a batch is copied. Make it larger, or "
        "sample smaller batches."
    )
