"""What is announced to a disk: each page of the parts once, in pieces that the kernel takes."""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodichain_rl.shared import FileBlock, Part, ReadAhead, SharedBlock
from embodichain_rl.shared.read_ahead import PATIENCE, PIECE, pieces_of

parts = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3 * PIECE), max_size=6),
        st.one_of(st.integers(0, 3 * mmap.PAGESIZE), st.just(2 * PIECE)),
    ),
    max_size=4,
)


def pages(begin: int, nbytes: int) -> range:
    return range(begin // mmap.PAGESIZE, -(-(begin + nbytes) // mmap.PAGESIZE)) if nbytes else range(0)


@given(parts)
def test_the_pieces_are_the_pages_of_the_parts(parts: list[tuple[list[int], int]]) -> None:
    pieces = list(pieces_of((np.array(addresses, dtype=np.int64), nbytes) for addresses, nbytes in parts))
    announced = [page for begin, nbytes in pieces for page in pages(begin, nbytes)]
    assert announced == sorted(set(announced))
    assert set(announced) == {page for addresses, nbytes in parts for at in addresses for page in pages(at, nbytes)}
    assert all(0 < nbytes <= PIECE and not begin % mmap.PAGESIZE for begin, nbytes in pieces)


def test_parts_of_different_sizes() -> None:
    several = np.array([0, 2 * mmap.PAGESIZE]), np.array([1, mmap.PAGESIZE + 1])
    assert list(pieces_of([several])) == [(0, mmap.PAGESIZE), (2 * mmap.PAGESIZE, 2 * mmap.PAGESIZE)]


def test_only_a_file_is_announced(tmp_path: Path) -> None:
    def never() -> object:
        raise AssertionError("nothing is announced")
        yield

    memory = ReadAhead(SharedBlock(4096))
    assert not memory.on_disk
    with memory.reading(never()):  # type: ignore[arg-type]
        pass
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4096)
    file = ReadAhead(FileBlock(fd, "file"))
    assert file.on_disk
    asked = []

    def once() -> object:
        asked.append(True)
        return iter(())

    for _ in range(PATIENCE + 3):  # nothing is read
        with file.reading(each for each in [None] for each in once()):  # type: ignore[attr-defined]
            pass
    assert len(asked) == PATIENCE


def test_it_begins_again_when_something_was_read_from_the_disk(tmp_path: Path) -> None:
    far = 64 << 20  # beyond what a page fault reads ahead
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    for place in (0, far):
        os.pwrite(fd, b"x" * mmap.PAGESIZE, place)
    os.fsync(fd)
    block = FileBlock(fd, "file")
    ahead, mapped = ReadAhead(block), block.mapped().numpy()
    asked = []

    def read(place: int) -> None:
        def part() -> Iterator[Part]:
            asked.append(place)
            return
            yield

        with ahead.reading(part()):
            assert mapped[place] == ord("x")

    for _ in range(PATIENCE + 3):
        read(0)
    assert asked[-1:] == [0]
    asked.clear()
    read(0)
    assert not asked
    os.posix_fadvise(fd, far, mmap.PAGESIZE, os.POSIX_FADV_DONTNEED)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
    read(far)
    if resource.getrusage(resource.RUSAGE_THREAD).ru_majflt == before:
        pytest.skip("the file can't be dropped from memory here")
    for _ in range(2):  # the next part of a batch, although the one before was in memory
        read(0)
    assert asked == [0, 0]
