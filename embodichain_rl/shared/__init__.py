"""Services of the operating system: shared memory, a crash-safe lock, process liveness, memory order, free memory.

This is the lowest room. It imports nothing else of the package but the error types, and uses torch only for tensors
over memory. Begin with ``memory.py``.
"""

import embodichain_rl.shared.generators  # noqa: F401  # for its effect on pickling
from embodichain_rl.shared.blocks import BlockSource
from embodichain_rl.shared.by_value import dumps_by_value, dumps_for_other_machine, main_is_importable
from embodichain_rl.shared.descriptors import descriptor_for_child
from embodichain_rl.shared.files import FileBlock, FileBlocks, check_disk, file_system, sync_folder, write_durably
from embodichain_rl.shared.lock import CrossProcessLock
from embodichain_rl.shared.memory import ALIGNMENT, SharedBlock, map_shared
from embodichain_rl.shared.memory_check import available_memory, check_memory
from embodichain_rl.shared.memory_order import Membarrier, register_for_barriers, write_barrier
from embodichain_rl.shared.processes import (
    ProcessWatch,
    own_process,
    process_is_alive,
    process_start,
    process_state,
    processes_with,
    stopped_note,
)
from embodichain_rl.shared.read_ahead import Part, ReadAhead
from embodichain_rl.shared.running_time import LONGEST_SLICE, Deadline, RunningClock
from embodichain_rl.shared.shortage import naming_shortage, shortage_of
from embodichain_rl.shared.signals import leave_signals_to_owner, without_owners_signals

__all__ = [
    "ALIGNMENT",
    "LONGEST_SLICE",
    "BlockSource",
    "CrossProcessLock",
    "Deadline",
    "FileBlock",
    "FileBlocks",
    "Membarrier",
    "Part",
    "ProcessWatch",
    "ReadAhead",
    "RunningClock",
    "SharedBlock",
    "available_memory",
    "check_disk",
    "check_memory",
    "descriptor_for_child",
    "dumps_by_value",
    "dumps_for_other_machine",
    "file_system",
    "leave_signals_to_owner",
    "main_is_importable",
    "map_shared",
    "naming_shortage",
    "own_process",
    "process_is_alive",
    "process_start",
    "process_state",
    "processes_with",
    "register_for_barriers",
    "shortage_of",
    "stopped_note",
    "sync_folder",
    "without_owners_signals",
    "write_barrier",
    "write_durably",
]
