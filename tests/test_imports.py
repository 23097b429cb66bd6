"""What can be imported from where, and what is loaded by it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from public_surface import MODULES as PUBLIC


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_there(module: str) -> None:
    imported = importlib.import_module(module)
    assert imported.__all__
    for name in imported.__all__:
        assert name in dir(imported)
        assert getattr(imported, name) is not None


def test_a_public_name_is_one_thing_wherever_it_is_imported_from() -> None:
    top = importlib.import_module("embodichain_rl")
    for room in PUBLIC[1:]:
        imported = importlib.import_module(room)
        for name in set(imported.__all__) & set(top.__all__):
            assert getattr(imported, name) is getattr(top, name), f"{name} of {room}"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(ImportError, match="NoSuchThing"):
        from embodichain_rl import NoSuchThing  # noqa: F401


def loaded_by(*statements: str) -> list[set[str]]:
    """Return the modules that a new interpreter has loaded after each of the statements."""
    code = "import sys\n" + "".join(f"{statement}\nprint(*sys.modules)\n" for statement in statements)
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return [set(line.split()) for line in output.splitlines()]


def test_nothing_heavy_is_loaded_before_it_is_used() -> None:
    for package in ("embodichain_rl", "embodichain_rl.replay", "embodichain_rl.datasets", "embodichain_rl.engine"):
        (loaded,) = loaded_by(f"import {package}")
        assert not {"torch", "numpy", "tensordict", "torchrl", "gymnasium"} & loaded


def test_other_libraries_are_loaded_by_what_needs_them_only() -> None:
    interop, live = loaded_by(
        "import embodichain_rl.interop", "from embodichain_rl.interop.lerobot import as_lerobot, LeRobotRecorder, load"
    )
    assert not {"torch", "lerobot", "minari", "pyarrow"} & interop
    assert not {"lerobot", "minari", "pyarrow", "pandas", "av"} & live


def test_datasets_load_no_torchrl_and_the_engine_loads_no_simulator() -> None:
    datasets, torchrl, engine = loaded_by(
        "from embodichain_rl.datasets import OnlineDataset",
        "import torchrl.data",
        "from embodichain_rl.engine import OnlineDataEngine, OnlineDataEngineCfg",
    )
    assert "embodichain_rl.datasets.online_data" in datasets
    assert not {"gymnasium", "gym", "torchrl"} & datasets
    assert "embodichain_rl.engine.data" in engine
    # TorchRL loads MuJoCo's bindings, where they are installed, with its replay buffers.
    simulators = {"mujoco", "gymnasium_robotics", "gymnasium.envs.mujoco", "pygame", "OpenGL"}
    assert not simulators & (engine - torchrl)


def test_nothing_that_watches_is_loaded_unless_it_is_asked_for() -> None:
    torchrl, buffer, engine, monitor = loaded_by(
        "import torchrl.data, torchrl.envs, torchrl.collectors",
        "import torch, embodichain_rl\n"
        "from tensordict import TensorDict\n"
        "rb = embodichain_rl.TrajectoryReplayBuffer("
        "max_trajectories=4, max_total_steps=100, chunk_size=4, batch_size=2)\n"
        "done = (torch.arange(10) == 9).unsqueeze(1)\n"
        "steps = lambda: TensorDict({'action': torch.ones(10, 1), 'next': {'done': done}}, [10])\n"
        "rb.extend(steps()), rb.sample(), rb.stats()",
        "cfg = embodichain_rl.OnlineDataEngineCfg("
        "buffer_size=2, max_episode_steps=10, producers=[(steps() for _ in range(4))])\n"
        "with embodichain_rl.OnlineDataEngine(cfg) as engine: engine.sample_batch(2, 4), engine.stats()",
        "import embodichain_rl.monitor",
    )
    watching = {"rich", "nicegui", "fastapi", "uvicorn", "prometheus_client", "rerun", "matplotlib", "PIL", "av"}
    for loaded in (buffer, engine, monitor):
        assert not watching & (loaded - torchrl)
    for loaded in (buffer, engine):
        assert not {name for name in loaded if name.startswith("embodichain_rl.monitor")}
    assert "embodichain_rl.monitor" in monitor
