"""BatchMemory recycles memory when its last user is gone, and never before."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from steps import LABEL, Child, check_chunk, make_buffer, small
from tensordict import TensorDict
from waiting import PATIENCE

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.replay.host.batch_memory import POOL_FROM, BatchMemory, destination, gathering_into, size_class

ROWS = (POOL_FROM, 2)
"""Shape of a tensor of bytes that is large enough to be recycled."""

IMAGE = 2**14
"""Size of an image, in bytes."""


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class TestRecycling:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16, torch.bool], ids=str)
    def test_returns_the_requested_shape_and_dtype(self, dtype: torch.dtype) -> None:
        tensor = BatchMemory().empty((3, 1000, 211), dtype)
        assert tensor.shape == (3, 1000, 211)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0, "not aligned to a cache line, which makes copies slow"
        tensor.fill_(1)
        assert tensor.sum(dtype=torch.float64) == tensor.numel()

    def test_begins_behind_a_cache_line_where_that_is_asked_for(self) -> None:
        memory = BatchMemory()
        tensor = memory.empty((size_class(POOL_FROM),), torch.uint8, 16)
        begin = tensor.data_ptr()
        assert begin % 64 == 16
        tensor.fill_(1)
        del tensor
        assert memory.empty((size_class(POOL_FROM),), torch.uint8, 16).data_ptr() == begin

    def test_reuses_memory(self) -> None:
        memory = BatchMemory()
        tensor = memory.empty(ROWS, torch.uint8)
        first = address(tensor)
        del tensor
        assert address(memory.empty(ROWS, torch.uint8)) == first

    def test_reuses_memory_for_another_dtype_and_nearly_the_same_size(self) -> None:
        memory = BatchMemory()
        tensor = memory.empty(ROWS, torch.uint8)
        first = address(tensor)
        del tensor
        assert address(memory.empty((POOL_FROM // 2 - 100,), torch.float32)) == first

    def test_does_not_reuse_memory_for_another_size(self) -> None:
        memory = BatchMemory()
        first = address(memory.empty(ROWS, torch.uint8))
        assert address(memory.empty((POOL_FROM * 8,), torch.uint8)) != first

    def test_reuses_the_most_recently_used_block_first(self) -> None:
        memory = BatchMemory()
        first, second = memory.empty(ROWS, torch.uint8), memory.empty(ROWS, torch.uint8)
        addresses = address(first), address(second)
        del second
        del first
        again = [memory.empty(ROWS, torch.uint8) for _ in range(2)]
        assert [address(tensor) for tensor in again] == list(addresses)

    @pytest.mark.parametrize(
        "hold",
        [
            lambda tensor: tensor,
            lambda tensor: tensor[5:7],
            lambda tensor: tensor.view(-1)[3],
            lambda tensor: tensor.view(torch.int16).t(),
            lambda tensor: tensor.detach(),
            lambda tensor: tensor.numpy(),
            lambda tensor: tensor.numpy()[1:, :1],
            lambda tensor: memoryview(tensor.numpy()),
            lambda tensor: tensor.untyped_storage(),
            lambda tensor: torch.utils.dlpack.to_dlpack(tensor),
            lambda tensor: TensorDict({"a": tensor}, [POOL_FROM])[10:20],
        ],
        ids=[
            "itself",
            "a slice",
            "an element",
            "another dtype",
            "detached",
            "an array",
            "a slice of an array",
            "a buffer",
            "the storage",
            "a capsule",
            "a tensordict",
        ],
    )
    def test_does_not_reuse_memory_that_is_referenced(self, hold: Callable[[torch.Tensor], Any]) -> None:
        memory = BatchMemory()
        tensor = memory.empty(ROWS, torch.uint8)
        first = address(tensor)
        held = hold(tensor)
        del tensor
        others = [memory.empty(ROWS, torch.uint8) for _ in range(3)]
        assert first not in [address(other) for other in others]
        del held
        assert address(memory.empty(ROWS, torch.uint8)) == first

    def test_does_not_reuse_memory_that_an_autograd_graph_needs(self) -> None:
        memory = BatchMemory()
        tensor = memory.empty((POOL_FROM,), torch.float32).fill_(3)
        first = address(tensor)
        weight = torch.ones(POOL_FROM, requires_grad=True)
        loss = (weight * tensor).sum()
        del tensor
        other = memory.empty((POOL_FROM,), torch.float32).fill_(5)
        assert address(other) != first
        loss.backward()
        assert (weight.grad == 3).all()

    def test_leaves_small_tensors_to_torch(self) -> None:
        memory = BatchMemory()
        tensor = memory.empty((POOL_FROM - 1,), torch.uint8)
        assert tensor.shape == (POOL_FROM - 1,)
        del tensor
        assert not memory._idle

    @pytest.mark.parametrize("shape", [(0,), (0, 5), ()], ids=str)
    def test_accepts_empty_and_scalar_shapes(self, shape: tuple[int, ...]) -> None:
        assert BatchMemory().empty(shape, torch.float32).shape == shape


class TestBounds:
    def test_keeps_at_most_max_idle_bytes(self) -> None:
        memory = BatchMemory(max_idle=5 * size_class(POOL_FROM))
        held = [memory.empty((POOL_FROM,), torch.uint8) for _ in range(9)]
        addresses = [address(tensor) for tensor in held]
        while held:
            held.pop(0)
        assert list(memory._idle) == addresses[4:], "the most recently used blocks must be kept"
        assert memory._idle_bytes == sum(len(block) for block in memory._idle.values())

    def test_with_a_limit_of_zero_keeps_nothing(self) -> None:
        memory = BatchMemory(max_idle=0)
        memory.empty(ROWS, torch.uint8)
        assert not memory._idle

    @pytest.mark.parametrize("nbytes", [POOL_FROM, POOL_FROM + 1, 10**6, 2**21 - 1, 2**21, 2**21 + 1, 123_456_789])
    def test_size_classes_waste_little(self, nbytes: int) -> None:
        size = size_class(nbytes)
        assert nbytes <= size <= 1.25 * nbytes + 4096
        assert size % 4096 == 0
        assert size_class(size) == size

    def test_there_are_few_size_classes(self) -> None:
        assert len({size_class(nbytes) for nbytes in range(2**20, 2**21, 4096)}) <= 9


class TestThreadsAndProcesses:
    def test_threads_never_get_the_same_memory(self) -> None:
        memory = BatchMemory()
        start = threading.Barrier(4)
        mixed = []

        def use(mark: int) -> None:
            start.wait()
            for _ in range(200):
                tensor = memory.empty(ROWS, torch.uint8)
                tensor[::4096] = mark
                if not (tensor[::4096] == mark).all():
                    mixed.append(mark)

        threads = [threading.Thread(target=use, args=(mark,)) for mark in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not mixed
        assert len(memory._idle) <= 8  # each thread holds one block while it allocates the next

    def test_a_child_forked_while_a_thread_holds_the_mutex_works(self) -> None:
        memory = BatchMemory()
        held = memory.empty(ROWS, torch.uint8).fill_(7)
        inside, leave = threading.Event(), threading.Event()

        def stay_inside() -> None:
            with memory._mutex:
                inside.set()
                leave.wait(PATIENCE)

        thread = threading.Thread(target=stay_inside)
        thread.start()
        assert inside.wait(PATIENCE)
        child = Child("fork", memory)
        leave.set()
        assert child.call(use_in_child) == list(ROWS)
        child.end()
        thread.join(PATIENCE)
        assert (held == 7).all()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda memory: pickle.loads(pickle.dumps(memory))])
    def test_copies_have_memory_of_their_own(self, copied: Any) -> None:
        memory = BatchMemory(max_idle=12345)
        memory.empty(ROWS, torch.uint8)
        twin = copied(memory)
        assert twin.max_idle == 12345
        assert not twin._idle


def use_in_child(memory: BatchMemory) -> list[int]:
    return list(memory.empty(ROWS, torch.uint8).fill_(1).shape)


class OwnMemory:
    """A destination that allocates memory and records it."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def empty_together(self, specs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in specs]
        self.given += tensors
        return tensors


