"""The memory of a storage on a CUDA device: the arena, and the staging ring through which other processes write to it.

This room reserves, copies and publishes. It does not decide what a trajectory is. It imports ``host``, because the ring
is host memory, and the rooms below ``host``. All calls of ``torch.cuda`` are in ``cuda.py``. Begin with ``memory.py``.
"""

from embodichain_rl.replay.device.arena import DeviceArena, DeviceTable, Spans
from embodichain_rl.replay.device.chunk_batches import DeviceBatches
from embodichain_rl.replay.device.cuda import CudaDevice, Device, checked_device
from embodichain_rl.replay.device.direct_writes import Batch, DirectTrajectory, Span
from embodichain_rl.replay.device.memory import DeviceMemory

__all__ = [
    "Batch",
    "CudaDevice",
    "Device",
    "DeviceArena",
    "DeviceBatches",
    "DeviceMemory",
    "DeviceTable",
    "DirectTrajectory",
    "Span",
    "Spans",
    "checked_device",
]
