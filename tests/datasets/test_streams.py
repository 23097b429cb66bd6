from __future__ import annotations

import copy
import multiprocessing
import pickle
from itertools import product
from typing import Any

import pytest
from waiting import PATIENCE

from embodichain_rl.datasets.streams import MAX_WORKERS, IterationCounter, stream_seeds
from embodichain_rl.errors import InvalidArgumentError


def test_seeds_are_a_function_of_who_draws_and_of_nothing_else() -> None:
    who = list(product((0, 1, 7), range(3), range(3), range(3)))
    drawn = [stream_seeds(*each) for each in who]
    assert drawn == [stream_seeds(*each) for each in who]
    numbers = [number for pair in drawn for number in pair]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 2**64 for number in numbers)


def test_without_a_seed_they_never_come_again() -> None:
    assert len({stream_seeds(None, 0, 0, 0) for _ in range(100)}) == 100


def test_each_worker_has_a_count_of_its_own() -> None:
    counter = IterationCounter()
    assert [counter.begin(worker) for worker in (0, 0, 1, 0, MAX_WORKERS - 1)] == [0, 1, 0, 2, 0]
    with pytest.raises(InvalidArgumentError, match=str(MAX_WORKERS)):
        counter.begin(MAX_WORKERS)


def test_a_copy_counts_on_by_itself() -> None:
    counter = IterationCounter()
    counter.begin(0)
    for other in (copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))):
        assert [other.begin(0), other.begin(0)] == [1, 2]
    assert counter.begin(0) == 1


def _count(counter: IterationCounter, times: int, results: Any) -> None:
    results.put([counter.begin(0) for _ in range(times)])


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_processes_count_together_and_no_number_comes_twice(method: str) -> None:
    context = multiprocessing.get_context(method)
    counter, results = IterationCounter(), context.Queue()
    processes = [context.Process(target=_count, args=(counter, 2000, results)) for _ in range(2)]
    for process in processes:
        process.start()
    numbers = [number for _ in processes for number in results.get(timeout=PATIENCE)]
    for process in processes:
        process.join(PATIENCE)
    assert sorted(numbers) == list(range(4000))
    assert counter.begin(0) == 4000
