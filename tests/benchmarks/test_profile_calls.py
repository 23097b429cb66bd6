"""The profile of a call measures every function that it names."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from profile_calls import PARTS_OF_EXTEND, PARTS_OF_SAMPLE, Clock, Function
from sampling import Case, make_trajectory

from embodichain_rl import TrajectoryReplayBuffer

CASE = Case("states", 2, 10, 4, 3)


@pytest.mark.parametrize(
    ("parts", "call"),
    [
        (PARTS_OF_SAMPLE, lambda rb: rb.sample()),
        (PARTS_OF_EXTEND, lambda rb: rb.extend(make_trajectory(CASE, 0))),
    ],
    ids=["sample", "extend"],
)
def test_every_part_is_measured(
    parts: dict[str, tuple[Function, ...]], call: Callable[[TrajectoryReplayBuffer], object]
) -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=20, chunk_size=3, batch_size=4)
    rb.extend(make_trajectory(CASE, 0))
    functions = [*itertools.chain(*parts.values())]
    before = [owner.__dict__[name] for owner, name in functions]
    clock = Clock()
    with ExitStack() as stack:
        for owner, name in functions:
            stack.enter_context(clock.inside(owner, name))
        for _ in range(5):  # room is not looked for each time
            call(rb)
    assert [function for function, taken in clock.own.items() if not taken] == []
    assert [owner.__dict__[name] for owner, name in functions] == before
