"""Weights, filters, and passes without replacement: every chunk with the chance that was promised."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import Child, assert_chances, assert_uniform, check_chunk, numbers_of, small
from tensordict import NonTensorData, TensorDict

from embodichain_rl import (
    ByGroup,
    ByPriority,
    ByRecency,
    ChunkSampler,
    TrajectoryReplayBuffer,
    TrajectoryWriter,
    accept_success,
)
from embodichain_rl.errors import (
    ChunkTooLongError,
    EmptyBufferError,
    InvalidArgumentError,
    NothingToDrawError,
    SchemaMismatchError,
)

L = 3


def make(lengths: Sequence[int], *, groups: Any = None, capacity: int | None = None, **kwargs: Any) -> Any:
    """A buffer of trajectories of those lengths, and a sampler of those options."""
    writer = kwargs.pop("writer", None)
    batch_size = kwargs.pop("batch_size", 1000)
    rb = TrajectoryReplayBuffer(
        max_trajectories=capacity or len(lengths),
        max_total_steps=10_000,
        sampler=ChunkSampler(kwargs.pop("chunk_size", L), **kwargs),
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(3),
        writer=writer,
    )
    for number, length in enumerate(lengths):
        rb.extend(trajectory(number, length, groups[number] if groups else 0))
    return rb


def trajectory(number: int, length: int, group: int = 0) -> TensorDict:
    return small(number, length).set("task", torch.full((length, 1), group))


def trajectories_of(rb: Any, batches: int) -> list[int]:
    return [number for _ in range(batches) for number in numbers_of(rb.sample())]


def chunks_of(rb: Any, batches: int) -> list[tuple[int, int]]:
    return [(int(label[0]), int(label[1])) for _ in range(batches) for label in check_chunk(rb.sample())["label"][:, 0]]


class TestSteps:
    def test_make_every_chunk_as_likely_as_any_other(self) -> None:
        lengths = (3, 12, 5, 30, 2, 4)
        rb = make(lengths, weights="steps")
        assert_uniform(chunks_of(rb, 6), [(n, start) for n, T in enumerate(lengths) for start in range(T - L + 1)])

    def test_do_so_among_those_that_are_left(self) -> None:
        lengths = [2 + number % 9 for number in range(60)]
        rb = make(lengths, weights="steps", capacity=7)
        assert_uniform(chunks_of(rb, 6), [(n, start) for n in range(53, 60) for start in range(lengths[n] - L + 1)])

    def test_count_what_padding_adds(self) -> None:
        lengths = (2, 9, 1)
        rb = make(lengths, weights="steps", pad="both")
        drawn = [n for _ in range(6) for n in rb.sample()["label"][:, 0, 0].tolist()]
        assert_chances(drawn, {n: T + L - 1 for n, T in enumerate(lengths)})

    def test_work_where_hardly_any_chunk_fits(self) -> None:
        lengths = (2,) * 300 + (4,)
        rb = make(lengths, weights="steps", batch_size=8)
        assert_uniform(chunks_of(rb, 40), [(300, 0), (300, 1)])

    def test_refuse_what_no_trajectory_has(self) -> None:
        with pytest.raises(ChunkTooLongError):
            make((2, 2), weights="steps").sample()


class TestRecency:
    @pytest.mark.parametrize("half_life", [0.7, 2.0, 50.0])
    def test_halves_the_chance(self, half_life: float) -> None:
        rb = make((5,) * 6, weights=ByRecency(half_life), capacity=5)
        assert_chances(trajectories_of(rb, 20), {n: 2 ** (n / half_life) for n in range(1, 6)})

    def test_among_those_that_are_long_enough(self) -> None:
        rb = make((5, 5, 2, 5, 2, 2), weights=ByRecency(1.0))
        assert_chances(trajectories_of(rb, 6), {n: 2.0**n for n in (0, 1, 3)})


class TestGroups:
    def test_are_balanced(self) -> None:
        groups = [7, 7, -1, 7, 7, -1, 7]
        rb = make((5,) * 7, groups=groups, weights=ByGroup("task"))
        assert_chances(trajectories_of(rb, 10), {n: 0.5 if group == -1 else 0.2 for n, group in enumerate(groups)})

    def test_follow_a_mixture_whatever_fits(self) -> None:
        # Half of group 0 is too short: its part of the mixture is the same.
        groups, lengths = [0, 0, 0, 0, 1, 1, 2], (5, 2, 2, 5, 5, 5, 5)
        rb = make(lengths, groups=groups, weights=ByGroup("task", {0: 3, 1: 1}))
        assert_chances(trajectories_of(rb, 10), {0: 1.5, 3: 1.5, 4: 0.5, 5: 0.5})
        mixture = rb.stats()["mixture"]
        assert mixture[0] + mixture[1] == pytest.approx(1.0)
        assert mixture[0] == pytest.approx(0.75, abs=0.02)

    def test_may_be_text(self) -> None:
        rb = make((), capacity=8, weights=ByGroup(("trajectory", "task"), {"lift": 3, "pour": 1}))
        for number, task in enumerate(["lift", "pour", "lift", "stir"]):
            rb.extend(trajectory(number, 5).set(("trajectory", "task"), NonTensorData(task, [5])))
        assert_chances(trajectories_of(rb, 5), {0: 1.5, 1: 1.0, 2: 1.5})
        assert rb.stats()["mixture"]["lift"] == pytest.approx(0.75, abs=0.03)
        rb.set_sampler(ChunkSampler(L, weights=ByGroup(("trajectory", "task"), {0: 1})))
        with pytest.raises(SchemaMismatchError, match=r"groups \[0\].*which are text"):
            rb.sample()

    def test_come_and_go(self) -> None:
        rb = make((5, 5), groups=[0, 1], weights=ByGroup("task"), capacity=3)
        assert set(trajectories_of(rb, 1)) == {0, 1}
        rb.extend(trajectory(2, 5, group=2))
        assert_uniform(trajectories_of(rb, 1), [0, 1, 2])
        for number in (3, 4):
            rb.extend(trajectory(number, 5, group=2))
        assert set(trajectories_of(rb, 1)) == {2, 3, 4}
        rb.empty()
        with pytest.raises(EmptyBufferError):
            rb.sample()
        rb.extend(trajectory(5, 5, group=1))
        assert set(trajectories_of(rb, 1)) == {5}

    @settings(max_examples=25)
    @given(groups=st.lists(st.integers(0, 3), min_size=1, max_size=40), seed=st.integers(0, 9))
    def test_have_the_members_that_are_live(self, groups: list[int], seed: int) -> None:
        rb = make((5,), groups=[9], weights=ByGroup("task"), capacity=6, batch_size=60)
        live = [9]
        for number, group in enumerate(groups):
            rb.extend(trajectory(number, 5, group))
            live = [*live, group][-6:]
            if (number + seed) % 3 == 0:
                data = rb.sample()
                assert set(data["task"].flatten().tolist()) == set(live)

    def test_that_are_empty_are_refused(self) -> None:
        rb = make((5, 5), groups=[0, 1], weights=ByGroup("task", {0: 1, 4: 1, 5: 0}), capacity=3)
        with pytest.raises(NothingToDrawError, match=r"mixture of the groups \[0, 4\].*no trajectory of \[4\].*0: 1"):
            rb.sample()
        rb.extend(trajectory(2, 5, group=4))
        assert set(rb.sample()["task"].flatten().tolist()) == {0, 4}

    def test_whose_members_are_too_short_are_refused(self) -> None:
        with pytest.raises(ChunkTooLongError, match="longest of 1 live"):
            make((5, 2), groups=[0, 1], weights=ByGroup("task")).sample()

    @pytest.mark.parametrize("key", ["tusk", "observation", ("next", "done", "x")])
    def test_need_an_integer_key(self, key: Any) -> None:
        with pytest.raises(SchemaMismatchError, match="groups of"):
            make((5,), weights=ByGroup(key)).sample()

    def test_are_noted_once_by_many_threads(self) -> None:
        rb = make((5,) * 50, groups=[n % 2 for n in range(50)], weights=ByGroup("task"), batch_size=64)
        with ThreadPoolExecutor(8) as pool:
            drawn = [n for batch in pool.map(lambda _: numbers_of(rb.sample()), range(64)) for n in batch]
        assert_uniform(drawn, range(50))


class TestPriorities:
    def test_are_all_alike_at_first(self) -> None:
        assert_uniform(trajectories_of(make((5,) * 7, weights=ByPriority()), 3), range(7))

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
    def test_say_how_often(self, alpha: float) -> None:
        rb = make((5,) * 4, weights=ByPriority(alpha=alpha, beta=1.0))
        rb.update_priority(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert_chances(trajectories_of(rb, 5), {n: (n + 1.0) ** alpha for n in range(4)})

    def test_are_made_up_for_by_the_importance_weights(self) -> None:
        rb = make((5,) * 4, weights=ByPriority(alpha=1.0, beta=0.5), batch_size=64)
        rb.update_priority(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        data = rb.sample()
        assert data["priority_weight"].shape == (64, L)
        assert data["priority_weight"].dtype == torch.float32
        numbers = data["label"][..., 0]
        lowest = float(numbers.min()) + 1.0
        torch.testing.assert_close(data["priority_weight"], ((numbers + 1.0) / lowest) ** -0.5, check_dtype=False)

    def test_of_new_trajectories_are_the_largest_that_are_live(self) -> None:
        rb = make((5,) * 3, weights=ByPriority(alpha=1.0), capacity=4)
        rb.sample()
        rb.update_priority([0, 1, 2], [1.0, 2.0, 5.0])
        rb.extend(trajectory(3, 5))
        assert_chances(trajectories_of(rb, 4), {0: 1.0, 1: 2.0, 2: 5.0, 3: 5.0})

    def test_go_with_their_trajectory(self) -> None:
        rb = make((5,) * 3, weights=ByPriority(alpha=1.0))
        rb.sample()
        rb.update_priority([0, 1, 2], [100.0, 1.0, 3.0])
        rb.extend(trajectory(3, 5))
        rb.update_priority([0, 3], [50.0, 2.0])  # 0 is gone
        assert_chances(trajectories_of(rb, 3), {1: 1.0, 2: 3.0, 3: 2.0})

    def test_survive_an_emptied_buffer(self) -> None:
        rb = make((5,) * 3, weights=ByPriority())
        rb.update_priority([0], [100.0])
        rb.empty()
        for number in range(3):
            rb.extend(trajectory(number, 5))
        assert_uniform(trajectories_of(rb, 1), range(3))

    def test_among_those_that_are_long_enough(self) -> None:
        rb = make((5, 2, 5, 2), weights=ByPriority(alpha=1.0))
        rb.update_priority(torch.arange(4), torch.tensor([1.0, 1e6, 2.0, 1e6]))
        assert_chances(trajectories_of(rb, 3), {0: 1.0, 2: 2.0})

    @pytest.mark.parametrize("shape", [(), (1,), (L,), (L, 1)])
    def test_are_read_off_a_batch(self, shape: tuple[int, ...]) -> None:
        rb = make((5, 5, 5), weights=ByPriority(alpha=1.0), batch_size=300)
        data = rb.sample()
        numbers = data["label"][:, 0, 0]
        errors = torch.zeros(300, *shape)
        errors.view(300, -1)[:, -1] = numbers + 1.0  # the largest of a chunk counts
        rb.update_tensordict_priority(TensorDict({"index": data["index"], "td_error": errors}, [300]))
        rb.update_tensordict_priority(data.set("td_error", torch.ones(300, L) * (numbers[:, None] + 1.0)))
        assert_chances(trajectories_of(rb, 10), {0: 1.0, 1: 2.0, 2: 3.0})

    def test_of_windows(self) -> None:
        rb = make((5, 5), chunk_size=None, windows={"label": (0, 1)}, weights=ByPriority(alpha=1.0), batch_size=300)
        data = rb.sample()
        assert data["priority_weight"].shape == (300,)
        rb.update_tensordict_priority(data.set("td_error", 1.0 + data["trajectory", "id"]))
        assert_chances(rb.sample()["trajectory", "id"].tolist(), {0: 1.0, 1: 2.0})

    def test_do_nothing_where_draws_are_not_by_them(self) -> None:
        rb = make((5, 5))
        rb.update_tensordict_priority(rb.sample())  # as in TorchRL
        rb.update_priority([0], [1.0])
        assert rb.stats()["unfit"] == 0

    def test_need_what_they_are_read_off(self) -> None:
        rb = make((5, 5), weights=ByPriority())
        with pytest.raises(InvalidArgumentError, match=r"'index'.*'td_error'"):
            rb.update_tensordict_priority(rb.sample())

    @pytest.mark.parametrize("priority", [[-1.0], [float("nan")], [float("inf")], [1.0, 2.0, 3.0]])
    def test_that_are_none_are_refused(self, priority: list[float]) -> None:
        rb = make((5, 5), weights=ByPriority())
        with pytest.raises(InvalidArgumentError, match="priorities"):
            rb.update_priority([0, 1], priority)
        assert_uniform(trajectories_of(rb, 1), range(2))

    def test_are_shared_by_all_processes(self) -> None:
        rb = make((5, 5), weights=ByPriority(alpha=1.0))
        child = Child("forkserver", rb)
        try:
            child.call(_set_priorities, [0, 1], [1.0, 9.0])
            assert_chances(trajectories_of(rb, 2), {0: 1.0, 1: 9.0})
            rb.update_priority([1], [1.0])
            assert_uniform(child.call(trajectories_of, 2), range(2))
        finally:
            child.end()

    @settings(max_examples=50)
    @given(
        changes=st.lists(
            st.tuples(st.integers(0, 12), st.floats(1e-3, 1e3)) | st.just("extend"), min_size=1, max_size=40
        )
    )
    def test_are_what_was_set_last(self, changes: list[Any]) -> None:
        rb = make((5,) * 3, weights=ByPriority(alpha=1.0, eps=1e-12), capacity=5)
        rb.sample()
        expected, number = dict.fromkeys(range(3), 1.0), 3
        for change in changes:
            if change == "extend":
                rb.extend(trajectory(number, 5))
                expected = {n: p for n, p in expected.items() if n > number - 5}
                expected[number] = max(expected.values())
                number += 1
            else:
                rb.update_priority([change[0]], [change[1]])
                if change[0] in expected:
                    expected[change[0]] = change[1]
        ledger = rb.storage.ledger
        ids = np.array([*expected])
        np.testing.assert_allclose(ledger.weights_of(ids), [*expected.values()], rtol=1e-6)
        # Each of many evenly spread numbers falls to a live trajectory, as often as its weight says.
        spread = (np.arange(20_000) + 0.5) / 20_000
        found = Counter(ledger.ids_at(ledger.priorities.find(spread)).tolist())
        total = sum(expected.values())
        for n, priority in expected.items():
            assert found[n] == pytest.approx(20_000 * priority / total, abs=2)


def _set_priorities(rb: TrajectoryReplayBuffer, ids: list[int], priorities: list[float]) -> None:
    rb.update_priority(ids, priorities)


class TestFilters:
    def test_of_success(self) -> None:
        rb = make((), capacity=4, writer=TrajectoryWriter(accept=accept_success), batch_size=50)
        written = []
        for number in range(5):
            data = trajectory(number, 5)
            data["next", "success"] = torch.zeros(5, 1, dtype=torch.bool)
            data["next", "success"][-1] = number % 2 == 0
            written.append(rb.extend(data).tolist())
        assert written == [[0] * 5, [-1] * 5, [1] * 5, [-1] * 5, [2] * 5]
        assert set(trajectories_of(rb, 1)) == {0, 2, 4}
        assert rb.stats()["rejected"] == 2

    def test_of_the_writer_see_whole_trajectories(self) -> None:
        seen: list[int] = []
        rb = make((), capacity=4, writer=TrajectoryWriter(accept=lambda t: seen.append(len(check_chunk(t))) or True))
        for piece in trajectory(0, 9).split(4):
            rb.extend(piece)
        rb.extend(torch.cat([trajectory(1, 3), trajectory(2, 4)]))
        assert seen == [9, 3, 4]

    def test_of_the_writer_go_along_to_a_child(self) -> None:
        least = 4
        rb = make((), capacity=4, writer=TrajectoryWriter(accept=lambda t: len(t) >= least))
        child = Child("forkserver", rb)
        try:
            assert child.call(_extend, trajectory(0, 3)) == [-1] * 3
            assert child.call(_extend, trajectory(1, 4)) == [0] * 4
        finally:
            child.end()

    def test_of_age(self) -> None:
        rb = make((5,) * 3, max_age=3600.0)
        assert_uniform(trajectories_of(rb, 1), range(3))
        ledger = rb.storage.ledger
        ledger._published_at[:2] -= int(3601e9)
        assert set(trajectories_of(rb, 1)) == {2}
        ledger._published_at[2] -= int(3601e9)
        with pytest.raises(NothingToDrawError, match=r"3601\.\d s old, but max_age=3600 s"):
            rb.sample()

    @pytest.mark.parametrize("weights", ["uniform", "steps", ByRecency(9.0), ByGroup("task"), ByPriority()])
    def test_of_policy_versions(self, weights: Any) -> None:
        rb = make((), capacity=4, weights=weights, max_policy_lag=1, batch_size=50)
        versions = [3, 7, 6, 5]
        for number, version in enumerate(versions):
            data = trajectory(number, 5)
            data["policy_version"] = torch.arange(version - 4, version + 1)  # that of the last step counts
            rb.extend(data)
        assert set(trajectories_of(rb, 3)) == {1, 2}
        rb.extend(trajectory(4, 2).set("policy_version", torch.full((2,), 9)))
        with pytest.raises(NothingToDrawError, match="version 9 of the policy or one of the 1 before"):
            rb.sample()


def _extend(rb: TrajectoryReplayBuffer, data: TensorDict) -> list[int]:
    return rb.extend(data).tolist()


LENGTHS = (3, 12, 5, 30, 2, 4)
CHUNKS = [(n, start) for n, T in enumerate(LENGTHS) for start in range(T - L + 1)]


class TestWithoutReplacement:
    def test_a_pass_has_every_chunk_once(self) -> None:
        rb = make(LENGTHS, replacement=False, batch_size=1)
        passes = [chunks_of(rb, len(CHUNKS)) for _ in range(3)]
        assert [sorted(drawn) for drawn in passes] == [CHUNKS] * 3
        assert passes[0] != passes[1]
        assert rb.stats()["passes"] == 3

    def test_the_order_is_random(self) -> None:
        rb = make((5, 4), replacement=False, batch_size=5)
        firsts = [chunks_of(rb, 1)[0] for _ in range(400)]
        assert_uniform(firsts, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)])

    def test_a_batch_may_end_one_pass_and_begin_the_next(self) -> None:
        rb = make(LENGTHS, replacement=False, batch_size=len(CHUNKS) + 1)
        counts = Counter(chunks_of(rb, len(CHUNKS)))
        assert set(counts.values()) == {len(CHUNKS) + 1}

    def test_what_is_evicted_is_skipped_and_what_comes_is_for_the_next_pass(self) -> None:
        rb = make((5,) * 4, replacement=False, batch_size=1)
        before = chunks_of(rb, 4)
        rb.extend(trajectory(4, 5))  # evicts 0
        rest = self._rest_of_pass(rb)
        assert sorted(rest) == sorted({(n, s) for n in (1, 2, 3) for s in range(3)} - set(before))
        assert {n for n, _ in chunks_of(rb, 12)} >= {4}

    def _rest_of_pass(self, rb: Any) -> list[tuple[int, int]]:
        drawn: list[tuple[int, int]] = []
        while True:
            chunk = chunks_of(rb, 1)
            if rb.stats()["passes"] > 1:
                return drawn
            drawn += chunk

    @pytest.mark.parametrize("mode", ["segment", "boundary"])
    def test_in_segments(self, mode: str) -> None:
        rb = make((), capacity=3, replacement=False, sampling_mode=mode, batch_size=1)
        segments = [[0, 0, 0, 0, 1, 1, 1], [5, 5, 5], [2, 2, 3, 3, 3, 3]]
        expected = []
        for number, ids in enumerate(segments):
            rb.extend(trajectory(number, len(ids)).set("segment_id", torch.tensor(ids)))
            for start in range(len(ids) - L + 1):
                changes = len(set(ids[start : start + L])) > 1
                expected += [(number, start)] if changes == (mode == "boundary") else []
        assert [sorted(chunks_of(rb, len(expected))) for _ in range(2)] == [expected] * 2

    def test_a_batch_that_no_pass_can_complete_keeps_its_chunks(self) -> None:
        rb = make(LENGTHS, replacement=False, batch_size=len(CHUNKS) - 2, max_age=3600.0)
        drawn = chunks_of(rb, 1)
        rb.sampler._draws.limits = rb.sampler._draws.limits._replace(max_age=0.0)  # as if an hour had gone by
        with pytest.raises(NothingToDrawError, match="max_age"):
            rb.sample()
        rb.sampler._draws.limits = rb.sampler._draws.limits._replace(max_age=None)
        assert sorted(drawn + chunks_of(rb, 1)[:2]) == CHUNKS

    def test_with_padding(self) -> None:
        rb = make((2, 4), replacement=False, pad="both", batch_size=10)
        steps = rb.sample()
        assert steps["collector", "mask"].sum() == 6 * L  # every step is in every place of a chunk once

    def test_threads_share_a_pass(self) -> None:
        rb = make((40,) * 5, replacement=False, batch_size=2)
        with ThreadPoolExecutor(8) as pool:
            drawn = [chunk for chunks in pool.map(lambda _: chunks_of(rb, 1), range(95)) for chunk in chunks]
        assert sorted(drawn) == [(n, start) for n in range(5) for start in range(38)]

    def test_needs_something_to_draw(self) -> None:
        with pytest.raises(EmptyBufferError):
            make((), capacity=1, replacement=False).sample()
        with pytest.raises(ChunkTooLongError):
            make((2, 2), replacement=False).sample()

    def test_a_copy_goes_through_passes_of_its_own(self) -> None:
        rb = make(LENGTHS, replacement=False, batch_size=1)
        first = chunks_of(rb, 5)
        copy = pickle.loads(pickle.dumps(rb))
        assert sorted(chunks_of(copy, len(CHUNKS))) == CHUNKS
        assert sorted(first + chunks_of(rb, len(CHUNKS) - 5)) == CHUNKS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "step"}, "'uniform', 'steps', ByRecency"),
        ({"weights": None}, "'uniform', 'steps', ByRecency"),
        ({"weights": ByRecency}, "'uniform', 'steps', ByRecency"),
        ({"replacement": 0}, "True or False"),
        ({"replacement": False, "weights": "steps"}, "needs weights='uniform'"),
        ({"replacement": False, "chunk_size": lambda: 3}, "chunks of one size"),
        ({"max_age": -1.0}, "max_age"),
        ({"max_age": float("nan")}, "max_age"),
        ({"max_policy_lag": -1}, "max_policy_lag"),
        ({"max_policy_lag": 1.5}, "max_policy_lag"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ChunkSampler(**{"chunk_size": 3, **options})


@pytest.mark.parametrize(
    ("make_weights", "message"),
    [
        (lambda: ByRecency(0.0), "half_life"),
        (lambda: ByRecency(True), "half_life"),
        (lambda: ByGroup(3), "key"),
        (lambda: ByGroup("task", {}), "positive weight"),
        (lambda: ByGroup("task", {0: 0.0}), "positive weight"),
        (lambda: ByGroup("task", {0: -1.0}), "weight of group 0"),
        (lambda: ByGroup("task", {1.5: 1.0}), "a group of the mixture"),
        (lambda: ByGroup("task", {"pick": 1.0, 0: 1.0}), "integers or text, not both"),
        (lambda: ByGroup("task", [0, 1]), "map groups"),
        (lambda: ByPriority(alpha=-0.1), "alpha"),
        (lambda: ByPriority(beta=float("nan")), "beta"),
        (lambda: ByPriority(eps=0.0), "eps"),
    ],
)
def test_bad_weights_are_refused(make_weights: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make_weights()
