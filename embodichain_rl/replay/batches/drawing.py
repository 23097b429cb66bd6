"""The batches of a buffer: drawn by its sampler without a lock, and transformed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any, Self

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import expand_as_right
from torchrl.data.replay_buffers.utils import pin_memory_output

from embodichain_rl._checks import checked_int
from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import EmptyBufferError, InvalidArgumentError
from embodichain_rl.replay.batches.chunks import BufferChunks
from embodichain_rl.replay.batches.prefetching import PrefetchingBuffer
from embodichain_rl.replay.batches.transformed import pinned, transformed
from embodichain_rl.replay.metrics import GateWatch, note_sampled
from embodichain_rl.replay.sampling import (
    PRIORITY_WEIGHT,
    ChunkQuery,
    ChunkSampler,
    PassEndedError,
    RandomSource,
    current_generator,
    drawer_like,
    drawing_with,
)
from embodichain_rl.replay.schema import INDEX, Key
from embodichain_rl.replay.storage import reader_of

__all__ = ["DrawingBuffer"]


class DrawingBuffer(PrefetchingBuffer):
    """What :class:`~embodichain_rl.TrajectoryReplayBuffer` does to return batches."""

    _gate: GateWatch

    @property
    def draws_streams(self) -> bool:
        """Whether the generator of :meth:`sample_chunks` may be a ``RandomStreams``: each chunk has a stream."""
        if type(self).sample_chunks is not DrawingBuffer.sample_chunks or len(self._transform):
            return False
        return isinstance(self._sampler, ChunkSampler) and self._sampler.draws_streams

    def for_worker(self) -> BufferChunks | Self:
        """Return a source of the same chunks for a ``DataLoader`` worker that is being started.

        Returns:
            One that does not load TorchRL; or the buffer itself, if it has transforms, or if a subclass of it or of its
            sampler draws the chunks.
        """
        if not self.draws_streams or type(self._sampler) is not ChunkSampler:
            return self
        self._storage.handed_over.to_child()
        return BufferChunks(reader_of(self._storage), drawer_like(self._sampler))

    @graph_break
    def sample_chunks(
        self, batch_size: int, chunk_size: int | ChunkQuery, *, generator: RandomSource = None
    ) -> TensorDict:
        """Return ``batch_size`` chunks of ``chunk_size`` steps, ``[batch_size, chunk_size]``, transformed.

        Other than ``sample``, it takes the length from the caller and is not prefetched.

        Args:
            batch_size: how many chunks.
            chunk_size: steps of each; all else is as the buffer's sampler has it. Or what
                :meth:`ChunkSampler.query` of another sampler returns.
            generator: for the draws; by default the buffer's, or torch's global one.

        Raises:
            InvalidArgumentError: when the buffer's sampler is not a :class:`ChunkSampler`.
        """
        if not isinstance(self._sampler, ChunkSampler):
            raise InvalidArgumentError(f"The buffer's sampler, {self._sampler!r}, draws no chunks; use a ChunkSampler.")
        batch_size = checked_int("batch_size", batch_size, minimum=1)
        if not isinstance(chunk_size, ChunkQuery):
            chunk_size = self._sampler.query(checked_int("chunk_size", chunk_size, minimum=1))
        data = self._sampled(batch_size, chunk_size, generator)
        with drawing_with(generator if isinstance(generator, torch.Generator) else None):
            return self._transformed(data)

    @graph_break
    def sample(
        self, batch_size: int | None = None, return_info: bool = False, include_info: bool | None = None
    ) -> TensorDict:
        """Return a batch of chunks ``[batch_size, L]``; see :meth:`torchrl.data.TensorDictReplayBuffer.sample`.

        With ``prefetch``, batches of the buffer's own ``batch_size`` are drawn ahead, on threads. Another
        ``batch_size`` is drawn now. What was drawn ahead is discarded, and drawn anew, when the buffer is emptied, by
        whichever process, or loaded, and when its storage, sampler, ``chunk_size``, transforms or generator are
        replaced.
        """
        # What TorchRL does between its sample and _sample takes as long as the gather. It is left out where it does
        # nothing: it writes to the batch what a ChunkSampler has written already.
        if self._service_shutdown:
            raise RuntimeError("A shut down replay buffer cannot be sampled.")
        usual = batch_size is None or batch_size == self._batch_size
        if isinstance(self._sampler, ChunkSampler) and not (usual and self._prefetch):
            size = self._batch_size if usual else checked_int("batch_size", batch_size, minimum=1)
            if size is not None:
                if not (return_info or self._pin_memory or include_info is not None):
                    return self._sample_without_lock(size)
                return self._sample_now(size, return_info, include_info)
        if not self._prefetch:
            return super().sample(batch_size, return_info, include_info)
        if not usual:
            return self._sample_now(checked_int("batch_size", batch_size, minimum=1), return_info, include_info)
        if isinstance(self._sampler, ChunkSampler) and include_info is None:
            data, info = self.next_prefetched(self._batch_size)
            return (data, info) if return_info else data
        self.discard_outdated()
        return super().sample(batch_size, return_info, include_info)

    def _sample_now(self, batch_size: int, return_info: bool, include_info: bool | None) -> Any:
        """Return a batch without a look at what was prefetched, as TorchRL returns it."""
        if include_info is not None:
            warnings.warn("TorchRL has deprecated include_info; pass return_info instead.", stacklevel=4)
        data, info = self._sample(batch_size)
        if not isinstance(self._sampler, ChunkSampler):
            for key, value in info.items():
                value = torch.as_tensor(value)
                data.set(key, expand_as_right(value, data) if value.ndim < data.ndim else value)
        return (data, info) if return_info else data

    @pin_memory_output  # type: ignore[untyped-decorator]
    def _sample(self, batch_size: int) -> tuple[TensorDict, dict[str, Any]]:
        # TorchRL's takes a lock around the sampler's draw and the storage's read. A ChunkSampler needs none: it draws,
        # copies, and draws again what was evicted meanwhile.
        if not isinstance(self._sampler, ChunkSampler):
            return super()._sample(batch_size)
        data = self._sample_without_lock(checked_int("batch_size", batch_size, minimum=1))
        # Under the keys that they have in the batch, to which TorchRL writes them once more.
        info: dict[Any, Any] = {}
        for key in (self._index_key, (PRIORITY_WEIGHT,)):
            value = data.get(key, None) if isinstance(data, TensorDictBase) else None
            if value is not None:
                info[key[0] if len(key) == 1 else key] = value
        return data, info

    @property
    def _index_key(self) -> Key:
        """Where samples have the pair of trajectory id and step."""
        schema = self._storage.schema
        return INDEX if schema is None else schema.index_key

    def _sample_without_lock(self, batch_size: int) -> TensorDict:
        sampler = self._sampler
        return self._transformed(self._sampled(batch_size, sampler.query(sampler.next_length())))

    def _sampled(self, batch_size: int, query: ChunkQuery, generator: RandomSource = None) -> TensorDict:
        if not self._gate.sampled:
            self._gate.read()
        storage = self._storage
        replaced = storage.times_replaced
        began = time.monotonic_ns()
        try:
            # The generator of this buffer: a sampler that serves several has that of the last one.
            generator = generator or self._rng or torch.default_generator
            data = self._sampler.sample_chunks(storage, batch_size, query, generator)
        except EmptyBufferError as error:
            raise self._writer.explained(error) from None
        if storage.times_replaced != replaced:  # emptied by another thread, which may have written other keys
            return self._sampled(batch_size, query, generator)
        note_sampled(storage, self._sampler, data, batch_size, began)
        return data

    def _transformed(self, data: TensorDict) -> TensorDict:
        if not self._has_transforms():
            return data
        with drawing_with(current_generator(self._rng)):  # a transform draws as the batch was drawn
            return transformed(self._transform, data, self._index_key)

    def _has_transforms(self) -> bool:
        # len(self._transform) takes several us: it looks its list up among the parameters and buffers of a module.
        return bool(self._transform._modules["transforms"]._modules)

    def __iter__(self) -> Iterator[TensorDict]:
        """Iterate over batches: without end, or without replacement to the end of the pass.

        Without replacement, the iteration goes on with the pass under way, such as one that was restored, or begins the
        next one. Its last batch has the chunks that are left. The next iteration is the next pass.
        """
        sampler = self._sampler
        if not isinstance(sampler, ChunkSampler) or sampler.replacement or self._batch_size is None:
            yield from super().__iter__()
            return
        query = sampler.until_pass_ends(sampler.query(sampler.next_length()))
        while True:
            try:
                data = self._sampled(self._batch_size, query)
            except PassEndedError:
                return
            yield pinned(self._transformed(data)) if self._pin_memory else self._transformed(data)
