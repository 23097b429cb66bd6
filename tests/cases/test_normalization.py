"""Normalization: the statistics of what a buffer holds, and the transform that takes them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_device import SimulatedDevice
from steps import make_buffer, make_trajectory
from tensordict import TensorDict

from embodichain_rl import ChunkSampler, Normalize, TrajectoryReplayBuffer, TrajectoryStorage, buffer_statistics
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import EmptyBufferError, InvalidArgumentError, SchemaMismatchError

LENGTHS = [5, 90, 11, 40]


def episode(number: int, length: int) -> TensorDict:
    generator = torch.Generator().manual_seed(number)
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = True
    state = 1000.0 * number + torch.randn(length + 1, 3, generator=generator, dtype=torch.float64)
    return TensorDict(
        {
            "state": state[:-1].float(),
            "precise": state[:-1],
            "action": torch.rand(length, 2, generator=generator).half(),
            "pixels": torch.randint(0, 40 * (number + 1), (length, 3, 6, 5), generator=generator).to(torch.uint8),
            "gripper": torch.rand(length, generator=generator) < 0.3,
            "constant": torch.full((length, 1), 4.5),
            "next": {"state": state[1:].float(), "done": done},
        },
        [length],
    )


def filled(count: int = 4, **kwargs: Any) -> TrajectoryReplayBuffer:
    settings: dict[str, Any] = {"max_trajectories": 3, "max_total_steps": 200, "batch_size": 16, **kwargs}
    if "sampler" not in settings:
        settings["chunk_size"] = 4
    rb = TrajectoryReplayBuffer(**settings)
    for number in range(count):
        rb.extend(episode(number, LENGTHS[number]))
    return rb


def live(numbers: Any, key: Any) -> np.ndarray:
    return torch.cat([episode(number, LENGTHS[number])[key] for number in numbers]).double().numpy()


def check(found: dict[str, torch.Tensor], values: np.ndarray) -> None:
    """Holds the statistics of a key against those of all its values."""
    expected = {
        "mean": values.mean(0),
        "std": values.std(0),
        "min": values.min(0),
        "max": values.max(0),
        "q01": np.quantile(values, 0.01, axis=0),
        "q99": np.quantile(values, 0.99, axis=0),
    }
    assert {*found} == {*expected, "count"}
    assert found["count"].tolist() == [len(values)]
    for name, value in expected.items():
        dtype = found[name].dtype
        torch.testing.assert_close(found[name], torch.from_numpy(np.asarray(value)).to(dtype), rtol=1e-6, atol=1e-7)


class TestStatistics:
    @pytest.mark.parametrize("compact", [False, True])
    def test_are_those_of_all_live_steps(self, compact: bool) -> None:
        rb = filled(compact=compact)
        keys: list[Any] = ["state", "precise", "action", "pixels", "gripper", "constant", ("next", "state")]
        statistics = buffer_statistics(rb, keys)
        assert [*statistics] == keys
        for key in keys:
            check(statistics[key], live([1, 2, 3], key))
        assert statistics["precise"]["mean"].dtype == torch.float64
        assert statistics["state"]["std"].dtype == statistics["pixels"]["q01"].dtype == torch.float32

    def test_change_with_what_the_buffer_holds(self) -> None:
        rb = filled(1)
        for number in range(1, 4):
            check(buffer_statistics(rb, "state")["state"], live(range(number), "state"))
            rb.extend(episode(number, LENGTHS[number]))
        check(buffer_statistics(rb, "state")["state"], live([1, 2, 3], "state"))

    def test_read_only_what_is_new(self) -> None:
        rb = filled()
        arena: Any = rb.storage.arena
        read: list[int] = []
        copy_steps = arena.copy_steps
        arena.copy_steps = lambda number, steps: (read.append(steps.size), copy_steps(number, steps))[1]
        for _ in range(2):
            buffer_statistics(rb, "state", quantiles=None)
        assert read == [90 + 11 + 40]
        rb.extend(episode(0, 5))
        buffer_statistics(rb, "state", quantiles=None)
        assert read[1:] == [5]

    def test_after_the_buffer_was_emptied_or_loaded(self, tmp_path: Path) -> None:
        rb = filled()
        buffer_statistics(rb, "state")
        rb.dumps(tmp_path)
        rb.empty()
        with pytest.raises(EmptyBufferError, match="without a trajectory"):
            buffer_statistics(rb, "state")
        rb.extend(episode(0, 5))
        check(buffer_statistics(rb, "state")["state"], live([0], "state"))
        rb.loads(tmp_path)
        check(buffer_statistics(rb, "state")["state"], live([1, 2, 3], "state"))

    def test_of_images_by_channel(self) -> None:
        rb = filled()
        found = buffer_statistics(rb, ["pixels"], per_channel=["pixels"], quantiles=(0.01, 0.5, 0.99))["pixels"]
        values = np.moveaxis(live([1, 2, 3], "pixels"), 1, -1).reshape(-1, 3)
        assert found["mean"].shape == (3, 1, 1)
        q50 = found.pop("q50")
        torch.testing.assert_close(q50.flatten().double(), torch.from_numpy(np.quantile(values, 0.5, axis=0)))
        assert found.pop("count").tolist() == [141]
        check(
            {**{name: value.flatten() for name, value in found.items()}, "count": torch.tensor([len(values)])}, values
        )
        assert buffer_statistics(rb, "pixels", per_channel={"pixels": -1})["pixels"]["mean"].shape == (1, 1, 5)

    def test_on_a_device(self) -> None:
        storage = TrajectoryStorage(3, 200, device=SimulatedDevice())  # type: ignore[arg-type]
        rb = filled(storage=storage, max_trajectories=None, max_total_steps=None)
        rb.storage.flush()
        check(buffer_statistics(rb, "state")["state"], live([1, 2, 3], "state"))
        storage.close()

    def test_of_all_keys_of_floats(self) -> None:
        assert [*buffer_statistics(filled())] == ["state", "precise", "action", "constant", ("next", "state")]

    def test_that_can_not_be(self) -> None:
        rb = filled()
        with pytest.raises(SchemaMismatchError, match="Got the key 'torque'"):
            buffer_statistics(rb, ["torque"])
        with pytest.raises(InvalidArgumentError, match=r"images are \[C, H, W\]"):
            buffer_statistics(rb, ["state"], per_channel=["state"])
        with pytest.raises(InvalidArgumentError, match="not one of the keys"):
            buffer_statistics(rb, ["state"], per_channel=["pixels"])
        with pytest.raises(InvalidArgumentError, match="quantiles must be"):
            buffer_statistics(rb, ["state"], quantiles=[1.5])
        with pytest.raises(InvalidArgumentError, match="buffer_statistics needs"):
            buffer_statistics(3, ["state"])


class TestNormalize:
    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            ("mean_std", lambda x, s: (x - s["mean"]) / s["std"]),
            ("min_max", lambda x, s: 2 * (x - s["min"]) / (s["max"] - s["min"]) - 1),
            ("quantiles", lambda x, s: 2 * (x - s["q01"]) / (s["q99"] - s["q01"]) - 1),
            ("identity", lambda x, s: x),
        ],
    )
    def test_and_back(self, mode: str, expected: Any) -> None:
        rb = filled()
        statistics = buffer_statistics(rb, ["state", "precise", "pixels"], per_channel=["pixels"])
        batch = rb.sample()
        normalize = Normalize(statistics, mode)
        normalized = normalize(batch.clone())
        for key in ("state", "precise", "pixels"):
            assert normalized[key].shape == batch[key].shape
            torch.testing.assert_close(normalized[key], expected(batch[key], statistics[key]), rtol=1e-3, atol=1e-3)
            back = normalize.unnormalize(normalized)[key]
            torch.testing.assert_close(back, batch[key].to(back.dtype), rtol=1e-4, atol=1e-3)
            one = normalize.unnormalize(normalized[key][0, 0], key)
            torch.testing.assert_close(one, back[0, 0])

    def test_of_a_batch_of_each_kind(self) -> None:
        rb = filled()
        normalize = Normalize(buffer_statistics(rb, ["state"]))
        samplers = [
            ChunkSampler(6, pad="both"),
            ChunkSampler(windows={"state": (-1, 0), "action": (0, 3)}, pad="both"),
        ]
        for sampler in samplers:
            rb.set_sampler(sampler)
            batch = normalize(rb.sample())
            assert batch["state"].abs().max() < 10
        batch = next(iter(OnlineDataset(rb, 4, 8, transform=normalize, seed=0)))
        assert batch["state"].abs().max() < 10

    def test_next_observations_go_by_the_statistics_of_observations(self) -> None:
        rb = filled(2, compact=True)
        rb.append_transform(Normalize(buffer_statistics(rb, ["state"])))
        batch = rb.sample()
        assert torch.equal(batch["state"][:, 1:], batch["next", "state"][:, :-1])

    def test_does_not_change_what_is_written(self) -> None:
        rb = filled(2)
        rb.append_transform(Normalize(buffer_statistics(rb, ["state"]), "min_max"))
        rb.extend(episode(2, 11))
        assert torch.equal(rb.storage[2]["state"], episode(2, 11)["state"])

    @pytest.mark.parametrize("mode", ["mean_std", "min_max", "quantiles"])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16])
    def test_of_any_dtype(self, mode: str, dtype: torch.dtype) -> None:
        data = episode(0, 40)
        data["action"] = (data["action"].float() * 3).to(dtype)
        data["constant"] = data["constant"].to(dtype)
        rb = TrajectoryReplayBuffer(max_trajectories=3, max_total_steps=200, chunk_size=4, batch_size=64)
        rb.extend(data)
        normalize = Normalize(buffer_statistics(rb, ["action", "constant"]), mode)
        batch = rb.sample()
        result = normalize(batch.clone())
        assert (result["constant"] == (0.0 if mode == "mean_std" else -1.0)).all()
        assert result["action"].dtype == (dtype if dtype.is_floating_point else torch.float32)
        back = normalize.unnormalize(result)
        for key in ("action", "constant"):
            torch.testing.assert_close(back[key].float(), batch[key].float(), rtol=1e-2, atol=1e-2)

    def test_constants_do_not_explode(self) -> None:
        rb = filled()
        statistics = buffer_statistics(rb, ["constant"])
        for mode in ("mean_std", "min_max", "quantiles"):
            normalize = Normalize(statistics, mode)
            normalized = normalize(rb.sample())["constant"]
            assert normalized.unique().tolist() in ([0.0], [-1.0])
            assert (normalize.unnormalize(normalized, "constant") == 4.5).all()

    def test_of_several_modes(self) -> None:
        rb = filled()
        normalize = Normalize(buffer_statistics(rb, ["state", "action"]), {"state": "mean_std", "action": "MIN_MAX"})
        batch = normalize(rb.sample())
        assert batch["action"].abs().max() <= 1.01
        assert repr(normalize) == "Normalize('state': mean_std, 'action': min_max)"

    def test_is_saved_with_the_buffer(self, tmp_path: Path) -> None:
        rb = filled()
        statistics = buffer_statistics(rb, ["state", "action"])
        rb.append_transform(Normalize(statistics, {"state": "min_max", "action": "mean_std"}))
        rb.dumps(tmp_path)
        for how in ("dumps", "state_dict", "pickle"):
            other = filled(0, transform=Normalize(), generator=torch.Generator())
            if how == "dumps":
                other.loads(tmp_path)
            elif how == "state_dict":
                other.load_state_dict(rb.state_dict())
            else:
                other = pickle.loads(pickle.dumps(rb))
                other.set_rng(torch.Generator())
            other._rng.manual_seed(1)
            rb.set_rng(torch.Generator().manual_seed(1))
            a, b = rb.sample(), other.sample()
            assert torch.equal(a["state"], b["state"])
            assert torch.equal(a["action"], b["action"])
            assert a["state"].abs().max() <= 1.001

    def test_is_refreshed(self) -> None:
        rb = filled(1)
        normalize = Normalize(buffer_statistics(rb, ["state"]))
        rb.append_transform(normalize)
        rb.extend(episode(1, 90))
        assert rb.sample()["state"].abs().max() > 100
        normalize.update(buffer_statistics(rb, ["state"]))
        assert rb.sample()["state"].abs().max() < 10

    def test_that_can_not_be(self) -> None:
        rb = filled()
        statistics = buffer_statistics(rb, ["state"], quantiles=None)
        with pytest.raises(InvalidArgumentError, match="it must be one of"):
            Normalize(statistics, "z_score")
        with pytest.raises(InvalidArgumentError, match=r"'quantiles' takes \['q01', 'q99'\]"):
            Normalize(statistics, "quantiles")
        with pytest.raises(InvalidArgumentError, match=r"but not of \('action',\)"):
            Normalize(statistics, keys=["action"])
        with pytest.raises(InvalidArgumentError, match="has no statistics yet"):
            Normalize()(rb.sample())
        with pytest.raises(SchemaMismatchError, match=r"without a tensor at \('state',\)"):
            Normalize(statistics)(rb.sample().exclude("state"))
        with pytest.raises(InvalidArgumentError, match="Give the key"):
            Normalize(statistics).unnormalize(torch.zeros(3))


def test_statistics_while_others_write() -> None:
    rb = make_buffer([make_trajectory(0, 20)], max_trajectories=2)
    for number in range(30):
        rb.extend(make_trajectory(number, 20))
        found = buffer_statistics(rb, "label")["label"]
        assert found["max"][0] == number
        assert found["count"].item() == 20 * len(rb)
