from __future__ import annotations

import copy
import math
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from embodichain_rl.datasets.sampler import ChunkSizeSampler, GMMChunkSampler, UniformChunkSampler
from embodichain_rl.errors import EmbodiChainRLError, InvalidArgumentError

START_METHODS = ["fork", "spawn", "forkserver"]


class Multiples(ChunkSizeSampler):
    """As a user would write one: no call of the base class's constructor."""

    def __init__(self, of: int) -> None:
        self.of = of

    def __call__(self) -> int:
        return self.of * int(self.generator.integers(1, 10**6))


class Fixed(ChunkSizeSampler):
    def __call__(self) -> int:
        return 8


class SizesByWorker(IterableDataset):
    """Each worker yields its id and the sizes that it drew."""

    def __init__(self, sampler: ChunkSizeSampler | None = None, worker_seed: int | None = None) -> None:
        self.sampler = sampler
        self.worker_seed = worker_seed

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        worker = get_worker_info()
        assert worker is not None
        sampler = self.sampler or wide(seed=5)
        if self.worker_seed is not None:
            sampler.manual_seed(self.worker_seed)
        yield worker.id, draw(sampler)


class SizesOfWorkerAndItsFork(IterableDataset):
    def __init__(self, sampler: ChunkSizeSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        yield draw(self.sampler)
        yield draw_in_fork(self.sampler)


def wide(seed: int | None = None) -> UniformChunkSampler:
    """So many sizes that two streams of 32 agree by chance less than once in 10^190 times."""
    return UniformChunkSampler(1, 10**6, seed=seed)


def wide_mixture(seed: int | None = None) -> GMMChunkSampler:
    return GMMChunkSampler([10**6, 2 * 10**6], [10**5, 10**5], seed=seed)


def draw(sampler: ChunkSizeSampler, count: int = 32) -> list[int]:
    return [sampler() for _ in range(count)]


def draw_in_fork(sampler: ChunkSizeSampler) -> list[int]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        sender.send(draw(sampler))
        os._exit(0)
    drawn = receiver.recv()
    os.waitpid(child, 0)
    return list(drawn)


def send_draws(sampler: ChunkSizeSampler, connection: Connection) -> None:
    connection.send(draw(sampler))


def draws_in_children(sampler: ChunkSizeSampler, start_method: str = "fork", children: int = 2) -> list[list[int]]:
    context: Any = multiprocessing.get_context(start_method)
    pipes = [context.Pipe(duplex=False) for _ in range(children)]
    processes = [context.Process(target=send_draws, args=(sampler, sender)) for _, sender in pipes]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    drawn = [receiver.recv() for receiver, _ in pipes]
    for process in processes:
        process.join()
    return drawn


def draws_in_workers(dataset: SizesByWorker, start_method: str = "fork", workers: int = 2) -> dict[int, list[int]]:
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=start_method)
    return {worker: list(sizes) for worker, sizes in loader}


def all_different(streams: list[list[int]]) -> bool:
    return len({tuple(stream) for stream in streams}) == len(streams)


