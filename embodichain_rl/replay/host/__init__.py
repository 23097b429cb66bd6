"""The memory of a storage on the CPU: the arena, the table of trajectory values, chunk views, recycled batch memory.

This room copies bytes in and out. The ledger decides which process may read or write them, and when. The room imports
``kernels``, ``ledger``, ``schema`` and ``shared``. Begin with ``memory.py``, then read ``arena.py``, which copies steps
in and chunks out. ``chunk_batches.py`` makes whole batches in one call of the kernels.
"""

from embodichain_rl.replay.host.arena import Arena
from embodichain_rl.replay.host.batch_memory import MAX_IDLE, BatchMemory, gathering_into, size_class
from embodichain_rl.replay.host.chunk_batches import ChunkBatches
from embodichain_rl.replay.host.layout import Gathers, Layout, arena_bytes, column_bytes, first_rows, split_shifted
from embodichain_rl.replay.host.memory import HostMemory
from embodichain_rl.replay.host.pieces import RegionInPieces
from embodichain_rl.replay.host.sizing import MOST_STEPS, Sizing
from embodichain_rl.replay.host.trajectory_table import TrajectoryTable

__all__ = [
    "MAX_IDLE",
    "MOST_STEPS",
    "Arena",
    "BatchMemory",
    "ChunkBatches",
    "Gathers",
    "HostMemory",
    "Layout",
    "RegionInPieces",
    "Sizing",
    "TrajectoryTable",
    "arena_bytes",
    "column_bytes",
    "first_rows",
    "gathering_into",
    "size_class",
    "split_shifted",
]
