"""Without replacement, every chunk comes once per pass, whoever shares the pass."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import iterating, loading
from scripts import run_script
from steps import small
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from waiting import PATIENCE

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import ChunkTooLongError, InvalidArgumentError, StateMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

LENGTH = 4
LENGTHS = (20, 200)
CHUNKS = [(n, start) for n, length in enumerate(LENGTHS) for start in range(length - LENGTH + 1)]

Chunk = tuple[int, int]


def buffer(lengths: tuple[int, ...] = LENGTHS, *, capacity: int = 10) -> TrajectoryReplayBuffer:
    rb = TrajectoryReplayBuffer(max_trajectories=capacity, max_total_steps=2000, chunk_size=LENGTH)
    for number, length in enumerate(lengths):
        rb.extend(small(number, length))
    return rb


@pytest.fixture(scope="module")
def rb() -> TrajectoryReplayBuffer:
    return buffer()


def chunks_of(batches: Any) -> list[Chunk]:
    """Trajectory id and first step of each chunk of some batches, in order."""
    first = [batch["index"].reshape(-1, LENGTH, 2)[:, 0] for batch in batches]
    return [(number, step) for steps in first for number, step in steps.tolist()]


def one_pass(rb: TrajectoryReplayBuffer, batch_size: int | None, **options: Any) -> OnlineDataset:
    return OnlineDataset(rb, LENGTH, batch_size, **{"replacement": False, "passes": 1, "seed": 3, **options})


# ------------------------------------------------------------------------------------------ one process, or several


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_train_for_an_epoch_over_every_chunk(rb: TrajectoryReplayBuffer, workers: int, batch_size: int | None) -> None:
    options = {} if batch_size else {"batch_size": 5}
    with loading(one_pass(rb, batch_size), workers, **options) as loader:
        epochs = [chunks_of(loader) for _ in range(2)]
    assert [sorted(drawn) for drawn in epochs] == [CHUNKS] * 2
    assert epochs[0] != epochs[1]
    alone = one_pass(rb, 5)
    assert epochs == [chunks_of(alone) for _ in range(2)], "the order depends on the number of workers"


def test_take_as_many_batches_as_there_are_chunks(rb: TrajectoryReplayBuffer) -> None:
    with iterating(OnlineDataset(rb, LENGTH, replacement=False), 2, batch_size=1) as batches:
        drawn = chunks_of(islice(batches, 3 * len(CHUNKS)))
    assert set(Counter(drawn[: len(CHUNKS)]).values()) == {1}
    assert Counter(drawn) == dict.fromkeys(CHUNKS, 3)


def test_more_workers_than_trajectories_and_than_chunks() -> None:
    rb = buffer((LENGTH + 1, LENGTH - 1))
    with loading(one_pass(rb, 1), 3) as loader:
        assert sorted(chunks_of(loader)) == [(0, 0), (0, 1)]
    with iterating(OnlineDataset(rb, LENGTH, 1, replacement=False), 3) as batches:
        assert Counter(chunks_of(islice(batches, 12))) == {(0, 0): 6, (0, 1): 6}


def test_several_passes_in_one_iteration(rb: TrajectoryReplayBuffer) -> None:
    with loading(one_pass(rb, 50, passes=2), 2) as loader:
        batches = [batch.clone() for batch in loader]
    assert [len(batch) for batch in batches] == [50] * 8 + [2 * len(CHUNKS) - 400]
    drawn = chunks_of(batches)
    assert sorted(drawn[: len(CHUNKS)]) == sorted(drawn[len(CHUNKS) :]) == CHUNKS


def test_leave_out_the_last_batches_that_not_every_worker_and_rank_gets(rb: TrajectoryReplayBuffer) -> None:
    per_rank = []
    for rank in range(3):
        with loading(one_pass(rb, 16, drop_last=True, rank=rank, world_size=3), 2) as loader:
            per_rank.append([batch.clone() for batch in loader])
    assert [[len(batch) for batch in batches] for batches in per_rank] == [[16] * 4] * 3
    assert len({chunk for batches in per_rank for chunk in chunks_of(batches)}) == 3 * 4 * 16


def test_nothing_long_enough_is_said_as_such() -> None:
    with pytest.raises(ChunkTooLongError):
        next(iter(one_pass(buffer((2, 3)), 5)))


# ------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_of_the_environment_share_a_pass(
    rb: TrajectoryReplayBuffer, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    drawn = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        with loading(one_pass(rb, 5), workers) as loader:
            drawn.append(chunks_of(loader))
    assert sorted(drawn[0] + drawn[1]) == CHUNKS
    assert abs(len(drawn[0]) - len(drawn[1])) <= 5


def test_each_rank_goes_through_everything_if_asked_to(
    rb: TrajectoryReplayBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert sorted(chunks_of(one_pass(rb, 5, rank=0, world_size=1))) == CHUNKS


def test_ranks_that_can_not_agree_are_refused(rb: TrajectoryReplayBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InvalidArgumentError, match="without WORLD_SIZE"):
        iter(one_pass(rb, 5))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidArgumentError, match="without a seed, in rank 0 of 2"):
        iter(one_pass(rb, 5, seed=None))


def _draw_as_rank(rank: int, dataset: OnlineDataset, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    results.put([chunks_of(dataset) for _ in range(2)])


def _on_two_forked_ranks(target: Callable[..., None], *arguments: Any) -> list[Any]:
    """Return what two ranks put into the queue that ``target(rank, *arguments, results)`` gets."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=target, args=(rank, *arguments, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    drawn = [results.get(timeout=PATIENCE) for _ in ranks]
    for process in ranks:
        process.join(PATIENCE)
    return drawn


