"""Text leaves the table of texts with the last trajectory that uses it, whoever writes, reads or is killed."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from instructions import EVERY, at_every_instruction, run_in_child_until
from tensordict import NonTensorData, NonTensorStack, TensorDict
from waiting import PATIENCE

from embodichain_rl import ByGroup, TrajectoryReplayBuffer
from embodichain_rl.errors import TextTableFullError, UnknownTextError
from embodichain_rl.replay.schema import TextTable, texts

STEPS = 3


@pytest.fixture(autouse=True)
def _sweep_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "SWEEP_AFTER", 20)


def episode(number: int, *, ends: bool = True) -> TensorDict:
    done = torch.zeros(STEPS, 1, dtype=torch.bool)
    done[-1] = ends
    return TensorDict(
        {
            "number": torch.full((STEPS, 1), number),
            "say": NonTensorStack(*(f"say {number} {step}" for step in range(STEPS))),
            "trajectory": {
                "task": NonTensorData(f"task {number}", batch_size=[STEPS]),
                "kind": NonTensorData("always the same", batch_size=[STEPS]),
            },
            "next": {"done": done},
        },
        [STEPS],
    )


def make_buffer(**kwargs: Any) -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(
        **{"max_trajectories": 5, "max_total_steps": 100, "chunk_size": 2, "batch_size": 8, **kwargs}
    )


def check(rb: TrajectoryReplayBuffer, batch: TensorDict | None = None) -> None:
    """Check that every text of a batch, or of all that is live, is that of its trajectory and step."""
    batch = rb.sample() if batch is None else batch
    numbers, steps = batch["number"][..., 0].flatten().tolist(), batch["trajectory", "step"].flatten().tolist()
    said = [f"say {number} {step}" for number, step in zip(numbers, steps, strict=True)]
    assert rb.texts.resolve(batch["say"].flatten()) == said
    assert rb.texts.resolve(batch["trajectory", "task"].flatten()) == [f"task {number}" for number in numbers]
    assert set(rb.texts.resolve(batch["trajectory", "kind"].flatten())) == {"always the same"}


def test_text_that_is_different_every_time_does_not_pile_up() -> None:
    rb = make_buffer()
    used = []
    for number in range(500):
        rb.extend(episode(number))
        if number % 20 == 0:
            check(rb)
            used.append(rb.texts.nbytes_used)
    assert len(rb.texts) < 200
    assert rb.texts.generation > 10
    assert max(used[5:]) <= 2 * max(used[:5])
    assert len(rb.texts._cache.texts) < 200


def test_texts_that_stay_do_not_let_others_pile_up() -> None:
    rb = make_buffer(max_trajectories=40, max_total_steps=400, max_pinned=0.9)
    for number in range(30):
        rb.extend(episode(number))
    rb.pin(range(30))
    for number in range(30, 1000):
        rb.extend(episode(number))
    assert len(rb.texts) < 4 * (30 + 10) * 4  # four texts a trajectory, and not forty for each sweep
    check(rb)


def test_groups_that_were_drawn_do_not_keep_their_texts() -> None:
    rb = make_buffer(weights=ByGroup("task"), strict_length=False)
    for number in range(300):
        rb.extend(episode(number))
        rb.sample()
        if number % 20 == 19:
            assert set(rb.stats()["mixture_drawn"]) <= {f"task {other}" for other in range(number + 1)}
    assert len(rb.texts) < 200
    rb.empty()
    rb.stats()


def test_a_table_is_never_full_of_what_is_gone() -> None:
    rb = make_buffer()
    rb.storage.texts = TextTable(max_texts=200)
    for number in range(150):
        rb.extend(episode(number))
    check(rb)
    with pytest.raises(TextTableFullError, match="of at most 200 strings"):
        rb.storage.texts.ids_of(np.array([f"kept {n}" for n in range(200)], dtype=object))


def test_a_text_keeps_its_id_as_long_as_a_trajectory_has_it() -> None:
    rb = make_buffer()
    first = int(rb.extend(episode(0))[0])
    rb.pin([first])
    task = int(rb.storage.trajectory(first)["trajectory", "task"][0])
    for number in range(1, 200):
        rb.extend(episode(number))
    assert rb.texts.generation > 3
    assert rb.texts.resolve(task) == "task 0"
    assert int(rb.storage.trajectory(first)["trajectory", "task"][0]) == task
    again = episode(200)
    again["trajectory", "task"] = NonTensorData("task 0", batch_size=[STEPS])
    rb.extend(again)
    assert int(rb[-1]["trajectory", "task"][0]) == task


def test_the_id_of_a_text_that_is_gone_is_refused_and_never_means_another_one() -> None:
    rb = make_buffer()
    rb.extend(episode(0))
    batch = rb.sample()
    for number in range(1, 20):
        rb.extend(episode(number))
    for number in range(20, 200):
        rb.extend(episode(number))
    with pytest.raises(UnknownTextError, match="left the table some time after the last trajectory"):
        rb.texts.resolve(batch["trajectory", "task"])
    assert rb.texts.get(int(batch["trajectory", "task"][0, 0])) is None


def test_what_a_user_adds_stays() -> None:
    rb = make_buffer()
    number = rb.texts.intern("mine")
    for n in range(200):
        rb.extend(episode(n))
    assert rb.texts.resolve(number) == "mine"
    assert rb.texts.intern("mine") == number


def test_the_texts_of_unfinished_episodes_stay() -> None:
    rb = make_buffer(max_total_steps=1000)
    waiting = [rb.extend(episode(number, ends=False)[None]) for number in range(1)]
    assert (waiting[0] == -1).all()

    def others() -> None:
        for number in range(1, 150):
            rb.extend(episode(number))

    child = multiprocessing.get_context("fork").Process(target=others)
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0
    assert rb.texts.generation > 3
    assert rb.writer.truncate_pending() == 1
    check(rb, rb[-1])
    assert rb.texts._holds[:, 2].max() == texts.FREE


def test_the_hold_of_a_killed_writer_does_not_count() -> None:
    rb = make_buffer()
    rb.extend(episode(0))

    def die() -> None:
        rb.extend(episode(1, ends=False))
        os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=die)
    child.start()
    child.join(PATIENCE)
    assert rb.texts._holds[:, 2].max() >= 0
    for number in range(2, 300):
        rb.extend(episode(number))
    assert len(rb.texts) < 200


def test_another_process_reads_the_texts_of_what_it_samples() -> None:
    rb = make_buffer()
    rb.extend(episode(0))
    context = multiprocessing.get_context("fork")
    done, ready = context.Event(), context.Event()

    def read() -> None:
        count = 0
        while not done.is_set() or count < 20:
            batch = rb.sample()
            try:
                check(rb, batch)
            except UnknownTextError:  # the child was not run for so long that the texts have left
                continue
            count += 1
            ready.set()

    child = context.Process(target=read)
    child.start()
    assert ready.wait(PATIENCE)
    for number in range(1, 300):
        rb.extend(episode(number))
    done.set()
    child.join(PATIENCE)
    assert child.exitcode == 0


def test_checkpoints_and_copies_have_the_texts_that_are_left(tmp_path: Path) -> None:
    rb = make_buffer()
    for number in range(200):
        rb.extend(episode(number))
    rb.dumps(tmp_path)
    restored = make_buffer()
    restored.loads(tmp_path)
    for other in (restored, copy.deepcopy(rb)):
        for number in range(5):
            check(other, other[number])
        for number in range(200, 300):
            other.extend(episode(number))
        check(other)
    table = pickle.loads(pickle.dumps(rb.texts))
    task = rb[0]["trajectory", "task"][0]
    assert table.resolve(task) == rb.texts.resolve(task)
    assert table.intern("more") == rb.texts.intern("more")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda rb: pickle.loads(pickle.dumps(rb))])
def test_texts_leave_a_copy_too(copied: Callable[[TrajectoryReplayBuffer], TrajectoryReplayBuffer]) -> None:
    rb = make_buffer()
    mine = rb.texts.intern("mine")
    for number in range(5):
        rb.extend(episode(number))
    for _ in range(3):  # copies of copies
        rb = copied(rb)
        early = rb.sample()["say"]
        check(rb)
        for number in range(100):
            rb.extend(episode(number))
        check(rb)
        assert rb.texts.get(int(early[0, 0])) is None
        assert len(rb.texts) < 200
        assert rb.texts.resolve(mine) == "mine"


def test_texts_in_a_file_stay(tmp_path: Path) -> None:
    rb = make_buffer(path=tmp_path / "buffer")
    for number in range(60):
        rb.extend(episode(number))
    assert rb.texts.generation == 0
    rb.close()
    again = TrajectoryReplayBuffer.open(tmp_path / "buffer", chunk_size=2, batch_size=8)
    check(again)
    again.close()


def small_table() -> tuple[TextTable, list[str]]:
    """A table of 13 strings, of which some are in use, that is swept when the next one is added."""
    table, names = TextTable(max_texts=64, max_bytes=4096), [f"text {n}" for n in range(12)]
    table.ids_of(np.array(names, dtype=object), for_good=False)
    table._words[texts.GENERATION] += 2  # none of them was used lately
    table.in_use = lambda: np.array([2, 5, 11])
    return table, names


def add_one(table: TextTable) -> None:
    table.ids_of(np.array(["new"], dtype=object), for_good=False)


def test_killed_at_any_instruction_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "SWEEP_AFTER", 4)
    table, names = small_table()
    instruction = killed = 0
    while run_in_child_until(instruction, partial(add_one, table)):
        for number in (2, 5, 11):
            assert table.resolve(number) == names[number - 1]
        assert all(table.get(number) in (None, name) for number, name in enumerate(["", *names, "new"]))
        assert table.intern(names[4]) == 5
        table, names = small_table()
        killed += 1
        instruction += 2 * EVERY
    assert killed > 5


def test_a_reader_between_any_two_instructions_of_a_sweep_sees_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "SWEEP_AFTER", 4)
    table, names = small_table()
    reader = TextTable.__new__(TextTable)
    reader.__dict__.update(table.__dict__)
    looks = 0

    def look(_: int) -> None:
        nonlocal looks
        reader._map()
        for number in (0, 2, 5, 11):
            assert reader.get(number) == ["", *names][number]
        assert all(reader.get(number) in (None, name) for number, name in enumerate(["", *names]))
        looks += 1

    at_every_instruction(partial(add_one, table), look)
    assert looks > 200
    assert table.generation == 3
    assert len(table) == 5
    assert table.resolve([0, 2, 5, 11, 13]) == ["", "text 1", "text 4", "text 10", "new"]
