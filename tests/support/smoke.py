"""What a fresh installation must do. Runs as a script in an environment that has nothing but the wheel.

``make dist`` runs it for the wheel and for the source distribution, each installed in an environment of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import pickle
import sys
import tempfile
from pathlib import Path


def make_steps(length: int):
    import torch
    from tensordict import TensorDict

    done = (torch.arange(length) == length - 1).unsqueeze(1)
    steps = TensorDict({"observation": torch.arange(length).float().unsqueeze(1), "next": {"done": done}}, [length])
    steps["instruction"] = ["reach"] * length
    return steps


def main() -> None:
    package = importlib.resources.files("embodichain_rl")
    assert (package / "py.typed").is_file()
    assert Path(str(package)).is_relative_to(sys.prefix), f"{package} is not the installed one"

    import embodichain_rl

    assert embodichain_rl.__version__ == importlib.metadata.version("embodichain-rl") != "0+unknown"
    for name in embodichain_rl.__all__:
        assert getattr(embodichain_rl, name) is not None, name

    from torch.utils.data import DataLoader

    from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg, OnlineDataset, TrajectoryReplayBuffer
    from embodichain_rl.replay.kernels import kernels

    assert kernels().is_compiled, "the wheel was built without a C compiler"

    rb = TrajectoryReplayBuffer(max_trajectories=8, max_total_steps=800, chunk_size=16, batch_size=4)
    for length in (20, 50, 100):
        rb.extend(make_steps(length))
    batch = rb.sample()
    assert batch.shape == (4, 16)
    assert (batch["observation"].diff(dim=1) == 1).all()
    assert rb.texts.resolve(batch["instruction"][0, :1]) == ["reach"]
    assert len(pickle.loads(pickle.dumps(rb))) == 3
    loader = DataLoader(OnlineDataset(rb, chunk_size=16, batch_size=4), batch_size=None, num_workers=2)
    assert next(iter(loader)).shape == (4, 16)

    with tempfile.TemporaryDirectory() as folder:
        limits = {"max_trajectories": 8, "max_total_steps": 800, "chunk_size": 4}
        TrajectoryReplayBuffer(path=f"{folder}/b", **limits).extend(make_steps(9))
        assert len(TrajectoryReplayBuffer.open(f"{folder}/b")) == 1

    cfg = OnlineDataEngineCfg(
        buffer_size=2, max_episode_steps=50, gym_config={"id": "CartPole-v1"}, progress_bar=False, refill_threshold=None
    )
    with OnlineDataEngine(cfg) as engine:
        assert engine.sample_batch(4, 2).shape == (4, 2)
    print(f"embodichain-rl {embodichain_rl.__version__}: the installation works")


if __name__ == "__main__":
    main()
