"""What was stopped goes on in another loader, over the same data, as if it had not been."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import check_batch, filled_buffer, indices, loading, overlap, same, take
from scripts import run_script
from steps import small
from tensordict import TensorDict
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from waiting import PATIENCE

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.datasets import ChunkSizeSampler, GMMChunkSampler, OnlineDataset, UniformChunkSampler
from embodichain_rl.datasets.streams import item_seed, stream_seeds
from embodichain_rl.errors import EmptyBufferError, StateMismatchError, UnsupportedOperationError

# torchdata calls what torch no longer wants to be called.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

SIZES: dict[str, Callable[[], Any]] = {
    "fixed": lambda: 8,
    "uniform": lambda: UniformChunkSampler(2, 10),
    "uniform with a seed": lambda: UniformChunkSampler(2, 10, seed=3),
    "mixture": lambda: GMMChunkSampler([3, 9], [1, 2], low=2, high=12),
}


@pytest.fixture(scope="module")
def rb() -> TrajectoryReplayBuffer:
    return filled_buffer()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As a trainer's checkpoint does it, with what torch loads without trusting it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@contextmanager
def stateful(dataset: OnlineDataset, workers: int, method: str = "fork", **kwargs: Any) -> Iterator[StatefulDataLoader]:
    if dataset.batch_size is None:
        kwargs["batch_size"] = 3
    with loading(dataset, workers, method, kind=StatefulDataLoader, **kwargs) as loader:
        yield loader


@pytest.mark.parametrize(
    ("workers", "sizes", "batch_size", "seed", "options"),
    [
        (0, "fixed", 4, 5, {}),
        (0, "uniform", 4, None, {}),
        (0, "mixture", None, 5, {}),
        (0, "uniform with a seed", None, None, {"snapshot_every_n_steps": 3}),
        (2, "fixed", None, None, {}),
        (2, "uniform", 4, 5, {}),
        (2, "uniform", None, 5, {"snapshot_every_n_steps": 4}),
        (2, "mixture", 4, None, {"persistent_workers": True}),
        (2, "uniform with a seed", 4, None, {}),
        (2, "mixture", None, 5, {"persistent_workers": True, "prefetch_factor": 3}),
    ],
)
def test_a_loader_goes_on_where_it_was_stopped(
    rb: TrajectoryReplayBuffer, workers: int, sizes: str, batch_size: int | None, seed: int | None, options: dict
) -> None:
    def dataset() -> OnlineDataset:
        return OnlineDataset(rb, SIZES[sizes](), batch_size, seed=seed)

    with stateful(dataset(), workers, **options) as loader:
        before = [take(loader, 2)]
        iteration = iter(loader)
        before.append([batch.clone() for batch in islice(iteration, 5)])
        state = through_a_file(loader.state_dict())
        expected = [batch.clone() for batch in islice(iteration, 6)]
        expected_next = take(loader, 4)
        del iteration
    with stateful(dataset(), workers, **options) as loader:
        loader.load_state_dict(state)
        assert same(take(loader, 6), expected)
        if seed is not None:  # without one the next iteration is a new one for both
            assert same(take(loader, 4), expected_next)
    if seed is not None:  # as if nobody had asked for the state
        with loading(dataset(), workers, batch_size=None if batch_size else 3) as loader:
            assert same(take(loader, 2), before[0])
            assert same(take(loader, 11), before[1] + expected)
            assert same(take(loader, 4), expected_next)
    everything = sum(before, expected + expected_next)
    assert len({str(index.tolist()) for index in indices(everything)}) == len(everything), "batches come twice"


def test_workers_that_are_started_in_another_way_go_on(rb: TrajectoryReplayBuffer) -> None:
    def dataset() -> OnlineDataset:
        return OnlineDataset(rb, UniformChunkSampler(2, 10), 4, seed=5)

    with stateful(dataset(), 1) as loader:
        take(loader, 3)
        state, expected, expected_next = _stop_after(loader, 3, 4)
    with stateful(dataset(), 1, "forkserver", persistent_workers=True) as loader:
        loader.load_state_dict(through_a_file(state))
        assert same(take(loader, 4), expected)
        assert same(take(loader, 4), expected_next)


def _stop_after(loader: StatefulDataLoader, count: int, more: int) -> tuple[dict, list[TensorDict], list[TensorDict]]:
    iteration = iter(loader)
    collected = [batch.clone() for batch in islice(iteration, count)]
    assert len(collected) == count
    state = loader.state_dict()
    return state, [batch.clone() for batch in islice(iteration, more)], take(loader, more)


def test_stopped_before_the_first_batch(rb: TrajectoryReplayBuffer) -> None:
    for workers in (0, 2):
        with stateful(OnlineDataset(rb, 8, 4), workers) as loader:
            state = loader.state_dict()
            expected = take(loader, 4)
        with stateful(OnlineDataset(rb, 8, 4), workers) as loader:
            loader.load_state_dict(state)
            assert same(take(loader, 4), expected)


def test_stopped_again(rb: TrajectoryReplayBuffer) -> None:
    expected = take(OnlineDataset(rb, UniformChunkSampler(2, 10), 4, seed=5), 9)
    state: dict[str, Any] = {}
    drawn = []
    for _ in range(3):
        with stateful(OnlineDataset(rb, UniformChunkSampler(2, 10), 4, seed=5), 1) as loader:
            loader.load_state_dict(state)
            drawn += take(loader, 3)
            state = through_a_file(loader.state_dict())
    assert same(drawn, expected)


SCRIPT = """
import json, sys
import torch
from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.datasets import OnlineDataset, UniformChunkSampler
from itertools import islice
from torchdata.stateful_dataloader import StatefulDataLoader

