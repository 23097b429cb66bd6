"""The mean over real steps."""

from __future__ import annotations

import math

import pytest
import torch

from embodichain_rl.datasets import masked_mean
from embodichain_rl.errors import InvalidArgumentError


@pytest.mark.parametrize("feature", [(), (1,), (3, 2)])
def test_is_the_mean_of_what_the_mask_selects(feature: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 7, *feature, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 7, generator=generator) < 0.6
    mean = masked_mean(values, mask)
    torch.testing.assert_close(mean, values[mask].mean())
    mean.backward()
    assert values.grad[~mask].eq(0).all()
    assert values.grad[mask].ne(0).all()


def test_padding_may_hold_anything() -> None:
    values = torch.tensor([[1.0, math.nan], [3.0, math.inf]])
    assert masked_mean(values, torch.tensor([[True, False], [True, False]])) == 2


def test_of_nothing_real_is_zero() -> None:
    assert masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)) == 0


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool), torch.ones(2, dtype=torch.int64)]
)
def test_other_masks_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match="a bool mask with one element for each step"):
        masked_mean(torch.ones(2, 3), mask)
