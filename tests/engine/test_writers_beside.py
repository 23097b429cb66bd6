"""Those who write beside an engine's workers, and the errors that workers meet because of others."""

from __future__ import annotations

import pytest

from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.engine.processes import pack_exception
from embodichain_rl.engine.workers import Loss, would_recur
from embodichain_rl.errors import (
    EnvOutputError,
    LedgerLockTimeoutError,
    SchemaMismatchError,
    TooManyWritersError,
    TrajectoryTooLongError,
)
from embodichain_rl.replay.ledger.invariants import check_ledger


@pytest.mark.parametrize("buffer_size", [1, 2])
@pytest.mark.parametrize("compact", [False, True])
def test_four_that_stand_still_in_the_middle_take_nothing_from_a_small_buffer(buffer_size: int, compact: bool) -> None:
    cfg = OnlineDataEngineCfg(
        buffer_size=buffer_size, max_episode_steps=50, compact=compact, gym_config={"id": "Pendulum-v1"}
    )
    ledger = OnlineDataEngine(cfg).replay_buffer.storage.ledger
    for length in (1, 50, 7, 43):  # leaves room in pieces
        ledger.publish(ledger.reserve(length))
    standing_still = [ledger.reserve(length) for length in (50, 1, 50, 50)]
    for length in [50, 1, 26, 50, 49, 2, 50] * 20:
        ledger.publish(ledger.reserve(length))
        assert len(ledger) == buffer_size
    for region in standing_still:
        ledger.publish(region)
    assert ledger.stats() | {"evicted_early": 0, "writing": 0} == ledger.stats()
    check_ledger(ledger)


@pytest.mark.parametrize("kind", [TooManyWritersError, LedgerLockTimeoutError])
def test_what_passes_by_itself_is_a_reason_to_replace_a_worker(kind: type[Exception]) -> None:
    packed = pack_exception(kind("others were stopped"))
    assert not would_recur(packed)
    assert type(Loss(packed, "worker 0").error()) is kind


@pytest.mark.parametrize("kind", [SchemaMismatchError, TrajectoryTooLongError, EnvOutputError])
def test_what_another_worker_would_meet_as_well_is_the_end(kind: type[Exception]) -> None:
    assert would_recur(pack_exception(kind("wrong")))
