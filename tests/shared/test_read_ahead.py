"""What is announced to a disk: each page of the parts once, in pieces that the kernel takes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embodichain_rl.shared import FileBlock, ReadAhead, SharedBlock
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
