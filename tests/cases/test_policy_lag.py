"""How old what is sampled may be, and how old it was."""

from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import Child, assert_chances, assert_uniform, numbers_of, small
from tensordict import NonTensorStack, TensorDict
from torchrl.data import TensorDictReplayBuffer

from embodichain_rl import ByGroup, ByPriority, ByRecency, ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.errors import EmptyBufferError, SchemaMismatchError

WEIGHTS = ["uniform", "steps", ByRecency(9.0), ByGroup("label_group"), ByPriority()]
EVERY_KIND = [*({"weights": weights} for weights in WEIGHTS), {"replacement": False}]


def make(lag: int | None = 1, *, capacity: int = 6, **kwargs: Any) -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(
        max_trajectories=capacity,
        max_total_steps=1000,
        sampler=ChunkSampler(3, max_policy_lag=lag, **kwargs),
        batch_size=64,
    )


def versioned(number: int, version: Any, length: int = 5) -> TensorDict:
    data = small(number, length).set("label_group", torch.zeros(length, dtype=torch.int64))
    version = torch.as_tensor(version)
    return data.set("policy_version", version.expand(length, *version.shape).clone())


def fill(rb: TrajectoryReplayBuffer, versions: dict[int, Any]) -> TrajectoryReplayBuffer:
    for number, version in versions.items():
        rb.extend(versioned(number, version))
    return rb


def drawn(rb: TrajectoryReplayBuffer) -> set[int]:
    return {number for _ in range(3) for number in numbers_of(rb.sample())}


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
class TestTheNewestLiveVersionCounts:
    def test_as_it_goes_on(self, options: dict[str, Any]) -> None:
        assert drawn(fill(make(**options), {0: 3, 1: 7, 2: 6, 3: 5})) == {1, 2}

    def test_after_the_buffer_was_emptied(self, options: dict[str, Any]) -> None:
        rb = fill(make(**options), {0: 9})
        rb.empty()
        assert drawn(fill(rb, {1: 0, 2: 1, 3: 2})) == {2, 3}

    def test_after_the_newest_was_evicted(self, options: dict[str, Any]) -> None:
        rb = fill(make(capacity=3, **options), {0: 9, 1: 2, 2: 1, 3: 0})
        assert drawn(rb) == {1, 2}

    def test_after_a_checkpoint_was_loaded(self, options: dict[str, Any], tmp_path: Path) -> None:
        fill(make(**options), {1: 0, 2: 1, 3: 2}).dumps(tmp_path)
        rb = fill(make(**options), {0: 9})
        rb.loads(tmp_path)
        assert drawn(rb) == {2, 3}
        assert drawn(fill(rb, {4: 3})) == {3, 4}


class TestVersionsAreKept:
    def test_by_pickling(self) -> None:
        rb = pickle.loads(pickle.dumps(fill(make(), {0: 3, 1: 7, 2: 6, 3: 5})))
        assert drawn(rb) == {1, 2}

    def test_where_the_data_does_not_have_them(self) -> None:
        rb = make()
        for number, version in enumerate([3, 7, 6, 5]):
            written = small(number, 5)
            rb.storage.allocate(written)
            arrays = [value.numpy() for value in rb.storage.schema.leaves(written)]
            rb.storage.write([arrays], policy_version=version)  # as the engine's workers do
        assert drawn(rb) == {1, 2}
        target = make()
        target.load_state_dict(rb.state_dict())
        assert drawn(target) == {1, 2}

    def test_of_a_state_of_an_earlier_version(self) -> None:
        state = fill(make(), {0: 3, 1: 7, 2: 6, 3: 5}).state_dict()
        del state["_storage"]["policy_versions"]
        target = make()
        target.load_state_dict(state)
        assert drawn(target) == {1, 2}

    @pytest.mark.parametrize("version", [torch.tensor([4]), torch.tensor(4.0), torch.tensor(4, dtype=torch.int32)])
    def test_whatever_their_shape_and_dtype(self, version: torch.Tensor) -> None:
        rb = fill(make(lag=0), {0: version - 1, 1: version})
        assert drawn(rb) == {1}


