"""Zero-copy transfer of batches from a ``DataLoader`` worker to the training process.

By default, torch copies every tensor of a batch into a new shared-memory file when it is sent, and passes one file
descriptor for each. Mapping the new pages of these files takes several times longer than the copy, and where
``/dev/shm`` is too small for them the main process waits forever. Here, a batch is gathered into one block of shared
memory from the start, and blocks are reused:

* In a worker, :func:`outgoing_memory` provides the memory. A block, a ``memfd`` like all shared memory of this
  library, is *lent* when a tensor in it is sent.
* The receiver (``incoming.py``) opens the block through ``/proc/<process>/fd/<descriptor>``, maps it and builds
  ordinary tensors over it. From then on the block needs no descriptor in either process. When the last of these tensors
  is released, the receiver marks the block as free in its header, and the worker reuses it.

No process waits for another: a worker that finds no free block makes a new one. Blocks are never leaked: the kernel
frees a block when the worker has ended and the receiver holds no tensor in it.

The transfer works on what is pickled (``sending.py``): TensorDicts, tensors and NumPy arrays. So transforms and collate
functions need not know of it, whatever objects they return. What is outside of the blocks is copied into one when it is
sent, if possible into the block of the same batch. A received tensor has a storage of its own, so that it can be saved
and pickled without the others.

Two kinds of tensors are sent in torch's usual way: those on another device, and those that the user placed in torch's
shared memory. All tensors are sent in that way if a process has no permission to read ``/proc`` of its worker, and with
``torch.multiprocessing.set_sharing_strategy("file_system")``.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.multiprocessing import get_sharing_strategy
from torch.utils.data import get_worker_info
from torch.utils.data._utils import collate as torch_collate

from embodichain_rl.datasets.outgoing_memory import OutgoingMemory
from embodichain_rl.datasets.sending import Sender
from embodichain_rl.datasets.structure import is_plain
from embodichain_rl.shared import Deadline

__all__ = ["OutgoingMemory", "enter_worker", "outgoing_memory"]

FEEDER_THREAD = "QueueFeederThread"
"""The name of the feeder threads of ``multiprocessing.Queue``, which pickle the objects to send."""

FEEDER_TIMEOUT = 1.0
"""Seconds that an exiting worker waits for each of them. A feeder whose queue is no longer read blocks outside of
torch's code, where stopping it is safe."""


@cache
def enter_worker() -> None:
    """Prepare this ``DataLoader`` worker: it sends through shared memory, and shuts down gracefully.

    A spawned worker exits with the interpreter, which stops daemon threads at any point. If a feeder thread of a queue
    is inside torch's C++ code at that moment, the process aborts ("terminate called without an active exception"). The
    ``DataLoader`` then raises an error in the main process. So the feeder threads are joined at exit.
    """
    outgoing_memory()
    atexit.register(_join_feeders)


def _join_feeders() -> None:
    for thread in threading.enumerate():
        if thread.name == FEEDER_THREAD:
            Deadline(FEEDER_TIMEOUT).join(thread)


def outgoing_memory() -> OutgoingMemory | None:
    """Return the memory for outgoing batches of this ``DataLoader`` worker, or None in any other process."""
    worker = get_worker_info()
    return None if worker is None else _outgoing_memory()


@cache
def _outgoing_memory() -> OutgoingMemory | None:
    parent = multiprocessing.parent_process()
    if parent is None or get_sharing_strategy() == "file_system" or not _can_read_proc_of(parent.pid):
        return None
    memory = OutgoingMemory()
    Sender(memory).serve_this_process()
    # In a worker, torch collates tensors into files in /dev/shm.
    torch_collate.default_collate_fn_map[torch.Tensor] = _stack_in_private_memory
    os.register_at_fork(before=memory.spoil, after_in_child=_outgoing_memory.cache_clear)
    return memory


def _can_read_proc_of(pid: int | None) -> bool:
    """Return whether this process may read ``/proc`` of another process.

    Both are run by the same user, so the other process may then read ``/proc`` of this one.
    """
    try:
        os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return False
    return True


_torch_collate_tensors = torch_collate.default_collate_fn_map[torch.Tensor]


def _stack_in_private_memory(batch: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    """Collate tensors as torch does, but in memory of this process, from where they are copied into one block."""
    if all(map(is_plain, batch)):
        return torch.stack(list(batch))
    stacked: torch.Tensor = _torch_collate_tensors(batch, collate_fn_map=collate_fn_map)
    return stacked
