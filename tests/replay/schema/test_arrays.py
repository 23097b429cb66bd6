"""Tensors as NumPy arrays over the same memory."""

from __future__ import annotations

import pytest
import torch
from columns import DTYPES, SHAPES, column

from embodichain_rl.replay.schema import as_array, as_tensor


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
