"""What a ``DataLoader`` worker does to send its batches without a copy: the package explains the transfer."""

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

from embodichain_rl.datasets.transport.outgoing import OutgoingMemory
from embodichain_rl.datasets.transport.sending import Sender
from embodichain_rl.datasets.transport.structure import is_plain
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