folder = sys.argv[1]
rb = TrajectoryReplayBuffer(max_trajectories=40, max_total_steps=2000, chunk_size=8, batch_size=4)
rb.loads(folder + "/buffer")
loader = StatefulDataLoader(
    OnlineDataset(rb, UniformChunkSampler(2, 10), 4, seed=5),
    batch_size=None, num_workers=2, multiprocessing_context="fork",
)
loader.load_state_dict(torch.load(folder + "/loader.pt"))
print(json.dumps([batch["observation"].tolist() for batch in islice(loader, 6)]))
"""


def test_a_new_process_goes_on_with_a_saved_buffer(rb: TrajectoryReplayBuffer, tmp_path: Path) -> None:
    with stateful(OnlineDataset(rb, UniformChunkSampler(2, 10), 4, seed=5), 2) as loader:
        state, expected, _ = _stop_after(loader, 5, 6)
    rb.dumps(tmp_path / "buffer")
    torch.save(state, tmp_path / "loader.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_script(tmp_path / "script.py", str(tmp_path), directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [batch["observation"].tolist() for batch in expected]


# ------------------------------------------------------------------------------------------ the dataset by itself


@settings(max_examples=60)
@given(
    sizes=st.sampled_from(sorted(SIZES)),
    batch_size=st.sampled_from([None, 3]),
    seed=st.sampled_from([None, 5]),
    iterations=st.lists(st.integers(0, 4), max_size=3),
    stop=st.integers(0, 6),
)
def test_a_plain_loader_goes_on_through_its_dataset(
    sizes: str, batch_size: int | None, seed: int | None, iterations: list[int], stop: int
) -> None:
    rb = filled_buffer_once()

    def loader() -> DataLoader:
        dataset = OnlineDataset(rb, SIZES[sizes](), batch_size, seed=seed)
        return DataLoader(dataset, batch_size=None if batch_size else 3)

    stopped, resumed = loader(), loader()
    for count in iterations:
        take(stopped, count)
    iteration = iter(stopped)
    assert len(list(islice(iteration, stop))) == stop
    state = json.loads(json.dumps(stopped.dataset.state_dict()))
    resumed.dataset.load_state_dict(state)
    assert resumed.dataset.state_dict() == state, "what was loaded is not what is saved before the next batch"
    assert same(take(resumed, 4), list(islice(iteration, 4)))
    assert resumed.dataset.state_dict() == stopped.dataset.state_dict()
    if seed is not None:
        assert same(take(resumed, 2), take(stopped, 2))


_buffers: list[TrajectoryReplayBuffer] = []


def filled_buffer_once() -> TrajectoryReplayBuffer:
    if not _buffers:
        _buffers.append(filled_buffer())
    return _buffers[0]


@pytest.mark.parametrize("arguments", [{"pad": "both"}, {"windows": {"action": (-1, 2)}, "chunk_size": None}])
def test_padding_and_windows_go_on(rb: TrajectoryReplayBuffer, arguments: dict[str, Any]) -> None:
    made = [OnlineDataset(**{"source": rb, "chunk_size": 8, "batch_size": 4, **arguments}) for _ in range(2)]
    iteration = iter(made[0])
    list(islice(iteration, 3))
    made[1].load_state_dict(made[0].state_dict())
    for left, right in zip(islice(iteration, 3), made[1], strict=False):
        assert (left == right).all()


def test_torchrls_slices_go_on() -> None:
    rb = TensorDictReplayBuffer(storage=LazyTensorStorage(100), sampler=SliceSampler(slice_len=4), batch_size=8)
    data = torch.cat([small(number, 12) for number in range(4)])
    rb.extend(data.set(("collector", "traj_ids"), torch.arange(4).repeat_interleave(12)))
    made = [OnlineDataset(rb, 4, 3, seed=5) for _ in range(2)]
    iteration = iter(made[0])
    list(islice(iteration, 3))
    made[1].load_state_dict(made[0].state_dict())
    assert same(list(islice(iteration, 3)), take(made[1], 3))


def test_before_the_first_iteration(rb: TrajectoryReplayBuffer) -> None:
    fresh = OnlineDataset(rb, 8, 3, seed=5)
    resumed = OnlineDataset(rb, 8, 3, seed=5)
    take(resumed, 2)  # is behind by an iteration again
    resumed.load_state_dict(fresh.state_dict())
    assert same(take(resumed, 3) + take(resumed, 3), take(fresh, 3) + take(fresh, 3))
    sizes = UniformChunkSampler(2, 10, seed=1)
    sizes()
    fresh, resumed = OnlineDataset(rb, sizes, 3), OnlineDataset(rb, UniformChunkSampler(2, 10, seed=1), 3)
    resumed.load_state_dict(fresh.state_dict())
    assert [b.shape for b in take(resumed, 5)] == [b.shape for b in take(fresh, 5)]


def test_two_iterations_over_one_dataset_are_saved_apart(rb: TrajectoryReplayBuffer) -> None:
    dataset = OnlineDataset(rb, 8, 3, seed=5)
    loaders = [StatefulDataLoader(dataset, batch_size=None) for _ in range(2)]
    iterations = [iter(loader) for loader in loaders]
    for count, iteration in zip((2, 4), iterations, strict=True):
        list(islice(iteration, count))
    for loader, iteration in zip(loaders, iterations, strict=True):
        resumed = StatefulDataLoader(OnlineDataset(rb, 8, 3, seed=5), batch_size=None)
        resumed.load_state_dict(loader.state_dict())
        assert same(take(resumed, 3), [batch.clone() for batch in islice(iteration, 3)])


def test_a_copy_is_saved_by_itself(rb: TrajectoryReplayBuffer) -> None:
    dataset = OnlineDataset(rb, 8, 3, seed=5)
    take(dataset, 2)
    other = copy.deepcopy(dataset)
    state = other.state_dict()
    assert (state["iteration"], state["position"]) == (1, 0)


def test_progress_in_workers_is_not_known_to_the_main_process(rb: TrajectoryReplayBuffer) -> None:
    dataset = OnlineDataset(rb, 8, 3, seed=5)
    with loading(dataset, 1) as loader:
        take(loader, 2)
    with pytest.raises(UnsupportedOperationError, match="StatefulDataLoader"):
        dataset.state_dict()
    take(dataset, 1)
    assert dataset.state_dict()["position"] == 1


# ---------------------------------------------------------------------------------------------- what draws depend on


def test_what_could_not_be_drawn_does_not_move_the_stream() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=4, max_total_steps=100, chunk_size=8)
    rb.extend(small(0, 12))
    expected = take(OnlineDataset(rb, 8, 3, seed=5), 3)
    dataset = OnlineDataset(rb, 8, 3, seed=5)
    iteration = iter(dataset)
    drawn = [next(iteration)["trajectory", "step"]]
    rb.empty()
    for _ in range(3):
        with pytest.raises(EmptyBufferError):
            next(iteration)
    assert dataset.state_dict()["position"] == 1
    rb.extend(small(0, 12))
    drawn += [batch["trajectory", "step"] for batch in islice(iteration, 2)]
    assert all(map(torch.equal, drawn, (batch["trajectory", "step"] for batch in expected)))


def test_items_are_drawn_with_seeds_that_do_not_come_again_within_a_stream() -> None:
    seeds = {stream: [item_seed(stream, n) for n in range(20_000)] for stream in stream_seeds(0, 0, 0, 0)}
    for drawn in seeds.values():
        assert len(set(drawn)) == len(drawn)
        assert 0 <= min(drawn) < max(drawn) < 2**32
    first, second = seeds.values()
    assert first.index(first[7]) == 7
    shared = [(first.index(seed), second.index(seed)) for seed in set(first) & set(second)]
    assert len({left - right for left, right in shared}) == len(shared), "two streams run side by side"


def test_first_numbers_of_items_are_uniform() -> None:
    stream, _ = stream_seeds(5, 0, 0, 0)
    generator = torch.Generator()
    drawn = np.array([torch.rand(2, generator=generator.manual_seed(item_seed(stream, n))) for n in range(20_000)])
    counts, _, _ = np.histogram2d(*drawn.T, bins=10, range=[[0, 1], [0, 1]])
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert 60 < chi_square < 150  # 99 degrees of freedom: one in a thousand streams is outside


# ------------------------------------------------------------------------------------------- states that do not fit


class Curriculum(ChunkSizeSampler):
    """A sampler with more to remember than its random numbers."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> int:
        self.asked += 1
        return min(self.asked, 10) + int(self.generator.integers(2))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "asked": self.asked}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.asked = state["asked"]


