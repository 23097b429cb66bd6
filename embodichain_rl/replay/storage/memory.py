"""Where a storage keeps its steps: on the host or on a device; chosen once, when it is created."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.device import CudaDevice, Device, DeviceMemory, checked_device
from embodichain_rl.replay.host import HostMemory
from embodichain_rl.replay.ledger import Ledger
from embodichain_rl.replay.schema import SharedSchema, TextTable
from embodichain_rl.shared import BlockSource

__all__ = ["Memory", "is_host", "make_memory", "make_parts"]

Memory: TypeAlias = HostMemory | DeviceMemory


def make_memory(
    max_trajectories: int,
    max_total_steps: int,
    *,
    device: torch.device | str | Device,
    schema: SharedSchema,
    max_writers: int,
    compact: bool,
    staging_bytes: int | None,
    blocks: BlockSource,
) -> Memory:
    """Return the memory of a storage, with a ledger, for the arguments of :class:`TrajectoryStorage`.

    Args:
        max_trajectories: the largest number of live trajectories.
        max_total_steps: the largest number of live steps.
        device: the device; or a :class:`Device`, usually that of CUDA.
        schema: the schema of the storage, set or not.
        max_writers: the number of writers that the head-room has room for; has no effect on a device.
        compact: whether next observations are stored once.
        staging_bytes: the size of the staging ring of a device, in bytes.
        blocks: where the shared memory of a storage on the CPU comes from.

    Raises:
        InvalidArgumentError: for a device that does not exist, or arguments that can't be combined.
    """
    if not isinstance(device, Device):
        device = checked_device("device", device)
    # A region has one step more than its trajectory where observations are stored once.
    room = max_total_steps + compact * min(max_trajectories, max_total_steps)
    average = -(-room // max_trajectories)
    if room >= 2**63:
        raise InvalidArgumentError(f"Got max_total_steps={max_total_steps:,}, more than can be counted.")
    if isinstance(device, torch.device) and device.type == "cpu":
        if staging_bytes is not None:
            raise InvalidArgumentError(
                f"Got staging_bytes={staging_bytes!r} with device='cpu', where trajectories are written in place."
            )
        head_room = min(max(max_writers * average, 2 * room), 2**63 - 1 - room)
        ledger = Ledger(max_trajectories, max_total_steps, room + head_room, margin=int(compact), blocks=blocks)
        # expected_steps is compared with the memory left: the rest is only address space, unless many write at once.
        expected = room + max(average, room // 16)
        return HostMemory(ledger, compact=compact, expected_steps=expected, blocks=blocks)
    # On a device the head-room takes memory, and only the owner writes.
    head_room = min(max(2 * average, room // 8), 2**63 - 1 - room)
    ledger = Ledger(max_trajectories, max_total_steps, room + head_room, margin=int(compact))
    there = CudaDevice(device) if isinstance(device, torch.device) else device
    return DeviceMemory(there, ledger, schema, compact=compact, staging_bytes=staging_bytes, made_for=device)


def is_host(device: torch.device | str | Device) -> bool:
    """Return whether this is the CPU."""
    return not isinstance(device, Device) and checked_device("device", device).type == "cpu"


def make_parts(
    max_trajectories: int, max_total_steps: int, *, blocks: BlockSource, **options: Any
) -> tuple[SharedSchema, Memory, TextTable]:
    """Return the shared parts of a storage: its schema, its memory and its table of texts.

    Args:
        max_trajectories: see :func:`make_memory`.
        max_total_steps: likewise.
        blocks: where their shared memory comes from.
        options: the other arguments of :func:`make_memory`.
    """
    schema = SharedSchema(blocks)
    memory = make_memory(max_trajectories, max_total_steps, schema=schema, blocks=blocks, **options)
    return schema, memory, TextTable(blocks=blocks)
