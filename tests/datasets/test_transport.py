"""Batches on their way from a worker: not overwritten while anyone looks at them, and nothing left behind."""

from __future__ import annotations

import collections
import copy
import gc
import io
import multiprocessing
import os
import pickle
from itertools import islice, pairwise
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import check_batch, filled_buffer, iterating
from tensordict import NonTensorData, TensorDict
from waiting import PATIENCE

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.datasets import OnlineDataset, UniformChunkSampler
from embodichain_rl.datasets.transport import OutgoingMemory, Sender, columns_of, outgoing_memory
from embodichain_rl.errors import SharingError
from embodichain_rl.replay.host import gathering_into

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc; torch's transport is used")


@pytest.fixture(scope="module")
def rb() -> TrajectoryReplayBuffer:
    return filled_buffer()


def mapped_blocks() -> set[str]:
    """The inodes of the blocks that are mapped in this process."""
    gc.collect()
    return {
        line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if "embodichain_rl-batch" in line
    }


def blocks_of(tensors: list[torch.Tensor]) -> set[str]:
    """The inodes of the blocks that tensors are in."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "embodichain_rl-batch" in line:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            ranges.append((begin, end, line.split()[4]))
    return {next(inode for begin, end, inode in ranges if begin <= leaf.data_ptr() < end) for leaf in tensors}


def leaves(data: TensorDict) -> list[torch.Tensor]:
    return list(data.values(True, True))


# ---------------------------------------------------------------------------------------------------- through a loader


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_batch_arrives_in_blocks_that_are_used_again(rb: TrajectoryReplayBuffer, method: str) -> None:
    with iterating(OnlineDataset(rb, 8, 3), 1, method) as batches:
        for batch in islice(batches, 60):
            assert type(check_batch(batch)) is TensorDict
            assert len(blocks_of(leaves(batch))) == 1
        assert 2 <= len(mapped_blocks()) <= 16
    del batches, batch
    assert not mapped_blocks(), "memory of a worker that is gone is still mapped"


def test_items_arrive_in_one_block(rb: TrajectoryReplayBuffer) -> None:
    for sizes in (8, UniformChunkSampler(2, 10)):
        with iterating(OnlineDataset(rb, sizes), 1, batch_size=3) as batches:
            for batch in islice(batches, 30):
                assert len(blocks_of(leaves(check_batch(batch)))) == 1
            assert 1 <= len(mapped_blocks()) <= 16


def test_what_is_held_is_never_overwritten(rb: TrajectoryReplayBuffer) -> None:
    with iterating(OnlineDataset(rb, UniformChunkSampler(4, 10), 3), 2) as batches:
        held = []
        for number, batch in enumerate(islice(batches, 90)):
            if number % 3 == 0:
                held.append((batch, batch.clone()))
            elif number % 3 == 1:
                held.append((batch["observation"], batch["observation"].clone()))
            elif number % 9 == 2:
                held.append((torch.from_numpy(batch["pixels"][1, 2:].numpy()), batch["pixels"][1, 2:].clone()))
    del batches
    for seen, expected in held:
        assert (seen == expected).all()


def _large_arrays(data: TensorDict) -> dict[str, np.ndarray]:
    labels = np.repeat(data["label"].numpy(), 100, axis=-1)
    return {"labels": labels, "fortran": np.asfortranarray(labels.reshape(-1, 400)), "views": labels[1:]}


def test_arrays_that_are_held_are_never_overwritten(rb: TrajectoryReplayBuffer) -> None:
    with iterating(OnlineDataset(rb, 8, 3, _large_arrays), 1, collate_fn=lambda batch: batch) as batches:
        held = []
        for number, batch in enumerate(islice(batches, 60)):
            array = (batch["labels"], batch["fortran"], batch["views"][0, 2:])[number % 3]
            held.append((array, array.copy()))
        assert len(mapped_blocks()) >= 2
    del batches, batch
    for seen, expected in held:
        assert (seen == expected).all()


def _check_when_told(batch: TensorDict, told: Connection) -> None:
    torch.set_num_threads(1)
    assert told.poll(PATIENCE)
    check_batch(batch)


@pytest.mark.parametrize("parent_lets_go", [True, False])
def test_what_a_forked_child_inherits_is_never_overwritten(rb: TrajectoryReplayBuffer, parent_lets_go: bool) -> None:
    with iterating(OnlineDataset(rb, 8, 3), 1) as batches:
        batch = next(batches)
        told, tell = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_check_when_told, args=(batch, told))
        child.start()
        if parent_lets_go:
            del batch
        for other in islice(batches, 30):
            check_batch(other)
        tell.send(None)
        child.join(PATIENCE)
        assert child.exitcode == 0
        if not parent_lets_go:
            check_batch(batch)
        for other in islice(batches, 30):
            check_batch(other)


class Repeat:
    """Hands out every batch twice, and keeps the last one."""

    def __init__(self) -> None:
        self.last: TensorDict | None = None

    def __call__(self, data: TensorDict) -> TensorDict:
        self.last, again = (None, self.last) if self.last is not None else (data, data)
        return again


def test_a_batch_may_be_sent_twice(rb: TrajectoryReplayBuffer) -> None:
    with iterating(OnlineDataset(rb, 8, 3, Repeat()), 1) as batches:
        for first, second in islice(zip(batches, batches, strict=False), 20):
            assert (check_batch(first) == check_batch(second)).all()


def _new_and_old(data: TensorDict) -> dict[str, Any]:
    return {"new": data["observation"] * 2, "old": data["observation"][:, 1:], "name": "batch"}


def test_tensors_go_in_any_container(rb: TrajectoryReplayBuffer) -> None:
    with iterating(OnlineDataset(rb, 8, 3, _new_and_old), 1) as batches:
        for batch in islice(batches, 20):
            assert batch["name"] == "batch"
            assert torch.equal(batch["new"][:, 1:], batch["old"] * 2)


def _fork_and_end(data: TensorDict) -> TensorDict:
    """Has a child that inherits what lies in the worker's memory, and outlives the batch."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return data


