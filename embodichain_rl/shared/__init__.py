"""What the operating system gives: shared memory, the lock that dies with its holder, who is alive, memory order.

Imports nothing of the package but its errors, and of torch only tensors over memory. Begin with ``memory.py``.
"""

import embodichain_rl.shared.generators  # noqa: F401  # for its effect on pickling
from embodichain_rl.shared.lock import CrossProcessLock
from embodichain_rl.shared.memory import ALIGNMENT, SharedBlock
from embodichain_rl.shared.memory_check import available_memory, check_memory
from embodichain_rl.shared.memory_order import Membarrier, keep_order, take_part_in_order
from embodichain_rl.shared.processes import own_process, process_is_alive, process_start

__all__ = [
    "ALIGNMENT",
    "CrossProcessLock",
    "Membarrier",
    "SharedBlock",
    "available_memory",
    "check_memory",
    "keep_order",
    "own_process",
    "process_is_alive",
    "process_start",
    "take_part_in_order",
]
