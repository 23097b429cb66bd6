"""Functions for padded batches."""

from __future__ import annotations

from typing import Any

import torch

from embodichain_rl.errors import InvalidArgumentError

__all__ = ["masked_mean"]


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over the real steps of a padded batch, so that padding has no weight in a loss.

    Args:
        values: ``[*B, *feature]``, one or more values for each step.
        mask: padding mask, ``bool`` ``[*B]``, True at real steps. For example ``batch["collector", "mask"]``, or
            ``~batch["action_is_pad"]`` for a window.

    Returns:
        A scalar with the dtype of ``values``: the mean over all elements of all real steps, or 0 if no step is real.

    Raises:
        InvalidArgumentError: ``values`` or ``mask`` is not a tensor, the mask is not ``bool``, or its shape is not a
            prefix of the shape of ``values``.

    Example:
        >>> losses = torch.tensor([[1.0, 3.0], [5.0, 100.0]])
        >>> masked_mean(losses, torch.tensor([[True, True], [True, False]]))
        tensor(3.)
    """
    given: tuple[Any, Any] = values, mask
    if not all(isinstance(each, torch.Tensor) for each in given):
        raise InvalidArgumentError(
            f"Got values of type {type(values).__name__} and a mask of type {type(mask).__name__}; both must be "
            "tensors, and the mask a bool mask with one element for each step, [B, L]."
        )
    if mask.dtype != torch.bool or values.shape[: mask.ndim] != mask.shape:
        raise InvalidArgumentError(
            f"Got values {list(values.shape)} and a mask {list(mask.shape)} of {mask.dtype}; the mask must be a bool "
            "mask with one element for each step, [B, L]."
        )
    elements = values.shape[mask.ndim :].numel()
    weights = mask.view(*mask.shape, *[1] * (values.ndim - mask.ndim))
    # where(), not a product: padding may contain infinities or NaN.
    total = torch.where(weights, values, torch.zeros_like(values)).sum()
    return total / (mask.sum() * elements).clamp(min=1)
