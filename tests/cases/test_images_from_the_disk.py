"""A buffer in a file whose images are not in memory: the disk reads all chunks of a batch together."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import resource
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from embodichain_rl import TrajectoryReplayBuffer

STEPS, CHUNK, BATCH = 64, 16, 16
BATCHES = 8


def images(number: int) -> TensorDict:
    done = torch.zeros(STEPS, 1, dtype=torch.bool)
    done[-1] = True
    pixels = torch.full((STEPS, 3, 64, 64), number, dtype=torch.uint8)
    return TensorDict({"pixels": pixels, "next": {"done": done}}, [STEPS])


def fill(path: Path, trajectories: int) -> None:
    rb = TrajectoryReplayBuffer(
        path=path,
        max_trajectories=trajectories,
        max_total_steps=trajectories * STEPS,
        chunk_size=CHUNK,
        batch_size=BATCH,
    )
    for number in range(trajectories):
        rb.extend(images(number))
    rb.close()


def in_a_process(action: object, *arguments: object) -> None:
    process = multiprocessing.get_context("fork").Process(target=action, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join()
    assert process.exitcode == 0


def drop_from_memory(path: Path) -> None:
    for file in path.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_no_more_than_is_touched(rb: TrajectoryReplayBuffer) -> None:
    """Have page faults in the mapped steps read one page, however much the machine reads ahead otherwise."""
    libc = ctypes.CDLL(None, use_errno=True)
    for column in rb.storage.arena.columns:
        begin = column.data_ptr() & -mmap.PAGESIZE
        nbytes = column.data_ptr() + column.nbytes - begin
        assert libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(nbytes), mmap.MADV_RANDOM) == 0


def waits_for_the_disk(path: Path) -> tuple[int, int]:
    """Return how many page faults waited for the disk while batches were sampled, and the blocks that were read."""
    rb = TrajectoryReplayBuffer.open(path)
    read_no_more_than_is_touched(rb)
    rb.sample()  # from here on it is known whether there is something to be read
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(BATCHES):
        batch = rb.sample()
        assert torch.equal(batch["pixels"][:, :, 0, 0, 0].long(), batch["index"][..., 0])
        assert (batch["pixels"] == batch["pixels"][..., :1, :1, :1]).all()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_majflt - before.ru_majflt, after.ru_inblock - before.ru_inblock


def look(path: Path, warm: Path) -> None:
    torch.set_num_threads(1)
    waits_for_the_disk(warm)  # the code is in memory from here on
    drop_from_memory(path)
    waits, blocks = waits_for_the_disk(path)
    if not blocks:
        os._exit(77)  # it is no disk, or nothing can be dropped from memory
    assert waits < BATCHES * BATCH / 2, f"{waits} waits for {blocks} blocks"


def test_chunks_of_a_batch_are_read_together(tmp_path: Path) -> None:
    in_a_process(fill, tmp_path / "warm", 2)
    in_a_process(fill, tmp_path / "cold", 64)
    process = multiprocessing.get_context("fork").Process(target=look, args=(tmp_path / "cold", tmp_path / "warm"))
    process.start()
    process.join()
    if process.exitcode == 77:
        pytest.skip("the files of the buffer can't be dropped from memory here")
    assert process.exitcode == 0