def test_ranks_that_are_forked_with_a_dataset_without_a_seed_share_its_passes(rb: TrajectoryReplayBuffer) -> None:
    drawn = _on_two_forked_ranks(_draw_as_rank, one_pass(rb, 5, seed=None))
    assert [sorted(first + second) for first, second in zip(*drawn, strict=True)] == [CHUNKS] * 2


def _make_in_rank(rank: int, rb: TrajectoryReplayBuffer, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results.put([chunks_of(one_pass(rb, 5, seed=None)) for _ in range(2)])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ranks_that_each_make_a_dataset_without_a_seed_share_its_passes(
    rb: TrajectoryReplayBuffer, tmp_path: Path
) -> None:
    drawn = _on_two_forked_ranks(_make_in_rank, rb, str(tmp_path / "store"))
    assert [sorted(first + second) for first, second in zip(*drawn, strict=True)] == [CHUNKS] * 2
    assert drawn[0][0] != drawn[0][1]


# ------------------------------------------------------------------------------------------------ while others write


def test_ranks_have_the_same_pass_while_trajectories_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    rb = buffer((30,) * 4, capacity=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset, iterations = one_pass(rb, 2), []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        iterations.append(iter(dataset))
    drawn = chunks_of(islice(iterations[0], 3))
    rb.extend(small(4, 30))  # evicts 0; the second rank begins the pass only now
    for iteration in iterations:
        drawn += chunks_of(iteration)
    expected = [(n, start) for n in (1, 2, 3) for start in range(30 - LENGTH + 1)]
    assert sorted(chunk for chunk in drawn if chunk[0] > 0) == expected
    assert max(Counter(drawn).values()) == 1


def test_what_comes_is_part_of_the_next_pass() -> None:
    rb = buffer((10, 10))
    dataset = one_pass(rb, 3)
    assert {number for number, _ in chunks_of(dataset)} == {0, 1}
    rb.extend(small(2, 10))
    assert {number for number, _ in chunks_of(dataset)} == {0, 1, 2}


# ---------------------------------------------------------------------------------------------------------- resuming


def _stopped(loader: StatefulDataLoader, count: int) -> tuple[list[Chunk], dict[str, Any], list[Chunk]]:
    iteration = iter(loader)
    before = chunks_of(islice(iteration, count))
    state = loader.state_dict()
    return before, state, chunks_of(iteration)


@pytest.mark.parametrize(
    ("workers", "batch_size", "seed"), [(0, 5, 3), (2, 5, 3), (2, 5, None), (2, None, 3), (0, None, None)]
)
def test_a_pass_goes_on_in_another_loader(
    rb: TrajectoryReplayBuffer, workers: int, batch_size: int | None, seed: int | None
) -> None:
    options = {} if batch_size else {"batch_size": 5}
    with loading(one_pass(rb, batch_size, seed=seed, passes=2), workers, kind=StatefulDataLoader, **options) as loader:
        before, state, rest = _stopped(loader, 50)
    assert len(before) == 250  # in the second pass
    with loading(one_pass(rb, batch_size, seed=seed, passes=2), workers, kind=StatefulDataLoader, **options) as loader:
        loader.load_state_dict(state)
        assert chunks_of(loader) == rest
    assert Counter(before + rest) == dict.fromkeys(CHUNKS, 2)


def test_a_pass_goes_on_after_more_data_has_come() -> None:
    rb = buffer((30, 30, 30), capacity=3)
    dataset = one_pass(rb, 4, seed=None)
    iteration = iter(dataset)
    before = chunks_of(islice(iteration, 5))
    state = json.loads(json.dumps(dataset.state_dict()))
    rb.extend(small(3, 30))  # evicts 0
    resumed = one_pass(rb, 4, seed=None)
    resumed.load_state_dict(state)
    rest = chunks_of(resumed)
    assert rest == chunks_of(iteration)
    assert sorted(chunk for chunk in before + rest if chunk[0]) == [(n, s) for n in (1, 2) for s in range(27)]


SCRIPT = """
import json, sys
from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.datasets import OnlineDataset

rb = TrajectoryReplayBuffer(max_trajectories=10, max_total_steps=2000, chunk_size=4)
rb.loads(sys.argv[1] + "/buffer")
dataset = OnlineDataset(rb, 4, 5, replacement=False, passes=1, subset=("train", 0.9))
dataset.load_state_dict(json.load(open(sys.argv[1] + "/state.json")))
print(json.dumps([steps for batch in dataset for steps in batch["index"][:, 0].tolist()]))
"""


def test_a_pass_goes_on_in_a_new_process_over_the_saved_buffer(tmp_path: Path) -> None:
    rb = buffer((9, 12, 20, 8, 50, 7, 30, 11, 13, 14, 15, 16))  # the first two are evicted
    dataset = one_pass(rb, 5, seed=None, subset=("train", 0.9))
    iteration = iter(dataset)
    chunks_of(islice(iteration, 10))
    (tmp_path / "state.json").write_text(json.dumps(dataset.state_dict()))
    rb.dumps(tmp_path / "buffer")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_script(tmp_path / "script.py", str(tmp_path), directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [tuple(steps) for steps in json.loads(done.stdout.splitlines()[-1])] == chunks_of(iteration)


def test_a_pass_over_another_buffer_is_refused(rb: TrajectoryReplayBuffer) -> None:
    dataset = one_pass(rb, 5)
    next(iter(dataset))
    state = dataset.state_dict()
    for other in (buffer((20,)), buffer((20, 190)), buffer((20, 200, 30)[::-1])):
        resumed = one_pass(other, 5)
        resumed.load_state_dict(state)
        with pytest.raises(StateMismatchError, match="a pass over 214 chunks"):
            next(iter(resumed))


def test_a_pass_of_another_number_of_ranks_is_refused(rb: TrajectoryReplayBuffer) -> None:
    dataset = one_pass(rb, 5, rank=0, world_size=2)
    next(iter(dataset))
    resumed = one_pass(rb, 5)
    resumed.load_state_dict(dataset.state_dict())
    with pytest.raises(StateMismatchError, match="2 processes share"):
        next(iter(resumed))


@pytest.mark.parametrize("damage", [{"pass": 3}, {"pass": {}}, {"pass": {"number": 0}}])
def test_a_damaged_pass_is_refused(rb: TrajectoryReplayBuffer, damage: dict[str, Any]) -> None:
    dataset = one_pass(rb, 5)
    next(iter(dataset))
    with pytest.raises(StateMismatchError, match="state of a pass"):
        one_pass(rb, 5).load_state_dict({**dataset.state_dict(), **damage})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 1, "replacement": True}, "needs replacement=False"),
        ({"passes": 0}, "passes must be"),
        ({"passes": None, "drop_last": True}, "without passes="),
        ({"drop_last": 1}, "drop_last"),
        ({"rank": 1}, "both or none"),
        ({"rank": 2, "world_size": 2}, "rank must be"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    rb: TrajectoryReplayBuffer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        one_pass(rb, 5, **options)


def test_a_plain_loader_counts_its_batches(rb: TrajectoryReplayBuffer) -> None:
    batches: Iterator[Any] = iter(DataLoader(one_pass(rb, 100), batch_size=None))
    assert [len(batch) for batch in batches] == [100, 100, 14]
