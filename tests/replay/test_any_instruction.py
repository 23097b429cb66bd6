"""Kill a process at any instruction of ``extend`` and ``sample``: no other process blocks and no chunk is torn."""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from both_kernels import NAMES, in_parts, kernels_named, use
from instructions import EVERY, at_every_instruction, change_within_samples, run_in_child_until
from tensordict import TensorDict
from waiting import PATIENCE

from embodichain_rl import ByGroup, ByPriority, ByRecency, ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger, Reservation
from embodichain_rl.replay.schema.arrays import as_array
from embodichain_rl.shared.lock import LOCK_TIMEOUT

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import _checked_steps  # noqa: E402
import stress  # noqa: E402
from _checked_steps import count_torn  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the thread pool of OpenMP does not survive a fork
    yield
    torch.set_num_threads(threads)


def make_trajectory(number: int, length: int) -> TensorDict:
    return _checked_steps.make_trajectory(number, length, ["observation", "pixels", "action", "task"])


def make_buffer() -> TrajectoryReplayBuffer:
    rb = TrajectoryReplayBuffer(max_trajectories=3, max_total_steps=40, chunk_size=4, batch_size=8)
    for number in range(5):
        rb.extend(make_trajectory(number, 6 + number))
    return rb


def test_killed_at_any_instruction_of_extend() -> None:
    rb = make_buffer()
    rb.set_sampler(ChunkSampler(4, weights=ByPriority()))
    rb.sample()  # builds the priority tree
    # The trajectory ends in the second piece, so that all code of the writer and of the ledger runs.
    pieces = make_trajectory(77, 9).split([4, 5])
    instruction = killed = 0
    while run_in_child_until(instruction, lambda: [rb.extend(piece) for piece in pieces]):
        check_ledger(rb.storage.ledger)
        before = time.monotonic()
        rb.extend(make_trajectory(100 + killed, 5 + killed % 9))
        chunks = rb.sample()
        assert time.monotonic() - before < LOCK_TIMEOUT / 2, "it waited for the lock of the dead"
        assert count_torn(chunks) == 0
        assert len(rb) == 3
        oldest, end = rb.storage.ledger.live_range()
        assert (rb.storage.ledger.weights_of(np.arange(oldest, end)) == 1.0).all()
        killed += 1
        instruction += EVERY
    assert killed > 100, f"only {killed} instructions were reached"
    assert rb.stats()["writing"] <= 1  # at most the last reservation; the others were reclaimed


