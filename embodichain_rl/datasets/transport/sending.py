"""The sending side of the transfer of batches: what a ``DataLoader`` worker pickles, as places in its blocks.

The package explains the transfer; see ``incoming.py`` for the receiving side. A batch is one entry of a
message: the blocks that it is in, and the layout of its tensors in them. Most batches have the same layout, so it is
pickled once, and the receiver knows it by its bytes.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch._utils import ExceptionWrapper
from torch.multiprocessing.reductions import reduce_storage, reduce_tensor
from torch.utils.data import get_worker_info

from embodichain_rl.datasets.transport.blocks import Block, aligned
from embodichain_rl.datasets.transport.incoming import (
    HEADER,
    LENT,
    BatchLayout,
    TensorPlace,
    receive_array,
    receive_batch,
    receive_storage,
    receive_tensor,
)
from embodichain_rl.datasets.transport.outgoing import OutgoingMemory
from embodichain_rl.datasets.transport.structure import is_plain, structure_of
from embodichain_rl.shared import dumps_by_value

__all__ = ["Sender"]

INLINE_ARRAY = 4096
"""Size in bytes below which a NumPy array is pickled into the message itself."""

MAX_LAYOUTS = 256
"""The number of layouts whose bytes are kept."""

_tensordicts_reduction: Callable[[TensorDict], tuple[Any, ...]] = ForkingPickler._extra_reducers[TensorDict]  # type: ignore[attr-defined]


class _Message:
    """What is known of the message that is being pickled."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.loose = 0  # bytes that were copied into the memory
        self.gathered = False  # whether there are tensors that were in the memory already
        self.copied: dict[int, tuple[Block, int]] = {}  # the copy of each storage, by its address


