"""Where a storage keeps its steps: on the host or on a device; chosen once, when it is created."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from embodichain_rl._checks import checked_int
from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.device import CudaDevice, Device, DeviceMemory, checked_device
from embodichain_rl.replay.host import HostMemory, Sizing
from embodichain_rl.replay.ledger import Ledger
from embodichain_rl.replay.schema import Formats, SharedSchema, TextTable
from embodichain_rl.shared import BlockSource, FileBlocks

__all__ = ["Memory", "checked_limits", "in_mebibytes", "is_host", "make_memory", "make_parts"]

Memory: TypeAlias = HostMemory | DeviceMemory


def make_memory(
    max_trajectories: int,
    max_total_steps: int | None,
    *,
    device: torch.device | str | Device,
    schema: SharedSchema,
    max_writers: int,
    compact: bool,
    staging_bytes: int | None,
    max_pinned: float = 0.5,
    max_bytes: int | None = None,
    reserve: bool = False,
    blocks: BlockSource,
) -> Memory:
    """Return the memory of a storage, with a ledger, for the arguments of :class:`TrajectoryStorage`.

    Args:
        max_trajectories: the largest number of live trajectories.
        max_total_steps: the largest number of live steps; None if only bytes are limited.
        device: the device; or a :class:`Device`, usually that of CUDA.
        schema: the schema of the storage, set or not.
        max_writers: the number of writers that the head-room has room for; has no effect on a device.
        compact: whether next observations are stored once.
        staging_bytes: the size of the staging ring of a device, in bytes.
        max_pinned: the share of both limits that can be pinned.
        max_bytes: the largest number of bytes; None: no limit.
        reserve: whether the memory is taken at once.
        blocks: where the shared memory of a storage on the CPU comes from.

    Raises:
        InvalidArgumentError: for a device that does not exist, or arguments that can't be combined.
    """
    if not isinstance(device, Device):
        device = checked_device("device", device)
    if max_total_steps is not None and 2 * max_total_steps >= 2**63:
        raise InvalidArgumentError(f"Got max_total_steps={max_total_steps:,}, more than can be counted.")
    on_cpu = isinstance(device, torch.device) and device.type == "cpu"
    if on_cpu and staging_bytes is not None:
        raise InvalidArgumentError(
            f"Got staging_bytes={staging_bytes!r} with device='cpu', where trajectories are written in place."
        )
    if on_cpu:
        in_file = isinstance(blocks, FileBlocks)
        sizing = Sizing(max_trajectories, max_total_steps, max_writers, compact, max_bytes, reserve, in_file)
        # With a limit of bytes, the sizes are set when the schema is known.
        sizes = sizing.of_steps(1 if max_bytes is not None or max_total_steps is None else max_total_steps)
        ledger = Ledger(
            max_trajectories,
            sizes.max_total_steps,
            sizes.arena_steps,
            margin=int(compact),
            max_pinned=max_pinned,
            usual_steps=sizes.usual_steps,
            blocks=blocks,
        )
        return HostMemory(ledger, compact=compact, sizing=sizing, reserve=reserve, blocks=blocks)
    if max_total_steps is None or max_bytes is not None or reserve:
        raise InvalidArgumentError(
            f"Got max_bytes={max_bytes!r} and reserve={reserve!r} with a buffer on {device}: give max_total_steps; all "
            "memory of a device is taken at once."
        )
    # A region has one step more than its trajectory where observations are stored once.
    room = max_total_steps + compact * min(max_trajectories, max_total_steps)
    average = -(-room // max_trajectories)
    # On a device the head-room takes memory, and only the owner writes.
    head_room = min(max(2 * average, room // 8), 2**63 - 1 - room)
    ledger = Ledger(max_trajectories, max_total_steps, room + head_room, margin=int(compact), max_pinned=max_pinned)
    there = CudaDevice(device) if isinstance(device, torch.device) else device
    return DeviceMemory(there, ledger, schema, compact=compact, staging_bytes=staging_bytes, made_for=device)


def checked_limits(max_total_steps: int | None, max_bytes: int | None) -> tuple[int | None, int | None]:
    """Return the limits of steps and of bytes; one of them must be given."""
    if max_total_steps is None and max_bytes is None:
        raise InvalidArgumentError("Got max_total_steps=None and max_bytes=None: give one of them, or both.")
    steps = None if max_total_steps is None else checked_int("max_total_steps", max_total_steps, minimum=1)
    return steps, None if max_bytes is None else checked_int("max_bytes", max_bytes, minimum=1)


def in_mebibytes(nbytes: int) -> str:
    """Return a size with one digit after the point, as long as it is small."""
    return f"{nbytes / 2**20:,.{1 if nbytes < 100 << 20 else 0}f}"


def is_host(device: torch.device | str | Device) -> bool:
    """Return whether this is the CPU."""
    return not isinstance(device, Device) and checked_device("device", device).type == "cpu"


def make_parts(
    max_trajectories: int, max_total_steps: int | None, *, formats: Formats, blocks: BlockSource, **options: Any
) -> tuple[SharedSchema, Memory, TextTable]:
    """Return the shared parts of a storage: its schema, its memory and its table of texts.

    Args:
        max_trajectories: see :func:`make_memory`.
        max_total_steps: likewise.
        formats: the fields that are ragged, and those that are kept encoded.
        blocks: where their shared memory comes from.
        options: the other arguments of :func:`make_memory`.
    """
    schema = SharedSchema(blocks, formats)
    memory = make_memory(max_trajectories, max_total_steps, schema=schema, blocks=blocks, **options)
    return schema, memory, TextTable(blocks=blocks)
