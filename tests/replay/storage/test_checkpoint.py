"""Saving and loading: what comes back is what was live, and a damaged checkpoint changes nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import (
    Child,
    check_chunk,
    contents,
    make_buffer,
    make_plain_buffer,
    make_storage,
    make_trajectory,
    small,
)
from tensordict import TensorDict
from torchrl.data import ReplayBuffer, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs.transforms import ObservationNorm

from embodichain_rl.errors import CheckpointError, SchemaMismatchError, UnsupportedOperationError

SAVED = [(2, 5), (3, 6), (4, 7), (5, 8)]


def saved_buffer(make: Callable[..., Any] = make_buffer, **kwargs: Any) -> Any:
    """A buffer that holds what ``SAVED`` says, after two more trajectories that were evicted."""
    return make([make_trajectory(number, 3 + number) for number in range(6)], **kwargs)


def through_directory(source: ReplayBuffer, target: ReplayBuffer, path: Path) -> None:
    source.dumps(path)
    target.loads(path)


def through_state(source: ReplayBuffer, target: ReplayBuffer, path: Path) -> None:
    target.load_state_dict(source.state_dict())


def through_torch_save(source: ReplayBuffer, target: ReplayBuffer, path: Path) -> None:
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))


WAYS = [through_directory, through_state, through_torch_save]


@pytest.mark.parametrize("way", WAYS)
class TestEveryWay:
    @pytest.mark.parametrize("make", [make_buffer, make_plain_buffer])
    def test_brings_back_every_value_in_the_same_order(self, way: Any, make: Any, tmp_path: Path) -> None:
        source, target = saved_buffer(make), make()
        way(source, target, tmp_path)
        assert contents(target) == contents(source) == SAVED
        assert target.storage.schema == source.storage.schema
        assert check_chunk(target.sample()).shape == (8, 3)

    def test_goes_on_counting(self, way: Any, tmp_path: Path) -> None:
        source, target = saved_buffer(), make_buffer()
        source.storage.ledger.count_steps_from(2**33)
        way(source, target, tmp_path)
        assert target.write_count == 2**33
        target.extend(make_trajectory(6, 3))
        assert target.write_count == 2**33 + 3

    def test_keeps_the_ids_in_a_new_buffer(self, way: Any, tmp_path: Path) -> None:
        source, target = saved_buffer(), make_buffer()
        way(source, target, tmp_path)
        for number, rows in enumerate(source.storage):
            assert torch.equal(target.storage[number]["trajectory", "id"], rows["trajectory", "id"])
        assert int(target.extend(make_trajectory(6, 3))[0]) == int(source.extend(make_trajectory(6, 3))[0]) == 6

    def test_gives_no_id_again(self, way: Any, tmp_path: Path) -> None:
        source, target = saved_buffer(), make_buffer([make_trajectory(9, 3)])
        way(source, target, tmp_path)
        ids = [int(rows["trajectory", "id"][0]) for rows in target.storage]
        assert min(ids) >= 6
        assert int(target.extend(make_trajectory(6, 3))[0]) > max(ids)

    def test_replaces_what_was_there(self, way: Any, tmp_path: Path) -> None:
        target = make_buffer([make_trajectory(number, 4) for number in (90, 91)])
        target.extend(make_trajectory(92, 4)[:2])
        way(saved_buffer(), target, tmp_path)
        assert contents(target) == SAVED
        assert target.stats()["pending_steps"] == 0

    def test_goes_on_with_the_draws(self, way: Any, tmp_path: Path) -> None:
        source, target = saved_buffer(generator=torch.Generator().manual_seed(3)), make_buffer()
        source.sample()
        way(source, target, tmp_path)
        assert torch.equal(target.sample()["label"], source.sample()["label"])

    def test_leaves_unfinished_trajectories_out(self, way: Any, tmp_path: Path) -> None:
        source, target = saved_buffer(), make_buffer()
        source.extend(make_trajectory(6, 9)[:4])
        way(source, target, tmp_path)
        assert contents(target) == SAVED
        source.extend(make_trajectory(6, 9)[4:])
        assert contents(source)[-1] == (6, 9)

    def test_of_a_buffer_without_memory(self, way: Any, tmp_path: Path) -> None:
        target = make_buffer()
        way(make_buffer(), target, tmp_path)
        assert not target.storage.initialized
        target.extend(small(0, 3))

    def test_of_an_empty_buffer_empties(self, way: Any, tmp_path: Path) -> None:
        source, target = make_buffer([small(0, 3)]), make_buffer([small(1, 3)])
        source.empty()
        way(source, target, tmp_path)
        assert len(target) == 0
        target.extend(small(2, 4))
        assert contents(target) == [(2, 4)]

    def test_into_a_smaller_buffer_keeps_the_newest(self, way: Any, tmp_path: Path) -> None:
        target = make_buffer(max_trajectories=3, max_total_steps=16)
        way(saved_buffer(), target, tmp_path)
        assert contents(target) == [(4, 7), (5, 8)]

    def test_into_a_buffer_too_small_for_one_changes_nothing(self, way: Any, tmp_path: Path) -> None:
        target = make_buffer([make_trajectory(9, 4)], max_total_steps=7)
        with pytest.raises(CheckpointError, match="a trajectory of 8 steps, the storage at most 7 in all"):
            way(saved_buffer(), target, tmp_path)
        assert contents(target) == [(9, 4)]

    def test_of_other_keys_changes_nothing(self, way: Any, tmp_path: Path) -> None:
        target = make_buffer([small(9, 4)])
        with pytest.raises(SchemaMismatchError, match=r"The checkpoint holds Schema\(.*the storage was allocated for"):
            way(saved_buffer(), target, tmp_path)
        assert contents(target) == [(9, 4)]

    def test_of_keys_in_another_order(self, way: Any, tmp_path: Path) -> None:
        target = make_buffer()
        step = make_trajectory(0, 1)[0]
        target.storage.allocate(TensorDict({key: step[key] for key in reversed(list(step.keys()))}, []))
        assert target.storage.schema.keys != saved_buffer().storage.schema.keys
        way(saved_buffer(), target, tmp_path)
        assert contents(target) == SAVED

    def test_of_a_sampler_and_a_transform_with_state(self, way: Any, tmp_path: Path) -> None:
        source, target = (
            make(
                sampler=SamplerWithoutReplacement(shuffle=False),
                transform=ObservationNorm(loc=loc, scale=1.0, in_keys=["speed"], standard_normal=True),
                batch_size=2,
            )
            for make, loc in ((saved_buffer, 7.0), (make_buffer, 0.0))
        )
        source.sample()
        way(source, target, tmp_path)
        data = target.sample()
        assert data["label"][:, 0, 0].tolist() == [4, 5]
        assert torch.equal(data["speed"], target.storage[2:4]["speed"] - 7)


class TestDirectory:
    def test_is_read_by_another_process(self, tmp_path: Path) -> None:
        saved_buffer().dumps(tmp_path)
        child = Child("forkserver", str(tmp_path))
        assert child.call(load_contents) == SAVED
        child.end()

    def test_holds_no_pickle(self, tmp_path: Path) -> None:
        rb = saved_buffer(prefetch=2)
        rb.sample()
        rb.dumps(tmp_path)
        names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert not {name for name in names if not name.endswith((".json", ".bin"))}
        target = make_buffer(prefetch=1)
        target.loads(tmp_path)
        assert contents(target) == SAVED

    def test_can_be_written_again(self, tmp_path: Path) -> None:
        rb = saved_buffer()
        rb.dumps(tmp_path)
        rb.extend(make_trajectory(6, 3))
        rb.dumps(tmp_path)
        target = make_buffer()
        target.loads(tmp_path)
        assert contents(target) == [*SAVED[1:], (6, 3)]

    def test_is_written_by_all_of_torchrls_names(self, tmp_path: Path) -> None:
        rb = saved_buffer()
        for save, load in (("save", "load"), ("dump", "loads"), ("dumps", "load")):
            getattr(rb, save)(tmp_path)
            target = make_buffer()
            getattr(target, load)(tmp_path)
            assert contents(target) == SAVED
        rb.storage.dumps(tmp_path / "alone")
        storage = make_storage()
        storage.loads(tmp_path / "alone")
        assert contents(storage) == SAVED

    @pytest.mark.parametrize("register", ["register_save_hook", "register_load_hook"])
    def test_hooks_are_refused(self, register: str) -> None:
        with pytest.raises(UnsupportedOperationError, match="hook"):
            getattr(saved_buffer(), register)(lambda data, path=None: data)


def load_contents(path: str) -> list[tuple[int, int]]:
    rb = make_buffer()
    rb.loads(path)
    return contents(rb)


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "trajectories.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def file_in(path: Path, name: str) -> Path:
    (file,) = path.rglob(name)
    return file


def truncated(name: str, size: int) -> Callable[[Path], None]:
    def truncate(path: Path) -> None:
        file = file_in(path, name)
        file.write_bytes(file.read_bytes()[:size])

    return truncate


def schema_with(field: Any = ("next", "terminated"), **changes: Any) -> str:
    """The schema with something else said of one field, whose bytes are those of one bool."""
    fields = json.loads(saved_buffer().storage.schema.to_json())
    named = [dict(zip(("key", "shape", "dtype"), given, strict=True)) for given in fields]
    next(given for given in named if given["key"] == list(field)).update(changes)
    return json.dumps([[given["key"], given["shape"], given["dtype"]] for given in named])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no description": lambda path: (path / "trajectories.json").unlink(),
    "half a description": truncated("trajectories.json", 100),
    "no object": lambda path: (path / "trajectories.json").write_text("[]"),
    "no text": lambda path: (path / "trajectories.json").write_bytes(b"\xff\xfe\x00"),
    "a field less": lambda path: file_in(path, "field_0003.bin").unlink(),
    "an empty field": lambda path: file_in(path, "field_0000.bin").write_bytes(b""),
    "half a field": truncated("field_0001.bin", 77),
    "another format": edited(format=99),
    "no format": edited(format=None),
    "a folder of others": edited(folder="../other"),
    "a folder that is no name": edited(folder=3),
    "fields that are not shifted": edited(shifted={"0": 1}),
    "shifted fields that are no numbers": edited(shifted={"a": 1}),
    "shifted fields that are a list": edited(shifted=[1]),
    "fewer steps": edited(lengths=[5, 6, 7]),
    "more steps": edited(lengths=[5, 6, 7, 9]),
    "a negative length": edited(lengths=[5, 6, 7, -8, 16]),
    "a length of zero": edited(lengths=[5, 6, 7, 8, 0]),
    "nested lengths": edited(lengths=[[5, 6, 7, 8]]),
    "a length that is text": edited(lengths=["5", 6, 7, 8]),
    "no lengths": edited(lengths=None),
    "lengths that overflow": edited(lengths=[2**62] * 4),
    "a negative id": edited(next_id=-1),
    "an id that is no number": edited(next_id="6"),
    "an id that is true": edited(next_id=True),
    "an id that overflows": edited(next_id=2**70),
    "no count": edited(steps_written=None),
    "half a count": edited(steps_written=1.5),
    "half a schema": edited(schema="["),
    "an empty schema": edited(schema="[]"),
    "no schema": edited(schema=None),
    "a schema that is no text": edited(schema=[]),
    "an unknown dtype": edited(schema=schema_with(dtype="float32x")),
    "a dtype that is a module": edited(schema=schema_with(dtype="nn")),
    "a dtype that is a class": edited(schema=schema_with(dtype="__class__")),
    "a negative shape": edited(schema=schema_with(shape=[-1])),
    "a shape that is text": edited(schema=schema_with(shape=["3"])),
    "a huge shape": edited(schema=schema_with(shape=[2**40])),
    "a key of nothing": edited(schema=schema_with(key=[])),
    "keys that are the same": edited(schema=schema_with(key=["next", "done"])),
    "a key within another": edited(schema=schema_with(key=["label", "x"])),
    "a key above others": edited(schema=schema_with(key=["robot"])),
    "a key that is a number": edited(schema=schema_with(key=[3])),
    "a key that is text": edited(schema=schema_with(key="ab")),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("fresh", [True, False], ids=["into a fresh storage", "into one in use"])
    def test_is_found_and_changes_nothing(self, damage: str, fresh: bool, tmp_path: Path) -> None:
        saved_buffer().storage.dumps(tmp_path)
        DAMAGES[damage](tmp_path)
        storage = make_storage([] if fresh else [make_trajectory(8, 4)])
        with pytest.raises(CheckpointError):
            storage.loads(tmp_path)
        assert storage.initialized is not fresh
        assert contents(storage) == ([] if fresh else [(8, 4)])
        assert storage.ledger.steps_written == (0 if fresh else 4)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda state: state.pop("values"),
            lambda state: state["values"].pop(),
            lambda state: state["values"].append(torch.zeros(26)),
            lambda state: state["values"].__setitem__(0, state["values"][0][:-1]),
            lambda state: state["values"].__setitem__(0, state["values"][0].float()),
            lambda state: state["values"].__setitem__(0, "values"),
            lambda state: state.update(values={}),
            lambda state: state.update(lengths=torch.tensor([5.5, 6, 7, 7.5])),
            lambda state: state.pop("lengths"),
            lambda state: state.pop("next_id"),
            lambda state: state.clear(),
        ],
        ids=[
            "no values",
            "a field less",
            "a field more",
            "a step less",
            "another dtype",
            "no tensor",
            "values that are no list",
            "half steps",
            "no lengths",
            "no id",
            "nothing",
        ],
    )
    def test_of_a_state_is_found_and_changes_nothing(self, damage: Callable[[dict[str, Any]], None]) -> None:
        state = saved_buffer().storage.state_dict()
        damage(state)
        target = make_buffer([make_trajectory(8, 4)])
        with pytest.raises(CheckpointError):
            target.storage.load_state_dict(state)
        assert contents(target) == [(8, 4)]
        assert target.write_count == 4

    def test_what_is_not_there_is_not_loaded(self, tmp_path: Path) -> None:
        target = make_buffer([make_trajectory(8, 4)])
        with pytest.raises(CheckpointError, match="No readable"):
            target.loads(tmp_path / "nowhere")
        assert contents(target) == [(8, 4)]


def test_is_taken_while_others_write() -> None:
    rb = make_buffer(max_trajectories=3, max_total_steps=30)
    rb.extend(make_trajectory(0, 5))
    child = Child("fork", rb)
    child.begin(write_many, 150)
    taken = 0
    while rb.storage.ledger.stats()["published"] < 151:
        target = make_buffer()
        target.load_state_dict(rb.state_dict())
        assert len(contents(target)) <= 3
        taken += 1
    child.result()
    child.end()
    assert taken > 0


def write_many(rb: TensorDictReplayBuffer, count: int) -> None:
    for number in range(1, count + 1):
        rb.extend(make_trajectory(number, 1 + number % 10))


def test_loading_into_a_shared_buffer_is_seen_by_every_process() -> None:
    rb = make_buffer([make_trajectory(8, 4)])
    child = Child("fork", rb)
    rb.load_state_dict(saved_buffer().state_dict())
    assert child.call(contents) == SAVED
    child.end()


def test_a_buffer_can_be_taken_back_to_a_state_of_its_own() -> None:
    rb = saved_buffer()
    state = rb.state_dict()
    rb.extend(make_trajectory(6, 3))
    rb.load_state_dict(state)
    assert contents(rb) == SAVED