class Sender:
    """Pickles messages of this process, with their tensors and arrays in its outgoing memory.

    Args:
        memory: the memory.
    """

    def __init__(self, memory: OutgoingMemory) -> None:
        self._memory = memory
        self._of_thread = threading.local()
        self._room_alone = 0  # bytes that the last message without a batch of this memory took
        self._layouts: dict[Any, bytes] = {}
        self.reducers: dict[type[Any], Callable[[Any], Any]] = {
            TensorDict: self.reduce_batch,
            torch.Tensor: self.reduce_tensor,
            torch.UntypedStorage: self.reduce_storage,
            np.ndarray: self.reduce_array,
        }

    def serve_this_process(self) -> None:
        """Send everything that this process pickles for another process through the memory."""
        for kind, reduce in self.reducers.items():
            ForkingPickler.register(kind, reduce)
        dumps: Callable[..., Any] = ForkingPickler.dumps.__func__  # type: ignore[attr-defined]

        def dumps_as_one_message(kind: type[ForkingPickler], obj: Any, protocol: int | None = None) -> Any:
            try:
                with self.one_message():
                    return dumps(kind, obj, protocol)
            except (AttributeError, pickle.PicklingError):
                pass  # it has an object of a class that a notebook defines
            except Exception:
                return dumps(kind, _with_error(obj), protocol)
            try:
                with self.one_message():
                    return dumps_by_value(obj)
            except Exception:
                # The feeder thread would print the error, and the main process would wait forever.
                return dumps(kind, _with_error(obj), protocol)

        ForkingPickler.dumps = classmethod(dumps_as_one_message)  # type: ignore[method-assign, assignment]

    @contextmanager
    def one_message(self) -> Iterator[None]:
        """Send what this thread pickles in the ``with`` block in as few blocks as possible."""
        message = self._of_thread.message = _Message()
        try:
            yield
        except BaseException:
            for block in message.blocks:  # nobody will receive them
                block.words[LENT] = 0
            raise
        finally:
            self._of_thread.message = None
        if message.gathered:
            room = self._memory.room_beside
            self._memory.room_beside = max(message.loose, room - room // 8)
        elif message.loose:
            self._room_alone = message.loose

    def _current_message(self) -> _Message | None:
        return getattr(self._of_thread, "message", None) if self._memory.of_this_process else None

    # --------------------------------------------------------------------------------------------- how to pickle

    def reduce_batch(self, data: TensorDict) -> tuple[Any, ...]:
        """Return how to pickle a TensorDict: as a whole, if it is made of ordinary tensors."""
        message = self._current_message()
        found = None if message is None else structure_of(data)
        if message is None or found is None:
            return _tensordicts_reduction(data)
        alike = self._in_one_block(message, found.leaves)
        if alike is None:
            if not all(map(_is_private, found.leaves)):
                return _tensordicts_reduction(data)
            alike = self._in_several_blocks(message, found.leaves)
        blocks, places = alike
        known = found.nest, data.batch_size, found.device, *places
        layout = self._layouts.get(known)
        if layout is None:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            layout = BatchLayout(
                found.nest, tuple(data.batch_size), found.device, [TensorPlace(*place) for place in places]
            ).to_bytes()
            self._layouts[known] = layout
        return receive_batch, (tuple(block.ticket() for block in blocks), layout)

    def _in_one_block(
        self, message: _Message, leaves: Sequence[torch.Tensor]
    ) -> tuple[list[Block], list[tuple[Any, ...]]] | None:
        """Return the block that all tensors are in, as usual, and their places in it; None if they are not."""
        block = self._lend(message, leaves[0].data_ptr())
        if block is None:
            return None
        begin, size = block.address, block.size
        places = []
        for leaf in leaves:
            offset = leaf.data_ptr() - begin
            if not 0 <= offset < size or leaf.requires_grad or leaf.is_neg() or leaf.is_conj():
                return None
            places.append((0, offset, leaf.shape, leaf.stride(), leaf.dtype))
        return [block], places

    def _in_several_blocks(
        self, message: _Message, leaves: Sequence[torch.Tensor]
    ) -> tuple[list[Block], list[tuple[Any, ...]]]:
        """Return the blocks that tensors are in, or are copied to, and their places."""
        blocks: list[Block] = []
        places = []
        for leaf in leaves:
            block, offset, stride = self._place_of(message, leaf)
            if block not in blocks:
                blocks.append(block)
            places.append((blocks.index(block), offset, leaf.shape, stride, leaf.dtype))
        return blocks, places

    def reduce_tensor(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        """Return how to pickle a tensor: where it is in the memory, into which it is copied if necessary."""
        message = self._current_message()
        if message is None or not is_plain(tensor) or tensor.numel() == 0:
            return reduce_tensor(tensor)
        storage = tensor.untyped_storage()
        block = self._lend(message, storage.data_ptr())
        if block is None:
            if storage.is_shared():
                return reduce_tensor(tensor)
            block, begin = self._copied_storage(message, storage)
        else:
            begin = storage.data_ptr()
        offset = begin + tensor.data_ptr() - storage.data_ptr() - block.address
        return receive_tensor, (block.ticket(), offset, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def reduce_storage(self, storage: torch.UntypedStorage) -> tuple[Any, ...]:
        """Return how to pickle a storage by itself, in the same way."""
        message, nbytes = self._current_message(), storage.nbytes()
        if message is None or storage.device.type != "cpu" or nbytes == 0:
            return reduce_storage(storage)
        address = storage.data_ptr()
        block = self._lend(message, address)
        if block is None:
            if storage.is_shared():
                return reduce_storage(storage)
            block, address = self._copied_storage(message, storage)
        return receive_storage, (block.ticket(), address - block.address, nbytes)

    def reduce_array(self, array: np.ndarray) -> str | tuple[Any, ...]:
        """Return how to pickle an array: as a tensor, unless it is small or of objects."""
        message = self._current_message()
        if message is None or array.dtype.hasobject or array.nbytes < INLINE_ARRAY:
            return array.__reduce_ex__(4)
        transposed = array.flags.f_contiguous and not array.flags.c_contiguous
        given = array.T if transposed else array
        address = given.ctypes.data
        block = self._lend(message, address) if given.flags.c_contiguous else None
        if block is None:
            block, copy = self._take(message, array.nbytes)
            copy.view(array.dtype).reshape(given.shape)[...] = given
            address = copy.ctypes.data
        return receive_array, (block.ticket(), address - block.address, array.dtype, given.shape, transposed)

    # ------------------------------------------------------------------------------------------------------- places

    def _place_of(self, message: _Message, leaf: torch.Tensor) -> tuple[Block, int, tuple[int, ...]]:
        """Return the block that a tensor is in, or is copied to, and its offset and strides there."""
        if leaf.numel() == 0:
            return (message.blocks[0] if message.blocks else self._take(message, 1)[0]), HEADER, leaf.stride()
        address = leaf.data_ptr()
        lent = self._lend(message, address)
        if lent is not None:
            return lent, address - lent.address, leaf.stride()
        block, copy = self._take(message, leaf.nbytes)
        target = torch.from_numpy(copy).view(leaf.dtype).view(leaf.shape)
        target.copy_(leaf)
        return block, copy.ctypes.data - block.address, target.stride()

    def _copied_storage(self, message: _Message, storage: torch.UntypedStorage) -> tuple[Block, int]:
        """Copy a storage, once for each message; return the block, and the address of the copy."""
        found = message.copied.get(storage.data_ptr())
        if found is None:
            block, copy = self._take(message, storage.nbytes())
            torch.from_numpy(copy).copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
            found = message.copied[storage.data_ptr()] = block, copy.ctypes.data
        return found

    def _lend(self, message: _Message, address: int) -> Block | None:
        """Lend the block at an address to a message, unless another message has it; return the block."""
        for block in message.blocks:
            if block.address <= address < block.address + block.size:
                return block
        found = self._memory.lend(address, message.blocks)
        message.gathered |= found is not None
        return found

    def _take(self, message: _Message, nbytes: int) -> tuple[Block, np.ndarray]:
        """Return uninitialised bytes in a block of a message, and the block."""
        at_least = 0 if message.gathered else self._room_alone - message.loose
        message.loose += aligned(nbytes)
        return self._memory.take(nbytes, message.blocks, at_least=at_least)


def _is_private(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is an ordinary one that the user has not placed in torch's shared memory."""
    return is_plain(tensor) and not tensor.is_shared()


def _with_error(message: Any) -> Any:
    """Put the current exception in the place of the batch in a message of a ``DataLoader`` worker."""
    worker = get_worker_info()
    if worker is None or not isinstance(message, tuple) or len(message) != 2:
        raise
    error = ExceptionWrapper(where=f"in DataLoader worker process {worker.id}")
    index, batch = message
    if isinstance(batch, tuple) and len(batch) == 3 and batch[1] == worker.id:  # torchdata adds the worker's state
        return index, (error, *batch[1:])
    return index, error
