"""The gather of chunks, compared with a plain implementation."""

from __future__ import annotations

import random
import signal

import numpy as np
import pytest
import torch
from columns import DTYPES, SHAPES, column

from embodichain_rl.replay.host import chunk_view
from embodichain_rl.replay.host.chunk_view import ChunkView


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 4, 11])
class TestGather:
    STARTS = np.array([0, 7, 3, 3])

    def expected(self, values: torch.Tensor, length: int) -> torch.Tensor:
        starts = self.STARTS % (len(values) - length + 1)
        return torch.stack([values[start : start + length] for start in starts])

    def test_copies_chunks(self, shape: tuple[int, ...], dtype: torch.dtype, length: int) -> None:
        values = column(11, shape, dtype)
        (copies,) = ChunkView(values, 1, length).copy(self.STARTS % (12 - length))
        assert copies.dtype == dtype
        assert copies.is_contiguous()
        assert torch.equal(copies, self.expected(values, length))
        before = values.clone()
        copies.zero_()
        assert torch.equal(values, before)

    @pytest.mark.parametrize("one_by_one", [False, True])
    def test_copies_chunks_to_given_memory(
        self, shape: tuple[int, ...], dtype: torch.dtype, length: int, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if one_by_one:
            monkeypatch.setattr(chunk_view, "MEMCPY_FROM", 0)
        values = column(11, shape, dtype)
        view = ChunkView(values, 1, length)
        output = torch.zeros(view.shape_of(4), dtype=dtype)
        (copies,) = view.copy_to(output, self.STARTS % (12 - length))
        assert copies.data_ptr() == output.data_ptr()
        assert torch.equal(copies, self.expected(values, length))

    def test_copies_chunks_of_several_columns(self, shape: tuple[int, ...], dtype: torch.dtype, length: int) -> None:
        columns = [column(11, shape, dtype), column(11, shape, dtype).flip(0), column(11, shape, dtype).roll(3, 0)]
        view = ChunkView(torch.cat(columns), 3, length)
        starts = self.STARTS % (12 - length)
        output = torch.zeros(view.shape_of(4), dtype=dtype)
        for copies in (view.copy(starts), view.copy_to(output, starts)):
            for copy, values in zip(copies, columns, strict=True):
                assert torch.equal(copy, self.expected(values, length))

    def test_sees_later_writes_to_the_column(self, shape: tuple[int, ...], dtype: torch.dtype, length: int) -> None:
        values = column(11, shape, dtype)
        view = ChunkView(values, 1, length)
        values.copy_(values.flip(0))
        assert torch.equal(view.copy(self.STARTS % (12 - length))[0], self.expected(values, length))


def test_no_signal_is_swallowed_while_a_view_is_made() -> None:
    """A Ctrl-C right after the start of a training arrives while the first views are made."""

    class RingError(BaseException):
        pass

    def ring(number: int, frame: object) -> None:
        rung.append(number)
        raise RingError

    def make_views() -> None:  # a function of its own: Python 3.13 raises at a loop's end outside of a try around it
        while not rung:
            ChunkView(values, 1, 4)

    values = column(20, (3,), torch.float32)
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for _ in range(3000):
            rung.clear()
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4))
                make_views()
                pytest.fail("a signal was swallowed")
            except RingError:
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
