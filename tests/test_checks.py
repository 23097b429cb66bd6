from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from embodichain_rl._checks import checked_float, checked_int
from embodichain_rl.errors import InvalidArgumentError


@pytest.mark.parametrize("value", [5, np.int8(5), np.uint64(5), 2**80])
def test_integers_pass_as_python_ints(value: Any) -> None:
    assert checked_int("n", value, minimum=5) == value
    assert type(checked_int("n", value)) is int


@pytest.mark.parametrize("value", [5, 5.0, np.float32(5), np.int64(5)])
def test_numbers_pass_as_python_floats(value: Any) -> None:
    assert checked_float("x", value, minimum=5, maximum=5) == 5.0
    assert type(checked_float("x", value)) is float


@pytest.mark.parametrize(
    ("value", "bounds", "needed"),
    [
        (4, {"minimum": 5}, "an integer of at least 5"),
        (8, {"maximum": 7}, "an integer of at most 7"),
        (8, {"minimum": 5, "maximum": 7}, "an integer from 5 to 7"),
        (True, {}, "an integer"),
        (5.0, {}, "an integer"),
        ("5", {"minimum": 1}, "an integer of at least 1"),
        (None, {}, "an integer"),
        (np.array([5]), {}, "an integer"),
    ],
)
def test_what_is_no_such_integer_is_refused(value: Any, bounds: dict[str, int], needed: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        checked_int("batch_size", value, **bounds)
    assert str(refusal.value) == f"batch_size must be {needed}, got {value!r}."


@pytest.mark.parametrize(
    ("value", "bounds", "needed"),
    [
        (0.4, {"minimum": 0.5}, "a finite number of at least 0.5"),
        (0.8, {"maximum": 0.5}, "a finite number of at most 0.5"),
        (2, {"minimum": 0.0, "maximum": 1.0}, "a finite number from 0.0 to 1.0"),
        (math.nan, {}, "a finite number"),
        (-math.inf, {}, "a finite number"),
        (np.float32("inf"), {}, "a finite number"),
        (10**400, {}, "a finite number"),
        (False, {}, "a finite number"),
        (1j, {}, "a finite number"),
        (Decimal("1"), {}, "a finite number"),
        ("1.0", {"minimum": 0.0}, "a finite number of at least 0.0"),
    ],
)
def test_what_is_no_such_number_is_refused(value: Any, bounds: dict[str, float], needed: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        checked_float("timeout", value, **bounds)
    assert str(refusal.value) == f"timeout must be {needed}, got {value!r}."
