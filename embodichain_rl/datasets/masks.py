"""What to do with padded batches."""

from __future__ import annotations

from typing import Any

import torch

from embodichain_rl.errors import InvalidArgumentError

__all__ = ["masked_mean"]


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean over the real steps of a padded batch, so that padding has no weight in a loss.

    Args:
        values: ``[*B, *feature]``, one value or several of each step.
        mask: ``bool`` ``[*B]``, True where a step is real, such as ``batch["collector", "mask"]``, or
            ``~batch["action_is_pad"]`` of a window.

    Returns:
        A scalar of the dtype of ``values``: the mean over all elements of all real steps; 0 where none is real.

    Raises:
        InvalidArgumentError: when the mask is not ``bool``, or its shape is not the beginning of that of the values.

    Example:
        >>> losses = torch.tensor([[1.0, 3.0], [5.0, 100.0]])
        >>> masked_mean(losses, torch.tensor([[True, True], [True, False]]))
        tensor(3.)
    """
    given: tuple[Any, Any] = values, mask
    if not all(isinstance(each, torch.Tensor) for each in given):
        raise InvalidArgumentError(
            f"Got values of type {type(values).__name__} and a mask of type {type(mask).__name__}; needed are tensors, "
            "the mask a bool mask with one element for each step, [B, L]."
        )
    if mask.dtype != torch.bool or values.shape[: mask.ndim] != mask.shape:
        raise InvalidArgumentError(
            f"Got values {list(values.shape)} and a mask {list(mask.shape)} of {mask.dtype}; needed is a bool mask "
            "with one element for each step, [B, L]."
        )
    elements = values.shape[mask.ndim :].numel()
    weights = mask.view(*mask.shape, *[1] * (values.ndim - mask.ndim))
    # where(), not a product: what stands in padding may be infinite or NaN.
    total = torch.where(weights, values, torch.zeros_like(values)).sum()
    return total / (mask.sum() * elements).clamp(min=1)
