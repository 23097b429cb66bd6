"""The index of a batch of chunks."""

from __future__ import annotations

import numpy as np
import pytest

from embodichain_rl.replay.storage import chunk_index


class TestChunkIndex:
    def test_says_trajectory_and_step(self) -> None:
        index = chunk_index(np.array([7, 2**40]), np.array([3, 0]), 2)
        assert index.tolist() == [[[7, 3], [7, 4]], [[2**40, 0], [2**40, 1]]]
        assert index.dtype == np.int64

    @pytest.mark.parametrize(("count", "length"), [(0, 4), (3, 0)])
    def test_of_nothing(self, count: int, length: int) -> None:
        assert chunk_index(np.arange(count), np.arange(count), length).shape == (count, length, 2)
