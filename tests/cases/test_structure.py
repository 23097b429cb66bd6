"""What users nest comes out nested: batch dimensions of agents, names of dimensions, tensorclasses."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steps import Child, make_buffer, make_storage, make_writer
from tensordict import TensorDict, TensorDictBase, lazy_stack, tensorclass
from torch.utils.data import DataLoader
from torchrl.data import TensorDictReplayBuffer

from embodichain_rl import ChunkSampler, OnlineDataset, TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter
from embodichain_rl.errors import CheckpointError, SchemaMismatchError
from embodichain_rl.replay.schema import Schema
from embodichain_rl.transforms import FlatChunks

AGENTS = 3


@tensorclass
class Pose:
    position: torch.Tensor
    rotation: torch.Tensor


@tensorclass
class Task:
    goal: torch.Tensor
    words: str


@tensorclass
class Note:
    goal: torch.Tensor
    about: object


def agents(length: int) -> TensorDict:
    """A trajectory of three agents."""
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = True
    batch = [length, AGENTS]
    observations = torch.randn(length + 1, AGENTS, 4)
    arms = TensorDict({"joints": torch.randn(*batch, 2, 7)}, [*batch, 2])
    observed = TensorDict({"observation": observations[:-1], "arms": arms}, batch, names=["time", "agent"])
    after = TensorDict({"observation": observations[1:], "reward": torch.randn(*batch, 1)}, batch)
    following = TensorDict({"done": done, "agents": after}, [length])
    plain = TensorDict({"speed": torch.randn(length)}, [length])
    return TensorDict({"agents": observed, "plain": plain, "next": following}, [length])


def poses(length: int) -> TensorDict:
    """A trajectory with tensorclasses in it."""
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = True
    hand = Pose(position=torch.randn(length, 3), rotation=torch.randn(length, 4), batch_size=[length])
    arms = Pose(position=torch.randn(length, 2, 3), rotation=torch.randn(length, 2, 4), batch_size=[length, 2])
    return TensorDict({"hand": hand, "arms": arms, "next": {"done": done, "hand": hand.clone()}}, [length])


def check_agents(data: TensorDictBase) -> None:
    batch = data.batch_size
    assert data["agents"].batch_size == (*batch, AGENTS)
    assert data["agents", "arms"].batch_size == (*batch, AGENTS, 2)
    assert data["next", "agents"].batch_size == (*batch, AGENTS)
    assert data["next"].batch_size == data["plain"].batch_size == batch
    assert data["agents", "arms", "joints"].shape == (*batch, AGENTS, 2, 7)


def check_poses(data: TensorDictBase) -> None:
    for key in ("hand", ("next", "hand"), "arms"):
        assert type(data[key]) is Pose, key
    assert data["hand"].batch_size == data.batch_size
    assert data["arms"].batch_size == (*data.batch_size, 2)
    assert data["arms"].rotation.shape == (*data.batch_size, 2, 4)


CASES = pytest.mark.parametrize(("make", "check"), [(agents, check_agents), (poses, check_poses)])
Make = Callable[[int], TensorDict]
Check = Callable[[TensorDictBase], None]


@CASES
class TestHandedOut:
    def test_by_sample(self, make: Make, check: Check) -> None:
        rb = make_buffer([make(5), make(7)])
        sample = rb.sample()
        assert sample.batch_size == (8, 3)
        check(sample)

    @pytest.mark.parametrize("pad", ["before", "after", "both"])
    def test_by_padded_chunks(self, make: Make, check: Check, pad: str) -> None:
        check(make_buffer([make(5), make(7)], sampler=ChunkSampler(4, pad=pad)).sample())

    def test_by_a_compact_buffer(self, make: Make, check: Check) -> None:
        data = make(5)
        for key in (("hand", "position"), ("hand", "rotation")):
            if ("next", *key) in data.keys(True, True):
                data["next", key[0]].set(key[1], torch.cat([data[key][1:], data[key][:1]]))
        rb = make_buffer([data], compact=True)
        check(rb.sample())
        check(rb[0])

    def test_by_a_buffer_of_torchrl(self, make: Make, check: Check) -> None:
        rb = TensorDictReplayBuffer(
            storage=TrajectoryStorage(4, 100), writer=TrajectoryWriter(), sampler=ChunkSampler(3), batch_size=8
        )
        rb.extend(make(5))
        check(rb.sample())

    @pytest.mark.parametrize("index", [0, -1, slice(None), [0, 1], slice(1, 2)], ids=str)
    def test_by_reads_of_whole_trajectories(self, make: Make, check: Check, index: Any) -> None:
        check(make_buffer([make(5), make(7)])[index])

    def test_as_it_was_written(self, make: Make, check: Check) -> None:
        data = make(5)
        read = make_buffer([data])[0].exclude("index", "trajectory")
        assert (read == data).all()
        check(read)

    def test_by_iteration_over_a_storage(self, make: Make, check: Check) -> None:
        for trajectory in make_storage([make(5), make(7)]):
            check(trajectory)

    def test_by_query(self, make: Make, check: Check) -> None:
        found = make_buffer([make(5), make(7)]).query()
        assert [len(trajectory.data) for trajectory in found] == [5, 7]
        for trajectory in found:
            check(trajectory.data)

    def test_to_whoever_judges_a_trajectory(self, make: Make, check: Check) -> None:
        judged: list[TensorDictBase] = []
        rb = make_buffer([], writer=TrajectoryWriter(accept=lambda steps: judged.append(steps) or True))
        rb.extend(make(5))
        check(judged[0])

    def test_to_a_transform(self, make: Make, check: Check) -> None:
        rb = make_buffer([make(5), make(7)], transform=FlatChunks())
        check(rb.sample())

    @pytest.mark.parametrize("batch_size", [None, 4])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_by_a_data_loader(self, make: Make, check: Check, batch_size: int | None, workers: int) -> None:
        dataset = OnlineDataset(make_buffer([make(5), make(7)]), chunk_size=3, batch_size=batch_size)
        context = "forkserver" if workers else None
        loader = DataLoader(
            dataset, 4 if batch_size is None else None, num_workers=workers, multiprocessing_context=context
        )
        batch = next(iter(loader))
        assert batch.batch_size == (4, 3)
        check(batch)
        if make is agents:
            assert batch["agents"].names == [None, None, "agent"]

    def test_when_chunks_of_unequal_length_are_collated(self, make: Make, check: Check) -> None:
        chunks = iter(OnlineDataset(make_buffer([make(5), make(7)]), chunk_size=Lengths()))
        batch = OnlineDataset.collate_fn([next(chunks), next(chunks)])
        assert batch.batch_size == (2, 4)
        check(batch)

    def test_after_a_checkpoint(self, make: Make, check: Check, tmp_path: Path) -> None:
        rb, other = make_buffer([make(5), make(7)]), make_buffer()
        rb.dumps(tmp_path)
        other.loads(tmp_path)
        check(other.sample())
        assert (other[:].exclude("index", "trajectory") == rb[:].exclude("index", "trajectory")).all()

    def test_after_a_state_dict(self, make: Make, check: Check) -> None:
        other = make_buffer()
        other.load_state_dict(make_buffer([make(5), make(7)]).state_dict())
        check(other.sample())

    def test_after_pickling(self, make: Make, check: Check) -> None:
        check(pickle.loads(pickle.dumps(make_buffer([make(5), make(7)]))).sample())

    @pytest.mark.parametrize("start_method", ["fork", "forkserver"])
    def test_in_another_process(self, make: Make, check: Check, start_method: str) -> None:
        child = Child(start_method, make_buffer([make(5), make(7)]))
        try:
            check(child.call(TrajectoryReplayBuffer.sample))
        finally:
            child.end()

    def test_when_another_process_wrote_first(self, make: Make, check: Check) -> None:
        rb = make_buffer()
        child = Child("forkserver", rb)
        try:
            child.call(_write, make)
        finally:
            child.end()
        check(rb.sample())


class Lengths:
    """Chunks of 3 and 4 steps in turn."""

    def __init__(self) -> None:
        self._lengths: Iterator[int] | None = None

    def __call__(self) -> int:
        self._lengths = self._lengths or iter([3, 4] * 100)
        return next(self._lengths)


def _write(rb: TrajectoryReplayBuffer, make: Make) -> None:
    rb.extend(make(6))


class TestNames:
    def test_of_the_dimensions_of_agents_are_kept(self) -> None:
        rb = make_buffer([agents(5)])
        assert rb.sample()["agents"].names == [None, None, "agent"]
        assert rb[0]["agents"].names == [None, "agent"]
        assert rb.sample()["plain"].names == [None, None]


class TestWritten:
    @pytest.mark.parametrize("form", ["[T]", "[B, T]", "steps"])
    def test_in_any_form(self, form: str) -> None:
        data = agents(5)
        rb = make_buffer()
        rb.extend({"[T]": data, "[B, T]": torch.stack([data, data]), "steps": lazy_stack(list(data.unbind(0)))}[form])
        check_agents(rb.sample())

    def test_a_lazy_stack_of_steps_with_tensorclasses(self) -> None:
        rb = make_buffer([lazy_stack(list(poses(5).unbind(0)))])
        check_poses(rb.sample())

    def test_a_tensorclass_of_steps_becomes_a_tensordict_with_its_fields(self) -> None:
        @tensorclass
        class Step:
            hand: Pose
            next: TensorDict

        data = poses(5)
        rb = make_buffer([Step(hand=data["hand"], next=data["next"], batch_size=[5])])
        sample = rb.sample()
        assert type(sample) is TensorDict
        assert type(sample["hand"]) is Pose
        assert sample["index"].shape == (8, 3, 2)
        again = Step.from_tensordict(sample.select("hand", "next"))
        assert type(again) is Step
        assert torch.equal(again.hand.position, sample["hand", "position"])

    def test_the_structure_is_that_of_the_first_data(self) -> None:
        flat = agents(4)
        flat["agents"].batch_size = [4]
        rb = make_buffer([agents(5), flat])
        check_agents(rb[:])

    def test_a_tensorclass_of_whole_trajectories(self) -> None:
        data = poses(4)
        goal = torch.ones(4, 2)
        data["trajectory"] = TensorDict({"task": Task(goal=goal, words="push", batch_size=[4])}, [4])
        rb = make_buffer([data])
        task = rb.sample()["trajectory", "task"]
        assert type(task) is Task
        assert task.goal.tolist() == [[[1.0, 1.0]] * 3] * 8
        assert rb.texts.resolve(task.words[0, 0]) == "push"

    @pytest.mark.parametrize("key", ["trajectory", "collector"])
    def test_batch_dimensions_where_the_buffer_adds_entries_are_refused(self, key: str) -> None:
        data = agents(5).set(key, TensorDict({"x": torch.zeros(5, 2)}, [5, 2]))
        with pytest.raises(SchemaMismatchError, match=f"Got '{key}' with batch dimensions"):
            make_buffer().extend(data)

    def test_a_tensorclass_with_something_else_than_tensors_and_text_is_refused(self) -> None:
        data = poses(4)
        data["task"] = Note(goal=torch.zeros(4), about={"size": 3}, batch_size=[4])
        with pytest.raises(SchemaMismatchError, match=r"\('task', 'about'\)"):
            make_buffer().extend(data)


class TestCheckpoints:
    def test_that_know_of_no_structure_can_be_loaded(self) -> None:
        schema = json.dumps([[["agents", "x"], [3, 2], "float32"], [["next", "done"], [1], "bool"]])
        values = [torch.randn(5, 3, 2), torch.tensor([0, 0, 0, 0, 1]).bool()[:, None]]
        state = {"next_id": 1, "steps_written": 5, "schema": schema, "lengths": torch.tensor([5]), "values": values}
        storage = make_storage()
        storage.load_state_dict(state)
        assert storage[0]["agents"].batch_size == (5,)
        assert torch.equal(storage[0]["agents", "x"], values[0])

    def test_of_a_class_that_is_not_there_are_refused_and_nothing_is_imported(self) -> None:
        state = make_storage([poses(5)]).state_dict()
        state["schema"] = state["schema"].replace(f"{__name__}:Pose", "antigravity:Pose")
        with pytest.raises(CheckpointError, match="antigravity"):
            make_storage().load_state_dict(state)
        assert "antigravity" not in sys.modules

    def test_of_agents_go_into_a_storage_that_was_allocated_without_structure(self) -> None:
        flat = agents(4)
        flat["agents"].batch_size = [4]
        storage = make_storage([flat])
        storage.load_state_dict(make_storage([agents(5)]).state_dict())
        assert len(storage) == 1

    @pytest.mark.parametrize(
        "nodes",
        [[[["z"], [3], [], ""]], [[["agents"], [4], [], ""]], [[["agents"], [3], ["a", "b"], ""]], [[["agents"], [3]]]],
    )
    def test_with_damaged_nodes_are_refused(self, nodes: list[Any]) -> None:
        text = json.dumps({"fields": [[["agents", "x"], [3, 2], "float32"]], "nodes": nodes})
        with pytest.raises((TypeError, ValueError)):
            Schema.from_json(text)


def test_windows_have_the_batch_size_of_the_batch() -> None:
    rb = make_buffer([agents(6)], sampler=ChunkSampler(windows={("agents", "observation"): (-1, 0)}, pad="both"))
    sample = rb.sample()
    assert sample["agents"].batch_size == (8,)
    assert sample["agents", "observation"].shape == (8, 2, AGENTS, 4)


def test_steps_of_agents_added_one_by_one() -> None:
    storage = TrajectoryStorage(4, 100)
    writer = make_writer(storage)
    for step in agents(5):
        writer.add(step)
    check_agents(storage[0])
    assert np.array_equal(storage[0]["trajectory", "step"], np.arange(5))
