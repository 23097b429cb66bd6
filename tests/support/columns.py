"""Columns of all kinds of steps."""

from __future__ import annotations

import numpy as np
import torch

SHAPES = [(), (1,), (5,), (2, 3, 4), (0,)]
DTYPES = [torch.float32, torch.float64, torch.uint8, torch.bool, torch.bfloat16, torch.int64, torch.complex64]


def column(steps: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    numbers = torch.arange(steps * int(np.prod(shape))) * 37 % 251
    return (numbers % 2 == 0 if dtype == torch.bool else numbers.to(dtype)).view(steps, *shape)
