"""The training of pick and place as a user runs it, but short; and its expert."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from example_process import EXAMPLES, running
from scripts import run_script

from embodichain_rl.engine.demonstrations import DemonstrationRollout
from embodichain_rl.engine.environments import EnvMaker

pytest.importorskip("gymnasium_robotics", reason="needs the extra [robotics]")

FOLDER = EXAMPLES / "training"
SHORT = ["--num-workers", "1", "--buffer-size", "8", "--batch-size", "32"]
SHORT += ["--evaluation-episodes", "3", "--evaluation-pause", "1"]


def test_expert_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    env = EnvMaker({"id": "expert_env:PickAndPlaceExpert-v0", "kwargs": {"noise": 0.2}}, max_episode_steps=50)()
    env.set_seed(0)
    demonstrations = DemonstrationRollout([env])
    for _ in range(12):
        steps = next(demonstrations)
        assert [segment.name for segment in demonstrations.segments] == ["approach", "descend", "grip", "carry"]
        assert steps["segment_id"].diff().min() == 0
        assert steps["action"].abs().max() == 1.0, "the recorded actions are the expert's, without the noise"
    env.close()
    assert demonstrations.num_rejected == demonstrations.num_failed == 0


@pytest.mark.slow
def test_training_learns_and_draws(tmp_path: Path) -> None:
    arguments = [*SHORT, "--seconds", "3600", "--target-success", "0", "--out", str(tmp_path)]
    done = run_script(FOLDER / "pick_and_place.py", *arguments, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", done.stderr)]
    assert losses[-1] < 0.9 * losses[0]
    assert re.search(r"target of 0% reached twice in a row", done.stdout)
    assert (tmp_path / "training.png").stat().st_size > 20_000
    assert (tmp_path / "episode.png").exists() or "rendering failed" in done.stdout


@pytest.mark.slow
def test_ctrl_c_ends_with_a_summary(tmp_path: Path) -> None:
    arguments = [*SHORT, "--policy", "act", "--target-success", "2", "--out", str(tmp_path)]
    with running("training/pick_and_place.py", *arguments, directory=tmp_path) as example:
        example.wait_for_output("loss")
        os.killpg(example.process.pid, signal.SIGINT)  # the terminal sends it to all of its foreground processes
        assert example.wait_for_exit() == 0, example.stderr
    assert "Stopped by Ctrl-C." in example.stdout
    assert "not reached" in example.stdout
    assert (tmp_path / "training.png").exists()
    assert "Traceback" not in example.stderr