def test_a_worker_may_fork(rb: TrajectoryReplayBuffer) -> None:
    with iterating(OnlineDataset(rb, 8, 3, _fork_and_end), 1) as batches:
        for batch in islice(batches, 20):
            check_batch(batch)


def _send_and_end(pipe: Connection) -> None:
    torch.set_num_threads(1)
    memory = OutgoingMemory()
    (tensor,) = memory.empty_together([((3,), torch.int64)])
    pipe.send_bytes(dumps(memory, tensor))


def test_a_batch_of_a_worker_that_is_gone_is_an_error() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=_send_and_end, args=(sender,))
    worker.start()
    assert receiver.poll(PATIENCE)
    message = receiver.recv_bytes()
    worker.join(PATIENCE)
    with pytest.raises(SharingError, match=f"worker {worker.pid} ended before the batch that it sent was received"):
        pickle.loads(message)


def saved(data: Any) -> tuple[int, Any]:
    """Return the size of what is saved, and what is loaded from it."""
    file = io.BytesIO()
    torch.save(data, file)
    file.seek(0)
    return file.getbuffer().nbytes, torch.load(file, weights_only=False)


def _send_back(received: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    answers.put(check_batch(received.get(timeout=PATIENCE))["observation"].sum().item())


SAVED = {"chunks": {}, "padded": {"pad": "both"}, "without replacement": {"replacement": False}}


@pytest.mark.parametrize("options", SAVED.values(), ids=SAVED)
def test_a_received_batch_is_saved_copied_and_sent_on_as_any_other(
    rb: TrajectoryReplayBuffer, options: dict[str, Any]
) -> None:
    with iterating(OnlineDataset(rb, 8, 40, **options), 1) as batches:
        batch, others = next(batches), iter(batches)
        expected = batch.clone()
        size, loaded = saved(batch)
        assert (loaded == expected).all()
        assert size < sum(leaf.nbytes for leaf in leaves(batch)) + 16384
        for key, leaf in batch.items(True, True):
            assert saved(leaf)[0] < leaf.nbytes + 2048, f"{key} is saved with others"
        assert (pickle.loads(pickle.dumps(batch)) == expected).all()
        assert (copy.deepcopy(batch) == expected).all()
        if not options:
            context = torch.multiprocessing.get_context("fork")
            queue, answers = context.Queue(), context.Queue()
            child = context.Process(target=_send_back, args=(queue, answers))
            child.start()
            queue.put(batch)
            collections.deque(islice(others, 10), maxlen=0)
            assert answers.get(timeout=PATIENCE) == expected["observation"].sum().item()
            child.join(PATIENCE)
        batch = next(others)
        expected = batch.clone()
        assert batch.share_memory_().is_shared()
        collections.deque(islice(others, 10), maxlen=0)
        assert (batch == expected).all()


def _as_tuple(data: TensorDict) -> tuple[Any, ...]:
    return data["observation"], data["pixels"], {"flags": data["flags"]}


def test_received_tensors_are_saved_each_by_itself(rb: TrajectoryReplayBuffer) -> None:
    for transform, as_dict in ((_as_tuple, False), (None, True)):
        with iterating(OnlineDataset(rb, 8, 40, transform, as_dict=as_dict), 1) as batches:
            batch = next(batches)
            assert saved(batch)[0] < 40 * 8 * 400
            one = batch["observation"] if as_dict else batch[0]
            assert saved(one)[0] < one.nbytes + 2048


def test_own_batches_are_saved_key_by_key() -> None:
    own = filled_buffer(batch_size=40)
    batches = [own.sample(), next(iter(OnlineDataset(own, 8, 40, pad="both"))), next(iter(OnlineDataset(own, 8)))]
    for batch in batches:
        assert (saved(batch)[1] == batch).all()
        for key, leaf in batch.items(True, True):
            assert saved(leaf)[0] < 2 * leaf.nbytes + 2048, f"{key} is saved with others"


@pytest.mark.parametrize(
    "options",
    [{}, {"pad": "both"}, {"stride": 2}, {"windows": {"pixels": (-1, 0), "action": (0, 5), "observation": (0, 0)}}],
)
def test_all_kinds_of_batches_are_gathered_into_outgoing_memory(
    rb: TrajectoryReplayBuffer, options: dict[str, Any]
) -> None:
    memory = OutgoingMemory()
    length = None if "windows" in options else 6
    query = ChunkSampler(length, **options).query(length)
    apart = rb.sample_chunks(5, query, generator=torch.Generator().manual_seed(1))
    with gathering_into(memory):
        batch = rb.sample_chunks(5, query, generator=torch.Generator().manual_seed(1))
    assert (batch == apart).all()
    gathered = [batch[key] for key in ("pixels", "action", "observation")]
    assert all(map(memory.holds, gathered))
    assert len(blocks_of(gathered)) == 1


def test_only_workers_have_outgoing_memory() -> None:
    assert outgoing_memory() is None


# ------------------------------------------------------------------------------------------------ the memory by itself


def dumps(memory: OutgoingMemory, data: Any) -> bytes:
    """What a worker's queue does with a batch."""
    stream = io.BytesIO()
    pickler = ForkingPickler(stream, pickle.HIGHEST_PROTOCOL)
    sender = Sender(memory)
    pickler.dispatch_table.update(sender.reducers)
    with sender.one_message():
        pickler.dump(data)
    return stream.getvalue()


SPECS = [
    ((3, 5), torch.float64),
    ((), torch.bool),
    ((0, 4), torch.float32),
    ((7,), torch.bfloat16),
    ((2,), torch.int64),
]


def test_tensors_of_one_batch_lie_in_one_block_apart_and_aligned() -> None:
    tensors = OutgoingMemory().empty_together(SPECS)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in tensors] == SPECS
    assert len(blocks_of([tensor for tensor in tensors if tensor.nbytes])) == 1
    places = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors if tensor.nbytes]
    assert all(start % 64 == 0 for start, _ in places)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))


