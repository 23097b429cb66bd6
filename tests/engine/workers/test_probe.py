"""Probes of environments, each in a real process.

It is forked from the server that has all imports loaded, except where a test is about the default, ``"spawn"``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from demo_envs import ActionListReach
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, GymWrapper
from waiting import PATIENCE, wait_for_children, wait_until

from embodichain_rl import OnlineDataEngineCfg, TrajectoryStorage, TrajectoryWriter
from embodichain_rl.engine.demonstrations import DemonstrationRollout
from embodichain_rl.engine.environments import EnvMaker
from embodichain_rl.engine.processes import pack_exception, unpack_exception
from embodichain_rl.engine.workers import EnvProbe, planning, probe_env
from embodichain_rl.errors import ConfigError, EnvProbeError, EnvProbeTimeoutError, InvalidArgumentError, RemoteError
from embodichain_rl.shared import process_start

pytestmark = pytest.mark.slow

REACH = "demo_envs:ActionListReach-v0"


@pytest.fixture(autouse=True)
def _leaves_no_process() -> Any:
    yield
    wait_for_children()


def probe(env_maker: Callable[[], EnvBase], **settings: Any) -> EnvProbe:
    return probe_env(env_maker, **{"timeout": PATIENCE, "start_method": "forkserver", **settings})


def layout(steps: Any) -> dict:
    return {key: (value.dtype, value.shape[steps.ndim :]) for key, value in steps.items(True, True)}


def with_confidence(observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return observation[..., :2].clamp(-1, 1), observation[..., 2:].double()


def test_the_example_is_what_a_collector_writes_to_a_buffer() -> None:
    maker = EnvMaker({"id": REACH, "num_envs": 2}, max_episode_steps=5)
    policy = TensorDictModule(with_confidence, in_keys=["observation"], out_keys=["action", "confidence"])
    found = probe_env(maker, policy=policy, timeout=PATIENCE)

    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
    collector = Collector(
        maker,
        policy,
        frames_per_batch=20,
        total_frames=20,
        replay_buffer=buffer,
        trajs_per_batch=1,
        auto_register_policy_transforms=False,
    )
    for _ in collector:
        pass
    collector.shutdown()
    written = buffer[:].exclude("index")
    assert layout(found.example) == layout(written)
    assert ("collector", "traj_ids") in found.example.keys(True, True)
    assert found.example.batch_size == ()
    assert not any(value.any() for value in found.example.values(True, True))
    assert found.batch_size == (2,)
    assert found.observation_spec["observation"].shape == (2, 4)
    assert found.action_spec["action"].shape == (2, 2)
    assert found.reports_success
    assert 0 < found.seconds < PATIENCE


def test_the_example_of_demonstrations() -> None:
    maker = EnvMaker({"id": REACH, "num_envs": 2}, max_episode_steps=30)
    found = probe(maker, policy="demo")
    assert layout(found.example) == layout(next(DemonstrationRollout(maker.each())))
    assert found.batch_size == ()


class UnsolvableError(Exception):
    def __init__(self, joint: str, angle: float) -> None:
        super().__init__(f"{joint} is at {angle}")


def test_an_error_arrives_with_its_traceback() -> None:
    def make_broken_simulator() -> EnvBase:
        raise OSError(5, "no GPU found")

    with pytest.raises(
        EnvProbeError, match=r"make_broken_simulator: building the environment failed with OSError"
    ) as caught:
        probe(make_broken_simulator)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == 5
    (note,) = caught.value.__notes__
    assert "The traceback in the probe's process" in note
    assert "in make_broken_simulator" in note


def test_an_error_of_the_policy_is_told_apart() -> None:
    def wrong(observation: torch.Tensor) -> torch.Tensor:
        return observation

    with pytest.raises(
        EnvProbeError, match=r"ActionListReach-v0: acting in the environment failed with ActionMismatch"
    ):
        probe(EnvMaker({"id": REACH}), policy_factory=lambda: wrong)


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(EnvProbeError, match=r"exit code -9 while building the environment"):
        probe(lambda: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[arg-type, return-value]


@pytest.mark.slow
def test_a_hang_is_a_timeout_and_leaves_nothing(tmp_path: Path) -> None:
    started = tmp_path / "pid"

    def hang() -> EnvBase:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        simulator = subprocess.Popen(["sleep", "3600"])
        started.write_text(str(simulator.pid))
        simulator.wait()
        raise AssertionError

    for timeout in (2.0, 8.0, 32.0, 128.0):  # the shortest in which the process gets that far on this machine
        begin = time.monotonic()
        with pytest.raises(EnvProbeTimeoutError, match=f"{timeout:g} s after the start of the probe") as caught:
            probe(hang, timeout=timeout)
        assert time.monotonic() - begin < timeout + PATIENCE  # rather than an hour
        if started.exists():
            break
    assert isinstance(caught.value, TimeoutError)
    assert "building the environment was not done" in str(caught.value)
    wait_until_gone(int(started.read_text()))


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: process_start(pid) < 0, f"the end of process {pid}")


def _probe_for_ever(pid_file: Path) -> None:
    def hang() -> EnvBase:
        pid_file.write_text(str(os.getpid()))
        time.sleep(3600)
        raise AssertionError

    probe_env(hang, timeout=3600)


@pytest.mark.slow
def test_the_process_ends_with_its_owner(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    owner = multiprocessing.get_context("forkserver").Process(target=_probe_for_ever, args=(pid_file,))
    owner.start()
    try:
        wait_until(lambda: not owner.is_alive() or (pid_file.exists() and pid_file.read_text()), "the probe's process")
        assert owner.is_alive()
    finally:
        owner.kill()
        owner.join()
    wait_until_gone(int(pid_file.read_text()))


class Speaking(ActionListReach):
    """Observes a mission besides; what it is is up to the one who makes it."""

    observation_space = gymnasium.spaces.Dict(
        {"observation": ActionListReach.observation_space, "mission": gymnasium.spaces.Text(20)}
    )

    def __init__(self, mission: Any) -> None:
        super().__init__()
        self._mission = mission

    def reset(self, **kwargs: Any) -> tuple:
        observation, info = super().reset(**kwargs)
        return {"observation": observation.copy(), "mission": self._mission}, info

    def step(self, action: Any) -> tuple:
        observation, *rest = super().step(action)
        return {"observation": observation.copy(), "mission": self._mission}, *rest


def test_text_is_empty_in_the_example() -> None:
    example = probe(lambda: GymWrapper(Speaking("reach"))).example
    assert example["mission"] == example["next", "mission"] == ""
    assert not example["observation"].any()


def test_the_text_of_segments_is_that_of_demonstrations() -> None:
    maker = EnvMaker({"id": "demo_envs:SegmentReach-v0"})
    storage = TrajectoryStorage(2, 200)
    storage.allocate(probe(maker, policy="demo").example)
    writer = TrajectoryWriter()
    writer.register_storage(storage)
    writer.extend(next(DemonstrationRollout(maker.each())))
    assert storage.schema.text_keys == [("segment_name",), ("instruction",)]
    assert set(storage.texts.resolve(storage[0]["instruction"])) == {"Go below the goal.", "Rise to the goal."}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (ActionListReach, "writes 'observation' of every step into the same memory"),
        (lambda: Speaking(["reach"]), "'mission'.*neither tensors of fixed shape nor text"),
    ],
)
def test_what_can_not_be_stored_is_refused(environment: Any, message: str) -> None:
    with pytest.raises(EnvProbeError, match=message):
        probe(lambda: GymWrapper(environment()))


def test_an_engine_probes_with_the_start_method_of_multiprocessing(tmp_path: Path) -> None:
    def make_env() -> EnvBase:
        (tmp_path / "parent").write_text(str(os.getppid()))
        return GymWrapper(gymnasium.make("Pendulum-v1"))

    cfg = OnlineDataEngineCfg(buffer_size=2, env_factory=make_env)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        planning.probe_for(cfg, PATIENCE)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert int((tmp_path / "parent").read_text()) != os.getpid(), "it was spawned by this process"


def test_arguments_are_checked_before_a_process_starts() -> None:
    with pytest.raises(InvalidArgumentError, match="timeout"):
        probe_env(EnvMaker({"id": REACH}), timeout=-1.0)
    with pytest.raises(ConfigError, match="got both"):
        probe_env(EnvMaker({"id": REACH}), policy="demo", policy_factory=lambda: None)


class TestExceptionsAcrossProcesses:
    def test_an_exception_keeps_its_type_and_gets_a_note(self) -> None:
        try:
            int("seven")
        except ValueError as error:
            restored = unpack_exception(pack_exception(error), where="worker 3")
        assert type(restored) is ValueError
        assert restored.__notes__[0].startswith("The traceback in worker 3:\nTraceback (most recent call last)")
        assert 'int("seven")' in restored.__notes__[0]

    def test_one_of_a_module_that_can_not_be_imported_here_keeps_its_message(self, tmp_path: Path) -> None:
        script = (
            "import sys; from embodichain_rl.engine.processes import pack_exception; import this_one\n"
            "sys.stdout.buffer.write(pack_exception(this_one.ItsError('elbow')))"
        )
        (tmp_path / "this_one.py").write_text("class ItsError(Exception): pass\n")
        packed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, check=True).stdout
        restored = unpack_exception(packed, where="worker 3")
        assert type(restored) is RemoteError
        assert str(restored) == "ItsError: elbow"

    @pytest.mark.parametrize(("module", "name"), [("os", "system"), ("subprocess", "Popen"), ("builtins", "eval")])
    def test_only_exceptions_are_made(self, tmp_path: Path, module: str, name: str) -> None:
        hostile = {"module": module, "name": name, "args": [f"touch {tmp_path}/made"], "message": "", "traceback": ""}
        assert type(unpack_exception(json.dumps(hostile).encode(), where="worker 3")) is RemoteError
        assert not (tmp_path / "made").exists()

    def test_one_that_can_not_be_made_anew_keeps_its_message(self) -> None:
        restored = unpack_exception(pack_exception(UnsolvableError("elbow", 1.5)), where="worker 3")
        assert type(restored) is RemoteError
        assert str(restored) == "UnsolvableError: elbow is at 1.5"
