from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from embodichain_rl.engine.envs import EnvMaker
from embodichain_rl.errors import GenerationFailedError, InvalidArgumentError
from embodichain_rl.replay.acceptance import AcceptFilter, accept_all, accept_success


def steps(*lengths: int, last_is_done: bool = True) -> TensorDict:
    """Trajectories one after another; ``"trajectory"`` tells which, ``"length"`` how long it is."""
    done = torch.cat([torch.arange(length) == length - 1 for length in lengths])
    done[-1] = last_is_done
    which = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])
    return TensorDict({"trajectory": which, "next": {"done": done[:, None]}}, done.shape)


def is_long(trajectory: TensorDictBase) -> bool:
    return len(trajectory) >= 3


def test_keeps_what_is_accepted_in_order() -> None:
    keep = AcceptFilter(is_long)
    kept = keep(steps(3, 1, 4, 2, 5))
    assert kept["trajectory"].tolist() == [0] * 3 + [2] * 4 + [4] * 5
    assert (keep.num_accepted, keep.num_rejected, keep.num_failed) == (3, 2, 0)


def test_keeps_all_or_nothing() -> None:
    everything = steps(3, 4)
    assert AcceptFilter(accept_all)(everything) is everything
    assert AcceptFilter(lambda trajectory: False)(everything).shape == (0,)


@pytest.mark.parametrize("wrong", [steps(3, 2, last_is_done=False), steps(3)[None], steps(3)[:0]])
def test_takes_whole_trajectories_only(wrong: TensorDict) -> None:
    with pytest.raises(InvalidArgumentError, match="whole trajectories"):
        AcceptFilter(accept_all)(wrong)


def test_judges_what_a_collector_writes() -> None:
    keep = AcceptFilter(lambda trajectory: len(trajectory) > 20)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(2000))
    maker = EnvMaker({"id": "CartPole-v1", "num_envs": 2})
    collector = Collector(maker, None, frames_per_batch=50, total_frames=1000, replay_buffer=buffer, trajs_per_batch=1)
    for _ in collector:
        pass
    collector.shutdown()
    written = buffer[:]
    kept = keep(written)
    ids, lengths = written["collector", "traj_ids"].unique(return_counts=True)
    assert set(kept["collector", "traj_ids"].tolist()) == set(ids[lengths > 20].tolist())
    assert len(kept) == lengths[lengths > 20].sum()
    assert (keep.num_accepted, keep.num_rejected) == ((lengths > 20).sum(), (lengths <= 20).sum())


@pytest.mark.parametrize(("flags", "accepted"), [([0, 0, 1], True), ([0, 1, 0], False), ([0, 0, 0], False)])
def test_success_counts_at_the_last_step(flags: list[int], accepted: bool) -> None:
    success = torch.tensor(flags, dtype=torch.bool)[:, None]
    assert accept_success(TensorDict({"next": {"success": success}}, [3])) is accepted


class TestGivingUp:
    def test_names_the_environment_the_count_and_the_cause(self) -> None:
        keep = AcceptFilter(is_long, max_generation_attempts=3, environment="Environment 2 (Lift-v0)")
        cause = RuntimeError("no path")
        assert keep.admit(steps(3))
        assert not keep.admit(steps(1))
        keep.failed("its planning raised")
        with pytest.raises(GenerationFailedError) as caught:
            keep.failed("its planning raised RuntimeError: no path", cause)
        message = str(caught.value)
        assert message.startswith("Environment 2 (Lift-v0) failed 3 times in a row")
        assert "its planning raised RuntimeError: no path" in message
        assert "1 were accepted, 1 rejected and 2 could not be made" in message
        assert caught.value.__cause__ is cause

    def test_an_accepted_trajectory_starts_the_count_anew(self) -> None:
        keep = AcceptFilter(is_long, max_generation_attempts=2)
        for _ in range(5):
            assert not keep.admit(steps(1))
            assert keep.admit(steps(3))

    def test_going_on_gives_as_many_attempts_again(self) -> None:
        keep = AcceptFilter(is_long, max_generation_attempts=2)
        for _ in range(3):
            assert not keep.admit(steps(1))
            with pytest.raises(GenerationFailedError, match="failed 2 times"):
                keep.admit(steps(1))

    def test_never_takes_accepted_trajectories_along(self) -> None:
        keep = AcceptFilter(is_long, max_generation_attempts=2)
        assert keep(steps(3, 1, 1, 1))["trajectory"].tolist() == [0] * 3
        with pytest.raises(GenerationFailedError, match="failed 4 times in a row"):
            keep(steps(1))

    def test_may_never_happen(self) -> None:
        keep = AcceptFilter(is_long)
        assert not any(keep.admit(steps(1)) for _ in range(100))

    def test_needs_a_number(self) -> None:
        with pytest.raises(InvalidArgumentError, match="max_generation_attempts"):
            AcceptFilter(is_long, max_generation_attempts=0)
        with pytest.raises(InvalidArgumentError, match="accept"):
            AcceptFilter(None)  # type: ignore[arg-type]
