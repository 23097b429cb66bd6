"""Lazy stacks: trajectories of unequal length are written, and what can't be is refused by the name of the key."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from steps import contents, make_buffer, make_storage, make_trajectory, small
from tensordict import TensorDict, TensorDictBase, lazy_stack, tensorclass

from embodichain_rl.errors import SchemaMismatchError


@tensorclass
class Pose:
    position: torch.Tensor


class TestRagged:
    def test_trajectories_of_unequal_length_are_a_trajectory_each(self) -> None:
        rb = make_buffer()
        index = rb.extend(lazy_stack([make_trajectory(0, 5), make_trajectory(1, 7), make_trajectory(2, 3)]))
        assert contents(rb) == [(0, 5), (1, 7), (2, 3)]
        assert index.tolist() == [[0] * 5 + [-1] * 2, [1] * 7, [2] * 3 + [-1] * 4]

    def test_into_a_buffer_that_holds_others(self) -> None:
        rb = make_buffer([make_trajectory(8, 6)])
        rb.extend(lazy_stack([make_trajectory(0, 5), make_trajectory(1, 7)]))
        assert contents(rb) == [(8, 6), (0, 5), (1, 7)]

    def test_with_text_and_trajectory_values(self) -> None:
        trajectories = []
        for length in (3, 5):
            words = [f"step {n}" for n in range(length)]
            trajectory = small(length, length).set("words", words)
            trajectories.append(trajectory.set(("trajectory", "task"), [f"task {length}"] * length))
        rb = make_buffer([lazy_stack(trajectories)])
        assert rb.texts.resolve(rb[0]["words"]) == ["step 0", "step 1", "step 2"]
        assert rb.texts.resolve(rb[1]["trajectory", "task"][:1]) == ["task 5"]

    def test_of_lazy_stacks_of_steps(self) -> None:
        rb = make_buffer()
        rb.extend(lazy_stack([lazy_stack(list(make_trajectory(n, n + 3).unbind(0))) for n in range(3)]))
        assert contents(rb) == [(0, 3), (1, 4), (2, 5)]

    def test_with_tensorclasses_and_agents(self) -> None:
        trajectories = []
        for length in (3, 5):
            pose = Pose(position=torch.randn(length, 2, 3), batch_size=[length, 2])
            trajectories.append(small(length, length).set("poses", pose))
        rb = make_buffer([lazy_stack(trajectories)])
        assert type(rb[0]["poses"]) is Pose
        assert rb[1]["poses"].batch_size == (5, 2)
        assert torch.equal(rb[1]["poses"].position, trajectories[1]["poses"].position)

    def test_allocates(self) -> None:
        storage = make_storage()
        storage.allocate(lazy_stack([make_trajectory(0, 5), make_trajectory(1, 7)]))
        assert ("collector", "mask") not in storage.schema.keys
        rb = make_buffer([make_trajectory(0, 4)], storage=storage)
        assert contents(rb) == [(0, 4)]

    @pytest.mark.parametrize(
        "data",
        [
            lazy_stack([small(0, 5), small(1, 7)], dim=1),
            lazy_stack([small(0, 5)[:0], small(1, 7)]),
            lazy_stack([small(0, 6).reshape(2, 3), small(1, 8).reshape(2, 4)]),
        ],
        ids=["along time", "without a step", "[B, N, T]"],
    )
    def test_of_another_form_is_refused(self, data: TensorDictBase) -> None:
        rb = make_buffer()
        with pytest.raises(SchemaMismatchError, match="batch size"):
            rb.extend(data)
        assert not rb.storage.initialized


def one_without(data: TensorDictBase, key: Any) -> TensorDictBase:
    return data.exclude(key)


class TestRefused:
    @pytest.mark.parametrize("key", ["observation", ("robot", "mode"), ("next", "reward")])
    @pytest.mark.parametrize("ragged", [False, True])
    @pytest.mark.parametrize("filled", [False, True])
    def test_where_only_some_have_a_key(self, key: Any, ragged: bool, filled: bool) -> None:
        rb = make_buffer([make_trajectory(7, 4)] if filled else [])
        some = [make_trajectory(0, 5), make_trajectory(1, 7 if ragged else 5).exclude(key)]
        for data in (lazy_stack(some), lazy_stack(some[::-1])):
            with pytest.raises(
                SchemaMismatchError, match=f"only some elements have .*{key if isinstance(key, str) else key[1]}"
            ):
                rb.extend(data)
        assert len(rb) == filled

    def test_where_only_some_steps_have_a_key(self) -> None:
        steps = list(make_trajectory(0, 5).unbind(0))
        steps[3] = steps[3].exclude("speed")
        with pytest.raises(SchemaMismatchError, match="only some elements have 'speed'"):
            make_buffer().extend(lazy_stack(steps))

    @pytest.mark.parametrize("ragged", [False, True])
    def test_where_shapes_differ(self, ragged: bool) -> None:
        other = make_trajectory(1, 7 if ragged else 5)
        other["robot", "mode"] = torch.zeros(len(other), 2, dtype=torch.int64)
        with pytest.raises(SchemaMismatchError, match=r"different \('robot', 'mode'\)"):
            make_buffer().extend(lazy_stack([make_trajectory(0, 5), other]))

    @pytest.mark.parametrize("steps", [False, True], ids=["trajectories", "steps"])
    @pytest.mark.parametrize("ragged", [False, True])
    def test_where_one_is_a_tensor_and_another_text_or_a_tensordict(self, steps: bool, ragged: bool) -> None:
        kinds = [
            torch.zeros(7, 3),
            TensorDict({"entry": torch.zeros(7)}, [7]),
            ["lift"] * 7,
        ]
        for one, other in itertools.permutations(kinds, 2):
            first = make_trajectory(0, 7).set("thing", one)
            second = make_trajectory(1, 7).set("thing", other)[2 * ragged :]
            elements = [*first[:5].unbind(0), *second.unbind(0)] if steps else [first, second]
            with pytest.raises(SchemaMismatchError, match="thing"):
                make_buffer().extend(lazy_stack(elements))

    @pytest.mark.parametrize("ragged", [False, True])
    def test_where_dtypes_differ(self, ragged: bool) -> None:
        first, second = small(0, 6), small(1, 4 if ragged else 6)
        first["count"], second["count"] = torch.full((6,), 2**40 + 1), torch.zeros(len(second))
        with pytest.raises(SchemaMismatchError, match=r"different 'count': .*torch.float32; .*torch.int64"):
            make_buffer().extend(lazy_stack([first, second]))
        steps = lazy_stack([*first.unbind(0), *second.unbind(0)])
        with pytest.raises(SchemaMismatchError, match=r"different 'count': .*torch.float32; .*torch.int64"):
            make_buffer().extend(steps)

    def test_where_agents_differ(self) -> None:
        steps = []
        for _ in range(3):
            agents = lazy_stack([TensorDict({"seen": torch.zeros(2)}), TensorDict({"seen": torch.zeros(3)})])
            steps.append(TensorDict({"agents": agents, "next": {"done": torch.zeros(1).bool()}}))
        with pytest.raises(SchemaMismatchError, match=r"different \('agents', 'seen'\)"):
            make_buffer().extend(lazy_stack(steps))
