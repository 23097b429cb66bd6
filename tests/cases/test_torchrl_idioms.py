"""Programs that were written for TorchRL's buffers: constructor words, iteration, transforms, attributes."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import Child, make_buffer, make_plain_buffer, small
from tensordict import TensorDict
from torchrl.data import (
    LazyTensorStorage,
    SliceSampler,
    SliceSamplerWithoutReplacement,
    TensorDictReplayBuffer,
    Transition,
    traj,
)
from torchrl.data.replay_buffers.sample_units import Sequence
from torchrl.envs.transforms import Compose, ExcludeTransform, SelectTransform, Transform
from waiting import wait_until

from embodichain_rl import ChunkSampler, OnlineDataset, TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter
from embodichain_rl.errors import (
    InvalidArgumentError,
    MissingKeyError,
    StateMismatchError,
    UnsupportedOperationError,
    WorkerDiedError,
)
from embodichain_rl.transforms import FlatChunks


def select() -> SelectTransform:
    return SelectTransform("observation", ("next", "done"), ("next", "truncated"))


class TestTransformsThatDropTheIndex:
    @pytest.mark.parametrize("kwargs", [{}, {"prefetch": 2}, {"pin_memory": True}, {"prefetch": 1, "pin_memory": True}])
    @pytest.mark.parametrize(
        "transform", [select, lambda: ExcludeTransform("index", "trajectory")], ids=["select", "exclude"]
    )
    def test_the_index_is_added_after_them(self, kwargs: dict[str, Any], transform: Any) -> None:
        if kwargs.get("pin_memory") and not torch.cuda.is_available():
            kwargs = {**kwargs, "pin_memory": False}
        rb = make_buffer([small(0, 9)], transform=transform(), **kwargs)
        for batch in (rb.sample(), rb.sample(5), rb.sample(return_info=True)[0], rb.sample_chunks(8, 3)):
            assert batch["index"].shape == (*batch.shape, 2)
            assert torch.equal(rb[batch["index"]]["observation"], batch["observation"])
        assert torch.equal(*[part["index"] for part in rb.sample(5, return_info=True)])

    @pytest.mark.parametrize("order", [0, 1])
    def test_beside_flat_chunks(self, order: int) -> None:
        transforms = [FlatChunks(), select()] if order == 0 else [select(), FlatChunks()]
        rb = make_buffer([small(0, 9)], transform=Compose(*transforms), prefetch=1)
        for batch in (rb.sample(), rb.sample(5), rb.sample(return_info=True)[0]):
            assert batch["index"].shape == (*batch.shape, 2)
            assert torch.equal(rb.storage[batch["index"][None]]["observation"][0], batch["observation"])

    def test_what_a_transform_made_of_the_index_stays(self) -> None:
        rb = make_buffer([small(0, 9)], transform=lambda data: data.set("index", data["index"] + 100))
        assert (rb.sample()["index"] >= 100).all()
        assert (rb.sample(2)["index"] >= 100).all()

    def test_a_transform_that_leaves_some_steps_out(self) -> None:
        rb = make_buffer([small(0, 9)], transform=lambda data: data[:, 1:].select("observation"), prefetch=1)
        assert "index" not in rb.sample().keys()  # noqa: SIM118  # nothing tells which steps are left
        assert rb.sample(5).shape == (5, 2)

    def test_in_a_dataset(self) -> None:
        rb = make_buffer([small(0, 9)], transform=select())
        assert next(iter(OnlineDataset(rb, 3, 4)))["index"].shape == (4, 3, 2)


class TestConstructorWords:
    @pytest.mark.parametrize(
        "word",
        [
            {"shared": True},
            {"shared": False},
            {"priority_key": "td"},
            {"priority_key": ("agents", "td_error")},
            {"collate_fn": None},
            {"collate_fn": lambda x: x},
            {"dim_extend": 0},
            {"dim_extend": 1},
            {"dim_extend": None},
            {"compilable": True},
            {"checkpointer": None},
            {"delayed_init": True},
            {"sample_unit": None},
            {"sample_unit": Transition()},
            {"consume_after_n_samples": None},
            {"service_backend": "direct"},
            {"transport": "auto"},
            {"transform_factory": lambda: select()},
        ],
        ids=lambda word: "-".join(word),
    )
    def test_harmless_ones_are_accepted(self, word: dict[str, Any]) -> None:
        rb = make_buffer([small(0, 9)], **word)
        assert rb.sample().shape == (8, 3)
        if "priority_key" in word:
            assert rb.priority_key == word["priority_key"]

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ({"dim_extend": 2}, "transpose"),
            ({"checkpointer": object()}, "rb.dumps"),
            ({"sample_unit": Sequence(4)}, "ChunkSampler"),
            ({"consume_after_n_samples": 1}, "replacement=False"),
            ({"service_backend": "ray"}, "RayReplayBuffer"),
            ({"service_backend": "process"}, "shared memory"),
            ({"transport": "distributed"}, "shared memory"),
            ({"alpha": 0.7}, r"ByPriority\(alpha"),
            ({"beta": 0.7}, r"ByPriority"),
            ({"slice_len": 4}, "chunk_size=slice_len"),
            ({"num_slices": 4}, "batch_size=num_slices"),
            ({"max_size": 4}, "max_total_steps"),
            ({"shared": "yes"}, "True or False"),
            ({"collate_fn": 3}, "function"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
    )
    def test_others_say_what_to_do(self, word: dict[str, Any], message: str) -> None:
        with pytest.raises((InvalidArgumentError, UnsupportedOperationError), match=message) as error:
            make_buffer(**word)
        assert next(iter(word)) in str(error.value)

    def test_unknown_ones_are_a_type_error_with_a_hint(self) -> None:
        with pytest.raises(TypeError, match=r"'max_trajectory'\. Did you mean 'max_trajectories'"):
            make_buffer(max_trajectory=3)

    @pytest.mark.parametrize("name", ["priority_key", "torchrl", "self_"])
    def test_none_is_dropped(self, name: str) -> None:
        with pytest.raises((TypeError, InvalidArgumentError), match=name):
            make_buffer(**{name: 3})

    def test_those_of_the_writer(self) -> None:
        rb = make_buffer([small(0, 9)], writer=TrajectoryWriter(compilable=True, track_generations=False))
        assert rb.sample().shape == (8, 3)
        with pytest.raises(UnsupportedOperationError, match=r"track_generations=True.*storage\.contains"):
            TrajectoryWriter(track_generations=True)

    def test_collate_fn_comes_before_the_transform(self) -> None:
        rb = make_buffer(
            [small(0, 9)],
            collate_fn=lambda batch: batch.set("seen", torch.ones(batch.shape)),
            transform=lambda batch: batch.set("twice", 2 * batch["seen"]),
        )
        assert (rb.sample()["twice"] == 2.0).all()

    @pytest.mark.parametrize(
        ("sampler", "message"),
        [
            (SliceSampler(slice_len=5), r"draws slices.*ChunkSampler\(5\)"),
            (SliceSamplerWithoutReplacement(slice_len=5), r"draws slices.*ChunkSampler\(5, replacement=False\)"),
            (SliceSampler(num_slices=5), r"draws slices.*ChunkSampler\(chunk_size\)"),
        ],
        ids=["SliceSampler", "SliceSamplerWithoutReplacement", "num_slices"],
    )
    def test_samplers_are_refused_with_the_true_reason(self, sampler: Any, message: str) -> None:
        for build in (make_buffer, make_plain_buffer):
            with pytest.raises(UnsupportedOperationError, match=message) as error:
                build(sampler=sampler)
            assert "single steps" not in str(error.value)


class TestAttributesThatProgramsRead:
    def test_columns_of_the_storage(self) -> None:
        rb = make_buffer([small(0, 5), small(1, 7)])
        whole = torch.cat([rb.trajectory(0), rb.trajectory(1)])
        assert torch.equal(rb.storage["observation"], whole["observation"])
        assert torch.equal(rb.storage["next", "done"], whole["next", "done"])
        assert rb.storage["next"].shape == (12,)
        assert torch.equal(rb.storage["next"]["done"], whole["next", "done"])
        assert torch.equal(rb.storage["index"], whole["index"])
        assert torch.equal(rb.storage["trajectory", "id"], whole["trajectory", "id"])
        with pytest.raises(KeyError, match="'reward'"):
            rb.storage["reward"]
        with pytest.raises(MissingKeyError, match="has the keys"):
            rb.storage["next", "reward"]

    def test_values_of_trajectories(self) -> None:
        rb = make_buffer([small(n, 4).set(("trajectory", "mass"), torch.full((4,), float(n))) for n in range(2)])
        assert rb.storage["trajectory", "mass"].tolist() == [0.0] * 4 + [1.0] * 4

    def test_everything(self) -> None:
        rb = make_buffer([small(0, 5), small(1, 7)])
        assert (rb[...] == rb[:]).all()
        assert rb[...].shape == (2, 7)

    def test_the_key_of_trajectories(self) -> None:
        rb = make_buffer([small(0, 5)])
        assert rb.sampler.traj_key == ("trajectory", "id")
        assert rb.sample()[rb.sampler.traj_key].shape == (8, 3)

    def test_the_device_of_a_sample(self) -> None:
        rb = make_buffer([small(0, 5)])
        theirs = TensorDictReplayBuffer(storage=LazyTensorStorage(10), batch_size=8)
        theirs.extend(small(0, 5))
        assert rb.sample().device == theirs.sample().device == torch.device("cpu")
        assert rb.sample()["next"].device == torch.device("cpu")
        assert rb[0].device == rb.trajectory(0).device == torch.device("cpu")


class TestCallsThatDoNothing:
    def test_extend_of_nothing(self) -> None:
        for rb in (make_buffer(), make_buffer([small(0, 5)]), make_plain_buffer()):
            before = len(rb)
            index = rb.extend(small(1, 3)[:0])
            assert index.shape == (0,)
            assert index.dtype == torch.int64
            assert len(rb) == before
        assert make_buffer().extend(torch.stack([small(0, 3), small(1, 3)])[:, :0]).shape == (2, 0)

    def test_priorities_of_a_uniform_sampler(self) -> None:
        rb = make_buffer([small(0, 5)])
        batch = rb.sample()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rb.update_priority(batch["index"], torch.ones(8))
            rb.update_tensordict_priority(batch.set("td_error", torch.ones(8, 3)))
            rb.sampler.update_priority(batch["index"], 1.0)


class TestQueries:
    class Counting(Transform):
        """Writes a key, and counts the trajectories that it is applied to."""

        def __init__(self) -> None:
            super().__init__(in_keys=["observation"], out_keys=["doubled"])
            self.calls = 0

        def forward(self, tensordict: TensorDict) -> TensorDict:
            self.calls += 1
            return tensordict.set("doubled", 2 * tensordict["observation"])

    def test_transforms_are_applied_to_what_is_found_only(self) -> None:
        counting = self.Counting()
        rb = make_buffer([small(n, 3 + n) for n in range(4)], transform=counting)
        found = rb.query(traj.length >= 6)
        assert [len(trajectory) for trajectory in found] == [6]
        assert counting.calls == 1
        assert torch.equal(found[0].data["doubled"], 2 * found[0].data["observation"])

    def test_a_condition_on_what_a_transform_writes(self) -> None:
        counting = self.Counting()
        rb = make_buffer([small(n, 3 + n) for n in range(4)], transform=counting)
        most = max(rb.storage[n]["observation"].sum().item() for n in range(4))
        found = rb.query(traj["doubled"].sum() >= 2 * most - 1e-3)
        assert len(found) == 1
        assert len(rb.query(lambda trajectory: bool((trajectory.data["doubled"] == 0).all()))) == 0
        assert len(rb.query()) == 4


def firsts(batches: Any) -> Counter[tuple[int, int]]:
    return Counter((i, s) for batch in batches for i, s in batch["index"][:, 0].tolist())


LENGTHS = (5, 9, 4)
CHUNKS = Counter((n, start) for n, length in enumerate(LENGTHS) for start in range(length - 2))


class TestIteration:
    def buffer(self, make: Any = make_buffer, **kwargs: Any) -> Any:
        sampler = ChunkSampler(3, replacement=False)
        return make([small(n, length) for n, length in enumerate(LENGTHS)], **{"sampler": sampler, **kwargs})

    @pytest.mark.parametrize("make", [make_buffer, make_plain_buffer])
    @pytest.mark.parametrize("batch_size", [1, 4, 5, 6, 12, 50])
    def test_ends_after_a_pass(self, make: Any, batch_size: int) -> None:
        rb = self.buffer(make, batch_size=batch_size)
        for _ in range(3):
            batches = list(rb)
            assert firsts(batches) == CHUNKS
            assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)

    def test_with_transforms_and_prefetch(self) -> None:
        rb = self.buffer(transform=select(), prefetch=2, batch_size=5)
        assert firsts(rb) == CHUNKS

    def test_an_iteration_that_is_broken_off_goes_on(self) -> None:
        rb = self.buffer(batch_size=5)
        first = next(iter(rb))
        assert firsts([first, *rb]) == CHUNKS
        assert firsts(rb) == CHUNKS

    def test_new_trajectories_belong_to_the_next_pass(self) -> None:
        rb = self.buffer(batch_size=5)
        iterator = iter(rb)
        seen = [next(iterator)]
        rb.extend(small(3, 3))
        assert firsts([*seen, *iterator]) == CHUNKS
        assert firsts(rb) == CHUNKS + Counter([(3, 0)])

    def test_next(self) -> None:
        rb = self.buffer(batch_size=5)
        batches = []
        while (batch := rb.next()) is not None:
            batches.append(batch)
        assert firsts(batches) == CHUNKS

    def test_with_replacement_it_has_no_end(self) -> None:
        rb = make_buffer([small(0, 5)])
        for number, batch in enumerate(rb):
            assert batch.shape == (8, 3)
            if number == 20:
                break

    @pytest.mark.parametrize("make", [make_buffer, make_plain_buffer])
    @pytest.mark.parametrize("way", ["state_dict", "dumps"])
    def test_a_restored_pass_goes_on_where_it_was(self, make: Any, way: str, tmp_path: Path) -> None:
        rb = self.buffer(make, batch_size=5)
        iterator = iter(rb)
        seen = [next(iterator)]
        new = make(sampler=ChunkSampler(3, replacement=False), batch_size=5)
        if way == "state_dict":
            new.load_state_dict(rb.state_dict())
        else:
            rb.dumps(tmp_path / "rb")
            new.loads(tmp_path / "rb")
        rest, theirs = list(iterator), list(new)
        assert firsts([*seen, *theirs]) == CHUNKS
        assert [batch["index"].tolist() for batch in rest] == [batch["index"].tolist() for batch in theirs]
        assert firsts(new) == CHUNKS

    def test_a_pass_restored_into_the_same_buffer(self) -> None:
        rb = self.buffer(batch_size=5, storage=TrajectoryStorage(10, 1000))
        iterator = iter(rb)
        seen = next(iterator)
        state = rb.state_dict()
        rest = torch.cat(list(iterator))
        rb.load_state_dict(state)  # which gives the trajectories new ids
        again = torch.cat(list(rb))
        assert torch.equal(again["label"], rest["label"])
        assert len(again) + len(seen) == sum(CHUNKS.values())

    def test_a_pass_over_other_data_is_refused(self) -> None:
        rb = self.buffer(batch_size=5)
        next(iter(rb))
        other = make_buffer(sampler=ChunkSampler(3, replacement=False))
        other.extend(small(0, 5))
        other.sampler.load_state_dict(rb.sampler.state_dict())
        with pytest.raises(StateMismatchError, match="Resume over the buffer"):
            other.sample()


def extend_with(rb: TrajectoryReplayBuffer, data: TensorDict) -> None:
    rb.extend(data)


def other_keys(length: int = 5) -> TensorDict:
    return small(0, length).set("step_count", torch.arange(length)[:, None])


class TestEmptyingAndOtherKeys:
    @pytest.mark.parametrize("make", [make_buffer, make_plain_buffer])
    def test_the_next_data_may_have_other_keys(self, make: Any) -> None:
        rb = make([small(0, 5), small(1, 5, ends=False)])
        rb.empty()
        rb.extend(other_keys())
        assert rb.sample()["step_count"].shape == (8, 3, 1)
        rb.empty()
        rb.extend(small(3, 6))
        assert "step_count" not in rb.sample().keys()  # noqa: SIM118
        assert [len(trajectory) for trajectory in rb.storage] == [6]

    def test_a_sampler_without_replacement_goes_on(self) -> None:
        rb = make_buffer([small(0, 5)], sampler=ChunkSampler(3, replacement=False))
        rb.sample(2)
        rb.empty()
        rb.extend(other_keys())
        assert sum(firsts(rb).values()) == 3

    def test_workers_that_start_afterwards_decide(self) -> None:
        rb = make_buffer([small(0, 1, ends=False)])  # as async scripts initialise their buffer
        rb.empty()
        child = Child("spawn", rb)
        try:
            child.call(extend_with, other_keys())
            assert rb.sample()["step_count"].shape == (8, 3, 1)
        finally:
            child.end()
        rb.empty()  # other processes may have the memory: the keys stay
        with pytest.raises(ValueError, match="step_count"):
            rb.extend(small(0, 5))


class TestCollectorsThatDie:
    def test_in_another_process(self) -> None:
        rb = make_buffer()
        child = Child("spawn", rb)
        child.process.kill()
        with pytest.warns(UserWarning, match=r"has failed: process \d+ was killed by signal 9"):
            wait_until(lambda: bool(rb.storage.handed_over.failed), lambda: "The end of the child to be noticed")
        with pytest.raises(WorkerDiedError, match="killed by signal 9"):
            rb.sample()
        with pytest.raises(WorkerDiedError, match="killed by signal 9"):
            next(iter(OnlineDataset(rb, 3, 2, wait=60.0)))
        rb.extend(small(0, 5))
        assert rb.sample().shape == (8, 3)

    def test_on_a_thread(self) -> None:
        rb = make_buffer()
        thread = threading.Thread(target=_extend_wrongly, args=(rb,), name="collector")
        thread.start()
        thread.join()
        with pytest.raises(WorkerDiedError, match="collector of this process could not extend: SchemaMismatchError"):
            rb.sample()

    def test_that_end_by_themselves_are_no_reason(self) -> None:
        rb = make_buffer()
        child = Child("spawn", rb)
        child.call(extend_with, small(0, 5, ends=False))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            child.end()
            wait_until(lambda: not rb.storage.handed_over.look(), lambda: "The end of the child to be noticed")
        with pytest.raises(RuntimeError, match="no trajectory is finished yet"):
            rb.sample()


def _extend_wrongly(rb: TrajectoryReplayBuffer) -> None:
    try:
        rb.extend(TensorDict({"observation": torch.zeros(3)}, [3]))
    except ValueError:
        return
