"""The memory of a storage on a CUDA device: the arena there, and the staging ring through which others write to it.

Offers reserve, copy and publish; what a trajectory is, is decided elsewhere. Imports ``host`` (the ring is host memory)
and what lies below it. All calls of ``torch.cuda`` are in ``cuda.py``. Begin with ``memory.py``.
"""

from embodichain_rl.replay.device.arena import DeviceArena, DeviceTable
from embodichain_rl.replay.device.cuda import CudaDevice, Device, checked_device
from embodichain_rl.replay.device.direct_writes import Batch, DirectTrajectory, Span
from embodichain_rl.replay.device.memory import DeviceMemory

__all__ = [
    "Batch",
    "CudaDevice",
    "Device",
    "DeviceArena",
    "DeviceMemory",
    "DeviceTable",
    "DirectTrajectory",
    "Span",
    "checked_device",
]