def chi_square(observed: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The statistic, and the value that it passes once in a thousand times (Wilson and Hilferty)."""
    freedom = len(expected) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return statistic, freedom * (1 - spread + 3.0902 * math.sqrt(spread)) ** 3


def gaussian_below(value: float, mean: float, std: float) -> float:
    return 0.5 * (1 + math.erf((value - mean) / (std * math.sqrt(2))))


class TestUniform:
    def test_every_size_is_equally_likely_and_both_ends_are_in(self) -> None:
        drawn = draw(UniformChunkSampler(3, 12, seed=0), 20_000)
        observed = np.bincount(drawn, minlength=13)[3:]
        assert observed.sum() == 20_000
        assert len(observed) == 10
        statistic, limit = chi_square(observed, np.full(10, 2_000.0))
        assert statistic < limit

    def test_one_size(self) -> None:
        assert set(draw(UniformChunkSampler(7, 7))) == {7}

    def test_largest_bound(self) -> None:
        assert UniformChunkSampler(2**63 - 1, 2**63 - 1)() == 2**63 - 1

    def test_repr_can_be_evaluated(self) -> None:
        sampler = UniformChunkSampler(np.int32(3), np.int64(12), seed=np.uint8(4))
        assert repr(sampler) == "UniformChunkSampler(low=3, high=12, seed=4)"
        assert draw(eval(repr(sampler))) == draw(sampler)


class TestMixture:
    def test_distribution(self) -> None:
        means, stds, weights, low, high = [20.0, 50.0], [3.0, 6.0], [3.0, 1.0], 15, 55
        count = 40_000
        drawn = draw(GMMChunkSampler(means, stds, weights, low, high, seed=0), count)

        def below(value: float) -> float:
            parts = zip(weights, means, stds, strict=True)
            return sum(weight * gaussian_below(value, mean, std) for weight, mean, std in parts) / sum(weights)

        edges = [-math.inf, *[size + 0.5 for size in range(low, high)], math.inf]
        expected = count * np.diff([below(edge) for edge in edges])
        observed = np.bincount(drawn, minlength=high + 1)[low:]
        assert observed.sum() == count
        assert len(observed) == len(expected) == high - low + 1
        assert (expected > 5).all()
        statistic, limit = chi_square(observed, expected)
        assert statistic < limit

    def test_weights_need_not_sum_to_one(self) -> None:
        sizes = GMMChunkSampler([10, 20], [0, 0], weights=[30, 10], seed=0)
        share = draw(sizes, 10_000).count(10) / 10_000
        assert share == pytest.approx(0.75, abs=0.02)

    def test_without_weights_all_components_are_equally_likely(self) -> None:
        drawn = draw(GMMChunkSampler([10, 20, 30], [0, 0, 0], seed=0), 9_000)
        statistic, limit = chi_square(np.bincount(drawn)[[10, 20, 30]], np.full(3, 3_000.0))
        assert statistic < limit

    @pytest.mark.parametrize("weights", [[0, 1, 0], [0, 5e-324, 0], [0.0, 1e308, 0]])
    def test_component_of_weight_zero_is_never_drawn(self, weights: list[float]) -> None:
        assert set(draw(GMMChunkSampler([10, 20, 30], [0, 0, 0], weights, seed=0), 500)) == {20}

    def test_extreme_weights(self) -> None:
        drawn = draw(GMMChunkSampler([10, 20], [0, 0], weights=[1.7e308, 1.7e308], seed=0), 1_000)
        assert 400 < drawn.count(10) < 600

    def test_rounds_to_the_nearest(self) -> None:
        assert set(draw(GMMChunkSampler([9.4, 9.6], [0, 0], seed=0))) == {9, 10}

    @pytest.mark.parametrize("mean", [-50.0, 0.0, 0.4, 0.6])
    def test_never_below_one(self, mean: float) -> None:
        assert set(draw(GMMChunkSampler([mean], [0]))) == {1}
        assert min(draw(GMMChunkSampler([mean], [3.0], seed=0), 500)) == 1

    def test_bounds_hold_what_falls_outside(self) -> None:
        drawn = draw(GMMChunkSampler([10], [20], low=8, high=12, seed=0), 500)
        assert set(drawn) == {8, 9, 10, 11, 12}

    def test_a_gaussian_as_wide_as_floats_go(self) -> None:
        drawn = draw(GMMChunkSampler([1e308], [1e308], seed=0), 200)
        assert set(drawn) == {1, 2**63 - 1}

    def test_answers_are_python_ints(self) -> None:
        sizes = GMMChunkSampler(np.array([10.5, 300]), np.array([5.0, 0]), low=np.int16(8), high=np.int64(16), seed=0)
        assert {type(size) for size in draw(sizes, 200)} == {int}
        assert {type(size) for size in draw(UniformChunkSampler(np.int32(1), np.uint8(9)), 200)} == {int}

    def test_arguments_are_copied(self) -> None:
        means, stds = [10.0], [0.0]
        sizes = GMMChunkSampler(means, stds)
        means[0] = 99.0
        assert sizes() == 10

    def test_repr_can_be_evaluated(self) -> None:
        sampler = GMMChunkSampler(np.array([8, 32]), (1, 2), [3, 1], high=40, seed=4)
        assert repr(sampler) == (
            "GMMChunkSampler(means=[8.0, 32.0], stds=[1.0, 2.0], weights=[3.0, 1.0], low=None, high=40, seed=4)"
        )
        assert draw(eval(repr(sampler))) == draw(sampler)


@pytest.mark.parametrize("make", [wide, wide_mixture])
class TestStreamInOneProcess:
    def test_seed_repeats_it(self, make: Callable[..., ChunkSizeSampler]) -> None:
        assert draw(make(seed=1)) == draw(make(seed=1))
        assert draw(make(seed=1)) != draw(make(seed=2))

    def test_without_seed_it_is_new_every_time(self, make: Callable[..., ChunkSizeSampler]) -> None:
        assert draw(make()) != draw(make())

    def test_numpy_and_torch_seeds_stay_out_of_it(self, make: Callable[..., ChunkSizeSampler]) -> None:
        np.random.seed(0)
        first = draw(make())
        np.random.seed(0)
        assert draw(make()) != first

    def test_manual_seed_settles_it(self, make: Callable[..., ChunkSizeSampler]) -> None:
        sampler = make(seed=1)
        expected = draw(make(seed=7))
        draw(sampler, 5)
        assert sampler.manual_seed(7) is None
        assert draw(sampler) == expected
        sampler.manual_seed(np.int64(7))
        assert draw(sampler) == expected
        assert "seed=7" in repr(sampler)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
    @pytest.mark.parametrize("seed", [None, 1])
    def test_a_copy_goes_on_where_the_original_stands(
        self,
        make: Callable[..., ChunkSizeSampler],
        duplicate: Callable[[ChunkSizeSampler], ChunkSizeSampler],
        seed: int | None,
    ) -> None:
        sampler = make(seed=seed)
        draw(sampler, 5)
        twin = duplicate(sampler)
        assert draw(twin) == draw(sampler)


class TestStreamInOtherProcesses:
    @pytest.mark.parametrize("start_method", ["fork", "forkserver"])
    def test_children_repeat_neither_the_parent_nor_each_other(self, start_method: str) -> None:
        sampler = wide(seed=1)
        children = draws_in_children(sampler, start_method)
        assert all_different([draw(sampler), *children])

    @pytest.mark.parametrize("sampler", [wide(), wide_mixture(), wide_mixture(seed=1)], ids=repr)
    def test_children_of_other_samplers(self, sampler: ChunkSizeSampler) -> None:
        children = draws_in_children(sampler)
        assert all_different([draw(sampler), *children])

    def test_the_parent_goes_on_as_if_there_were_no_children(self) -> None:
        sampler = wide(seed=1)
        first = draw(sampler, 4)
        draws_in_children(sampler)
        assert first + draw(sampler, 28) == draw(wide(seed=1))

    def test_a_subclass_that_never_called_our_constructor(self) -> None:
        sampler = Multiples(of=8)
        assert all_different([draw(sampler), *draws_in_children(sampler)])
        sampler.manual_seed(3)
        first = draw(sampler)
        sampler.manual_seed(3)
        assert draw(sampler) == first


class TestStreamInDataLoaderWorkers:
    @pytest.mark.parametrize("make", [wide, wide_mixture])
    def test_a_function_of_seed_and_worker(self, make: Callable[..., ChunkSizeSampler]) -> None:
        first = draws_in_workers(SizesByWorker(make(seed=5)))
        used = make(seed=5)
        draw(used, 3)
        assert draws_in_workers(SizesByWorker(used)) == first
        assert draws_in_workers(SizesByWorker(make(seed=5)), workers=1) == {0: first[0]}
        other = draws_in_workers(SizesByWorker(make(seed=6)))
        assert all_different([draw(make(seed=5)), *first.values(), *other.values()])

    def test_the_same_under_every_start_method(self) -> None:
        streams = [draws_in_workers(SizesByWorker(wide(seed=5)), method) for method in START_METHODS]
        assert streams[0] == streams[1] == streams[2]

    def test_the_same_when_made_in_the_worker(self) -> None:
        made_there = draws_in_workers(SizesByWorker(sampler=None))
        assert made_there == draws_in_workers(SizesByWorker(wide(seed=5)))

    def test_without_seed_new_in_every_worker_and_every_time(self) -> None:
        sampler = wide()
        first = draws_in_workers(SizesByWorker(sampler))
        second = draws_in_workers(SizesByWorker(sampler))
        assert all_different([draw(sampler), *first.values(), *second.values()])

    def test_manual_seed_before_the_workers_start_is_their_seed(self) -> None:
        sampler = wide(seed=1)
        sampler.manual_seed(5)
        assert draws_in_workers(SizesByWorker(sampler)) == draws_in_workers(SizesByWorker(wide(seed=5)))

    def test_manual_seed_in_a_worker_is_exact(self) -> None:
        streams = draws_in_workers(SizesByWorker(wide(seed=1), worker_seed=9))
        assert streams == {0: draw(wide(seed=9)), 1: draw(wide(seed=9))}

    @pytest.mark.parametrize("seed", [None, 5])
    def test_the_fork_of_a_worker_does_not_repeat_it(self, seed: int | None) -> None:
        loader = DataLoader(
            SizesOfWorkerAndItsFork(wide(seed)), batch_size=None, num_workers=1, multiprocessing_context="fork"
        )
        assert all_different([list(sizes) for sizes in loader])


class TestInterface:
    def test_the_base_class_is_abstract(self) -> None:
        with pytest.raises(TypeError, match="abstract"):
            ChunkSizeSampler()  # type: ignore[abstract]

    def test_a_subclass_needs_only_call(self) -> None:
        sampler = Fixed()
        sampler.manual_seed(1)
        assert sampler() == 8
        assert pickle.loads(pickle.dumps(sampler))() == 8

    def test_docstring_examples(self) -> None:
        import doctest

        from embodichain_rl.datasets import sampler

        failed, tried = doctest.testmod(sampler)
        assert failed == 0
        assert tried > 0


def uniform(*args: Any, **kwargs: Any) -> Callable[[], ChunkSizeSampler]:
    return lambda: UniformChunkSampler(*args, **kwargs)


def mixture(*args: Any, **kwargs: Any) -> Callable[[], ChunkSizeSampler]:
    return lambda: GMMChunkSampler(*args, **kwargs)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (uniform(0, 4), "low must be an integer of at least 1, got 0."),
    (uniform(-3, 4), "low must be an integer of at least 1, got -3."),
    (uniform(True, 4), "low must be an integer of at least 1, got True."),
    (uniform(np.bool_(True), 4), f"low must be an integer of at least 1, got {np.bool_(True)!r}."),
    (uniform(1.0, 4), "low must be an integer of at least 1, got 1.0."),
    (uniform(np.float64(2.0), 4), f"low must be an integer of at least 1, got {np.float64(2.0)!r}."),
    (uniform("2", 4), "low must be an integer of at least 1, got '2'."),
    (uniform(None, 4), "low must be an integer of at least 1, got None."),
    (uniform(1, 0), "high must be an integer of at least 1, got 0."),
    (uniform(1, True), "high must be an integer of at least 1, got True."),
    (uniform(1, 4.5), "high must be an integer of at least 1, got 4.5."),
    (uniform(1, math.inf), "high must be an integer of at least 1, got inf."),
    (uniform(1, math.nan), "high must be an integer of at least 1, got nan."),
    (uniform(1, 2**63), "high must be an integer of at most 9223372036854775807, got 9223372036854775808."),
    (uniform(5, 4), "low must not be above high, got low=5 and high=4."),
    (uniform(1, 4, seed=-1), "seed must be an integer of at least 0, got -1."),
    (uniform(1, 4, seed=1.5), "seed must be an integer of at least 0, got 1.5."),
    (uniform(1, 4, seed=False), "seed must be an integer of at least 0, got False."),
    (uniform(1, 4, seed="0"), "seed must be an integer of at least 0, got '0'."),
    (lambda: wide().manual_seed(-1), "seed must be an integer of at least 0, got -1."),
    (lambda: wide().manual_seed(True), "seed must be an integer of at least 0, got True."),
    (lambda: wide().manual_seed(None), "seed must be an integer of at least 0, got None."),  # type: ignore[arg-type]
    (mixture([], []), "means must have at least one number, got none."),
    (mixture(np.empty(0), []), "means must have at least one number, got none."),
    (mixture(8.0, [1.0]), "means must be a sequence of numbers, got 8.0."),
    (mixture(None, [1.0]), "means must be a sequence of numbers, got None."),
    (mixture("88", [1, 1]), "means must be a sequence of numbers, got '88'."),
    (mixture(b"88", [1, 1]), "means must be a sequence of numbers, got b'88'."),
    (mixture({8}, [1]), "means must be a sequence of numbers, got {8}."),
    (mixture(np.ones((2, 1)), [1, 1]), "means must be one-dimensional, got an array of shape (2, 1)."),
    (mixture(np.array(8.0), [1]), "means must be one-dimensional, got an array of shape ()."),
    (mixture([8, "9"], [1, 1]), "means[1] must be a finite number, got '9'."),
    (mixture([8, True], [1, 1]), "means[1] must be a finite number, got True."),
    (mixture([8, None], [1, 1]), "means[1] must be a finite number, got None."),
    (mixture([math.nan], [1]), "means[0] must be a finite number, got nan."),
    (mixture([-math.inf], [1]), "means[0] must be a finite number, got -inf."),
    (mixture([[8]], [1]), "means[0] must be a finite number, got [8]."),
    (mixture([8], []), "stds must have at least one number, got none."),
    (mixture([8, 9], [1]), "stds must have one number for each of the 2 means, got 1."),
    (mixture([8], [1, 1]), "stds must have one number for each of the 1 means, got 2."),
    (mixture([8], [-0.5]), "stds[0] must be a finite number of at least 0, got -0.5."),
    (mixture([8], [math.nan]), "stds[0] must be a finite number of at least 0, got nan."),
    (mixture([8], [math.inf]), "stds[0] must be a finite number of at least 0, got inf."),
    (mixture([8], [False]), "stds[0] must be a finite number of at least 0, got False."),
    (mixture([8], 1.0), "stds must be a sequence of numbers, got 1.0."),
    (mixture([8], [1], weights=[]), "weights must have at least one number, got none."),
    (mixture([8], [1], weights=[1, 1]), "weights must have one number for each of the 1 means, got 2."),
    (mixture([8, 9], [1, 1], weights=[0, 0.0]), "weights must have at least one above 0, got [0.0, 0.0]."),
    (mixture([8, 9], [1, 1], weights=[1, -1]), "weights[1] must be a finite number of at least 0, got -1."),
    (mixture([8, 9], [1, 1], weights=[1, math.nan]), "weights[1] must be a finite number of at least 0, got nan."),
    (mixture([8, 9], [1, 1], weights=[1, math.inf]), "weights[1] must be a finite number of at least 0, got inf."),
    (mixture([8, 9], [1, 1], weights="11"), "weights must be a sequence of numbers, got '11'."),
    (mixture([8], [1], low=0), "low must be an integer of at least 1, got 0."),
    (mixture([8], [1], low=2.0), "low must be an integer of at least 1, got 2.0."),
    (mixture([8], [1], low=True), "low must be an integer of at least 1, got True."),
    (mixture([8], [1], high=0), "high must be an integer of at least 1, got 0."),
    (mixture([8], [1], high=-1), "high must be an integer of at least 1, got -1."),
    (mixture([8], [1], high="16"), "high must be an integer of at least 1, got '16'."),
    (mixture([8], [1], high=math.inf), "high must be an integer of at least 1, got inf."),
    (mixture([8], [1], low=9, high=8), "low must not be above high, got low=9 and high=8."),
    (mixture([8], [1], seed=-1), "seed must be an integer of at least 0, got -1."),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_arguments_are_refused_where_they_are_given(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        call()
    assert str(refusal.value) == message
    assert isinstance(refusal.value, ValueError)
    assert isinstance(refusal.value, EmbodiChainRLError)
