"""Tables of nonsense: what is tried, the error that it must meet, and what the message must say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from steps import check_chunk, small

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.errors import InvalidArgumentError


class Place(NamedTuple):
    """Where nonsense is tried."""

    rb: TrajectoryReplayBuffer
    """Three trajectories of 8 steps, room for 40 steps."""
    engine: OnlineDataEngine
    """One that is not started."""
    folder: Path


Try = Callable[[Place], Any]


class Case(NamedTuple):
    """Something that must be refused."""

    name: str
    attempt: Try
    error: type[Exception]
    message: str


class Table:
    """Cases, and the decorator of the test that goes through them."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def refuse(self, error: type[Exception], message: str, *attempts: Try) -> None:
        """Every one of ``attempts`` is refused by ``error`` with a ``message``, a regular expression."""
        self.cases.extend(
            Case(f"{message} {number}", attempt, error, message) for number, attempt in enumerate(attempts)
        )

    def refuse_values(
        self,
        name: str,
        call: Callable[[Place, Any], Any],
        values: list[Any],
        error: type[Exception] = InvalidArgumentError,
    ) -> None:
        """Every one of ``values`` is refused by ``call``, by the argument's name and its own."""

        def attempt(value: Any) -> Try:
            return lambda place: call(place, value)

        self.cases.extend(
            Case(f"{name}={value!r}", attempt(value), error, f"{name}.*{re.escape(repr(value))}") for value in values
        )

    @property
    def each(self) -> pytest.MarkDecorator:
        assert len({case.name for case in self.cases}) > 5
        return pytest.mark.parametrize("case", self.cases, ids=lambda case: case.name)


def assert_refused(case: Case, place: Place) -> None:
    """Says that a case meets its error, that nothing was written, and that the buffer goes on."""
    before, written = len(place.rb), place.rb.storage.ledger.next_id
    with pytest.raises(case.error, match=re.compile(case.message, re.DOTALL)) as refusal:
        case.attempt(place)
    assert type(refusal.value) is case.error
    assert (len(place.rb), place.rb.storage.ledger.next_id) == (before, written), "something was written"
    check_chunk(place.rb.sample()[0])


NO_POSITIVE_INT = [0, -1, True, False, 1.5, 2.0, math.nan, "3", [3]]
NO_NUMBER = [True, math.nan, math.inf, "1", [1.0]]


def make_buffer(**kwargs: Any) -> TrajectoryReplayBuffer:
    rb = TrajectoryReplayBuffer(
        **{"max_trajectories": 4, "max_total_steps": 40, "chunk_size": 4, "batch_size": 3, **kwargs}
    )
    for number in range(3):
        rb.extend(small(number, 8))
    return rb


def emptied_buffer() -> TrajectoryReplayBuffer:
    rb = make_buffer()
    rb.empty()
    return rb


PENDULUM = {"id": "Pendulum-v1"}


def configure(**kwargs: Any) -> OnlineDataEngineCfg:
    return OnlineDataEngineCfg(**{"gym_config": PENDULUM, "progress_bar": False, **kwargs})
