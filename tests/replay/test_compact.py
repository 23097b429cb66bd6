"""Observations stored once: what is handed out is what the other layout hands out, and what does not fit is refused."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import Child
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch.utils.data import DataLoader
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.transforms import (
    CatFrames,
    Compose,
    InitTracker,
    MultiStepTransform,
    RewardSum,
    UnsqueezeTransform,
    VecNormV2,
)
from torchrl.modules import LSTMModule, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import (
    ChunkTooLongError,
    InvalidArgumentError,
    NothingToDrawError,
    SchemaMismatchError,
    TrajectoryTooLongError,
)
from embodichain_rl.replay.invariants import check_ledger

SHIFTED = {("next", "observation"), ("next", "pixels"), ("next", "robot", "joints"), ("next", "clock")}


def trajectory(number: int, steps: int, *, segments: int = 3) -> TensorDict:
    """Random steps as a collector writes them, of every kind of entry, with NaNs and negative zeros among them."""
    generator = torch.Generator().manual_seed(number)
    observation = torch.randn(steps + 1, 3, generator=generator)
    observation[::3, 0], observation[1::3, 0] = float("nan"), -0.0
    pixels = torch.randint(256, (steps + 1, 4, 5, 3), dtype=torch.uint8, generator=generator)
    joints = torch.randn(steps + 1, 2, generator=generator).bfloat16()
    clock = torch.arange(steps + 1, dtype=torch.float64) + 1000 * number
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True

    def observed(which: slice) -> dict[str, Any]:
        # Copies: what is stored must not be the same only because it lies in the same memory.
        return {
            "observation": observation[which].clone(),
            "pixels": pixels[which].clone(),
            "robot": {"joints": joints[which].clone()},
            "clock": clock[which].clone(),
        }

    return TensorDict(
        {
            **observed(slice(None, -1)),
            "action": torch.randn(steps, 3, generator=generator),
            "segment_id": torch.arange(steps) * segments // steps,
            "reward": torch.randn(steps, 1, generator=generator),
            "done": torch.zeros(steps, 1, dtype=torch.bool),
            "next": {**observed(slice(1, None)), "reward": torch.randn(steps, 1, generator=generator), "done": done},
        },
        [steps],
    )


def buffer(compact: bool = True, **kwargs: Any) -> TrajectoryReplayBuffer:
    defaults: dict[str, Any] = {"max_trajectories": 5, "max_total_steps": 60, "batch_size": 16}
    if "sampler" not in kwargs:
        defaults["chunk_size"] = 4
    return TrajectoryReplayBuffer(compact=compact, **{**defaults, **kwargs})


def layouts(**kwargs: Any) -> list[TrajectoryReplayBuffer]:
    """The two layouts, empty, with the same stream of random numbers."""
    return [
        buffer(compact, generator=torch.Generator().manual_seed(0), **copy.deepcopy(kwargs))
        for compact in (False, True)
    ]


def assert_same(got: TensorDictBase, expected: TensorDictBase) -> None:
    """To the bit, in every key."""
    assert got.batch_size == expected.batch_size
    assert {*got.keys(True, True)} == {*expected.keys(True, True)}
    for key, value in expected.items(True, True):
        assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape), key
        assert got[key].contiguous().flatten().view(torch.uint8).tolist() == (
            value.contiguous().flatten().view(torch.uint8).tolist()
        ), f"{key} differs"


EXPECTED_ERRORS = (ChunkTooLongError, NothingToDrawError)


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except EXPECTED_ERRORS as error:
        return type(error)


ways_to_draw = st.one_of(
    st.tuples(
        st.integers(2, 14),
        st.sampled_from(
            [
                {"sampling_mode": "segment"},
                {"sampling_mode": "boundary"},
                *({"pad": pad} for pad in ("none", "before", "after", "both")),
            ]
        ),
    ).map(lambda drawn: {"chunk_size": drawn[0], **drawn[1]}),
    st.fixed_dictionaries(
        {
            "windows": st.dictionaries(
                st.sampled_from(
                    ["observation", ("next", "observation"), ("next", "pixels"), ("next", "done"), "clock"]
                ),
                st.tuples(st.integers(-4, 4), st.integers(0, 4)).map(lambda w: (w[0], w[0] + w[1])),
                min_size=1,
            ),
            "pad": st.sampled_from(["none", "before", "after", "both"]),
        }
    ),
)


@settings(max_examples=70, deadline=None)
@given(lengths=st.lists(st.integers(1, 14), min_size=1, max_size=14), way=ways_to_draw, pieces=st.integers(1, 3))
def test_both_layouts_hand_out_the_same(lengths: list[int], way: dict[str, Any], pieces: int) -> None:
    wide, compact = layouts(sampler=ChunkSampler(**way))
    for number, steps in enumerate(lengths):
        for piece in trajectory(number, steps).split(-(-steps // pieces)):
            assert torch.equal(wide.extend(piece), compact.extend(piece))
        check_ledger(compact.storage.ledger)
    assert {compact.storage.schema.keys[n] for n in compact.storage.arena.shifted} == SHIFTED
    assert compact.storage.schema == wide.storage.schema
    assert compact.storage.num_steps == wide.storage.num_steps
    for _ in range(2):
        expected, got = outcome(wide.sample), outcome(compact.sample)
        if isinstance(expected, type):
            assert got is expected
        else:
            assert_same(got, expected)
    for index in (0, -1, slice(None), [0, -1]):
        assert_same(compact[index], wide[index])
    for found, there in zip(compact.query(), wide.query(), strict=True):
        assert_same(found.data, there.data)
    state, reference = compact.storage.state_dict(), wide.storage.state_dict()
    for value, other in zip(state.pop("values"), reference.pop("values"), strict=True):
        assert_same(TensorDict({"value": value}, []), TensorDict({"value": other}, []))
    assert state.pop("lengths").tolist() == reference.pop("lengths").tolist()
    assert state == reference


def test_a_plain_torchrl_buffer_hands_out_the_same() -> None:
    wide, compact = layouts()
    for number, steps in enumerate([7, 4, 12]):
        wide.extend(trajectory(number, steps))
        compact.extend(trajectory(number, steps))
    plain = [
        TensorDictReplayBuffer(
            storage=rb.storage, sampler=ChunkSampler(4), batch_size=32, generator=torch.Generator().manual_seed(1)
        )
        for rb in (wide, compact)
    ]
    assert_same(plain[1].sample(), plain[0].sample())
    apart = (torch.tensor([0, 2, 1, 2]), torch.tensor([6, 11, 3, 0]))  # last steps, in any order
    assert_same(compact.storage.get(apart), wide.storage.get(apart))


def test_a_chunk_and_its_next_are_views_of_one_memory_but_where_it_is_padded() -> None:
    for pad, shared in (("none", True), ("both", False)):
        rb = buffer(sampler=ChunkSampler(4, pad=pad))
        rb.extend(trajectory(0, 9))
        batch = rb.sample()
        for key in ("pixels", "observation"):
            memory, of_next = (value.untyped_storage().data_ptr() for value in (batch[key], batch["next", key]))
            assert (memory == of_next) is shared


def test_next_of_a_repeated_edge_step_is_that_of_the_edge() -> None:
    rb = buffer(sampler=ChunkSampler(6, pad="both"), batch_size=64)
    rb.extend(trajectory(0, 5))
    batch = rb.sample()
    assert torch.equal(batch["clock"], batch["trajectory", "step"].double())
    assert torch.equal(batch["next", "clock"], batch["clock"] + 1)
    assert not batch["collector", "mask"].all()


def test_a_padded_chunk_at_the_very_end_of_the_arena() -> None:
    rb = buffer(max_trajectories=1, max_total_steps=3, sampler=ChunkSampler(3, pad="both"))
    ledger = rb.storage.ledger
    while ledger.reserve(1).start + 4 < ledger.arena_steps:  # as writers that stand still
        pass
    rb.extend(trajectory(0, 1))
    assert ledger.live_rows().starts + 2 == ledger.arena_steps
    batch = rb.sample()
    assert torch.equal(batch["next", "clock"], batch["clock"] + 1)


@pytest.mark.parametrize(
    ("number", "limits"), [(1, (1, 1)), (30, (40, 10)), (30, (3, 9)), (20, (1, 9))], ids=["one step", *"abc"]
)
def test_limits_are_those_of_trajectories(number: int, limits: tuple[int, int]) -> None:
    wide, compact = layouts(max_trajectories=limits[0], max_total_steps=limits[1], chunk_size=1)
    for n in range(number):
        for rb in (wide, compact):
            rb.extend(trajectory(n, 1 + n % limits[1]))
        assert_same(compact[:], wide[:])
        assert compact.stats()["evicted_early"] == 0
    with pytest.raises(TrajectoryTooLongError):
        compact.extend(trajectory(0, limits[1] + 1))


class TestRefusal:
    """Nothing is dropped that could not be read again."""

    def wrong(self, key: Any, step: int, number: int = 0, steps: int = 8) -> TensorDict:
        data = trajectory(number, steps)
        # One bit; of a NaN, where it stands, another NaN.
        value = data["next", key] if isinstance(key, str) else data[("next", *key)]
        value[step : step + 1].view(torch.uint8).view(-1)[0] ^= 1
        return data

    @pytest.mark.parametrize("step", [0, 2, 6])
    @pytest.mark.parametrize("key", ["observation", "pixels", ("robot", "joints")])
    def test_of_one_bit(self, key: Any, step: int) -> None:
        rb = buffer()
        rb.extend(trajectory(9, 5))
        whole = ("next", *((key,) if isinstance(key, str) else key))
        message = f"{whole!r} that at step {step} of a trajectory is not the {key!r} of step {step + 1}"
        with pytest.raises(SchemaMismatchError) as refused:
            rb.extend(self.wrong(key, step))
        assert message in str(refused.value)
        assert "compact=False" in str(refused.value)
        assert rb.storage.ledger.next_id == 1
        assert rb.stats()["writing"] == 0

    def test_of_a_zero_of_the_other_sign(self) -> None:
        data = trajectory(0, 8)
        at = (data["observation"][1:, 0] == 0).nonzero()[0, 0]
        data["next", "observation"][at, 0] = 0.0
        with pytest.raises(SchemaMismatchError, match=f"at step {int(at)} "):
            buffer().extend(data)

    def test_the_last_next_observation_may_be_any(self) -> None:
        rb = buffer()
        rb.extend(self.wrong("observation", 7))
        assert_same(rb[0].exclude("index", "trajectory"), self.wrong("observation", 7))

    @pytest.mark.parametrize("cut", [1, 3, 4, 7])
    def test_across_the_pieces_of_a_trajectory(self, cut: int) -> None:
        rb = buffer()
        first, second = self.wrong("observation", 3).split([cut, 8 - cut])
        if cut > 4:
            with pytest.raises(SchemaMismatchError, match="at step 3 "):
                rb.extend(first)
            assert rb.writer.pending_steps == 0
            return
        rb.extend(first)
        with pytest.raises(SchemaMismatchError, match="at step 3 "):
            rb.extend(second)
        assert rb.writer.pending_steps == cut
        second = trajectory(0, 8)[cut:]
        first_next = first["next", "observation"][-1]
        second["observation"][0] = first_next  # mended, it goes on where it was
        rb.extend(second)
        assert len(rb) == 1

    def test_of_one_of_many_writes_none(self) -> None:
        rb = buffer()
        rb.extend(trajectory(9, 5))
        good = trajectory(1, 8)
        for data in (
            torch.cat([good, self.wrong("clock", 2)]),
            torch.stack([good, self.wrong("clock", 2)]),
            torch.stack([good[:4], self.wrong("clock", 2)[:4]]),
        ):
            with pytest.raises(SchemaMismatchError, match=r"\('next', 'clock'\)"):
                rb.extend(data)
            assert (rb.storage.ledger.next_id, rb.writer.pending_steps) == (1, 0)

    def test_of_trajectories_that_take_turns(self) -> None:
        """In one call two trajectories come in pieces, told apart by their ids."""

        def mixed(first: TensorDict, second: TensorDict) -> TensorDict:
            for number, data in enumerate((first, second)):
                data["collector", "traj_ids"] = torch.full((8,), number)
            return torch.cat([first[:3], second[:5], first[3:], second[5:]])

        rb = buffer()
        with pytest.raises(SchemaMismatchError, match="at step 4 "):
            rb.extend(mixed(trajectory(0, 8), self.wrong("pixels", 4)))
        with pytest.raises(SchemaMismatchError, match="at step 2 "):
            rb.extend(mixed(self.wrong("pixels", 2), trajectory(1, 8)))
        rb.extend(mixed(trajectory(0, 8), trajectory(1, 8)))
        assert len(rb) == 2

    def test_of_the_first_data_leaves_the_storage_open_for_other_keys(self) -> None:
        rb = buffer()
        with pytest.raises(SchemaMismatchError):
            rb.extend(self.wrong("clock", 2))
        assert not rb.storage.initialized
        rb.extend(self.wrong("clock", 2).exclude(("next", "clock")))
        assert len(rb) == 1

    def test_of_n_step_returns(self) -> None:
        data = trajectory(0, 8).exclude("reward")
        data["next", "terminated"] = data["next", "done"].clone()
        data["next", "truncated"] = torch.zeros(8, 1, dtype=torch.bool)
        for rb, refuses in zip(layouts(transform=MultiStepTransform(n_steps=3, gamma=0.9)), (False, True), strict=True):
            if refuses:
                with pytest.raises(SchemaMismatchError, match="n-step returns"):
                    rb.extend(data.clone())
            else:
                rb.extend(data.clone())

    @pytest.mark.parametrize("compact", [1, "yes", None])
    def test_of_another_argument(self, compact: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="compact="):
            TrajectoryStorage(2, 20, compact=compact)

    def test_of_a_storage_that_has_its_own(self) -> None:
        with pytest.raises(InvalidArgumentError, match="compact: the storage has its own"):
            TrajectoryReplayBuffer(storage=TrajectoryStorage(2, 20), chunk_size=2, compact=True)


def test_what_differs_in_shape_or_dtype_or_stands_only_once_is_stored_as_it_is() -> None:
    data = trajectory(0, 6)
    data["next", "clock"] = data["next", "clock"].float()
    data["next", "pixels"] = data["next", "pixels"][:, :2].clone()
    data["next", "value"] = torch.randn(6, 1)
    rb = buffer()
    rb.extend(data)
    arena = rb.storage.arena
    assert {arena.schema.keys[n] for n in arena.shifted} == {("next", "observation"), ("next", "robot", "joints")}
    assert_same(rb[0].exclude("index", "trajectory"), data)


class TestSaving:
    @pytest.mark.parametrize("into_compact", [True, False])
    @pytest.mark.parametrize("from_compact", [True, False])
    def test_a_checkpoint_goes_from_layout_to_layout(
        self, from_compact: bool, into_compact: bool, tmp_path: Path
    ) -> None:
        source, target = buffer(from_compact), buffer(into_compact)
        for number in range(7):
            source.extend(trajectory(number, 3 + number))
        source.dumps(tmp_path)
        target.loads(tmp_path)
        assert_same(target[:].exclude("index", "trajectory"), source[:].exclude("index", "trajectory"))

    def test_one_that_does_not_fit_changes_nothing(self, tmp_path: Path) -> None:
        source, target = buffer(False), buffer(True)
        source.extend(trajectory(0, 6))
        source.extend(TestRefusal().wrong("observation", 2))
        source.dumps(tmp_path)
        target.extend(trajectory(5, 4))
        before = target[:]
        with pytest.raises(SchemaMismatchError, match="compact=False"):
            target.loads(tmp_path)
        assert_same(target[:], before)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda rb: pickle.loads(pickle.dumps(rb))])
    def test_a_copy_is_compact_too(self, copied: Callable[[Any], Any]) -> None:
        rb = buffer()
        rb.extend(trajectory(0, 6))
        storage = copied(rb.storage)
        assert storage.compact
        assert_same(storage[0].exclude("index", "trajectory"), trajectory(0, 6))


def touched_bytes(storage: TrajectoryStorage) -> int:
    return 512 * os.fstat(storage._arena_block._fd).st_blocks


def test_memory_is_about_half_of_that_of_torchrl() -> None:
    number, steps = 24, 60

    def with_images(n: int) -> TensorDict:
        pixels = torch.full((steps + 1, 64, 64, 3), n % 256, dtype=torch.uint8)
        data = trajectory(n, steps)
        data["pixels"], data["next", "pixels"] = pixels[:-1], pixels[1:]
        return data

    theirs = LazyTensorStorage(number * steps)
    theirs.set(range(steps), with_images(0))
    reference = sum(value.nbytes for value in theirs._storage.values(True, True))
    rb = buffer(max_trajectories=number, max_total_steps=number * steps)
    for n in range(number):
        rb.extend(with_images(n))
    assert rb.storage.num_steps == number * steps
    assert touched_bytes(rb.storage) < 0.52 * reference
    for n in range(5 * number):
        rb.extend(with_images(n))
    assert touched_bytes(rb.storage) < 0.55 * reference


def take_over(rb: TrajectoryReplayBuffer, numbers: range) -> int:
    for number in numbers:
        rb.extend(trajectory(number, 3 + number % 11))
    return len(rb)


@pytest.mark.parametrize("allocated_first", [True, False])
def test_other_processes_know_which_keys_are_stored_once(allocated_first: bool) -> None:
    rb = buffer()
    if allocated_first:
        rb.storage.allocate(trajectory(0, 3))
    child = Child("forkserver", rb)
    try:
        child.call(take_over, range(5))
        assert_same(rb[-1].exclude("index", "trajectory"), trajectory(4, 7))
        child.begin(take_over, range(5, 300))
        while rb.storage.ledger.next_id < 300:
            batch = rb.sample()
            assert torch.equal(batch["next", "clock"], batch["clock"] + 1)
            assert (batch["clock"].diff(dim=1) == 1).all()
            assert (batch["clock"] // 1000 == (batch["trajectory", "id"]).double()).all()
            last = batch["next", "done"][..., 0]
            assert torch.equal(
                batch["next", "observation"][:, :-1].nan_to_num(7), batch["observation"][:, 1:].nan_to_num(7)
            )
            assert (batch["clock"][last] % 1000 == 2 + batch["trajectory", "id"][last] % 11).all()
        child.result()
    finally:
        child.end()
    check_ledger(rb.storage.ledger)


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("pad", ["none", "both"])
def test_through_a_dataloader(batch_size: int | None, pad: str) -> None:
    wide, compact = layouts()
    for number in range(5):
        for rb in (wide, compact):
            rb.extend(trajectory(number, 8 + number))

    def batches(rb: TrajectoryReplayBuffer) -> list[TensorDict]:
        dataset = OnlineDataset(rb, 4, batch_size, pad=pad, seed=0)
        workers = {"num_workers": 1, "multiprocessing_context": "fork", "timeout": 60}
        loader = DataLoader(dataset, batch_size=None if batch_size else 8, **workers)
        return [batch.clone() for batch, _ in zip(loader, range(3), strict=False)]

    for got, expected in zip(batches(compact), batches(wide), strict=True):
        assert got.shape == (8, 4)
        assert_same(got, expected)


def test_torchrl_trains_on_it_to_the_bit() -> None:
    """SAC on chunks of both layouts: losses and gradients."""
    wide, compact = layouts(max_total_steps=600)
    env = TransformedEnv(GymEnv("Pendulum-v1"), StepCounter(100))
    env.set_seed(0)
    torch.manual_seed(0)
    for _ in range(4):
        rollout = env.rollout(100)
        wide.extend(rollout.copy())
        compact.extend(rollout.copy())
    assert ("next", "step_count") in [compact.storage.schema.keys[n] for n in compact.storage.arena.shifted]

    def train(rb: TrajectoryReplayBuffer) -> list[torch.Tensor]:
        torch.manual_seed(1)
        net = torch.nn.Sequential(
            torch.nn.Linear(3, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2), NormalParamExtractor()
        )
        actor = ProbabilisticActor(
            TensorDictModule(net, ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            return_log_prob=True,
        )
        mix = TensorDictModule(lambda *parts: torch.cat(parts, -1), ["observation", "action"], ["mixed"])
        value = ValueOperator(torch.nn.Linear(4, 1), in_keys=["mixed"], out_keys=["state_action_value"])
        loss = SACLoss(actor, TensorDictSequential(mix, value), action_spec=env.action_spec)
        loss.make_value_estimator(gamma=0.99)
        targets = SoftUpdate(loss, tau=0.1)
        optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
        results = []
        for _ in range(5):
            losses = loss(rb.sample())
            total = losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            targets.step()
            results.append(total.detach())
        return [*results, *(parameter.detach() for parameter in loss.parameters())]

    for got, expected in zip(train(compact), train(wide), strict=True):
        assert torch.equal(got, expected)


TRANSFORMS: dict[str, Callable[[], list[Any]]] = {
    "counters": lambda: [RewardSum(), InitTracker()],
    "a running mean": lambda: [VecNormV2(in_keys=["observation"])],
    "stacked frames": lambda: [
        UnsqueezeTransform(-2, in_keys=["observation"]),
        CatFrames(N=3, dim=-2, in_keys=["observation"]),
    ],
    "a recurrent policy": lambda: [InitTracker()],
}


@pytest.mark.parametrize("which", TRANSFORMS)
def test_what_torchrl_collects_fits(which: str) -> None:
    """Also where transforms or a policy carry something from step to step, in pieces of two environments."""
    env: Any = TransformedEnv(
        SerialEnv(2, lambda: GymEnv("Pendulum-v1")), Compose(StepCounter(30), *TRANSFORMS[which]())
    )
    policy = None
    if which == "a recurrent policy":
        lstm = LSTMModule(input_size=3, hidden_size=4, in_key="observation", out_key="features")
        env.append_transform(lstm.make_tensordict_primer())
        policy = TensorDictSequential(lstm, TensorDictModule(torch.nn.Linear(4, 1), ["features"], ["action"]))
    wide, compact = layouts(max_total_steps=1000)
    collector = Collector(env, policy, frames_per_batch=50, total_frames=200)
    for data in collector:
        wide.extend(data.copy())
        compact.extend(data.copy())
    collector.shutdown()
    assert len(compact) == len(wide) == 5
    stored_once = {
        key for key in data["next"].keys(True, True) if key not in ("reward", "done", "terminated", "truncated")
    }
    assert {compact.storage.schema.keys[n][-1] for n in compact.storage.arena.shifted} == stored_once
    assert_same(compact[:], wide[:])


def test_a_collector_that_drops_next_observations_leaves_nothing_to_store_once() -> None:
    rb = buffer(max_total_steps=400)
    env = TransformedEnv(GymEnv("Pendulum-v1"), StepCounter(50))
    collector = Collector(env, None, frames_per_batch=100, total_frames=200, compact_obs=True, replay_buffer=rb)
    for _ in collector:
        pass
    collector.shutdown()
    assert len(rb) == 4
    assert not rb.storage.arena.shifted
    assert ("next", "observation") not in rb.sample().keys(True)