def mark(tensor: torch.Tensor, number: int) -> int:
    """Writes to a tensor's memory, and returns what stood there: 0 in a new block."""
    before = int(tensor[0])
    tensor[0] = number
    return before


def new(memory: OutgoingMemory) -> torch.Tensor:
    return memory.empty_together([((1000,), torch.int64)])[0]


def test_a_block_is_used_again_when_all_are_done_with_it() -> None:
    memory = OutgoingMemory()
    assert mark(new(memory), 1) == 0
    assert mark(new(memory), 2) == 1, "let go without being sent"
    held = new(memory)
    assert mark(held, 3) == 2
    others = [new(memory)]
    assert mark(others[-1], 4) == 0, "it is still held here"
    message = dumps(memory, held)
    del held
    others.append(new(memory))
    assert mark(others[-1], 5) == 0, "it is on its way"
    received = pickle.loads(message)
    assert received[0] == 3
    others.append(new(memory))
    assert mark(others[-1], 6) == 0, "the receiver holds it"
    part = received[10:20]
    del received
    others.append(new(memory))
    assert mark(others[-1], 7) == 0, "the receiver holds part of it"
    del part
    assert mark(new(memory), 8) == 3, "all are done with it"
    assert [int(other[0]) for other in others] == [4, 5, 6, 7]


