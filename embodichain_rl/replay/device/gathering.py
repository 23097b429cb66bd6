"""What one gather copies: the chunks of all columns, and the trajectory ids and steps of their index.

A *packet* goes from the host to the device with each batch: what was drawn, and the values of whole trajectories. All
else is the same for every batch of a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embodichain_rl.replay.kernels import Draws

__all__ = ["IDS", "OFFSETS", "STEPS", "VALUES", "GatherPlan", "Output"]

STEPS, VALUES, IDS, OFFSETS = range(4)
"""What an output is made of: the steps of a column; a value of each trajectory, repeated; the trajectory ids; or the
numbers of the steps."""

WORDS = (16, 8, 4, 2, 1)
"""Words that steps are copied as, in bytes: the widest one that fits."""

DRAWN = ("ids", "starts", "lengths", "versions", "published", "offsets")
"""The arrays at the beginning of a packet, each ``int64`` ``[count]``: the first ones of :class:`Draws`."""


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of a batch.

    Attributes:
        kind: ``STEPS``, ``VALUES``, ``IDS`` or ``OFFSETS``.
        step_bytes: bytes of a step, or of a value.
        repeats: number of steps of a chunk, or how often a value is repeated.
        source: the column ``[steps, *shape]`` on the device, contiguous; None for what is in the packet.
        packet_offset: the byte of a packet at which the values begin, ``[count, step_bytes]``.
    """

    kind: int
    step_bytes: int
    repeats: int
    source: torch.Tensor | None = None
    packet_offset: int = 0

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk."""
        return self.step_bytes * self.repeats

    @property
    def word(self) -> int:
        """Size of the words that are copied, in bytes."""
        address = self.packet_offset if self.source is None else self.source.data_ptr()
        return next(word for word in WORDS if self.step_bytes % word == 0 and address % word == 0)


class GatherPlan:
    """All outputs of the batches of one size.

    Args:
        count: the number of chunks.
        length: the number of steps of a chunk.
        outputs: the tensors of a batch, each contiguous, ``[count, repeats, *shape]``.
        packet_bytes: the size of a packet without the addresses of the outputs.

    Attributes:
        largest (int): bytes of the largest chunk of an output.
        prepared: what a device keeps for the plan.
    """

    def __init__(self, count: int, length: int, outputs: Sequence[Output], packet_bytes: int) -> None:
        self.count, self.length = count, length
        self.outputs = tuple(outputs)
        self.packet_words = packet_bytes // 8
        self.largest = max(output.chunk_bytes for output in outputs)
        self.prepared: Any = None

    @staticmethod
    def drawn(draws: Draws) -> np.ndarray:
        """Return the part of the draws that begins a packet, ``int64`` ``[6 * count]``, as a view."""
        return draws.arrays[: len(DRAWN)].reshape(-1)

    @staticmethod
    def drawn_bytes(count: int) -> int:
        """Return the size of that part in bytes."""
        return 8 * len(DRAWN) * count

    @staticmethod
    def padded(nbytes: int) -> int:
        """Return the bytes that values take in a packet, so that the next ones begin at a whole word."""
        return -(-nbytes // WORDS[0]) * WORDS[0]

    @staticmethod
    def as_words(values: torch.Tensor) -> np.ndarray:
        """Return the bytes of values, padded, as ``int64`` ``[n]``."""
        raw = values.contiguous().view(-1).view(torch.uint8).numpy()
        return np.pad(raw, (0, GatherPlan.padded(len(raw)) - len(raw))).view(np.int64)
