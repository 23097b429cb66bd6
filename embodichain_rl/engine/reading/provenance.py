"""Provenance: which run, episode, generation and moment each chunk of a batch is from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.engine.state import EngineChannel, Generations
from embodichain_rl.errors import TrajectoryEvictedError
from embodichain_rl.replay.ledger import Ledger
from embodichain_rl.replay.sampling import ChunkQuery

__all__ = ["EngineWithProvenance"]

ROUNDS = 100
"""Draws until a batch has none whose trajectory was published and evicted meanwhile."""


class EngineWithProvenance:
    """The chunks of an engine, with where they are from; see :meth:`EngineReader.with_provenance`.

    Args:
        engine: the engine, or its chunks.
    """

    takes_chunk_queries = True

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @property
    def replay_buffer(self) -> Any:
        """What the chunks are sampled from."""
        return self.engine.replay_buffer

    def for_worker(self) -> EngineWithProvenance:
        """Return the same for a ``DataLoader`` worker that is being started; itself if the engine needs TorchRL."""
        engine = self.engine.for_worker()
        return self if engine is self.engine else EngineWithProvenance(engine)

    def sample_chunks(
        self, batch_size: int, chunk_size: int | ChunkQuery, *, generator: torch.Generator | None = None
    ) -> TensorDict:
        """Return chunks as :meth:`EngineReader.sample_chunks` does, with their provenance."""
        engine = self.engine
        return sampled_with_provenance(
            lambda: engine.sample_chunks(batch_size, chunk_size, generator=generator),
            engine._channel,
            engine.replay_buffer.storage.ledger,
        )

    def __repr__(self) -> str:
        return f"{self.engine!r}.with_provenance()"


def sampled_with_provenance(draw: Callable[[], TensorDict], channel: EngineChannel, ledger: Ledger) -> TensorDict:
    """Draw a batch, and add where it is from.

    The keys are ``("trajectory", "run_id")``, a random number of the engine; ``("trajectory", "episode")``, the id of
    the trajectory; ``("trajectory", "generation")``; and ``("trajectory", "published_at")``, Unix time in nanoseconds.
    Each is ``int64`` in the shape of the batch.

    Args:
        draw: draws a batch with ``("trajectory", "id")``.
        channel: the channel of the engine.
        ledger: the ledger of the buffer.

    Raises:
        TrajectoryEvictedError: the buffer turns over faster than batches are drawn.
    """
    for _ in range(ROUNDS):
        # What is live before the draw may be evicted during it; what is published during it is looked up afterwards.
        before = ledger.live_rows()
        batch = draw()
        ids = batch["trajectory", "id"]
        flat = ids.cpu().numpy().reshape(-1)
        at = np.searchsorted(before.ids, flat)
        known = at < len(before.ids)
        known[known] = before.ids[at[known]] == flat[known]
        published_at = ledger.published_at(flat)
        published_at[known] = before.published_at[at[known]]
        if not (known | ledger.still_valid(flat)).all():
            continue
        values = {
            "run_id": np.full_like(flat, channel.run_id),
            "episode": flat.copy(),
            "generation": Generations(channel).of(flat),
            "published_at": published_at + channel.clock_offset,
        }
        for name, value in values.items():
            batch["trajectory", name] = torch.from_numpy(value).reshape(ids.shape).to(ids.device)
        return batch
    raise TrajectoryEvictedError(
        f"In {ROUNDS} draws, some trajectories were always published and evicted while a batch was drawn. Make the "
        "buffer larger, or sample smaller batches."
    )
