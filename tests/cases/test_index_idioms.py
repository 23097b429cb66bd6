"""TorchRL's idioms around ``batch["index"]``: priorities, reading steps again, and two buffers in one batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from steps import assert_chances, assert_uniform, check_chunk, make_plain_buffer, numbers_of, small
from tensordict import TensorDict
from torchrl.data import OfflineToOnlineReplayBuffer, ReplayBufferEnsemble

from embodichain_rl import ByPriority, ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter
from embodichain_rl.errors import InvalidArgumentError, TrajectoryEvictedError, TrajectoryIndexError

L = 3


def make(first: int = 0, count: int = 4, *, batch_size: int = 300, seed: int = 3, **kwargs: Any) -> Any:
    """A buffer of trajectories ``first`` to ``first + count - 1``, of 5 steps and more."""
    chunk_size = None if "windows" in kwargs else kwargs.pop("chunk_size", L)
    rb = TrajectoryReplayBuffer(
        max_trajectories=10,
        max_total_steps=1000,
        sampler=ChunkSampler(chunk_size, **kwargs),
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
    )
    for number in range(first, first + count):
        rb.extend(small(number, 5 + number % 4))
    return rb


def by_priority(**kwargs: Any) -> Any:
    return make(weights=ByPriority(alpha=1.0), **kwargs)


def drawn(rb: Any, batches: int = 8) -> list[int]:
    return [number for _ in range(batches) for number in rb.sample()["label"].reshape(-1, 4)[::L, 0].tolist()]


CHANCES = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}


class TestUpdatePriority:
    @pytest.mark.parametrize("shape", ["B", "B1", "BL", "BL1", "flat", "list", "numpy", "float64"])
    def test_with_the_index_of_a_batch(self, shape: str) -> None:
        rb = by_priority()
        batch = rb.sample()
        per_step = batch["label"][..., 0] + 1.0
        priority: Any = {
            "B": per_step[:, 0],
            "B1": per_step[:, :1],
            "BL": per_step,
            "BL1": per_step[..., None],
            "flat": per_step.flatten(),
            "list": per_step[:, 0].tolist(),
            "numpy": per_step.numpy(),
            "float64": per_step.double(),
        }[shape]
        rb.update_priority(batch["index"], priority)
        assert_chances(drawn(rb), CHANCES)

    def test_with_one_number_for_all(self) -> None:
        rb = by_priority()
        rb.update_priority([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0])
        index = rb.sample()["index"]
        rb.update_priority(index[index[:, 0, 0] == 3], 10.0)  # steps 0 to 4: not the trajectories of those ids
        assert_chances(drawn(rb), {0: 1.0, 1: 2.0, 2: 3.0, 3: 10.0})

    @pytest.mark.parametrize("priority", [10.0, torch.tensor(10.0), np.float32(10.0), [10.0], torch.full((L,), 10.0)])
    def test_with_the_index_of_one_chunk(self, priority: Any) -> None:
        rb = by_priority()
        index = rb.sample()["index"]
        rb.update_priority(index[index[:, 0, 0] == 2][0], priority)
        assert_chances(drawn(rb), {0: 1.0, 1: 1.0, 2: 10.0, 3: 1.0})

    def test_with_flat_pairs(self) -> None:
        rb = by_priority()
        batch = rb.sample()
        rb.update_priority(batch["index"].flatten(0, 1), batch["label"][..., 0].flatten() + 1.0)
        assert_chances(drawn(rb), CHANCES)

    def test_with_the_two_halves_of_an_index(self) -> None:
        rb = by_priority()
        batch = rb.sample()
        rb.update_priority(batch["index"].unbind(-1), batch["label"][:, 0, 0] + 1.0)
        assert_chances(drawn(rb), CHANCES)

    @pytest.mark.parametrize("chunk_size", [1, 2, 3, 4])
    def test_with_ids(self, chunk_size: int) -> None:
        rb = by_priority(chunk_size=chunk_size, batch_size=400)
        batch = rb.sample()
        ids = batch["trajectory", "id"]
        rb.update_priority(ids[:, 0], ids[:, 0] + 1.0)
        assert rb.storage.ledger.weights_of(np.arange(4)) == pytest.approx([1.0, 2.0, 3.0, 4.0])
        rb.update_priority(ids, ids + 2.0)  # [B, L], also where L is 2
        assert rb.storage.ledger.weights_of(np.arange(4)) == pytest.approx([2.0, 3.0, 4.0, 5.0])

    def test_with_two_ids(self) -> None:
        rb = by_priority()
        rb.update_priority(torch.tensor([2, 1]), torch.tensor([5.0, 7.0]))
        assert_chances(drawn(rb), {0: 1.0, 1: 7.0, 2: 5.0, 3: 1.0})

    def test_with_what_extend_returns(self) -> None:
        rb = by_priority()
        rb.update_priority(rb.extend(small(4, 6)), 3.0)
        assert_chances(drawn(rb), {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 3.0})

    def test_with_windows(self) -> None:
        rb = by_priority(windows={"label": (0, 1)})
        batch = rb.sample()
        ids = batch["index"][:, 0]
        for priority in (ids + 1.0, (ids + 1.0)[:, None], torch.stack([ids + 1.0, ids * 0.0], -1)):
            rb.update_priority([0, 1, 2, 3], 1.0)
            rb.update_priority(batch["index"], priority)
            assert rb.storage.ledger.weights_of(np.arange(4)) == pytest.approx([1.0, 2.0, 3.0, 4.0])

    def test_with_padded_chunks(self) -> None:
        rb = by_priority(pad="both", chunk_size=7)
        batch = rb.sample()
        rb.update_priority(batch["index"], batch["label"][:, 0, 0] + 1.0)
        assert rb.storage.ledger.weights_of(np.arange(4)) == pytest.approx([1.0, 2.0, 3.0, 4.0])

    def test_of_several_chunks_of_a_trajectory_takes_the_largest(self) -> None:
        rb = by_priority()
        index = torch.tensor([[[1, 0], [1, 1]], [[2, 0], [2, 1]], [[1, 2], [1, 3]]])
        rb.update_priority(index, torch.tensor([9.0, 4.0, 2.0]))
        assert rb.storage.ledger.weights_of(np.arange(4)) == pytest.approx([1.0, 9.0, 4.0, 1.0])

    def test_of_no_chunks_does_nothing(self) -> None:
        rb = by_priority()
        rb.update_priority(torch.zeros(0, L, 2, dtype=torch.int64), torch.zeros(0))
        assert_uniform(drawn(rb), range(4))

    @pytest.mark.parametrize(
        ("index", "priority"),
        [
            (torch.zeros(4, 3, 2, dtype=torch.int64), torch.ones(3)),
            (torch.zeros(4, 3, 2, dtype=torch.int64), torch.ones(4, 2)),
            (torch.zeros(4, 2, dtype=torch.int64), torch.ones(8)),
            (torch.arange(4), torch.ones(3)),
            (torch.arange(4) + 0.5, torch.ones(4)),
            (torch.ones(4, dtype=torch.bool), torch.ones(4)),
            ("0", 1.0),
            (None, 1.0),
        ],
    )
    def test_refuses_what_does_not_fit(self, index: Any, priority: Any) -> None:
        rb = by_priority()
        with pytest.raises(InvalidArgumentError):
            rb.update_priority(index, priority)
        assert rb.storage.ledger.weights_of(np.arange(4)).max(initial=0.0) <= 1.0

    def test_in_a_plain_torchrl_buffer(self) -> None:
        rb = make_plain_buffer([small(n, 6) for n in range(4)], sampler=ChunkSampler(L, weights=ByPriority(alpha=1.0)))
        batch, info = rb.sample(400, return_info=True)
        assert batch["priority_weight"].shape == (400, L)
        rb.update_priority(info["index"], batch["label"][:, 0, 0] + 1.0)
        assert rb.storage.ledger.weights_of(np.arange(4)) == pytest.approx([1.0, 2.0, 3.0, 4.0])


class TestUpdateTensorDictPriority:
    @pytest.mark.parametrize("per_step", [False, True])
    @pytest.mark.parametrize("shape", [(300,), (3, 100), (2, 3, 50)])
    def test_of_a_batch_of_any_shape(self, shape: tuple[int, ...], per_step: bool) -> None:
        rb = by_priority()
        batch = rb.sample()
        errors = batch["label"][..., 0] + 1.0
        if per_step:
            errors[:, 1:] = 0.0
        batch = batch.set("td_error", errors if per_step else errors[:, :1].expand(-1, L)).unflatten(0, shape)
        rb.update_tensordict_priority(batch)
        assert_chances(drawn(rb), CHANCES)

    def test_of_flat_steps(self) -> None:
        rb = by_priority()
        batch = rb.sample()
        rb.update_tensordict_priority(batch.set("td_error", batch["label"][..., 0] + 1.0).flatten())
        assert_chances(drawn(rb), CHANCES)

    def test_of_a_single_chunk_and_a_single_step(self) -> None:
        rb = by_priority()
        batch = rb.sample()
        batch.set("td_error", torch.full(batch.shape, 5.0))
        chunk = batch[batch["label"][:, 0, 0] == 3][0]
        for data in (chunk, chunk[2]):  # steps 2 and more: not the trajectory of that id
            rb.update_priority([0, 1, 2, 3], 1.0)
            rb.update_tensordict_priority(data)
            assert rb.storage.ledger.weights_of(np.arange(4)) == pytest.approx([1.0, 1.0, 1.0, 5.0])

    def test_of_a_part_of_an_ensemble(self) -> None:
        a, b = by_priority(), by_priority(first=100)
        batch = ReplayBufferEnsemble(a, b, sample_from_all=True, batch_size=600).sample()
        batch.set("td_error", batch["label"][..., 0] % 100 + 1.0)
        for part, rb in zip(batch, (a, b), strict=True):
            rb.update_tensordict_priority(part)
            assert_chances([number % 100 for number in drawn(rb)], CHANCES)
        with pytest.raises(InvalidArgumentError, match="each buffer its own part"):
            a.update_tensordict_priority(batch)


class TestReadAgain:
    @pytest.mark.parametrize("options", [{}, {"pad": "both"}, {"chunk_size": 1}, {"chunk_size": 2}])
    def test_the_chunks_of_a_batch(self, options: dict[str, Any]) -> None:
        rb = make(batch_size=20, **options)
        batch = rb.sample()
        again = rb[batch["index"]]
        assert again.shape == batch.shape
        for key in ("label", "observation", "index", ("trajectory", "id"), ("trajectory", "step"), ("next", "done")):
            assert torch.equal(again[key], batch[key]), key

    def test_one_chunk(self) -> None:
        rb = make()
        batch = rb.sample()
        assert torch.equal(rb[batch["index"][7]]["label"], batch["label"][7])

    def test_flat_steps(self) -> None:
        rb = make()
        batch = rb.sample()
        flat = rb[batch["index"].flatten(0, 1)]
        assert flat.shape == (300 * L,)
        assert torch.equal(flat["label"], batch["label"].flatten(0, 1))

    def test_more_dimensions(self) -> None:
        rb = make()
        batch = rb.sample().unflatten(0, (3, 100))
        assert torch.equal(rb[batch["index"]]["label"], batch["label"])

    def test_as_lists_and_arrays(self) -> None:
        rb = make()
        for index in ([[2, 0], [1, 4]], np.array([[2, 0], [1, 4]]), torch.tensor([[2, 0], [1, 4]], dtype=torch.int32)):
            assert rb[index]["label"][:, :2].tolist() == [[2, 0], [1, 4]]
            assert rb.storage[index]["label"][:, :2].tolist() == [[2, 0], [1, 4]]
            assert rb[index]["index"].tolist() == [[2, 0], [1, 4]]

    def test_none(self) -> None:
        rb = make()
        assert rb[torch.zeros(0, L, 2, dtype=torch.int64)].shape == (0, L)

    def test_through_a_transform(self) -> None:
        rb = make()
        rb.append_transform(lambda data: data.set("twice", data["observation"] * 2))
        batch = rb.sample()
        assert torch.equal(rb[batch["index"]]["twice"], batch["twice"])

    def test_of_windows(self) -> None:
        rb = make(windows={"label": (0, 0)})
        batch = rb.sample()
        assert torch.equal(rb[batch["index"]]["label"], batch["label"][:, 0])

    def test_positions_are_positions(self) -> None:
        rb = make(first=1)  # the ids are 0 to 3
        assert numbers_of(rb[torch.tensor([0, 2])]) == [1, 3]
        assert numbers_of(rb[[1, 1]]) == [2, 2]
        assert numbers_of(rb[torch.tensor([True, False, False, True])]) == [1, 4]

    def test_what_is_not_there_is_refused(self) -> None:
        rb = make()
        for pair in ([4, 0], [-1, 0], [0, 5], [0, -1]):
            with pytest.raises(TrajectoryEvictedError):
                rb[torch.tensor([[0, 0], pair])]
        for index in (torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.int64)):
            with pytest.raises(TrajectoryIndexError):
                rb[index]
        with pytest.raises(TrajectoryIndexError, match="same shape"):
            rb.storage.get((torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)))

    def test_whether_steps_are_there(self) -> None:
        rb = make()
        index = torch.tensor([[0, 4], [0, 5], [3, 7], [3, 8], [4, 0], [-1, 0], [1, -1]])
        there = [True, False, True, False, False, False, False]
        assert rb.storage.contains(index).tolist() == there
        assert rb.storage.contains(index.tolist()) == there


def sources_of(batch: TensorDict) -> list[int]:
    """Which of the two buffers each chunk ``[*, L]`` is from, by its numbers; every value of it is checked."""
    flat = check_chunk(batch.exclude("index", "trajectory").reshape(-1, batch.shape[-1]))
    return [int(number >= 100) for number in numbers_of(flat)]


class TestEnsemble:
    def test_in_given_parts(self) -> None:
        mixed = ReplayBufferEnsemble(
            make(), make(100), p=[0.3, 0.7], batch_size=400, num_buffer_sampled=100, generator=torch.Generator()
        )
        found: Counter[int] = Counter()
        for _ in range(10):
            batch = mixed.sample()
            assert batch.shape == (100, 4, L)
            sources = sources_of(batch)
            assert sources == batch["index", "buffer_ids"][..., 0].flatten().tolist()
            found.update(sources[::4])
        assert_chances(found.elements(), {0: 0.3, 1: 0.7})

    def test_as_many_of_each(self) -> None:
        mixed = ReplayBufferEnsemble(make(), make(100), sample_from_all=True, batch_size=16)
        batch, info = mixed.sample(return_info=True)
        assert batch.shape == (2, 8, L)
        assert sources_of(batch) == [0] * 8 + [1] * 8
        assert info["index", "index"].shape == (2, 8, L, 2)
        assert info["index", "buffer_ids"].shape == (2, 8, L)

    @pytest.mark.parametrize("p", [None, "sampleable", [0.5, 0.5]])
    def test_chosen_anew_for_each_batch(self, p: Any) -> None:
        mixed = ReplayBufferEnsemble(make(), make(100), p=p, batch_size=8, generator=torch.Generator().manual_seed(1))
        found = {tuple(sources_of(mixed.sample())) for _ in range(40)}
        assert found == {(a,) * 4 + (b,) * 4 for a in (0, 1) for b in (0, 1)}

    def test_an_empty_buffer_is_left_out(self) -> None:
        mixed = ReplayBufferEnsemble(make(count=0), make(100), p="sampleable", batch_size=8)
        assert set(sources_of(mixed.sample())) == {1}

    def test_each_part_is_read_again_from_its_buffer(self) -> None:
        a, b = make(), make(100)
        batch = ReplayBufferEnsemble(a, b, sample_from_all=True, batch_size=16).sample()
        for part, rb in zip(batch, (a, b), strict=True):
            assert torch.equal(rb[part["index", "index"]]["label"], part["label"])

    def test_priorities_of_each_part(self) -> None:
        a, b = by_priority(), by_priority(first=100)
        batch = ReplayBufferEnsemble(a, b, sample_from_all=True, batch_size=600).sample()
        assert batch["priority_weight"].shape == (2, 300, L)
        for part, rb in zip(batch, (a, b), strict=True):
            ids = part["index", "index"][..., 0]
            rb.update_priority(part["index", "index"], ids[:, 0] + 1.0)
            assert_chances([number % 100 for number in drawn(rb)], CHANCES)

    def test_of_which_one_draws_by_priority(self) -> None:
        mixed = ReplayBufferEnsemble(by_priority(), make(100), sample_from_all=True, batch_size=16)
        batch = mixed.sample()
        assert sources_of(batch) == [0] * 8 + [1] * 8
        assert (batch["priority_weight"][1] == 1.0).all()

    def test_with_a_transform_of_each(self) -> None:
        a, b = make(), make(100)
        for rb, sign in ((a, 1), (b, -1)):
            rb.append_transform(lambda data, sign=sign: data.set("sign", torch.full(data.shape, sign)))
        batch = ReplayBufferEnsemble(a, b, sample_from_all=True, batch_size=16).sample()
        assert batch["sign"][..., 0].tolist() == [[1] * 8, [-1] * 8]

    def test_while_one_is_written(self) -> None:
        a, b = make(), make(100)
        mixed = ReplayBufferEnsemble(a, b, sample_from_all=True, batch_size=16)
        for number in range(4, 60):
            a.extend(small(number, 6))
            assert sources_of(mixed.sample()) == [0] * 8 + [1] * 8

    def test_the_members_are_the_buffers(self) -> None:
        a, b = make(), make(100)
        mixed = ReplayBufferEnsemble(a, b, batch_size=16)
        assert mixed[0] is a
        assert mixed[1] is b
        assert mixed.stats()["size"] == 8


class TestOfflineToOnline:
    def mixed(self) -> OfflineToOnlineReplayBuffer:
        mixed = OfflineToOnlineReplayBuffer(
            make(100), online_storage=TrajectoryStorage(10, 1000), offline_fraction=0.25, batch_size=16
        )
        mixed.online_buffer.set_writer(TrajectoryWriter())
        mixed.online_buffer.set_sampler(ChunkSampler(L))
        return mixed

    def test_begins_with_what_is_offline(self) -> None:
        batch = self.mixed().sample()
        assert batch.shape == (16, L)
        assert set(sources_of(batch)) == {1}

    def test_mixes_in_given_parts(self) -> None:
        mixed = self.mixed()
        for number in range(3):
            mixed.extend(small(number, 6))
        batch = mixed.sample()
        assert batch.shape == (16, L)
        assert sources_of(batch) == [1] * 4 + [0] * 12
        assert batch["index"].shape == (16, L, 2)
        mixed.anneal(1, 1)
        assert set(sources_of(mixed.sample())) == {0}

    def test_over_the_storage_that_a_buffer_writes_to(self) -> None:
        online = make()
        mixed = OfflineToOnlineReplayBuffer(make(100), online_storage=online.storage, batch_size=16)
        mixed.online_buffer.set_sampler(online.sampler)
        mixed.online_buffer.set_writer(online.writer)
        assert sources_of(mixed.sample()) == [1] * 8 + [0] * 8
        assert len(mixed) == 8