class OnlySeeded:
    def __call__(self) -> int:
        return random.randint(2, 8)

    def manual_seed(self, seed: int) -> None:
        random.seed(seed)


def test_a_sampler_of_ones_own_with_more_to_remember(rb: TrajectoryReplayBuffer) -> None:
    with stateful(OnlineDataset(rb, Curriculum(), 3, seed=5), 1) as loader:
        state, expected, _ = _stop_after(loader, 4, 4)
    with stateful(OnlineDataset(rb, Curriculum(), 3, seed=5), 1) as loader:
        loader.load_state_dict(state)
        assert same(take(loader, 4), expected)


def test_random_sizes_that_can_not_say_where_they_stand_are_refused(rb: TrajectoryReplayBuffer) -> None:
    dataset = OnlineDataset(rb, OnlySeeded(), 3, seed=5)
    assert check_batch(next(iter(dataset))).shape[0] == 3
    with pytest.raises(UnsupportedOperationError, match="derive it from ChunkSizeSampler"):
        dataset.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 6}, "seed=5 where this one has 6"),
        ({"seed": None}, "seed=5 where this one has None"),
        ({"batch_size": 4}, "batch_size=3 where this one has 4"),
        (
            {"chunk_size": UniformChunkSampler(2, 9)},
            r"chunk_size='UniformChunkSampler\(low=2, high=10, seed=None\)'",
        ),
        ({"chunk_size": 8}, "where this one has 8"),
        ({"chunk_size": Curriculum()}, "Curriculum"),
        ({"pad": "after"}, r"options=\{\} where this one has \{'pad': \"'after'\"\}"),
        ({"weights": "steps"}, r"options=\{\} where this one has \{'weights'"),
        ({"chunk_size": None, "windows": {"action": (0, 1)}}, r"options=\{\} where this one has \{'windows'"),
    ],
)
def test_the_state_of_another_dataset_is_refused(
    rb: TrajectoryReplayBuffer, arguments: dict[str, Any], message: str
) -> None:
    fitting = {"chunk_size": UniformChunkSampler(2, 10), "batch_size": 3, "seed": 5}
    saved = OnlineDataset(rb, **fitting)
    take(saved, 2)
    other = OnlineDataset(rb, **{**fitting, **arguments})
    with pytest.raises(StateMismatchError, match=message):
        other.load_state_dict(saved.state_dict())
    with pytest.raises(StateMismatchError, match=message):
        iter(other).load_state_dict(saved.state_dict())
    assert next(iter(other)).shape[0] == arguments.get("batch_size", 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: None,
        lambda state: [state],
        lambda state: {},
        lambda state: {"_snapshot": state},
        lambda state: {**state, "more": 1},
        lambda state: {**state, "arguments": None},
        lambda state: {**state, "place": None},
        lambda state: {**state, "position": -1},
        lambda state: {**state, "position": True},
        lambda state: {**state, "iteration": "2"},
        lambda state: {**state, "stream": 2**64},
        lambda state: {**state, "chunk_size": None},
        lambda state: {**state, "chunk_size": {"generator": {"state": 0}}},
        lambda state: {**state, "chunk_size": 3},
    ],
)
def test_a_damaged_state_is_refused_and_a_good_one_loads_after_it(
    rb: TrajectoryReplayBuffer, damage: Callable[[dict[str, Any]], Any]
) -> None:
    saved = OnlineDataset(rb, UniformChunkSampler(2, 10), 3, seed=5)
    iteration = iter(saved)
    next(iteration)
    state = saved.state_dict()
    other = OnlineDataset(rb, UniformChunkSampler(2, 10), 3, seed=5)

    def load_and_go_on() -> None:
        other.load_state_dict(damage(copy.deepcopy(state)))
        next(iter(other))

    with pytest.raises(StateMismatchError, match=r"state|Got"):
        load_and_go_on()
    other.load_state_dict(state)
    assert same(take(other, 3), list(islice(iteration, 3)))


