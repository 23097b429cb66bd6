"""An actor with ready-made trajectories in the place of environments, for ``cluster.py``."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.cluster.messages import MessageFormat
from embodichain_rl.cluster.outbox import Outbox, OutboxWriter
from embodichain_rl.cluster.producer import ProducerActor, _EnterActor
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["BulkActor"]


class BulkActor(ProducerActor):
    """Extends its outbox with the same trajectory again and again. Its specification is the arrays of it."""

    def _collect(self, spec: Any, index: int, seed: int) -> None:
        torch.set_num_threads(1)
        data = TensorDict(spec, spec["next"]["done"].shape[:1])
        storage = TrajectoryStorage(1, len(data))
        storage.allocate(data)
        schema = storage.schema
        assert schema is not None
        self._outbox = Outbox(MessageFormat(schema, ()), storage.texts, 1 << 20)
        self._has_outbox.set()
        entry = _EnterActor(seed, 0.0, self._mark)
        writer = OutboxWriter(self._record, self._outbox, accept=None, entry=entry, between_steps=lambda: None)
        buffer = TrajectoryReplayBuffer(storage=storage, writer=writer, chunk_size=1)
        entry(self._record)
        while True:
            buffer.extend(data)
