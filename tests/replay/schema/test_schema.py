"""Schema: what a step consists of, and what is refused because it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from steps import FIELDS, make_trajectory
from tensordict import TensorDict, lazy_stack, tensorclass

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema.schema import Schema, StepField


@tensorclass
class Pose:
    position: torch.Tensor
    rotation: torch.Tensor


@pytest.fixture
def schema() -> Schema:
    return Schema.of(make_trajectory(0, 2))


class TestOf:
    @pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 6)], ids=str)
    def test_reads_fields_off_data_of_any_batch_size(self, shape: tuple[int, ...], schema: Schema) -> None:
        assert Schema.of(make_trajectory(1, 6).reshape(shape)) == schema

    def test_of_a_single_step(self, schema: Schema) -> None:
        assert Schema.of(make_trajectory(1, 6)[0]) == schema

    def test_of_a_lazy_stack(self, schema: Schema) -> None:
        assert Schema.of(lazy_stack(list(make_trajectory(1, 6).unbind(0)))) == schema

    def test_knows_every_field(self, schema: Schema) -> None:
        found = {field.key: (field.shape, field.dtype) for field in schema.fields}
        for key, kind in FIELDS.items():
            assert found[key if isinstance(key, tuple) else (key,)] == kind
        assert schema.keys == [field.key for field in schema.fields]
        assert schema.nbytes == sum(np.prod(shape) * dtype.itemsize for shape, dtype in found.values())

    def test_of_a_tensorclass_within(self) -> None:
        data = TensorDict({"pose": Pose(torch.zeros(4, 3), torch.zeros(4, 4), batch_size=[4])}, [4])
        assert Schema.of(data).keys == [("pose", "position"), ("pose", "rotation")]

    def test_leaves_out_what_the_buffer_adds(self, schema: Schema) -> None:
        data = make_trajectory(0, 3)
        data["index"] = torch.zeros(3, 2, dtype=torch.int64)
        data["trajectory"] = TensorDict({"id": data["index"][:, 0], "step": data["index"][:, 1]}, [3])
        assert Schema.of(data) == schema
        assert len(schema.leaves(data)) == len(schema.fields)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (TensorDict({}, [3]), "without any tensor"),
            (TensorDict({"a": TensorDict({}, [3])}, [3]), "without any tensor"),
            (TensorDict({"index": torch.zeros(3, 2, dtype=torch.int64)}, [3]), "without any tensor"),
            (TensorDict({"a": torch.zeros(3), "trajectory": {"id": torch.zeros(3)}}, [3]), "one integer for each step"),
            (TensorDict({"a": torch.zeros(3)}, [3]).set_non_tensor("task", 3), "'task' of type NonTensorData"),
            (TensorDict({"a": {"b": ["x", 2, "z"]}}, [3]), r"\('a', 'b'\) of type NonTensorStack"),
            (TensorDict({"trajectory": {"task": ["x", "x"]}}, [2]), "without any tensor"),
            (TensorDict({"a": torch.zeros(3), "trajectory": torch.zeros(3)}, [3]), "Got 'trajectory', but that is"),
            (TensorDict({"trajectory": {"id": {"x": torch.zeros(3)}}}, [3]), r"Got \('trajectory', 'id', 'x'\)"),
            (TensorDict({"next": {"trajectory": {"x": torch.zeros(3)}}}, [3]), r"without \('trajectory', 'x'\)"),
        ],
    )
    def test_refuses_what_no_arena_can_hold(self, data: TensorDict, message: str) -> None:
        with pytest.raises(SchemaMismatchError, match=message):
            Schema.of(data)


class TestLeaves:
    def test_are_in_the_order_of_the_fields(self, schema: Schema) -> None:
        data = make_trajectory(3, 5)
        mixed = TensorDict({key: data[key] for key in reversed(list(data.keys()))}, [5])
        for field, value in zip(schema.fields, schema.leaves(mixed), strict=True):
            assert torch.equal(value, data[field.key])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: d.exclude("speed"), "Got data without 'speed'"),
            (lambda d: d.exclude("speed", ("next", "reward")), r"without 'speed', \('next', 'reward'\)"),
            (lambda d: d.set("extra", torch.zeros(4)), "with 'extra', which the arena was not allocated for"),
            (lambda d: d.rename_key_("observation", "observations"), "'observations' may be meant as 'observation'"),
            (lambda d: d.rename_key_("clock", "velocity"), "without 'clock'; with 'velocity', which"),
            (lambda d: d.set("speed", torch.zeros(4, 1)), r"'speed' with \(1,\) elements.*allocated for \(\)"),
            (lambda d: d.set("pixels", d["pixels"][..., :1]), r"'pixels' with \(4, 5, 1\) .*for \(4, 5, 3\)"),
            (lambda d: d.set("speed", torch.zeros(4).half()), "torch.float16 a step, but .* torch.float32"),
            (lambda d: d.set(("robot", "mode"), torch.zeros(4).int()), r"\('robot', 'mode'\) .* torch.int32"),
        ],
    )
    def test_that_differ_are_refused_by_name(self, schema: Schema, change: Any, message: str) -> None:
        with pytest.raises(SchemaMismatchError, match=message):
            schema.leaves(change(make_trajectory(0, 4)))


class TestBuild:
    @pytest.mark.parametrize("batch_size", [(), (3,), (2, 5)], ids=str)
    def test_puts_values_where_they_belong(self, schema: Schema, batch_size: tuple[int, ...]) -> None:
        values = [torch.full((*batch_size, *field.shape), n).to(field.dtype) for n, field in enumerate(schema.fields)]
        data = schema.build(values, batch_size)
        assert data.batch_size == batch_size
        for field, value in zip(schema.fields, values, strict=True):
            assert data[field.key] is value or torch.equal(data[field.key], value)
        for key, node in data.items(True, False):
            if isinstance(node, TensorDict):
                assert node.batch_size == batch_size, key

    def test_makes_a_tensordict_like_any_other(self, schema: Schema) -> None:
        data = make_trajectory(0, 4)
        built = schema.build(schema.leaves(data), (4,))
        assert (built == data).all()
        assert built.device is None
        assert torch.equal(torch.stack([built, built])[0]["speed"], data["speed"])
        built["new", "key"] = torch.zeros(4)
        assert (built[1:3].clone() == built[1:3]).all()
        with built.lock_(), pytest.raises(RuntimeError, match="lock"):
            built["another"] = torch.zeros(4)

    def test_of_a_sample_says_where_it_comes_from(self, schema: Schema) -> None:
        data = make_trajectory(0, 6).reshape(2, 3)
        index = np.arange(12).reshape(2, 3, 2)
        there = torch.from_numpy(index)
        sample = schema.build_sample(schema.leaves(data), [there, there[..., 0], there[..., 1]])
        assert sample["trajectory", "id"].tolist() == index[..., 0].tolist()
        assert sample["trajectory", "step"].tolist() == index[..., 1].tolist()
        assert torch.equal(sample["speed"], data["speed"])


class TestJson:
    def test_brings_it_back(self, schema: Schema) -> None:
        again = Schema.from_json(schema.to_json())
        assert again == schema
        assert again.keys == schema.keys

    @pytest.mark.parametrize("key", [("a.b",), ("a/b", "c"), ("ä", "日本"), ('"',), (" ",)], ids=str)
    def test_of_any_name(self, key: tuple[str, ...]) -> None:
        schema = Schema([StepField(key, (2,), torch.float32), StepField(("x",), (), torch.bool)])
        assert Schema.from_json(schema.to_json()) == schema

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "3",
            '[["a", [], "float32"]]',
            "[]",
            '[[[], [], "float32"]]',
            '[[["a"], [-1], "float32"]]',
            '[[["a"], [1.5], "float32"]]',
            '[[["a"], ["1"], "float32"]]',
            '[[["a"], [], "float33"]]',
            '[[["a"], [], "nn"]]',
            '[[["a"], []]]',
            '[[[1], [], "float32"]]',
            '[[["a"], [], "float32"], [["a"], [], "float32"]]',
            '[[["a"], [], "float32"], [["a", "b"], [], "float32"]]',
            '[[["a", "b"], [], "float32"], [["a"], [], "float32"]]',
        ],
    )
    def test_of_something_else_is_refused(self, text: str) -> None:
        with pytest.raises((AttributeError, TypeError, ValueError)):
            Schema.from_json(text)


class TestEquality:
    def test_does_not_depend_on_the_order(self) -> None:
        a, b = StepField(("a",), (), torch.bool), StepField(("b",), (2,), torch.float32)
        assert Schema([a, b]) == Schema([b, a])
        assert hash(Schema([a, b])) == hash(Schema([b, a]))

    @pytest.mark.parametrize(
        "other",
        [StepField(("b",), (), torch.bool), StepField(("a",), (1,), torch.bool), StepField(("a",), (), torch.int8)],
    )
    def test_depends_on_key_shape_and_dtype(self, other: StepField) -> None:
        assert Schema([StepField(("a",), (), torch.bool)]) != Schema([other])

    def test_with_something_else(self, schema: Schema) -> None:
        assert schema != "schema"


def test_repr_lists_the_fields() -> None:
    schema = Schema([StepField(("a",), (2, 3), torch.uint8), StepField(("next", "done"), (1,), torch.bool)])
    assert repr(schema) == "Schema('a': [2, 3] uint8, ('next', 'done'): [1] bool)"