class TestDataWithoutVersions:
    @pytest.mark.parametrize(
        "options", [*({"weights": weights} for weights in WEIGHTS), {"replacement": False}], ids=str
    )
    def test_is_refused(self, options: dict[str, Any]) -> None:
        rb = make(**options)
        rb.extend(versioned(0, 0).exclude("policy_version"))
        with pytest.raises(SchemaMismatchError, match=r"max_policy_lag=1.*track_policy_version=True"):
            rb.sample()

    @pytest.mark.parametrize("version", [torch.tensor(True), torch.tensor(-1), torch.tensor(float("nan"))])
    def test_or_with_something_else_there(self, version: torch.Tensor) -> None:
        rb = fill(make(), {0: version})
        with pytest.raises(SchemaMismatchError, match="track_policy_version=True"):
            rb.sample()

    def test_or_with_text(self) -> None:
        rb = make()
        rb.extend(small(0, 5).set("policy_version", NonTensorStack(*["5a1c"] * 5)))
        with pytest.raises(SchemaMismatchError, match="track_policy_version=True"):
            rb.sample()

    def test_may_be_sampled_without_the_option(self) -> None:
        rb = make(lag=None)
        rb.extend(small(0, 5))
        assert drawn(rb) == {0}

    def test_of_an_empty_buffer_it_is_not_known(self) -> None:
        with pytest.raises(EmptyBufferError):
            make().sample()

    def test_is_not_drawn_beside_data_that_has_them(self) -> None:
        rb = fill(make(lag=100), {0: 2, 1: -1, 2: 0})
        assert drawn(rb) == {0, 2}


NAMES = ("sampled_age_mean", "sampled_age_max", "sampled_policy_lag_mean", "sampled_policy_lag_max")


def ages(rb: TrajectoryReplayBuffer) -> list[Any]:
    return [rb.stats()[name] for name in NAMES]


def _age(rb: TrajectoryReplayBuffer, number: int, seconds: float) -> None:
    rb.storage.ledger._published_at[number] -= int(seconds * 1e9)


class TestHowOldWasWhatWasSampled:
    def test_nothing_yet(self) -> None:
        assert ages(fill(make(), {0: 1})) == [None] * 4

    @pytest.mark.parametrize("batches", [1, 7, 200])
    def test_of_the_chunks_that_were_drawn(self, batches: int) -> None:
        rb = fill(make(lag=None), {0: 4, 1: 7, 2: 7})
        _age(rb, 0, 100.0)
        before = time.monotonic()
        numbers = [number for _ in range(batches) for number in numbers_of(rb.sample())]
        share = numbers.count(0) / len(numbers)
        mean, largest, lag, lag_max = ages(rb)
        took = time.monotonic() - before + 1.0
        assert 100.0 * share <= mean <= 100.0 * share + took
        assert 100.0 <= largest <= 100.0 + took
        assert lag == pytest.approx(3.0 * share)
        assert lag_max == 3

    def test_of_all_so_far(self) -> None:
        rb = fill(make(lag=None), {0: 4})
        rb.sample()
        rb.extend(versioned(1, 6))
        rb.set_sampler(rb.sampler)
        for _ in range(3):
            rb.sample_chunks(64, 5)
        mean, largest, lag, lag_max = ages(rb)
        assert 0.0 <= mean <= largest
        assert 0.0 < lag < 2.0  # of the first batch it was 0
        assert lag_max == 2

    def test_only_of_versions_that_are_known(self) -> None:
        rb = make(lag=None)
        rb.extend(small(0, 5))
        rb.sample()
        mean, _, lag, lag_max = ages(rb)
        assert mean >= 0.0
        assert (lag, lag_max) == (None, None)

    @pytest.mark.parametrize("start_method", ["fork", "forkserver"])
    def test_in_each_process_its_own(self, start_method: str) -> None:
        rb = fill(make(lag=None), {0: 4, 1: 9})
        rb.sample()
        child = Child(start_method, rb)
        try:
            assert child.call(ages) == [None] * 4
            assert child.call(_sample_and_age, 1)[3] == 5
        finally:
            child.end()
        assert ages(rb)[3] == 5

    def test_from_many_threads(self) -> None:
        rb = fill(make(lag=None), {0: 5, 1: 5})
        rb.extend(versioned(2, 8, length=2))  # too short to be drawn: every chunk is 3 versions behind
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: rb.sample(), range(300)))
        rb.sample()
        assert ages(rb)[2:] == [3.0, 3]
        assert rb.sampler._ages.of(rb.storage.ledger).chunks == 301 * 64

    def test_in_a_plain_buffer(self) -> None:
        ours = fill(make(lag=None), {0: 4, 1: 9})
        plain = TensorDictReplayBuffer(storage=ours.storage, writer=ours.writer, sampler=ChunkSampler(3), batch_size=64)
        plain.sample()
        assert plain.sampler.stats()["sampled_policy_lag_max"] == 5