class TestDestinations:
    def test_hold_the_chunks_that_are_gathered_inside_the_block(self) -> None:
        rb, destination_memory = make_buffer([small(0, 9)]), OwnMemory()
        with gathering_into(destination_memory):
            data = check_chunk(rb.sample())
        (block,) = destination_memory.given
        for key in ("observation", LABEL, ("next", "done")):
            assert 0 <= address(data[key]) - address(block) < block.nbytes
        count = len(destination_memory.given)
        rb.sample()
        assert len(destination_memory.given) == count

    def test_apply_to_this_thread_only_and_can_be_nested(self) -> None:
        outer, inner = OwnMemory(), OwnMemory()
        seen = []
        with gathering_into(outer):
            thread = threading.Thread(target=lambda: seen.append(destination()))
            thread.start()
            thread.join(PATIENCE)
            with gathering_into(inner):
                assert destination() is inner
            with gathering_into(None):
                assert destination() is None
            assert destination() is outer
        assert destination() is None
        assert seen == [None]

    def test_are_reset_when_the_block_raises(self) -> None:
        with pytest.raises(RuntimeError), gathering_into(OwnMemory()):
            raise RuntimeError
        assert destination() is None


def make_image_buffer() -> TrajectoryReplayBuffer:
    """Return a buffer whose batches have 4 chunks of 16 images, 1 MiB in all."""
    rb = make_buffer(max_total_steps=200, chunk_size=16, batch_size=4)
    for number in range(4):
        steps = small(number, 30)
        steps["image"] = (steps[LABEL][:, :1] * 40 + steps[LABEL][:, 1:2] + torch.arange(IMAGE) % 7).to(torch.uint8)
        rb.extend(steps)
    return rb


class TestBatches:
    def check(self, data: TensorDict) -> None:
        check_chunk(data)
        expected = data[LABEL][..., :1] * 40 + data[LABEL][..., 1:2] + torch.arange(IMAGE) % 7
        assert torch.equal(data["image"], expected.to(torch.uint8))

    def test_that_are_referenced_are_never_overwritten(self) -> None:
        rb = make_image_buffer()
        held = [rb.sample() for _ in range(6)]
        part = rb.sample()["image"][2, 5:7]
        before = part.clone()
        for _ in range(6):
            rb.sample()
        for data in held:
            self.check(data)
        assert torch.equal(part, before)

    def test_that_are_dropped_are_recycled(self) -> None:
        rb = make_image_buffer()
        rb.sample()
        addresses = set()
        for _ in range(20):
            data = rb.sample()
            self.check(data)
            addresses.add(address(data["image"]))
            del data
        assert len(addresses) == 1

    def test_of_changing_length_share_memory(self) -> None:
        rb = make_image_buffer()
        lengths = itertools.cycle([15, 16, 14, 16])
        addresses = set()
        for _ in range(12):
            data = rb.sample_chunks(8, next(lengths))
            self.check(data)
            addresses.add(address(data["image"]))
            del data
        assert len(addresses) <= 2

    def test_can_outlive_their_buffer(self) -> None:
        rb = make_image_buffer()
        data = rb.sample()
        array: np.ndarray = data["image"].numpy()
        before = array.copy()
        del rb
        gc.collect()
        self.check(data)
        del data
        assert np.array_equal(array, before)
