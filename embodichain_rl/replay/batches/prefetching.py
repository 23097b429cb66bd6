"""Batches that are sampled ahead, on threads: TorchRL's queue, which is given up where it is out of date."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torchrl.data import TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage

__all__ = ["PrefetchingBuffer"]


class PrefetchingBuffer(TensorDictReplayBuffer):
    """A TorchRL buffer over a :class:`~embodichain_rl.replay.TrajectoryStorage` that hands out no outdated batch.

    The queue is TorchRL's: futures of batches of the buffer's ``batch_size``. All of them were asked for under the same
    conditions, which are noted beside it: what is under way when these change is waited for and thrown away, so that it
    takes no random numbers, and no chunks of a pass, from what comes after.

    Prefetched batches are random draws that can be drawn again: they are not saved, and nothing is unpickled.
    """

    _prefetched_under: tuple[Any, ...] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._prefetched_under = None  # also a key of the state of a copy
        _buffers.add(self)

    def _conditions(self) -> tuple[Any, ...]:
        """Return what a prefetched batch depends on, but for the trajectories that come and go."""
        sampler, storage = self._sampler, self._storage
        chunk_size = getattr(sampler, "chunk_size", None)
        return storage, storage.ledger.edits, sampler, chunk_size, self._batch_size, *self._transform.transforms

    def discard_outdated(self) -> None:
        """Discard what was prefetched if it was asked for under other conditions than those of now."""
        with self._futures_lock:
            conditions = self._conditions()
            if conditions != self._prefetched_under:
                self._clear_prefetch_queue_locked()
                self._prefetched_under = conditions

    def next_prefetched(self, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Return the next batch and its info, and ask for others; as TorchRL does, but without writing to the batch."""
        with self._futures_lock:
            self.discard_outdated()
            queue, dependency = self._prefetch_queue, self._sample_dependency
            if queue:
                first = queue.popleft()
                # What no thread has begun is drawn here: until a thread wakes up takes as long as to draw states.
                result = self._sample(batch_size) if first.cancel() else first.result()
            else:
                if dependency is not None:
                    dependency.result()
                result = self._sample(batch_size)
            wanted = min(self._sampler._remaining_batches, self._prefetch_cap)
            while len(queue) < wanted and not self._sampler.ran_out:
                if dependency is not None:
                    dependency.result()
                queue.append(self._prefetch_executor.submit(self._sample, batch_size))
            return result

    @contextlib.contextmanager
    def _discarding_prefetched(self) -> Iterator[None]:
        """Discard what was prefetched, and prefetch nothing until the block is left."""
        with self._futures_lock:
            self._clear_prefetch_queue_locked()
            yield

    def empty(self, empty_write_count: bool = True) -> None:
        """Evict all trajectories, and discard what was prefetched; see :meth:`torchrl.data.ReplayBuffer.empty`."""
        with self._discarding_prefetched():
            super().empty(empty_write_count)

    def set_sampler(self, sampler: Sampler) -> Sampler:
        """Replace the sampler; return the one before."""
        with self._discarding_prefetched():
            return super().set_sampler(sampler)

    def set_storage(self, storage: Storage, collate_fn: Callable[[Any], Any] | None = None) -> Storage:
        """Replace the storage; return the one before."""
        with self._discarding_prefetched():
            return super().set_storage(storage, collate_fn)

    def set_rng(self, generator: torch.Generator | None) -> None:
        """Replace the generator of the draws; with None they come from torch's global one."""
        with self._discarding_prefetched():
            super().set_rng(generator)

    def append_transform(self, transform: Any, *, invert: bool = False) -> PrefetchingBuffer:
        """Append a transform; see :meth:`torchrl.data.ReplayBuffer.append_transform`."""
        with self._discarding_prefetched():
            return super().append_transform(transform, invert=invert)

    def insert_transform(self, index: int, transform: Any, *, invert: bool = False) -> PrefetchingBuffer:
        """Insert a transform before position ``index``; see :meth:`torchrl.data.ReplayBuffer.insert_transform`."""
        with self._discarding_prefetched():
            return super().insert_transform(index, transform, invert=invert)

    def loads(self, path: str | Path) -> None:
        """Replace what the buffer holds by what was saved to the directory ``path``."""
        with self._discarding_prefetched():
            super().loads(path)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace what the buffer holds by a state; see :meth:`torchrl.data.ReplayBuffer.load_state_dict`.

        Raises:
            CheckpointError: when the state is damaged.
            SchemaMismatchError: when the buffer was allocated for other steps.
        """
        with self._discarding_prefetched():
            super().load_state_dict(state_dict)

    # ---------------------------------------------------------------------------------- what TorchRL saves of a queue

    @contextlib.contextmanager
    def _capture_prefetch_state(self, *, clone_queue: bool = True) -> Iterator[None]:
        # What is saved or handed over is of one moment: nothing is drawn meanwhile.
        with self._futures_lock:
            wait(self._prefetch_queue)
            with self._replay_lock:
                yield None

    def _restore_prefetch_queue_locked(self, prefetch_state: Any, *, clone_queue: bool = True) -> None:
        """Restore nothing, also of states that hold prefetched batches."""

    def _validate_prefetch_state(self, prefetch_state: Any) -> None:
        """Accept any state, since nothing of it is restored."""

    def _dump_prefetch_state(self, path: Path, prefetch_state: Any) -> None:
        """Write nothing."""

    def _load_prefetch_state(self, path: Path) -> None:
        """Read nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prefetched_under": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _buffers.add(self)

    def _start_anew_in_forked_child(self) -> None:
        # Threads are not forked: a lock that one held stays taken, and what the pool was asked for never comes.
        self._replay_lock = threading.RLock()
        self._futures_lock = threading.RLock()
        self._prefetch_queue: collections.deque[Any] = collections.deque()
        if self._prefetch_cap:
            self._prefetch_executor = ThreadPoolExecutor(max_workers=self._prefetch_cap)


_buffers: weakref.WeakSet[PrefetchingBuffer] = weakref.WeakSet()


def _start_anew_in_forked_child() -> None:
    for buffer in list(_buffers):
        buffer._start_anew_in_forked_child()


os.register_at_fork(after_in_child=_start_anew_in_forked_child)