def _sample_and_age(rb: TrajectoryReplayBuffer, batches: int) -> list[Any]:
    for _ in range(batches):
        rb.sample()
    return ages(rb)


class TestOneSamplerOnTwoStorages:
    def buffers(self, sampler: ChunkSampler) -> list[TrajectoryReplayBuffer]:
        """Trajectories 0 to 5 in two groups of three, and 100 to 105, of which the first is a group of its own."""
        buffers = []
        for base in (0, 100):
            rb = TrajectoryReplayBuffer(max_trajectories=9, max_total_steps=500, sampler=sampler, batch_size=60)
            for number in range(6):
                group = torch.full((5,), int(number == 0) if base else number % 2)
                rb.extend(small(base + number, 5).set("label_group", group))
            buffers.append(rb)
        return buffers

    def test_draws_the_groups_of_each(self) -> None:
        a, b = self.buffers(ChunkSampler(3, weights=ByGroup("label_group")))
        torch.manual_seed(0)
        found: list[list[int]] = [[], []]
        for _ in range(20):
            for numbers, rb in zip(found, (a, b), strict=True):
                numbers += numbers_of(rb.sample())
        assert_uniform(found[0], range(6))
        assert_chances(found[1], {100: 5.0} | dict.fromkeys(range(101, 106), 1.0))

    def test_goes_through_passes_of_each(self) -> None:
        a, b = self.buffers(ChunkSampler(3, replacement=False))
        chunks: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
        for _ in range(9):
            for which, rb in enumerate((a, b)):
                chunks[which] += [tuple(label[:2].tolist()) for label in rb.sample_chunks(2, 3)["label"][:, 0]]
        assert sorted(chunks[0]) == [(number, start) for number in range(6) for start in range(3)]
        assert sorted(chunks[1]) == [(number, start) for number in range(100, 106) for start in range(3)]

    def test_reads_the_windows_of_each(self) -> None:
        sampler = ChunkSampler(windows={"label": (0, 1)})
        a, _ = self.buffers(sampler)
        b = TrajectoryReplayBuffer(max_trajectories=9, max_total_steps=500, sampler=sampler, batch_size=60)
        keys = list(reversed(list(small(0, 5).keys())))
        b.extend(small(7, 5).select(*keys).set("first", torch.zeros(5)))
        for _ in range(3):
            assert set(a.sample()["label"][:, 0, 0].tolist()) == set(range(6))
            assert set(b.sample()["label"][:, 0, 0].tolist()) == {7}

    @pytest.mark.parametrize("options", [{"weights": ByGroup("label_group")}, {"replacement": False}], ids=str)
    def test_a_new_storage_begins_anew(self, options: dict[str, Any]) -> None:
        a, b = self.buffers(ChunkSampler(3, **options))
        a.sample()
        a.set_storage(b.storage)
        assert drawn(a) == set(range(100, 106))

    def test_other_chunk_sizes_have_passes_of_their_own(self) -> None:
        a, _ = self.buffers(ChunkSampler(3, replacement=False))
        for _ in range(40):
            for length in (1, 5, 3, 2):
                labels = a.sample_chunks(1, length)["label"]
                assert (labels[..., 0] == labels[:, :1, 0]).all()
                assert (labels[0, :, 1] == labels[0, 0, 1] + torch.arange(length)).all()