def test_killed_at_any_instruction_of_update_priority() -> None:
    rb = make_buffer()
    rb.set_sampler(ChunkSampler(4, weights=ByPriority(alpha=1.0)))
    ledger, killed = rb.storage.ledger, 0
    rb.sample()
    first, end = ledger.live_range()
    rb.update_priority(range(first, end), 1.0)
    before = ledger.weights_of(np.arange(first, end))

    def update() -> None:
        first, end = ledger.live_range()
        rb.update_priority([first, end - 1], [7.0, 9.0])

    while run_in_child_until(killed * EVERY, update):
        check_ledger(ledger)
        weights = ledger.weights_of(np.arange(first, end))
        assert np.isin(weights, [*before, 7.0 + 1e-8, 9.0 + 1e-8]).all()
        assert count_torn(rb.sample()) == 0
        rb.extend(make_trajectory(100 + killed, 5 + killed % 9))  # repairs the tree, and gets the largest weight
        assert ledger.weights_of(np.array([end]))[0] == weights[1:].max()
        check_ledger(ledger)
        first, end = ledger.live_range()
        rb.update_priority(range(first, end), 1.0)
        assert ledger.priorities.largest(first % ledger.num_rows, end % ledger.num_rows) == before[0]
        killed += 1
    assert killed > 20, f"only {killed} instructions were met"


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_instruction_of_sample(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(in_parts(kernels_named(name)), monkeypatch)
    rb = make_buffer()
    instruction = killed = 0
    while run_in_child_until(instruction, rb.sample):
        check_ledger(rb.storage.ledger)
        rb.extend(make_trajectory(100 + killed, 5 + killed % 9))
        assert count_torn(rb.sample()) == 0
        killed += 1
        instruction += EVERY if name == "compiled" else 2 * EVERY
    assert killed > 8, f"only {killed} instructions were reached"
    assert rb.stats()["reclaimed"] == 0


@pytest.mark.parametrize(("margin", "beside"), [(0, 0), (1, 0), (1, 6)])
def test_a_reader_between_any_two_instructions_of_a_writer_sees_consistent_rows(margin: int, beside: int) -> None:
    ledger = Ledger(3, 20, 60, margin=margin, writer_slots=2)
    if beside:  # steps behind a trajectory, as ragged values take them
        ledger.resize(20, 60, 60, rooms_vary=True)
    written: list[Reservation] = []
    arena = np.full(60, -1)
    ids = np.arange(0, 60)

    def look(_: int) -> None:
        published = ids[ledger.published(ids)]
        rows = ledger.rows_of(published)
        rows = rows.select(rows.lengths >= 0)
        for trajectory, start, length in zip(rows.ids, rows.starts, rows.lengths, strict=True):
            assert (written[trajectory].start, written[trajectory].length) == (start, length)
            assert (arena[start : start + written[trajectory].room] == trajectory).all()
        oldest, end = ledger.live_range()
        assert len(ledger.live_rows().ids) == end - oldest, "a live trajectory has no row"
        assert end < 3 or 2 <= end - oldest <= 3

    def write_all() -> None:
        for number, length in enumerate(np.random.default_rng(0).integers(1, 7, 40).tolist()):
            reservation = ledger.reserve(length, length + margin + number % (beside + 1))
            written.append(reservation)
            arena[reservation.start : reservation.start + reservation.room] = number
            assert ledger.publish(reservation) == number

    assert at_every_instruction(write_all, look) > 5000


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernels": "twin"},
        {"weights": "steps"},
        {"weights": ByRecency(1.0)},
        {"weights": ByPriority()},
        {"weights": ByGroup("task")},
        {"replacement": False},
    ],
    ids=str,
)
def test_the_buffer_turns_over_between_any_two_instructions_of_sample(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(options)
    name = options.pop("kernels", "compiled")
    use(in_parts(kernels_named(name)), monkeypatch)
    every = 19 if options or name == "twin" else 7  # the compiled kernels take few instructions of Python
    rb = TrajectoryReplayBuffer(
        max_trajectories=2, max_total_steps=40, batch_size=8, sampler=ChunkSampler(4, **options)
    )
    numbers = itertools.count()

    def turn_over() -> None:
        for number in itertools.islice(numbers, 12):  # so many that the space of all live trajectories is reused
            rb.extend(make_trajectory(number, 6 + number % 5))

    def check(batch: TensorDict) -> None:
        assert batch.shape == (8, 4)
        assert count_torn(batch) == 0

    turn_over()
    assert change_within_samples(rb, turn_over, every, check) > 150


@pytest.mark.parametrize(
    ("kill", "start_method", "seconds", "every", "options"),
    [
        ("writers", "fork", 2.5, 0.2, {}),
        ("readers", "fork", 2.0, 0.2, {"weights": "priority"}),
        ("both", "forkserver", 2.0, 0.5, {"weights": "group"}),
        ("both", "fork", 1.5, 0.2, {"weights": "steps"}),
        ("both", "fork", 1.5, 0.2, {"weights": "recency", "compact": True}),
        ("both", "fork", 2.0, 0.2, {"ragged": True, "edits": True, "max_trajectories": 8}),
    ],
)
def test_short_stress_with_killed_processes(
    kill: Any, start_method: Any, seconds: float, every: float, options: dict[str, Any]
) -> None:
    """Run ``benchmarks/stress.py`` for a few seconds instead of a minute."""
    config = stress.Config(
        kill=kill,
        start_method=start_method,
        seconds=seconds,
        every=every,
        patience=10.0,
        **{"max_trajectories": 2, **options},
    )
    report = stress.run(config)
    assert stress.violations(report) == {}
    assert report["kills"] > 0
    assert report["chunks_checked"] > 0


def test_a_buffer_of_two_with_a_writer_that_is_stopped_inside_extend() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=20, chunk_size=4, batch_size=4)
    context = multiprocessing.get_context("fork")
    inside, go_on = context.Event(), context.Event()

    class Slow(list):
        def __iter__(self) -> Iterator[torch.Tensor]:
            first, *others = super().__iter__()
            yield first
            inside.set()
            assert go_on.wait(PATIENCE)
            yield from others

    def stop_while_copying() -> None:
        rb.storage.write([Slow(map(as_array, rb.storage.schema.leaves(make_trajectory(50, 10))))])

    rb.extend(make_trajectory(0, 10))
    rb.extend(make_trajectory(1, 10))
    slow = context.Process(target=stop_while_copying)
    slow.start()
    assert inside.wait(PATIENCE)
    for number in range(2, 100):
        rb.extend(make_trajectory(number, 10))
        assert len(rb) == 2
        assert count_torn(rb.sample()) == 0
    go_on.set()
    slow.join(PATIENCE)
    assert slow.exitcode == 0
    assert len(rb) == 2
    assert set(rb[1]["label"][:, 0].tolist()) == {50}
