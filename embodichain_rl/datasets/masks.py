"""Losses over some of the steps of a batch: without padding, and weighted by who acted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from embodichain_rl._checks import checked_float
from embodichain_rl.errors import InvalidArgumentError

__all__ = ["masked_mean", "step_weights"]


def masked_mean(values: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean over the real steps of a padded batch, so that padding has no weight in a loss.

    Args:
        values: ``[*B, *feature]``, one or more values for each step.
        mask: padding mask, ``bool`` ``[*B]``, True at real steps. For example ``batch["collector", "mask"]``, or
            ``~batch["action_is_pad"]`` for a window.
        weights: the weight of each step, ``[*B]``, such as from :func:`step_weights`; None: all real steps have the
            same.

    Returns:
        A scalar with the dtype of ``values``: the weighted mean over all elements of all real steps, or 0 if no step
        is real, or all of them have the weight 0.

    Raises:
        InvalidArgumentError: ``values``, ``mask`` or ``weights`` is not a tensor, the mask is not ``bool``, its shape
            is not a prefix of the shape of ``values``, or the weights have another shape than the mask.

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
    ones = [1] * (values.ndim - mask.ndim)
    # where(), not a product: padding may contain infinities or NaN.
    if weights is None:
        total = torch.where(mask.view(*mask.shape, *ones), values, torch.zeros_like(values)).sum()
        return total / (mask.sum() * elements).clamp(min=1)
    of_steps: Any = weights
    if not isinstance(of_steps, torch.Tensor) or of_steps.shape != mask.shape:
        shape = list(of_steps.shape) if isinstance(of_steps, torch.Tensor) else type(of_steps).__name__
        raise InvalidArgumentError(
            f"Got weights {shape}; they must be a tensor of one number for each step, {list(mask.shape)}."
        )
    counted = torch.where(mask, weights.to(values.dtype), torch.zeros((), dtype=values.dtype, device=values.device))
    used = counted.view(*mask.shape, *ones)
    total = torch.where(used > 0, values * used, torch.zeros_like(values)).sum()
    return total / torch.where(counted.any(), counted.sum() * elements, torch.ones_like(total))


def step_weights(
    labels: torch.Tensor, weights: Mapping[int | str, float], *, texts: Any = None, other: float | None = None
) -> torch.Tensor:
    """Return the weight of each step by its label, such as who acted there.

    With the weights 0 and 1 it is a mask.

    Args:
        labels: integers of any shape, such as ``batch["collector", "source"]``.
        weights: the weight of each label, not negative; labels are integers, or text.
        texts: for text, the table of its ids: a buffer, or its ``texts``.
        other: the weight of all other labels. None: they are refused.

    Returns:
        ``float32`` of the shape of ``labels``, on their device.

    Raises:
        InvalidArgumentError: when ``labels`` are no integers, a label has no weight, a weight is negative, or text is
            given without ``texts``.

    Example:
        >>> step_weights(torch.tensor([[0, 0, 1], [2, 1, 1]]), {0: 1.0, 1: 0.5}, other=0.0)
        tensor([[1.0000, 1.0000, 0.5000],
                [0.0000, 0.5000, 0.5000]])
    """
    of_steps: Any = labels
    if not isinstance(of_steps, torch.Tensor) or of_steps.dtype.is_floating_point or of_steps.dtype.is_complex:
        kind = of_steps.dtype if isinstance(of_steps, torch.Tensor) else type(of_steps).__name__
        raise InvalidArgumentError(f"Got labels of {kind}; they must be a tensor of integers.")
    given = {label: checked_float(f"the weight of {label!r}", weight, minimum=0.0) for label, weight in weights.items()}
    if other is not None:
        other = checked_float("other", other, minimum=0.0)
    is_text = any(isinstance(label, str) for label in given)
    if is_text and texts is None:
        raise InvalidArgumentError(
            f"Got weights of {[*given]} without texts; a batch has the ids of text. Give texts=rb, the buffer that it "
            "is from."
        )
    found, inverse = torch.unique(labels, return_inverse=True)
    names = getattr(texts, "texts", texts).resolve(found) if is_text else found.tolist()
    missing = [name for name in names if name not in given]
    if missing and other is None:
        raise InvalidArgumentError(
            f"Got weights of {[*given]}, but there are steps with {missing}. Give their weights, or other=0.0."
        )
    values = [given.get(name, other) for name in names]
    return torch.tensor(values, dtype=torch.float32, device=labels.device)[inverse]
