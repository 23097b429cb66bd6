"""A buffer in a file whose images are not in memory: the disk reads all parts of a batch together."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer

STEPS, CHUNK, BATCH = 64, 16, 16
BATCHES = 8

REQUESTS: dict[str, dict[str, Any]] = {
    "chunks": {"chunk_size": CHUNK},
    "chunks at every second step": {"chunk_size": CHUNK, "stride": 2},
    "chunks with padding": {"chunk_size": CHUNK, "pad": "both"},
    "windows": {"windows": {"pixels": (-1, 0), "action": (0, CHUNK - 1)}},
}


def images(number: int) -> TensorDict:
    done = torch.zeros(STEPS, 1, dtype=torch.bool)
    done[-1] = True
    pixels = torch.randint(256, (STEPS, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    return TensorDict({"pixels": pixels, "action": torch.randn(STEPS, 2), "next": {"done": done}}, [STEPS])


def fill(path: Path, trajectories: int, codec: str | None) -> None:
    rb = TrajectoryReplayBuffer(
        path=path,
        max_trajectories=trajectories,
        max_total_steps=trajectories * STEPS,
        compress=None if codec is None else {"pixels": codec},
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
    block = rb.storage._memory.arena_block.mapped()
    assert libc.madvise(ctypes.c_void_p(block.data_ptr()), ctypes.c_size_t(block.nbytes), mmap.MADV_RANDOM) == 0


def assert_right(batch: TensorDict) -> None:
    """Compare the frames that were drawn with those that were written; padding is ignored."""
    mask = batch.get(("collector", "mask"), torch.ones(batch["index"].shape[:-1], dtype=torch.bool))
    frames = batch["pixels"] if mask.ndim > 1 else batch["pixels"][:, -1]  # of a window, the last one is of the step
    written = {number: images(number)["pixels"] for number in batch["index"][..., 0].unique().tolist()}
    for (number, step), frame in zip(batch["index"][mask].tolist(), frames[mask], strict=True):
        assert torch.equal(frame, written[number][step])


def waits_for_the_disk(path: Path, request: str, beside: Path) -> tuple[int, int]:
    """Return how many page faults waited for the disk while batches were sampled, and the blocks that were read.

    A buffer that is in memory is sampled in turn, by the same thread.
    """
    in_memory = TrajectoryReplayBuffer.open(beside, sampler=ChunkSampler(**REQUESTS[request]))
    rb = TrajectoryReplayBuffer.open(path, sampler=ChunkSampler(**REQUESTS[request]))
    read_no_more_than_is_touched(rb)
    rb.sample()  # from here on it is known whether there is something to be read
    waits = blocks = 0
    for _ in range(BATCHES):
        in_memory.sample()
        before = resource.getrusage(resource.RUSAGE_SELF)
        batch = rb.sample()
        after = resource.getrusage(resource.RUSAGE_SELF)
        waits, blocks = waits + after.ru_majflt - before.ru_majflt, blocks + after.ru_inblock - before.ru_inblock
        assert_right(batch)
    return waits, blocks


def look(path: Path, warm: Path, request: str) -> None:
    torch.set_num_threads(1)
    waits_for_the_disk(warm, request, warm)  # the code is in memory from here on
    drop_from_memory(path)
    waits, blocks = waits_for_the_disk(path, request, warm)
    if not blocks:
        os._exit(77)  # it is no disk, or nothing can be dropped from memory
    assert waits < BATCHES * BATCH / 2, f"{waits} waits for {blocks} blocks"


@pytest.fixture(scope="module", params=[None, "png"])
def buffers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A large buffer and a small one, of images as they are or encoded."""
    folder = tmp_path_factory.mktemp("buffers")
    for name, trajectories in (("cold", 64), ("warm", 2)):
        in_a_process(fill, folder / name, trajectories, request.param)
    return folder / "cold", folder / "warm"


@pytest.mark.parametrize("name", REQUESTS)
def test_what_a_batch_needs_is_read_together(buffers: tuple[Path, Path], name: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=look, args=(*buffers, name))
    process.start()
    process.join()
    if process.exitcode == 77:
        pytest.skip("the files of the buffer can't be dropped from memory here")
    assert process.exitcode == 0
