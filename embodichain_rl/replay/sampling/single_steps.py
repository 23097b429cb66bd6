"""Batches of single steps without the dimension of the chunk."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict

__all__ = ["squeezed"]


def squeezed(data: Any) -> Any:
    """Return a batch ``[B, 1]`` as ``[B]``, over the same memory.

    TensorDict's own ``squeeze`` takes as long as the draws and the copy.
    """
    if type(data) is not TensorDict or data._td_dim_names is not None or len(data.batch_size) > 2:
        return data.squeeze(1)
    entries = {
        name: value.squeeze(1) if isinstance(value, torch.Tensor) else squeezed(value)
        for name, value in data._tensordict.items()
    }
    return TensorDict._new_unsafe(entries, batch_size=data.batch_size[:1], device=data.device)
