"""What can't be stored once is refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import assert_same, buffer, layouts, trajectory
from tensordict import TensorDict
from torchrl.envs.transforms import MultiStepTransform

from embodichain_rl import TrajectoryReplayBuffer, TrajectoryStorage
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError


def wrong(key: Any, step: int, number: int = 0, steps: int = 8) -> TensorDict:
    """A trajectory with one next observation that is not the observation of the step after."""
    data = trajectory(number, steps)
    # One bit; of a NaN, where it stands, another NaN.
    value = data["next", key] if isinstance(key, str) else data[("next", *key)]
    value[step : step + 1].view(torch.uint8).view(-1)[0] ^= 1
    return data


class TestRefusal:
    """Nothing is dropped that could not be read again."""

    @pytest.mark.parametrize("step", [0, 2, 6])
    @pytest.mark.parametrize("key", ["observation", "pixels", ("robot", "joints")])
    def test_of_one_bit(self, key: Any, step: int) -> None:
        rb = buffer()
        rb.extend(trajectory(9, 5))
        whole = ("next", *((key,) if isinstance(key, str) else key))
        message = f"{whole!r} that at step {step} of a trajectory is not the {key!r} of step {step + 1}"
        with pytest.raises(SchemaMismatchError) as refused:
            rb.extend(wrong(key, step))
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
        rb.extend(wrong("observation", 7))
        assert_same(rb[0].exclude("index", "trajectory"), wrong("observation", 7))

    @pytest.mark.parametrize("cut", [1, 3, 4, 7])
    def test_across_the_pieces_of_a_trajectory(self, cut: int) -> None:
        rb = buffer()
        first, second = wrong("observation", 3).split([cut, 8 - cut])
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
            torch.cat([good, wrong("clock", 2)]),
            torch.stack([good, wrong("clock", 2)]),
            torch.stack([good[:4], wrong("clock", 2)[:4]]),
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
            rb.extend(mixed(trajectory(0, 8), wrong("pixels", 4)))
        with pytest.raises(SchemaMismatchError, match="at step 2 "):
            rb.extend(mixed(wrong("pixels", 2), trajectory(1, 8)))
        rb.extend(mixed(trajectory(0, 8), trajectory(1, 8)))
        assert len(rb) == 2

    def test_of_the_first_data_leaves_the_storage_open_for_other_keys(self) -> None:
        rb = buffer()
        with pytest.raises(SchemaMismatchError):
            rb.extend(wrong("clock", 2))
        assert not rb.storage.initialized
        rb.extend(wrong("clock", 2).exclude(("next", "clock")))
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
        with pytest.raises(InvalidArgumentError, match="Got a storage and compact: the storage has its own"):
            TrajectoryReplayBuffer(storage=TrajectoryStorage(2, 20), chunk_size=2, compact=True)

    def test_of_a_checkpoint_changes_nothing(self, tmp_path: Path) -> None:
        source, target = buffer(False), buffer(True)
        source.extend(trajectory(0, 6))
        source.extend(wrong("observation", 2))
        source.dumps(tmp_path)
        target.extend(trajectory(5, 4))
        before = target[:]
        with pytest.raises(SchemaMismatchError, match="compact=False"):
            target.loads(tmp_path)
        assert_same(target[:], before)