def test_a_block_that_is_sent_again_is_copied() -> None:
    memory = OutgoingMemory()
    tensor = new(memory)
    mark(tensor, 1)
    first, second = pickle.loads(dumps(memory, tensor)), pickle.loads(dumps(memory, tensor))
    assert first[0] == second[0] == 1
    first[0] = 2
    assert second[0] == 1


def test_a_block_that_a_child_may_look_at_is_never_used_again() -> None:
    memory = OutgoingMemory()
    here, sent = new(memory), new(memory)
    mark(here, 1), mark(sent, 2)
    memory.spoil()
    received = pickle.loads(dumps(memory, sent))
    mark(sent, 3)
    del here, sent
    assert received[0] == 2, "it is a copy"
    del received
    others = [new(memory) for _ in range(3)]
    assert [mark(other, 4) for other in others] == [2, 0, 0], "only the block of the copy"


def test_idle_blocks_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embodichain_rl.datasets.transport.outgoing.MAX_IDLE", 3 << 20)
    memory = OutgoingMemory()
    before = len(mapped_blocks())
    held = [memory.empty_together([((1 << 20,), torch.uint8)]) for _ in range(10)]
    assert len(mapped_blocks()) == before + 10
    del held
    memory.empty_together([((10,), torch.uint8)])
    assert len(mapped_blocks()) <= before + 4


def odd_leaves() -> TensorDict:
    return TensorDict(
        {
            "plain": torch.arange(24.0).view(2, 3, 4),
            "strided": torch.arange(24).view(2, 4, 3).transpose(1, 2),
            "expanded": torch.ones(1, dtype=torch.bool).expand(2, 3),
            "empty": torch.zeros(2, 3, 0),
            "nested": {"deep": {"er": torch.zeros(2, 3, dtype=torch.bfloat16)}, "name": NonTensorData("arm", [2, 3])},
        },
        [2, 3],
    )


def test_a_batch_is_received_as_it_was_sent() -> None:
    memory = OutgoingMemory()
    data = odd_leaves().exclude(("nested", "name"))
    data["gathered"] = memory.empty_together([((2, 3), torch.int32)])[0].fill_(7)
    for _ in range(2):  # the second time there is room for what lies elsewhere
        received = pickle.loads(dumps(memory, data))
        assert (received == data).all()
        assert [*received.keys(True)] == [*data.keys(True)]
        assert received["nested", "deep"].batch_size == (2, 3)
        assert received["empty"].shape == (2, 3, 0)
        sizes = {key: leaf.untyped_storage().nbytes() for key, leaf in received.items(True, True)}
        assert all(sizes[key] == received[key].numel() * received[key].element_size() for key in sizes), sizes
    with_text = pickle.loads(dumps(memory, odd_leaves()))
    assert with_text["nested", "name"] == "arm"
    assert (with_text["plain"] == data["plain"]).all()


def test_stacking_does_what_torch_does() -> None:
    memory = OutgoingMemory()
    items = [odd_leaves().exclude(("nested", "name")) + number for number in range(3)]
    structure, columns = columns_of(items) or pytest.fail("they have one structure")
    stacks = memory.stack(columns)
    assert len(blocks_of([stack for stack in stacks if stack.nbytes])) == 1
    stacked = structure.nest.build(stacks, [3, *items[0].batch_size])
    assert stacked["nested"].batch_size == (3, 2, 3)
    assert (stacked == torch.stack(items)).all()


def test_parameters_are_left_to_torch() -> None:
    memory = OutgoingMemory()
    data = TensorDict({"weight": torch.ones(2, 3, requires_grad=True)}, [2])
    assert pickle.loads(dumps(memory, data))["weight"].requires_grad
    assert memory.stack([[data["weight"], data["weight"]]])[0].requires_grad