def test_a_state_of_another_number_of_workers_is_refused(rb: TrajectoryReplayBuffer) -> None:
    def dataset() -> OnlineDataset:
        return OnlineDataset(rb, 8, 3, seed=5)

    with stateful(dataset(), 2) as loader:
        take(loader, 3)
        state = loader.state_dict()
    resumed = StatefulDataLoader(dataset(), batch_size=None, num_workers=1, multiprocessing_context="fork")
    resumed.load_state_dict(state)
    assert "num_workers=2 where this one has 1" in refusal(resumed)
    # A dataset that was loaded in the main process does not go on in workers.
    plain = dataset()
    take(plain, 2)
    other = dataset()
    other.load_state_dict(plain.state_dict())
    resumed = DataLoader(other, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert "num_workers=0 where this one has 1" in refusal(resumed)


def refusal(loader: DataLoader) -> str:
    """What a loader refuses its state with; in a process of its own, as torch waits 5 s for a worker that raised."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            next(iter(loader))
        except StateMismatchError as error:
            sender.send(str(error))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    sender.close()
    try:
        assert receiver.poll(PATIENCE)
        return receiver.recv()
    finally:
        os.waitpid(child, 0)


def test_a_state_of_another_rank_is_refused(rb: TrajectoryReplayBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, other = OnlineDataset(rb, 8, 3, seed=5), OnlineDataset(rb, 8, 3, seed=5)
    take(saved, 2)
    other.load_state_dict(saved.state_dict())
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(StateMismatchError, match="rank=0 where this one has 1"):
        iter(other)
    monkeypatch.setenv("RANK", "0")
    assert not overlap(take(other, 2), take(OnlineDataset(rb, 8, 3, seed=5), 2))


# -------------------------------------------------------------------------------------------- sizes by themselves


@pytest.mark.parametrize("name", ["uniform", "uniform with a seed", "mixture"])
def test_sizes_go_on_where_they_were(name: str) -> None:
    sizes, other = SIZES[name](), SIZES[name]()
    for _ in range(3):
        sizes()
    other.load_state_dict(json.loads(json.dumps(sizes.state_dict())))
    assert [sizes() for _ in range(20)] == [other() for _ in range(20)]


@pytest.mark.parametrize("state", [None, {}, {"generator": None}, {"generator": {"bit_generator": "MT19937"}}, 3])
def test_what_is_no_state_of_sizes_is_refused(state: Any) -> None:
    sizes, untouched = UniformChunkSampler(1, 10**6, seed=1), UniformChunkSampler(1, 10**6, seed=1)
    with pytest.raises(StateMismatchError, match="not the state of a UniformChunkSampler"):
        sizes.load_state_dict(state)
    assert sizes() == untouched()
