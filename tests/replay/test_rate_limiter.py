"""The rate limiter against Reverb's definition, and between processes that fork, wait, change it and are killed."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import pytest
from instructions import at_every_instruction
from waiting import PATIENCE, wait_until

from embodichain_rl.errors import InvalidArgumentError, RateLimitTimeoutError, SharingError
from embodichain_rl.replay import rate_limiter
from embodichain_rl.replay.rate_limiter import RateLimiter

FORK = multiprocessing.get_context("fork")


class Other:
    """Another process that does with the limiter what it is told."""

    def __init__(self, limiter: RateLimiter, start_method: str = "fork") -> None:
        context = multiprocessing.get_context(start_method)
        self._pipe, there = context.Pipe()
        self.process = context.Process(target=_obey, args=(limiter, there), daemon=True)
        self.process.start()
        there.close()

    def tell(self, *call: Any) -> None:
        self._pipe.send(call)

    def answers_within(self, seconds: float) -> bool:
        return self._pipe.poll(seconds)

    def answer(self) -> Any:
        assert self._pipe.poll(PATIENCE), "the other process does not answer"
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self, *call: Any) -> Any:
        self.tell(*call)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(PATIENCE)


def _obey(limiter: RateLimiter, pipe: Connection) -> None:
    while True:
        try:
            name, *args = pipe.recv()
        except EOFError:
            return
        try:
            if name == "set":
                pipe.send(setattr(limiter, "samples_per_insert", args[0]))
            else:
                pipe.send(getattr(limiter, name)(*args))
        except Exception as error:
            pipe.send(error)


@contextmanager
def others(limiter: RateLimiter, *start_methods: str) -> Iterator[list[Other]]:
    started = [Other(limiter, method) for method in start_methods]
    try:
        yield started
    finally:
        for other in started:
            other.kill()


def in_child(action: Callable[[], object]) -> int:
    """Runs ``action`` in a forked child; returns its exit code."""
    child = FORK.Process(target=action)
    child.start()
    child.join(PATIENCE)
    if child.exitcode is None:
        child.kill()
        pytest.fail("the child hangs")
    return child.exitcode


def may_sample(limiter: RateLimiter, n: int) -> bool:
    try:
        limiter.wait_to_sample(n, timeout=0.0)
    except RateLimitTimeoutError:
        return False
    return True


def insert_all(limiter: RateLimiter) -> int:
    """Inserts as long as that may go ahead; returns how many there were."""
    inserts = 0
    while limiter.wait_to_insert(timeout=0.0):
        limiter.count_insert()
        inserts += 1
        assert inserts < 100_000, "nothing limits the inserts"
    return inserts


# ------------------------------------------------------------------------------------------------ the definition


def test_goes_ahead_when_the_definition_says_so() -> None:
    went = {answer for seed in range(12) for answer in answers_to_random_calls(random.Random(seed))}
    assert went == {("insert", True), ("insert", False), ("sample", True), ("sample", False)}


def answers_to_random_calls(rng: random.Random) -> Iterator[tuple[str, bool]]:
    """Holds a limiter against the definition, in any order of calls; says what might go ahead, and what not."""
    first, min_diff, max_diff = rng.randint(1, 6), rng.choice([-math.inf, -20.0, 4.0]), rng.choice([30.0, 64.0])
    ratio = rng.choice([2.0, 8.0])
    limiter = RateLimiter(ratio, min_size_to_sample=first, min_diff=min_diff, max_diff=max_diff)
    diff, size, inserts, samples, paused = 0.0, 0, 0, 0, False
    for _ in range(300):
        kind, n = rng.choice(["insert"] * 8 + ["sample"] * 6 + ["set", "pause", "resume"]), rng.randint(1, 16)
        if kind == "insert":
            goes = paused or size < first or diff + ratio <= max_diff
            assert limiter.wait_to_insert(timeout=0.0) is goes
            yield kind, goes
            if goes:
                limiter.count_insert()
                size += 1
                diff += 0 if paused else ratio
                inserts += not paused
        elif kind == "sample":
            goes = paused or (size >= first and diff - n >= min_diff)
            assert may_sample(limiter, n) is goes
            yield kind, goes
            if goes:
                limiter.count_sample(n)
                diff -= 0 if paused else n
                samples += 0 if paused else n
        elif kind == "set":
            limiter.samples_per_insert = ratio = rng.choice([0.5, 1.0, 2.0, 8.0])
            diff = min(diff, max_diff)
        else:
            getattr(limiter, kind)()
            paused = kind == "pause"
        stats = limiter.stats()
        assert (stats["inserts"], stats["samples"], stats["diff"]) == (inserts, samples, diff)
        assert (limiter.samples_per_insert, limiter.paused) == (ratio, paused)


@pytest.mark.parametrize(
    ("ratio", "first", "free", "ahead"), [(4.0, 1, 1, 2), (4.0, 10, 10, 2), (4.0, 100, 100, 10), (0.5, 1, 1, 4)]
)
def test_default_max_diff_lets_some_inserts_go_ahead(ratio: float, first: int, free: int, ahead: int) -> None:
    assert insert_all(RateLimiter(ratio, min_size_to_sample=first)) == free + ahead

    prefilled = RateLimiter(ratio, min_size_to_sample=first)
    prefilled.pause()
    prefilled.count_insert(first)
    prefilled.resume()
    assert insert_all(prefilled) == ahead, "what was free was free once"

    halfway = RateLimiter(ratio, min_size_to_sample=first)
    halfway.count_insert(first // 2)
    halfway.samples_per_insert = ratio
    assert first // 2 + insert_all(halfway) == free + ahead


def test_infinite_limits_never_hold() -> None:
    limiter = RateLimiter(1.0, min_size_to_sample=3, max_diff=math.inf)
    limiter.count_insert(2)
    assert not may_sample(limiter, 1)
    limiter.count_insert(10_000)
    assert limiter.wait_to_insert(timeout=0.0)
    limiter.count_sample(1_000_000)
    assert may_sample(limiter, 1_000_000)


# ------------------------------------------------------------------------------------------ changes while running


@pytest.mark.parametrize(("before", "after"), [(4.0, 8.0), (8.0, 4.0), (1.0, 1000.0), (1000.0, 1.0), (0.5, 4.0)])
def test_a_new_ratio_holds_from_the_next_draw_on(before: float, after: float) -> None:
    limiter, draws = RateLimiter(before), 3000
    for _ in range(draws):
        limiter.count_sample(1)
        insert_all(limiter)
    limiter.samples_per_insert = after
    assert math.isnan(limiter.stats()["samples_per_insert_measured"])
    inserts = insert_all(limiter)
    assert inserts <= 3, "producers run ahead"
    for _ in range(draws):
        limiter.count_sample(1)
        inserts += insert_all(limiter)
    assert abs(inserts - draws / after) <= 3
    assert limiter.stats()["samples_per_insert_measured"] == draws / inserts


def test_producers_that_are_behind_catch_up_after_a_new_ratio() -> None:
    limiter = RateLimiter(4.0, max_diff=8.0)
    limiter.count_sample(800)
    limiter.samples_per_insert = 8.0
    assert limiter.stats()["diff"] == -800.0
    assert insert_all(limiter) == 101


def test_a_ratio_that_the_limits_leave_no_room_for_changes_nothing() -> None:
    limiter = RateLimiter(4.0, min_diff=0.0, max_diff=20.0)
    limiter.count_insert(2)
    before = limiter.stats()
    with pytest.raises(InvalidArgumentError, match=r"min_diff \+ samples_per_insert \+ 1 = 41, got 20"):
        limiter.samples_per_insert = 40.0
    with pytest.raises(InvalidArgumentError, match="samples_per_insert"):
        limiter.samples_per_insert = -1.0
    assert limiter.stats() == pytest.approx(before, nan_ok=True)


def test_every_process_sees_and_makes_every_change() -> None:
    with ExitStack() as stack:
        pairs = []
        for start_method in ("spawn", "forkserver", "fork"):  # all are started before the first is waited for
            limiter = RateLimiter(4.0, min_size_to_sample=5, max_diff=100.0)
            pairs.append((limiter, *stack.enter_context(others(limiter, start_method))))
        for limiter, other in pairs:
            limiter.count_insert(1)
            other.ask("count_insert", 2)
            other.ask("pause")
            assert limiter.paused
            limiter.count_insert(50)
            limiter.count_sample(50)
            other.ask("count_insert", 50)
            limiter.resume()
            assert other.ask("stats")["diff"] == 12.0
            other.ask("set", 8.0)
            assert limiter.samples_per_insert == 8.0
            limiter.count_insert(1)
            other.ask("count_sample", 4)
            expected = {"inserts": 4, "samples": 4, "samples_per_insert": 8.0, "samples_per_insert_measured": 4.0}
            assert limiter.stats() == other.ask("stats") == {**expected, "diff": 16.0, "waiting_producers": 0}


# -------------------------------------------------------------------------------------------------------- counting


def test_no_count_is_lost_between_threads_processes_and_changes() -> None:
    limiter = RateLimiter(2.0, max_diff=math.inf)
    threads_each, counts = 3, 2000

    def count() -> None:
        for _ in range(counts):
            limiter.count_insert()
            limiter.count_sample(3)

    def count_in_threads() -> None:
        threads = [threading.Thread(target=count) for _ in range(threads_each)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)

    children = [FORK.Process(target=count_in_threads) for _ in range(3)]
    for child in children:
        child.start()
    while any(child.is_alive() for child in children):
        limiter.samples_per_insert = 6.0 - limiter.samples_per_insert
        stats = limiter.stats()
        assert 0 <= stats["inserts"] <= len(children) * threads_each * counts
    for child in children:
        child.join(PATIENCE)
        assert child.exitcode == 0
    stats = limiter.stats()
    assert (stats["inserts"], stats["samples"]) == (3 * threads_each * counts, 3 * 3 * threads_each * counts)


def test_threads_of_one_process_lose_no_count() -> None:
    limiter = RateLimiter(2.0)
    # Threads meet between any two instructions of an addition: one that stands still there lets the other go on.
    entered, go_on = threading.Event(), threading.Event()

    def stop_in_the_middle(_: int) -> None:
        entered.set()
        go_on.wait(0.0005)

    slow = threading.Thread(target=lambda: at_every_instruction(limiter.count_insert, stop_in_the_middle))
    slow.start()
    assert entered.wait(PATIENCE)
    counts = 0
    while slow.is_alive():
        limiter.count_insert()
        counts += 1
    slow.join(PATIENCE)
    assert limiter.stats()["inserts"] == counts + 1


def test_a_forked_child_counts_in_a_row_of_its_own() -> None:
    limiter = RateLimiter(2.0)
    limiter.count_insert(5)
    row = limiter._row
    with others(limiter, "fork") as [child]:
        child.ask("count_insert", 7)
        assert row is not None
        assert row[rate_limiter.INSERTS] == 5
        limiter.count_insert(2)
        child.ask("count_insert", 1)
        assert limiter.stats()["inserts"] == child.ask("stats")["inserts"] == 15


def test_a_child_forked_while_another_thread_counts_does_not_hang() -> None:
    limiter = RateLimiter(2.0)
    limiter.count_insert()
    with limiter._mutex:  # held as by a thread that the fork leaves behind
        assert in_child(limiter.count_insert) == 0
    assert limiter.stats()["inserts"] == 2


def test_counts_of_a_killed_process_stay() -> None:
    limiter = RateLimiter(2.0, max_diff=math.inf)
    counted = FORK.RawValue("q", 0)

    def count_for_ever() -> None:
        while True:
            limiter.count_insert()
            limiter.count_sample(2)
            counted.value += 1

    child = FORK.Process(target=count_for_ever)
    child.start()
    wait_until(lambda: counted.value > 1000)
    child.kill()
    child.join(PATIENCE)
    stats = limiter.stats()
    assert counted.value <= stats["inserts"] <= counted.value + 1
    assert 2 * counted.value <= stats["samples"] <= 2 * counted.value + 2
    limiter.count_insert(10)
    assert in_child(lambda: limiter.count_insert(100)) == 0
    assert limiter.stats()["inserts"] == stats["inserts"] + 110


def kill_at_every(step: int, action: Callable[[], object]) -> Iterator[int]:
    """Kills forked children at every ``step``-th instruction of ``action``, until one lives to its end."""

    def act(at: int) -> None:
        at_every_instruction(action, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == at else None)

    at = 0
    while in_child(partial(act, at)) == -signal.SIGKILL:
        yield at
        at += step
    assert at > 10 * step, "hardly any instruction was met"


def test_killed_at_any_instruction_of_a_first_count() -> None:
    limiter = RateLimiter(2.0)
    before = 0
    for _ in kill_at_every(5, limiter.count_insert):
        after = limiter.stats()["inserts"]
        assert after in (before, before + 1)
        limiter.count_insert()
        assert limiter.stats()["inserts"] == after + 1
        before = after + 1


def test_killed_at_any_instruction_of_a_change() -> None:
    limiter = RateLimiter(2.0, max_diff=math.inf)
    limiter.count_insert(10)
    limiter.count_sample(7)
    changed = 0
    for _ in kill_at_every(11, lambda: setattr(limiter, "samples_per_insert", 5.0)):
        assert limiter.stats()["diff"] == 13.0
        assert limiter.samples_per_insert in (2.0, 5.0)
        changed += limiter.samples_per_insert == 5.0
        limiter.samples_per_insert = 2.0
    assert changed > 0
    assert limiter.stats()["inserts"] == 10


def test_who_looks_between_any_two_instructions_of_a_change_sees_it_whole_or_not_at_all() -> None:
    limiter = RateLimiter(2.0, max_diff=math.inf)
    limiter.count_insert(10)
    limiter.count_sample(7)
    ratios = []

    def look(_: int) -> None:
        assert limiter.stats()["diff"] == 13.0
        ratios.append(limiter.samples_per_insert)

    assert at_every_instruction(lambda: setattr(limiter, "samples_per_insert", 5.0), look) > 50
    assert ratios == sorted(ratios)
    assert set(ratios) == {2.0, 5.0}


def test_a_change_between_any_two_instructions_of_who_looks_is_not_torn() -> None:
    limiter = RateLimiter(2.0, max_diff=math.inf)
    limiter.count_insert(5)
    seen = []

    def look() -> None:
        seen.append(limiter.stats()["diff"])

    def prefill() -> None:
        limiter.pause()
        limiter.count_insert(1000)
        limiter.resume()

    for at in range(at_every_instruction(look, lambda _: None)):
        at_every_instruction(look, lambda n, at=at: prefill() if n == at else None)
    assert set(seen) == {10.0}


def test_only_a_first_count_and_a_change_wait_for_the_lock() -> None:
    limiter = RateLimiter(2.0, max_diff=10.0)
    with others(limiter, "fork", "fork", "fork") as [counting, new, changing]:
        counting.ask("count_insert", 1)
        with limiter._lock:  # as of a process that stands still inside it
            new.tell("count_insert", 1)
            changing.tell("set", 4.0)
            counting.ask("count_insert", 1)
            counting.ask("count_sample", 1)
            counting.ask("wait_to_sample", 1, 0.0)
            assert counting.ask("wait_to_insert", 0.0) is True
            assert counting.ask("stats")["diff"] == 3.0
            assert not new.answers_within(0.1)
            assert not changing.answers_within(0.1)
        new.answer()
        changing.answer()
        assert (limiter.stats()["inserts"], limiter.samples_per_insert) == (3, 4.0)


def test_rows_of_the_dead_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limiter, "ROWS", 3)
    limiter = RateLimiter(2.0)
    limiter.count_insert()

    def count_and_die() -> None:
        limiter.count_insert()
        limiter.count_sample(3)
        os.kill(os.getpid(), signal.SIGKILL)

    for number in range(1, 10):
        assert in_child(count_and_die) == -signal.SIGKILL
        stats = limiter.stats()
        assert (stats["inserts"], stats["samples"]) == (1 + number, 3 * number)

    with others(limiter, "fork", "fork", "fork") as [first, second, third]:
        first.ask("count_insert", 1)
        second.ask("count_insert", 1)
        with pytest.raises(SharingError, match=f"3 living processes .* process {third.process.pid} is one too many"):
            third.ask("count_insert", 1)
        first.kill()
        third.ask("count_insert", 1)
        assert limiter.stats()["inserts"] == 10 + 3
        # The id of a dead process is given to another one, which never claimed the row.
        row_of_second = limiter._rows[limiter._rows[:, rate_limiter.PID] == second.process.pid][0]
        limiter._rows[limiter._rows[:, rate_limiter.PID] == second.process.pid, rate_limiter.PROCESS_START] -= 1
        assert in_child(count_and_die) == -signal.SIGKILL
        assert second.process.pid not in limiter._rows[:, rate_limiter.PID]
        assert row_of_second[rate_limiter.PID] == second.process.pid, "a copy, taken before"
        assert limiter.stats()["inserts"] == 10 + 4


# --------------------------------------------------------------------------------------------------------- waiting


def test_producers_wait_until_enough_is_drawn() -> None:
    limiter = RateLimiter(4.0, max_diff=8.0)
    limiter.count_insert(2)
    with others(limiter, "fork", "fork") as [first, second]:
        first.tell("wait_to_insert", PATIENCE)
        wait_until(lambda: limiter.stats()["waiting_producers"] == 1)
        second.tell("wait_to_insert", PATIENCE)
        wait_until(lambda: limiter.stats()["waiting_producers"] == 2)
        limiter.count_sample(3)
        assert not first.answers_within(0.1)
        limiter.count_sample(1)
        assert first.answer() is True
        assert second.answer() is True
        assert limiter.stats()["waiting_producers"] == 0


def test_a_pause_lets_those_who_wait_go() -> None:
    limiter = RateLimiter(4.0, min_size_to_sample=2, max_diff=8.0)
    with others(limiter, "fork", "fork") as [producer, consumer]:
        consumer.tell("wait_to_sample", 4, PATIENCE)
        assert not consumer.answers_within(0.1)
        limiter.pause()
        assert consumer.answer() is None
        limiter.resume()
        limiter.count_insert(2)
        producer.tell("wait_to_insert", PATIENCE)
        wait_until(lambda: limiter.stats()["waiting_producers"] == 1)
        limiter.pause()
        assert producer.answer() is True


def test_a_producer_killed_while_it_waits_is_not_counted_as_waiting() -> None:
    limiter = RateLimiter(4.0, max_diff=8.0)
    limiter.count_insert(2)
    with others(limiter, "fork", "fork") as [first, second]:
        first.tell("wait_to_insert", PATIENCE)
        second.tell("wait_to_insert", PATIENCE)
        wait_until(lambda: limiter.stats()["waiting_producers"] == 2)
        first.kill()
        assert limiter.stats()["waiting_producers"] == 1
        limiter.count_sample(4)
        assert second.answer() is True


def test_a_wait_to_insert_ends_in_time_or_interrupted() -> None:
    limiter = RateLimiter(4.0, max_diff=8.0)
    limiter.count_insert(2)
    looks = 0

    def count_looks() -> bool:
        nonlocal looks
        looks += 1
        return False

    before = time.monotonic()
    assert limiter.wait_to_insert(0.3, interrupted=count_looks) is False
    assert 0.3 <= time.monotonic() - before < PATIENCE / 2
    assert 1 <= looks <= 25, "a wait must be cheap"

    stop = threading.Event()
    answers: list[bool] = []
    waiting = threading.Thread(
        target=lambda: answers.append(limiter.wait_to_insert(PATIENCE, interrupted=stop.is_set)), daemon=True
    )
    waiting.start()
    wait_until(lambda: limiter.stats()["waiting_producers"] == 1)
    stop.set()
    waiting.join(PATIENCE / 2)
    assert answers == [False]

    def fail() -> bool:
        raise KeyError("raised while waiting")

    with pytest.raises(KeyError):
        limiter.wait_to_insert(PATIENCE, interrupted=fail)
    assert limiter.stats()["waiting_producers"] == 0


def test_consumers_wait_until_enough_is_inserted() -> None:
    limiter = RateLimiter(4.0, min_size_to_sample=3, min_diff=0.0, max_diff=40.0)
    with others(limiter, "fork") as [consumer]:
        consumer.tell("wait_to_sample", 16, PATIENCE)
        limiter.count_insert(3)
        assert not consumer.answers_within(0.1)
        limiter.count_insert()
        assert consumer.answer() is None


def test_a_wait_to_sample_that_ends_in_time_says_what_was_missing() -> None:
    limiter = RateLimiter(4.0, min_size_to_sample=3, min_diff=0.0, max_diff=40.0)
    limiter.count_insert(2)
    before = time.monotonic()
    with pytest.raises(RateLimitTimeoutError, match=r"min_size_to_sample=3 trajectories, of which there were 2"):
        limiter.wait_to_sample(1, timeout=0.2)
    assert 0.2 <= time.monotonic() - before < PATIENCE / 2
    limiter.count_insert(2)
    limiter.count_sample(9)
    counters = "inserts=4, samples=9, samples_per_insert=4, samples_per_insert_measured=2.25, diff=7"
    with pytest.raises(TimeoutError, match=rf"diff - 8 of at least min_diff=0 \({counters}.*Look whether"):
        limiter.wait_to_sample(8, timeout=0.0)


def test_a_sample_that_the_limits_leave_no_room_for_is_refused_at_once() -> None:
    limiter = RateLimiter(4.0, min_diff=0.0, max_diff=40.0)
    limiter.count_insert(9)
    limiter.wait_to_sample(36, timeout=PATIENCE)
    with pytest.raises(InvalidArgumentError, match=r"To draw 37 chunks at once, max_diff must be at least .* = 41"):
        limiter.wait_to_sample(37, timeout=PATIENCE)


def test_two_producers_keep_pace_with_a_consumer() -> None:
    ratio, batch, batches = 8.0, 32, 60
    limiter = RateLimiter(ratio, max_diff=3 * ratio)
    stop = FORK.Event()

    def produce() -> None:
        while not stop.is_set():
            if limiter.wait_to_insert(PATIENCE, interrupted=stop.is_set):
                limiter.count_insert()

    producers = [FORK.Process(target=produce, daemon=True) for _ in range(2)]
    for producer in producers:
        producer.start()
    for number in range(1, batches + 1):
        limiter.wait_to_sample(batch, timeout=PATIENCE)
        limiter.count_sample(batch)
        needed = number * batch / ratio
        wait_until(lambda needed=needed: limiter.stats()["inserts"] >= needed)
        # A producer can have had leave to insert before the other one counted: one each beyond the limit.
        assert limiter.stats()["inserts"] <= needed + 3 + len(producers)
    stop.set()
    for producer in producers:
        producer.join(PATIENCE)
        assert producer.exitcode == 0


# ------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples_per_insert": 0.0}, "samples_per_insert must be"),
        ({"samples_per_insert": math.inf}, "samples_per_insert must be"),
        ({"samples_per_insert": "4"}, "samples_per_insert must be"),
        ({"min_size_to_sample": 0}, "min_size_to_sample must be"),
        ({"min_size_to_sample": 1.0}, "min_size_to_sample must be"),
        ({"min_diff": math.inf}, "min_diff must be"),
        ({"min_diff": math.nan}, "min_diff must be"),
        ({"max_diff": -math.inf}, "max_diff must be"),
        ({"max_diff": math.nan}, "max_diff must be"),
        ({"min_diff": 0.0, "max_diff": 4.5}, r"max_diff must be at least .* = 5, got 4.5"),
        ({"min_diff": 9.0}, r"max_diff must be at least .* = 14, got 12"),
    ],
)
def test_what_can_not_work_is_refused_where_it_is_given(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        RateLimiter(**{"samples_per_insert": 4.0, **arguments})


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("count_insert", (-1,)),
        ("count_sample", (1.0,)),
        ("wait_to_insert", (-1.0,)),
        ("wait_to_insert", (math.nan,)),
        ("wait_to_sample", (0, 1.0)),
        ("wait_to_sample", (1, -1.0)),
    ],
)
def test_calls_refuse_what_can_not_work(method: str, arguments: tuple[Any, ...]) -> None:
    limiter = RateLimiter(4.0)
    with pytest.raises(InvalidArgumentError):
        getattr(limiter, method)(*arguments)
    assert limiter.stats()["inserts"] == limiter.stats()["samples"] == 0


def test_only_a_process_that_is_being_started_gets_it() -> None:
    with pytest.raises(SharingError):
        pickle.dumps(RateLimiter(4.0))
