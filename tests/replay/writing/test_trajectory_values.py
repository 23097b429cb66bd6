"""What belongs to a trajectory, and text of steps: it comes back with the steps that it was written with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instructions import EVERY, at_every_instruction, run_in_child_until
from steps import LABEL, Child, check_chunk, contents, make_buffer, make_plain_buffer, small
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase, lazy_stack

from embodichain_rl import ByGroup, ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter
from embodichain_rl.errors import CheckpointError, SchemaMismatchError, TrajectoryValueError
from embodichain_rl.replay.ledger.invariants import check_ledger

FIELDS: dict[Any, tuple[tuple[int, ...], torch.dtype]] = {
    "mass": ((), torch.float32),
    "goal": ((2, 3), torch.uint8),
    "half": ((2,), torch.bfloat16),
    "kind": ((1,), torch.int64),
    ("arm", "left"): ((), torch.bool),
}
"""Under ``"trajectory"``, besides the text "task"."""


def value_of(key: Any, number: int) -> torch.Tensor:
    """What trajectory ``number`` has there."""
    shape, dtype = FIELDS[key]
    return ((torch.arange(int(np.prod(shape))) + number * 7) % 120).reshape(shape).to(dtype)


def task_of(number: int) -> str:
    return f"task {number % 5}"


def said_at(number: int, step: int) -> str:
    return f"trajectory {number} says {step // 3}"


def trajectory(number: int, length: int, **kwargs: Any) -> TensorDict:
    """The steps ``[length]`` of trajectory ``number``, with what belongs to it, and text of steps."""
    data = small(number, length, **kwargs)
    data["say"] = [said_at(number, step) for step in range(length)]
    data["trajectory", "task"] = NonTensorData(task_of(number), batch_size=[length])
    for key in FIELDS:
        name = ("trajectory", *((key,) if isinstance(key, str) else key))
        value = value_of(key, number)
        data[name] = value.expand(length, *value.shape)
    return data


def check(rb: Any, data: TensorDictBase, mask: torch.Tensor | None = None) -> TensorDictBase:
    """Holds every value of steps ``[B, L]`` against the number of the trajectory and the step in their label."""
    texts = rb.storage.texts
    for row in range(len(data)):
        for step in range(data.shape[1]):
            real = mask is None or bool(mask[row, step])
            number = int(data[LABEL][row, step if real else 0, 0])
            for key in FIELDS:
                name = ("trajectory", *((key,) if isinstance(key, str) else key))
                assert torch.equal(data[name][row, step], value_of(key, number)), f"{key} is another trajectory's"
            assert texts.resolve(data["trajectory", "task"][row, step]) == task_of(number)
            said = said_at(number, int(data[LABEL][row, step, 1])) if real else ""
            assert texts.resolve(data["say"][row, step]) == said
    return data


def filled(count: int = 6, make: Callable[..., Any] = make_buffer, **kwargs: Any) -> Any:
    return make([trajectory(number, 3 + number) for number in range(count)], **kwargs)


class TestSamples:
    @pytest.mark.parametrize("make", [make_buffer, make_plain_buffer])
    def test_have_it_at_every_step(self, make: Callable[..., Any]) -> None:
        rb = filled(make=make)
        data = check(rb, check_chunk(rb.sample(32)))
        assert data["trajectory"].batch_size == (32, 3)
        assert data["trajectory", "goal"].shape == (32, 3, 2, 3)
        assert data["say"].dtype == data["trajectory", "task"].dtype == torch.int32

    @pytest.mark.parametrize("pad", ["before", "after", "both"])
    def test_have_it_in_padding(self, pad: str) -> None:
        rb = filled(sampler=ChunkSampler(6, pad=pad))
        data = rb.sample(32)
        assert not data["collector", "mask"].all()
        check(rb, data)  # padding repeats a step, with its label

    def test_of_windows_have_it_once(self) -> None:
        rb = filled(sampler=ChunkSampler(windows={LABEL: (0, 1), "say": (0, 1)}, pad="after"))
        data = rb.sample(16)
        numbers = data[LABEL][:, 0, 0].tolist()
        assert rb.texts.resolve(data["trajectory", "task"]) == [task_of(number) for number in numbers]
        assert torch.equal(data["trajectory", "goal"], torch.stack([value_of("goal", n) for n in numbers]))
        assert rb.texts.resolve(data["say"]) == [
            [said_at(n, int(s)) for n, s, *_ in row] for row in data[LABEL].tolist()
        ]
        assert "goal_is_pad" not in data["trajectory"]

    def test_that_are_changed_in_place_change_nothing_else(self) -> None:
        rb = filled()
        data = rb.sample(4)
        data["trajectory", "mass"][0, 0] += 1
        assert data["trajectory", "mass"][0, 1] == value_of("mass", int(data[LABEL][0, 1, 0]))
        check(rb, rb.sample(32))

    def test_of_images_lie_in_recycled_memory_as_well(self) -> None:
        rb = make_buffer(batch_size=64)
        for number in range(4):
            data = small(number, 4)
            data["trajectory", "image"] = torch.full((1, 64, 96), number, dtype=torch.uint8).expand(4, 64, 96)
            rb.extend(data)
        for _ in range(3):
            data = rb.sample()
            assert (data["trajectory", "image"] == data[LABEL][..., 0, None, None]).all()

    def test_are_drawn_by_a_group_of_trajectories(self) -> None:
        weights = ByGroup(("trajectory", "kind"), mixture={int(value_of("kind", n)): 1 + 3 * (n == 4) for n in (3, 4)})
        rb = filled(sampler=ChunkSampler(3, weights=weights), batch_size=400)
        numbers = rb.sample()[LABEL][:, 0, 0]
        assert set(numbers.tolist()) == {3, 4}
        assert 270 < (numbers == 4).sum() < 370  # 320 on average; six standard deviations
        with pytest.raises(
            SchemaMismatchError, match=r"\('trajectory', 'mass'\), which has \(\) elements of torch.float"
        ):
            filled(sampler=ChunkSampler(3, weights=ByGroup(("trajectory", "mass")))).sample()


class TestReads:
    def test_of_trajectories(self) -> None:
        rb = filled()
        assert contents(rb) == [(number, 3 + number) for number in range(2, 6)]
        check(rb, rb[:], rb[:]["collector", "mask"])
        check(rb, rb[[1, 3]], rb[[1, 3]]["collector", "mask"])
        check(rb, rb[2].unsqueeze(0))
        for found in rb.query():
            check(rb, found.data.unsqueeze(0))

    def test_of_given_steps(self) -> None:
        rb = filled()
        ids, steps = torch.tensor([[5, 2], [3, 5]]), torch.tensor([[7, 0], [1, 1]])
        data = rb.storage.get((ids, steps))
        assert torch.equal(data[LABEL][..., 0], ids)
        check(rb, data)

    def test_of_one_key(self) -> None:
        rb = filled()
        ids = np.array([4, 2, 4])
        values = rb.storage.trajectory_values(("trajectory", "goal"), ids)
        assert torch.equal(torch.from_numpy(values), torch.stack([value_of("goal", int(n)) for n in ids]))
        assert rb.texts.resolve(rb.storage.trajectory_values(("trajectory", "task"), ids)) == [
            "task 4",
            "task 2",
            "task 4",
        ]
        with pytest.raises(
            SchemaMismatchError, match=r"\('trajectory', 'weight'\), but the stored trajectory values are"
        ):
            rb.storage.trajectory_values(("trajectory", "weight"), ids)
        with pytest.raises(SchemaMismatchError, match="what is stored has no key under 'trajectory'"):
            make_buffer([small(0, 3)]).storage.trajectory_values(("trajectory", "goal"), ids)

    def test_of_ids_in_an_array_that_has_more_of_them_than_rows(self) -> None:
        storage = TrajectoryStorage(2, 20)
        writer = TrajectoryWriter()
        writer.register_storage(storage)
        for number in range(2 * storage.ledger.num_rows + 3):
            writer.extend(trajectory(number, 3))
        ids = np.arange(*storage.ledger.live_range())
        assert storage.trajectory_values(("trajectory", "mass"), ids).tolist() == [
            float(value_of("mass", n)) for n in ids
        ]


class TestWriting:
    @settings(max_examples=25)
    @given(st.data())
    def test_in_any_pieces(self, data: st.DataObject) -> None:
        rb = make_buffer(max_trajectories=10)
        lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
        steps = torch.cat([trajectory(n, length, traj_id=n) for n, length in enumerate(lengths)])
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(steps) - 1)), max_size=4)) - {len(steps)})
        for piece in steps.split(np.diff([0, *cuts, len(steps)]).tolist()):
            rb.extend(piece)
        assert contents(rb) == list(enumerate(lengths))
        check(rb, rb[:], rb[:]["collector", "mask"])

    def test_of_several_environments_and_of_padded_rows(self) -> None:
        rb = make_buffer()
        rows = lazy_stack([trajectory(number, 5) for number in range(2)])
        rb.extend(rows[:, :2])
        rb.extend(rows[:, 2:].contiguous())
        rb.extend(check(rb, rb[:]).exclude("say", "trajectory").update(rows.select("say", "trajectory")))
        assert [number for number, _ in contents(rb)] == [0, 1, 0, 1]
        check(rb, rb[:])

    @pytest.mark.parametrize("key", [*FIELDS, "task"], ids=str)
    @pytest.mark.parametrize("pieces", [[6], [2, 4], [4, 2]], ids=str)
    def test_of_what_changes_within_a_trajectory_is_refused_whole(self, key: Any, pieces: list[int]) -> None:
        rb = filled(2)
        data = trajectory(9, 6)
        name = ("trajectory", *((key,) if isinstance(key, str) else key))
        if key == "task":
            data[name] = ["a", "a", "a", "a", "b", "a"]
        else:
            values = data[name].clone()
            values[4] = 0
            data[name] = values
        *first, last = data.split(pieces)
        for piece in first:
            rb.extend(piece)
        with pytest.raises(TrajectoryValueError, match=rf"'{name[-1]}'\) that changes at step 4 of its trajectory"):
            rb.extend(last)
        assert len(rb) == 2
        assert rb.stats()["pending_steps"] == sum(pieces[:-1])
        if not first:
            rb.extend(trajectory(9, 6))
            assert check(rb, rb[2].unsqueeze(0))[LABEL][0, 0, 0] == 9

    def test_of_nan_is_the_same_at_every_step(self) -> None:
        rb = make_buffer()
        data = small(0, 3)
        data["trajectory", "mass"] = torch.full((3,), torch.nan)
        rb.extend(data)
        assert rb[0]["trajectory", "mass"].isnan().all()

    def test_of_what_an_environment_observes_again_behind_the_step(self) -> None:
        rb = make_buffer()
        data = trajectory(0, 4)
        data["next", "trajectory"] = data["trajectory"].clone()
        rb.extend(data)
        assert ("next", "trajectory", "mass") not in rb[0].keys(True)
        check(rb, rb[0].unsqueeze(0))
        data["next", "trajectory", "mass"] = data["trajectory", "mass"] + 1
        with pytest.raises(TrajectoryValueError, match=r"\('next', 'trajectory', 'mass'\) that is another than"):
            rb.extend(data)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: d.set("say", torch.zeros(3, dtype=torch.int32)), r"'say' with \(\) .*torch.int32.*\(\) of text"),
            (lambda d: d.set("observation", ["a", "b", "c"]), r"'observation' with \(\) elements of text"),
            (lambda d: d.set(("next", "done"), ["a", "b", "c"]), r"\('next', 'done'\) with \(\) elements of text"),
            (lambda d: d.exclude(("trajectory", "goal")), r"without \('trajectory', 'goal'\)"),
            (
                lambda d: d.set(("trajectory", "new"), ["a"] * 3),
                r"with \('trajectory', 'new'\), which the arena was not",
            ),
            (lambda d: d.set_non_tensor("say", 3), "'say' of type NonTensorData"),
            (lambda d: d.set("say", NonTensorStack(*[NonTensorStack("a", "b")] * 3)), r"'say' with \(2,\) elements"),
        ],
    )
    def test_of_other_data_is_refused(self, change: Callable[[TensorDict], TensorDict], message: str) -> None:
        rb = filled(2)
        with pytest.raises(SchemaMismatchError, match=message):
            rb.extend(change(trajectory(9, 3)))
        assert len(rb) == 2

    def test_several_texts_a_step(self) -> None:
        rb = make_buffer()
        data = small(0, 3)
        data["trajectory", "words"] = NonTensorStack(*[NonTensorStack("red", "cube")] * 3)
        rb.extend(data)
        assert rb.texts.resolve(rb.sample(2)["trajectory", "words"]) == [[["red", "cube"]] * 3] * 2

    def test_accept_reads_the_text(self) -> None:
        writer = TrajectoryWriter(accept=lambda steps: steps["trajectory", "task"][0] == "task 3")
        rb = filled(writer=writer)
        assert contents(rb) == [(3, 6)]
        check(rb, rb[:])


def through_directory(source: Any, target: Any, path: Path) -> Any:
    source.dumps(path)
    target.loads(path)
    return target


def through_state(source: Any, target: Any, path: Path) -> Any:
    target.load_state_dict(source.state_dict())
    return target


class TestSaved:
    @pytest.mark.parametrize("way", [through_directory, through_state])
    def test_into_a_buffer_that_knows_other_texts(self, way: Any, tmp_path: Path) -> None:
        source, target = filled(), make_buffer()
        for text in ("other", said_at(5, 3), "more"):
            target.texts.intern(text)
        way(source, target, tmp_path)
        assert contents(target) == contents(source)
        assert target.storage.schema == source.storage.schema
        check(target, target[:], target[:]["collector", "mask"])
        assert "trajectory 1 says 0" not in target.texts.resolve(range(len(target.texts))), "what is gone was saved"
        target.extend(trajectory(6, 4))
        check(target, target.sample(16))

    def test_a_copy_keeps_the_ids(self) -> None:
        rb = filled()
        own = copy.deepcopy(rb)
        assert torch.equal(own[:]["say"], rb[:]["say"])
        own.texts.intern("new")
        own.extend(trajectory(7, 4))
        check(own, own[:], own[:]["collector", "mask"])
        check(rb, rb[:], rb[:]["collector", "mask"])

    @pytest.mark.parametrize(
        "damage",
        [
            lambda state: state.pop("texts"),
            lambda state: state["texts"].pop(),
            lambda state: state.update(texts=3),
            lambda state: state.update(texts=[3] * 99),
            lambda state: state["values"].pop(),
            lambda state: state["values"].__setitem__(-1, state["values"][-1][:-1]),
        ],
        ids=["no texts", "a text less", "no list", "no strings", "a field less", "a trajectory less"],
    )
    def test_damage_is_found_and_changes_nothing(self, damage: Callable[[dict[str, Any]], None]) -> None:
        state = filled().storage.state_dict()
        damage(state)
        target = make_buffer([trajectory(8, 4)])
        with pytest.raises(CheckpointError):
            target.storage.load_state_dict(state)
        assert contents(target) == [(8, 4)]


def write_on(rb: TrajectoryReplayBuffer, first: int, count: int) -> None:
    for number in range(first, first + count):
        rb.extend(trajectory(number, 3 + number % 4))


class TestWhileOthersWrite:
    def test_every_chunk_has_its_own_trajectorys(self) -> None:
        rb = make_buffer([trajectory(0, 3)], max_trajectories=2, max_total_steps=12, batch_size=16)
        child = Child("fork", rb)
        child.begin(write_on, 1, 300)
        seen: set[int] = set()
        while rb.storage.ledger.next_id < 301:
            data = check(rb, rb.sample())
            seen |= set(data[LABEL][:, 0, 0].tolist())
        child.result()
        child.end()
        assert len(seen) > 5

    @pytest.mark.parametrize(
        "sampler",
        [
            ChunkSampler(3),
            ChunkSampler(4, pad="both"),
            ChunkSampler(windows={LABEL: (0, 2), "say": (0, 2)}, pad="both"),
        ],
        ids=["chunks", "padded", "windows"],
    )
    def test_rows_are_used_again_between_any_two_instructions_of_sample(self, sampler: ChunkSampler) -> None:
        rb = make_buffer(max_trajectories=2, max_total_steps=12, sampler=sampler)
        write_on(rb, 0, 3)
        rb.storage.ledger.num_rows = rb.storage.table._num_rows = 3  # so that they are at once
        instruction, met, written = 0, True, 3

        def write(n: int) -> None:
            nonlocal met, written
            if n == instruction:
                write_on(rb, written, 4)
                met, written = True, written + 4

        while met:
            met, data = False, []
            at_every_instruction(lambda data=data: data.append(rb.sample(4)), write)
            numbers = data[0][LABEL][:, 0, 0].tolist()
            if data[0].ndim == 2:
                check(rb, data[0])
            assert rb.texts.resolve(data[0]["trajectory", "task"].reshape(4, -1)[:, 0]) == [task_of(n) for n in numbers]
            instruction += 61
        assert instruction > 300

    def test_killed_at_any_instruction_of_extend(self) -> None:
        rb = make_buffer([trajectory(n, 5) for n in range(3)], max_trajectories=3, max_total_steps=30)
        pieces = trajectory(77, 6).split([2, 4])
        instruction = killed = 0
        while run_in_child_until(instruction, lambda: [rb.extend(piece) for piece in pieces]):
            check_ledger(rb.storage.ledger)
            check(rb, rb[:], rb[:]["collector", "mask"])
            rb.extend(trajectory(100 + killed, 3 + killed % 5))
            check(rb, rb.sample())
            killed += 1
            instruction += 9 * EVERY
        assert killed > 20, f"only {killed} instructions were met"

    def test_a_reader_between_any_two_instructions_of_publish_sees_its_values_or_none(self) -> None:
        rb = make_buffer([trajectory(0, 3)], max_trajectories=2, max_total_steps=12)
        storage, ledger = rb.storage, rb.storage.ledger
        ledger.num_rows = storage.table._num_rows = 3  # so that rows are used again at once
        ids = np.arange(40)
        whole = 0

        def look(_: int) -> None:
            nonlocal whole
            known = ids[ledger.published(ids)]
            there = known[ledger.rows_of(known).lengths >= 0]
            values = storage.trajectory_values(("trajectory", "mass"), there)
            kept = ledger.still_valid(there)
            assert values[kept].tolist() == [float(value_of("mass", int(n))) for n in there[kept]]
            whole += int(kept.sum())

        at_every_instruction(lambda: write_on(rb, 1, 4), look)
        assert whole > 1000
