"""Where trajectories end: flags of agents, of a group or at the root, and ids of trajectories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import contents, make_buffer, make_plain_buffer, small
from tensordict import NestedKey, TensorDict, TensorDictBase, lazy_stack
from torchrl.data import TensorDictReplayBuffer

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError

AGENTS = 3


def steps(count: int, first: int = 0, **entries: Any) -> TensorDict:
    """Steps whose observation is their number, without any end."""
    return TensorDict({"observation": torch.arange(float(first), first + count), **entries}, [count])


def flags(*ends: int) -> torch.Tensor:
    return torch.tensor(ends).bool()[:, None]


def observed(rb: TrajectoryReplayBuffer) -> list[list[float]]:
    """The observations of each trajectory, oldest first."""
    return [rb[number]["observation"].tolist() for number in range(len(rb))]


class TestAgents:
    @pytest.mark.parametrize("name", ["terminated", "truncated"])
    def test_the_death_of_one_does_not_end_the_trajectory(self, name: str) -> None:
        dead = torch.zeros(6, AGENTS, 1, dtype=torch.bool)
        dead[2:, 0] = dead[4:, 1] = True
        rb = make_buffer([steps(6, next={"done": flags(0, 0, 0, 0, 0, 1), name: dead})])
        assert observed(rb) == [[0, 1, 2, 3, 4, 5]]

    def test_the_order_of_the_keys_does_not_matter(self) -> None:
        dead = torch.ones(4, AGENTS, 1, dtype=torch.bool)
        rb = make_buffer([steps(4, next={"terminated": dead, "done": flags(0, 1, 0, 1)})])
        assert observed(rb) == [[0, 1], [2, 3]]

    def test_a_done_for_all_beside_which_agents_have_their_own(self) -> None:
        dead = torch.ones(4, AGENTS, 1, dtype=torch.bool)
        rb = make_buffer([steps(4, next={"done": dead, "truncated": flags(0, 0, 0, 1)})])
        assert observed(rb) == [[0, 1, 2, 3]]

    def test_only_flags_of_agents_end_it_where_any_is_done_as_in_collectors_of_torchrl(self) -> None:
        done = torch.zeros(4, AGENTS, 1, dtype=torch.bool)
        done[1, 2] = done[3] = True
        assert observed(make_buffer([steps(4, next={"done": done})])) == [[0, 1], [2, 3]]

    def test_only_flags_of_agents_end_it_where_all_are_done_if_they_are_named(self) -> None:
        done = torch.zeros(4, AGENTS, 1, dtype=torch.bool)
        done[1:, 2] = done[3] = True
        rb = make_buffer([steps(4, next={"done": done})], end_key=("next", "done"))
        assert observed(rb) == [[0, 1, 2, 3]]

    def test_flags_of_groups_beside_ids_let_trajectories_go_on_in_the_next_call(self) -> None:
        # One row of two environments behind the other, as a collector's batch has them after reshape(-1).
        done = torch.zeros(10, AGENTS, 1, dtype=torch.bool)
        done[1] = done[7] = done[9, 0] = True
        ids = torch.tensor([0, 0, 1, 1, 2, 2, 1, 1, 2, 2])
        entries = {"next": {"agents": {"done": done}}, "collector": {"traj_ids": ids}}
        data = TensorDict({"observation": torch.tensor([0.0, 1, 0, 1, 10, 11, 2, 3, 12, 13]), **entries}, [10])
        rb = make_buffer([data[:6], data[6:]])
        assert observed(rb) == [[0, 1], [0, 1, 2, 3], [10, 11, 12, 13]]


class TestEndKey:
    @pytest.mark.parametrize("key", ["done", ("done",), "terminal", ("next", "agents", "done"), ("info", "last")])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
    def test_any_entry_can_say_it(self, key: NestedKey, dtype: torch.dtype) -> None:
        data = steps(5).set(key, flags(0, 1, 0, 0, 1).to(dtype))
        assert observed(make_buffer([data], end_key=key)) == [[0, 1], [2, 3, 4]]

    def test_the_done_of_a_group_ends_it_where_all_are_done(self) -> None:
        done = torch.zeros(5, AGENTS, 1, dtype=torch.bool)
        done[1:, 0] = done[2:, 1] = done[4] = True
        group = TensorDict({"done": done, "reward": torch.zeros(5, AGENTS, 1)}, [5, AGENTS])
        rb = make_buffer([steps(5, next={"agents": group})], end_key=("next", "agents", "done"))
        assert observed(rb) == [[0, 1, 2, 3, 4]]
        assert rb[0]["next", "agents"].batch_size == (5, AGENTS)

    def test_what_is_named_counts_and_nothing_else(self) -> None:
        data = steps(4, next={"done": flags(1, 1, 1, 1)}, last=flags(0, 0, 0, 1))
        assert observed(make_buffer([data], end_key="last")) == [[0, 1, 2, 3]]

    def test_pieces_are_joined_until_it_comes(self) -> None:
        data = steps(6, done=flags(0, 0, 0, 0, 0, 1))
        rb = make_buffer([data[:2], data[2:4]], end_key="done")
        assert len(rb) == 0
        rb.extend(data[4:])
        assert observed(rb) == [[0, 1, 2, 3, 4, 5]]

    def test_it_can_be_said_to_the_writer(self) -> None:
        parts = {"storage": TrajectoryStorage(4, 100), "sampler": ChunkSampler(2)}
        for rb in (
            TensorDictReplayBuffer(**parts, writer=TrajectoryWriter(end_key="done"), batch_size=4),
            TrajectoryReplayBuffer(**parts, writer=TrajectoryWriter(end_key="done")),
        ):
            rb.extend(steps(2, done=flags(0, 1)))
        assert len(rb) == 2

    @pytest.mark.parametrize("name", ["end_key", "traj_key"])
    def test_not_to_a_buffer_that_is_given_a_writer(self, name: str) -> None:
        with pytest.raises(InvalidArgumentError, match="give them to the TrajectoryWriter"):
            make_buffer(writer=TrajectoryWriter(), **{name: "done"})

    @pytest.mark.parametrize("name", ["end_key", "traj_key"])
    @pytest.mark.parametrize("key", [3, (), ("a", 1), ["done"]], ids=repr)
    def test_what_is_no_key_is_refused(self, name: str, key: Any) -> None:
        with pytest.raises(InvalidArgumentError):
            TrajectoryWriter(**{name: key})

    @pytest.mark.parametrize("name", ["end_key", "traj_key"])
    def test_data_without_the_key_is_refused(self, name: str) -> None:
        rb = make_buffer(**{name: ("info", "last")})
        with pytest.raises(SchemaMismatchError, match=rf"{name}=\('info', 'last'\)"):
            rb.extend(small(0, 4))
        assert not rb.storage.initialized

    @pytest.mark.parametrize(
        ("data", "hint"),
        [
            (steps(3, done=flags(0, 0, 1)), "end_key='done'"),
            (steps(3, next={"agents": {"done": flags(0, 0, 1)}}), r"end_key=\('next', 'agents', 'done'\)"),
            (steps(3, episode=torch.zeros(3)), "traj_key='episode'"),
            (steps(3), "end_key= .* or traj_key="),
        ],
    )
    def test_data_with_neither_is_refused_with_what_to_name(self, data: TensorDict, hint: str) -> None:
        with pytest.raises(SchemaMismatchError, match=hint):
            make_buffer().extend(data)


def of(*ids: int) -> torch.Tensor:
    return torch.tensor(ids)


class TestTrajKey:
    @pytest.mark.parametrize("shape", ["[T]", "[T, 1]"])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
    def test_data_with_ids_only(self, shape: str, dtype: torch.dtype) -> None:
        ids = of(4, 4, 4, 9, 9, 2).to(dtype)
        rb = make_buffer([steps(6, episode=ids if shape == "[T]" else ids[:, None])], traj_key="episode")
        assert observed(rb) == [[0, 1, 2], [3, 4]]
        assert rb.stats()["pending_steps"] == 1
        rb.writer.truncate_pending()
        assert observed(rb) == [[0, 1, 2], [3, 4], [5]]

    def test_ids_that_are_text(self) -> None:
        rb = make_buffer([steps(5).set("episode", ["a", "a", "b", "b", "c"])], traj_key="episode")
        assert observed(rb) == [[0, 1], [2, 3]]

    def test_ids_under_trajectory(self) -> None:
        data = steps(5).set(("trajectory", "episode"), of(0, 0, 1, 1, 2))
        rb = make_buffer([data], traj_key=("trajectory", "episode"))
        assert observed(rb) == [[0, 1], [2, 3]]
        assert rb[1]["trajectory", "episode"].tolist() == [1, 1]

    def test_ids_that_are_not_whole_numbers_are_told_apart(self) -> None:
        rb = make_buffer([steps(4, episode=torch.tensor([0.25, 0.25, 0.5, 0.75]))], traj_key="episode")
        assert observed(rb) == [[0, 1], [2]]

    def test_they_end_across_calls_where_another_id_follows_in_the_row(self) -> None:
        rb = make_buffer(traj_key="episode")
        rb.extend(steps(2, episode=of(0, 0)))
        rb.extend(steps(2, 2, episode=of(0, 0)))
        assert len(rb) == 0
        rb.extend(steps(1, 4, episode=of(1)))
        assert observed(rb) == [[0, 1, 2, 3]]
        rb.extend(steps(3, 5, episode=of(1, 2, 2)))
        assert observed(rb) == [[0, 1, 2, 3], [4, 5]]

    def test_rows_go_on_by_themselves(self) -> None:
        rb = make_buffer(traj_key="episode")
        rows = [steps(2, episode=of(0, 0)), steps(2, 10, episode=of(1, 1))]
        rb.extend(torch.stack(rows))
        rows = [steps(2, 2, episode=of(0, 2)), steps(2, 12, episode=of(3, 3))]
        rb.extend(torch.stack(rows))
        assert sorted(observed(rb)) == [[0, 1, 2], [10, 11]]

    def test_the_same_id_again_is_another_trajectory(self) -> None:
        rb = make_buffer([steps(6, episode=of(0, 0, 1, 1, 0, 0))], traj_key="episode")
        rb.writer.truncate_pending()
        assert observed(rb) == [[0, 1], [2, 3], [4, 5]]

    def test_step_by_step(self) -> None:
        rb = make_buffer(traj_key="episode")
        for step in steps(6, episode=of(0, 0, 1, 1, 1, 2)):
            rb.add(step)
        assert observed(rb) == [[0, 1], [2, 3, 4]]

    def test_of_padded_rows(self) -> None:
        first, second = steps(3, episode=of(0, 0, 1)), steps(3, 10, episode=of(2, 2, 0))
        rows = torch.stack([first, second])
        rows["collector", "mask"] = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
        rb = make_buffer([rows], traj_key="episode")
        assert observed(rb) == [[0, 1]]
        rb.writer.truncate_pending()
        assert sorted(observed(rb)) == [[0, 1], [2], [10, 11]]

    def test_of_a_ragged_stack(self) -> None:
        rb = make_buffer(
            [lazy_stack([steps(3, episode=of(0, 0, 1)), steps(4, 10, episode=of(2, 3, 3, 3))])], traj_key="episode"
        )
        assert sorted(observed(rb)) == [[0, 1], [10]]

    @pytest.mark.parametrize("key", ["episode", ("collector", "traj_ids")])
    def test_beside_a_done_that_does_not_come(self, key: NestedKey) -> None:
        nothing = torch.zeros(5, 1, dtype=torch.bool)
        after = {"done": nothing.clone(), "truncated": nothing.clone()}
        data = steps(5, next=after).set(key, of(0, 0, 1, 1, 1))
        data["next", "done"][-1] = True
        rb = make_buffer([data], traj_key=key)
        assert observed(rb) == [[0, 1], [2, 3, 4]]
        assert rb[0]["next", "truncated"][:, 0].tolist() == [False, True]
        assert rb[0]["next", "done"][:, 0].tolist() == [False, True]
        assert not rb[1]["next", "truncated"].any()
        assert rb.stats()["truncated"] == 1

    def test_beside_a_done_pieces_of_several_environments_are_joined_by_it(self) -> None:
        rb = make_buffer(traj_key="episode")
        for first, done in ((0, 0), (2, 1)):
            for episode in (5, 6):
                after = {"done": flags(0, done)}
                rb.extend(steps(2, first + 10 * episode, next=after, episode=of(episode, episode)))
        assert observed(rb) == [[50, 51, 52, 53], [60, 61, 62, 63]]

    @pytest.mark.parametrize("key", ["episode", ("collector", "traj_ids")])
    def test_beside_a_terminated_that_never_comes_each_call_is_an_episode(self, key: NestedKey) -> None:
        # What a script keeps of Pendulum, whose episodes only end by their time limit, one in each batch.
        rb = make_buffer(traj_key=key)
        for episode in range(3):
            initial = torch.arange(4)[:, None] == 0
            data = steps(4, 10 * episode, is_init=initial, next={"terminated": flags(0, 0, 0, 0)})
            rb.extend(data.set(key, torch.full((4,), episode)))
        assert observed(rb) == [[0, 1, 2, 3], [10, 11, 12, 13]]
        data = steps(4, 30, is_init=torch.zeros(4, 1).bool(), next={"terminated": flags(0, 1, 0, 0)})
        rb.extend(data.set(key, of(2, 2, 3, 3)))
        assert observed(rb)[2:] == [[20, 21, 22, 23, 30, 31]]
        rb.writer.truncate_pending()
        assert observed(rb)[3:] == [[32, 33]]

    def test_ids_of_collectors_without_any_done(self) -> None:
        data = steps(5, collector={"traj_ids": of(0, 0, 1, 1, 1)})
        assert observed(make_buffer([data])) == [[0, 1]]

    def test_ids_of_collectors_with_a_done_go_on_in_the_next_call(self) -> None:
        rb = make_buffer()
        for first, done in ((0, 0), (2, 1)):
            rows = [
                steps(2, first + 10 * row, next={"done": flags(0, done)}, collector={"traj_ids": of(row, row)})
                for row in range(2)
            ]
            rb.extend(torch.cat(rows))  # as rb.extend(data.reshape(-1)) does
        assert observed(rb) == [[0, 1, 2, 3], [10, 11, 12, 13]]

    def test_several_numbers_a_step_are_no_id(self) -> None:
        with pytest.raises(SchemaMismatchError, match="one number a step"):
            make_buffer(traj_key="episode").extend(steps(3, episode=torch.zeros(3, 2)))

    def test_with_an_end_key(self) -> None:
        data = steps(6, done=flags(0, 1, 0, 0, 0, 0), episode=of(0, 0, 0, 0, 1, 1))
        rb = make_buffer([data], end_key="done", traj_key="episode")
        assert observed(rb) == [[0, 1], [2, 3]]

    def test_a_sample_of_such_a_buffer_can_be_written_again(self) -> None:
        rb = make_buffer([steps(6, episode=of(0, 0, 0, 1, 1, 2))], traj_key="episode", chunk_size=2)
        other = make_buffer([rb[:]], traj_key="episode")
        assert observed(other) == [[0, 1, 2], [3, 4]]

    def test_the_keys_go_with_the_buffer_to_another_process(self) -> None:
        from steps import Child

        rb = make_buffer(traj_key="episode")
        child = Child("fork", rb)
        try:
            child.call(TrajectoryReplayBuffer.extend, steps(4, episode=of(0, 0, 1, 1)))
        finally:
            child.end()
        assert observed(rb) == [[0, 1]]


def test_lazy_stacks_of_trajectories_that_were_read_from_another_buffer() -> None:
    source = make_buffer([small(number, 3 + number) for number in range(3)])
    rb = make_buffer([lazy_stack([source[number] for number in range(3)])])
    assert contents(rb) == [(0, 3), (1, 4), (2, 5)]


def test_in_a_plain_buffer_of_torchrl_the_defaults_hold() -> None:
    rb = make_plain_buffer([small(0, 4)])
    assert isinstance(rb.storage[0], TensorDictBase)
