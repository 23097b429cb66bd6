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
    assert [counter.begin(0, worker) for worker in (0, 0, 1, 0, MAX_WORKERS - 1)] == [0, 1, 0, 2, 0]
    with pytest.raises(InvalidArgumentError, match=str(MAX_WORKERS)):
        counter.begin(0, MAX_WORKERS)


def test_a_copy_counts_on_by_itself() -> None:
    counter = IterationCounter()
    counter.begin(0, 0)
    for other in (copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))):
        assert [other.begin(0, 0), other.begin(0, 0)] == [1, 2]
    assert counter.begin(0, 0) == 1


def test_each_rank_has_counts_of_its_own() -> None:
    counter = IterationCounter()
    assert [counter.begin(rank, 0) for rank in (0, 0, 1, 0, 1, 2)] == [0, 1, 0, 2, 1, 0]
    assert [counter.begun(rank) for rank in (0, 1, 2, 3)] == [3, 2, 1, 0]


def test_the_workers_of_a_loader_begin_the_same_iteration() -> None:
    counter = IterationCounter()
    first, second, third = 71, 72, 73
    assert [counter.begin(0, worker, first) for worker in (0, 1)] == [0, 0]
    assert counter.begin(0, 0, second) == 1  # its worker 1 is killed before it begins
    assert [counter.begin(0, worker, third) for worker in (1, 0)] == [2, 2]
    assert [counter.begin(0, worker, third) for worker in (0, 1)] == [3, 3]  # of a loader that keeps its workers


def test_two_loaders_at_the_same_time_keep_their_iterations() -> None:
    counter = IterationCounter()
    begun = [counter.begin(0, worker, loader) for worker in (0, 1) for loader in (71, 72)]
    assert begun == [0, 1, 0, 1]


def _count(counter: IterationCounter, times: int, results: Any) -> None:
    results.put([counter.begin(0, 0) for _ in range(times)])


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
    assert counter.begin(0, 0) == 4000
