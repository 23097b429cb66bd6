"""Index arithmetic and the gather of chunks, against the plainest code that does the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embodichain_rl.replay import windows
from embodichain_rl.replay.windows import (
    ChunkView,
    as_array,
    as_tensor,
    chunk_index,
    places_from_uniform,
)

SHAPES = [(), (1,), (5,), (2, 3, 4), (0,)]
DTYPES = [torch.float32, torch.float64, torch.uint8, torch.bool, torch.bfloat16, torch.int64, torch.complex64]


def column(steps: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    numbers = torch.arange(steps * int(np.prod(shape))) * 37 % 251
    return (numbers % 2 == 0 if dtype == torch.bool else numbers.to(dtype)).view(steps, *shape)


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
    def test_copies_them_to_a_given_place(
        self, shape: tuple[int, ...], dtype: torch.dtype, length: int, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if one_by_one:
            monkeypatch.setattr(windows, "MEMCPY_FROM", 0)
        values = column(11, shape, dtype)
        view = ChunkView(values, 1, length)
        place = torch.zeros(view.shape_of(4), dtype=dtype)
        (copies,) = view.copy_to(place, self.STARTS % (12 - length))
        assert copies.data_ptr() == place.data_ptr()
        assert torch.equal(copies, self.expected(values, length))

    def test_copies_those_of_several_columns(self, shape: tuple[int, ...], dtype: torch.dtype, length: int) -> None:
        columns = [column(11, shape, dtype), column(11, shape, dtype).flip(0), column(11, shape, dtype).roll(3, 0)]
        view = ChunkView(torch.cat(columns), 3, length)
        starts = self.STARTS % (12 - length)
        place = torch.zeros(view.shape_of(4), dtype=dtype)
        for copies in (view.copy(starts), view.copy_to(place, starts)):
            for copy, values in zip(copies, columns, strict=True):
                assert torch.equal(copy, self.expected(values, length))

    def test_sees_what_is_written_to_the_column(self, shape: tuple[int, ...], dtype: torch.dtype, length: int) -> None:
        values = column(11, shape, dtype)
        view = ChunkView(values, 1, length)
        values.copy_(values.flip(0))
        assert torch.equal(view.copy(self.STARTS % (12 - length))[0], self.expected(values, length))


class TestAsArray:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_is_the_same_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        values = column(9, shape, dtype)
        before, new = values.clone(), column(20, shape, dtype)[11:14]
        as_array(values)[4:7] = as_array(new)
        assert torch.equal(values[4:7], new)
        assert torch.equal(values[:4], before[:4])
        assert torch.equal(values[7:], before[7:])
        assert torch.equal(as_tensor(as_array(values), dtype), values)

    @pytest.mark.parametrize(
        "make",
        [
            lambda t: t.t().contiguous().t(),
            lambda t: torch.stack([t, t], 1)[:, 0],
            lambda t: t.repeat_interleave(2, 0)[::2],
            lambda t: t.clone().requires_grad_(),
            lambda t: torch.complex(t, -t).conj().conj(),
            lambda t: torch.complex(t, t).conj(),
            lambda t: torch.complex(t, t).conj().imag,
        ],
        ids=["transposed", "strided", "every other", "requires grad", "complex", "conjugated", "negated"],
    )
    def test_takes_any_layout(self, make: object) -> None:
        new = make(torch.rand(3, 5))  # type: ignore[operator]
        values = torch.zeros(4, 5, dtype=new.dtype)
        as_array(values)[1:] = as_array(new)
        assert torch.equal(values[1:], new.detach().resolve_conj().resolve_neg())

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.int8, torch.float8_e5m2, torch.uint16], ids=str)
    def test_is_the_memory_of_the_tensor(self, dtype: torch.dtype) -> None:
        tensor = torch.zeros(4, 3, dtype=dtype)
        array = as_array(tensor)
        assert array.shape == (4, 3)
        assert array.itemsize == dtype.itemsize
        array[2, 1] = 1
        assert tensor.view(torch.uint8).any()
        assert array.ctypes.data == tensor.data_ptr()


class TestStarts:
    @pytest.mark.parametrize("length", [1, 2, 5])
    @pytest.mark.parametrize("trajectory", [5, 6, 300, 2**40])
    def test_reach_from_the_first_valid_to_the_last(self, trajectory: int, length: int) -> None:
        uniform = np.array([0.0, np.nextafter(1, 0)])
        count = np.full(2, trajectory - length + 1)
        assert places_from_uniform(uniform, count).tolist() == [0, trajectory - length]
        assert places_from_uniform(uniform, count, -3).tolist() == [-3, trajectory - length - 3]

    def test_cut_the_interval_into_equal_parts(self) -> None:
        uniform = np.array([0.0, 0.2499, 0.25, 0.4999, 0.5, 0.75, 0.9999])
        assert places_from_uniform(uniform, np.full(7, 4)).tolist() == [0, 0, 1, 1, 2, 3, 3]

    def test_of_a_trajectory_as_long_as_a_chunk_are_zero(self) -> None:
        assert places_from_uniform(np.linspace(0, 0.999, 9), np.full(9, 1)).tolist() == [0] * 9

    @given(
        uniform=st.floats(0, 1, exclude_max=True),
        first=st.integers(-(10**6), 10**6),
        more=st.integers(0, 2**50),
    )
    def test_are_always_valid(self, uniform: float, first: int, more: int) -> None:
        place = places_from_uniform(np.array([uniform]), np.array([1 + more]), first)
        assert place.dtype == np.int64
        assert first <= place[0] <= first + more


class TestChunkIndex:
    def test_says_trajectory_and_step(self) -> None:
        index = chunk_index(np.array([7, 2**40]), np.array([3, 0]), 2)
        assert index.tolist() == [[[7, 3], [7, 4]], [[2**40, 0], [2**40, 1]]]
        assert index.dtype == np.int64

    @pytest.mark.parametrize(("count", "length"), [(0, 4), (3, 0)])
    def test_of_nothing(self, count: int, length: int) -> None:
        assert chunk_index(np.arange(count), np.arange(count), length).shape == (count, length, 2)
