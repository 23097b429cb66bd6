"""Tensors as NumPy arrays over the same memory, and back."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

__all__ = ["as_array", "as_tensor", "numpy_dtype"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Return the tensor's memory as a NumPy array of the same shape; of integers where NumPy lacks the dtype."""
    try:
        return tensor.numpy()
    except (RuntimeError, TypeError):
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.view(_INTEGERS[tensor.element_size()]).numpy()


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Return an array that :func:`as_array` made as a tensor of its original dtype, without a copy."""
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


@cache
def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """Return the dtype of the array that :func:`as_array` makes of a tensor."""
    return as_array(torch.empty(0, dtype=dtype)).dtype
