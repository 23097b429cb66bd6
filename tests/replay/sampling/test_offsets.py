"""Offsets of chunks in their trajectories."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodichain_rl.replay.sampling.requests.offsets import offsets_from_uniform


class TestOffsets:
    @pytest.mark.parametrize("length", [1, 2, 5])
    @pytest.mark.parametrize("trajectory", [5, 6, 300, 2**40])
    def test_reach_from_the_first_valid_to_the_last(self, trajectory: int, length: int) -> None:
        uniform = np.array([0.0, np.nextafter(1, 0)])
        count = np.full(2, trajectory - length + 1)
        assert offsets_from_uniform(uniform, count).tolist() == [0, trajectory - length]
        assert offsets_from_uniform(uniform, count, -3).tolist() == [-3, trajectory - length - 3]

    def test_cut_the_interval_into_equal_parts(self) -> None:
        uniform = np.array([0.0, 0.2499, 0.25, 0.4999, 0.5, 0.75, 0.9999])
        assert offsets_from_uniform(uniform, np.full(7, 4)).tolist() == [0, 0, 1, 1, 2, 3, 3]

    def test_of_a_trajectory_as_long_as_a_chunk_are_zero(self) -> None:
        assert offsets_from_uniform(np.linspace(0, 0.999, 9), np.full(9, 1)).tolist() == [0] * 9

    @given(
        uniform=st.floats(0, 1, exclude_max=True),
        first=st.integers(-(10**6), 10**6),
        more=st.integers(0, 2**50),
    )
    def test_are_always_valid(self, uniform: float, first: int, more: int) -> None:
        offset = offsets_from_uniform(np.array([uniform]), np.array([1 + more]), first)
        assert offset.dtype == np.int64
        assert first <= offset[0] <= first + more
