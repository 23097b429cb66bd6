"""``benchmarks/on_cuda.py``, ``cuda_gathers.py`` and their pendulums, as far as they run without a CUDA device."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import gymnasium
import numpy as np
import pytest
import torch
from scripts import run_script
from torchrl.envs.utils import check_env_specs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def pendulum(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import _pendulum

    return _pendulum


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, and the benchmark takes minutes")
@pytest.mark.parametrize("script", ["on_cuda.py", "cuda_gathers.py"])
def test_without_cuda_it_says_so_and_ends(tmp_path: Path, script: str) -> None:
    done = run_script(BENCHMARKS / script, "--out", str(tmp_path / "results.json"), directory=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Nothing is measured: this torch"), done.stderr
    assert "sees no CUDA device" in done.stderr
    assert not (tmp_path / "results.json").exists()


def test_all_gathers_return_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import cuda_gathers
    from sampling import Case, make_trajectory

    from embodichain_rl import TrajectoryReplayBuffer

    case = Case("3 cameras", 3, 20, 5, 4)
    rb = TrajectoryReplayBuffer(max_trajectories=3, max_total_steps=60, chunk_size=4, batch_size=5)
    for number in range(3):
        rb.extend(make_trajectory(case, number))
    arena, starts = rb.storage.arena, torch.tensor([0, 56, 17, 3, 17])
    expected = arena.copy_chunks(starts.numpy(), 4)
    for gather in (cuda_gathers.gather_by_key, cuda_gathers.gather_by_index):
        cuda_gathers.assert_same(expected, gather(arena.columns, 4)(starts), gather.__name__)
        with pytest.raises(AssertionError, match="returns other chunks"):
            cuda_gathers.assert_same(expected, gather(arena.columns, 4)(starts + 1), gather.__name__)


def test_what_is_captured_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import cuda_gathers
    from sampling import Case, make_trajectory

    torch.manual_seed(0)
    batch = make_trajectory(Case("states", 1, 30, 1, 1), 0)
    learner = cuda_gathers.Learner(batch)
    learner.take(batch.clone().set("action", torch.ones(30, 6)))
    learner.step()
    first = float(learner.loss)
    assert 0.8 < first < 1.2  # which is that of the batch that was taken
    for _ in range(50):
        learner.step()
    assert float(learner.loss) < first / 2


def test_its_parts_run_on_a_simulated_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import on_cuda
    from simulated_device import SimulatedDevice

    device = SimulatedDevice()
    monkeypatch.setattr(on_cuda, "DEVICE", device)
    monkeypatch.setattr(on_cuda, "synchronize", lambda: None)
    monkeypatch.setattr(on_cuda, "CALLS", 2)
    small = on_cuda.Case("states", 4, 30, 4, 8)
    results = on_cuda.measure_sampling(small, 0.0)
    assert {result["contestant"] for result in results} == {on_cuda.OURS, on_cuda.THEIRS, on_cuda.COPY}
    assert len(on_cuda.measure_uploading(on_cuda.Case("images", 2, 50, 4, 8), 1)) == 2
    device.direct = True
    rates = [result["steps_per_second"] for result in on_cuda.measure_collecting(0.0, 8, steps=250)]
    assert all(rate > 0 for rate in rates)


class TestPendulum:
    def test_does_what_gymnasiums_does(self, pendulum: ModuleType) -> None:
        ours = pendulum.BatchedPendulum(3, seed=1)
        state = ours.reset()
        theirs = [gymnasium.make("Pendulum-v1").unwrapped for _ in range(3)]
        for env, angle, speed in zip(theirs, ours.angle.tolist(), ours.speed.tolist(), strict=True):
            env.reset()
            env.state = np.array([*angle, *speed])
        for _ in range(30):
            state["action"] = torch.rand(3, 1) * 5 - 2.5
            following = ours.step(state.clone())["next"]
            for row, env in enumerate(theirs):
                observation, reward, *_ = env.step(state["action"][row].numpy())
                np.testing.assert_allclose(following["observation"][row].numpy(), observation, rtol=0, atol=1e-3)
                np.testing.assert_allclose(following["reward"][row].item(), reward, rtol=0, atol=1e-3)

    def test_keeps_to_its_specs(self, pendulum: ModuleType) -> None:
        check_env_specs(pendulum.BatchedPendulum(4, max_steps=3))

    def test_its_episodes_end_one_after_the_other(self, pendulum: ModuleType) -> None:
        env = pendulum.BatchedPendulum(10, max_steps=5)
        done = env.rollout(20, break_when_any_done=False)["next", "done"][..., 0]
        assert done.sum(1).tolist() == [4] * 10
        assert (done.sum(0) == 2).all()
