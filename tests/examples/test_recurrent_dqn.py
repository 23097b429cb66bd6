"""The recurrent DQN as a user runs it, but short."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from example_process import running

pytest.importorskip("matplotlib", reason="needs the extra [examples]")


@pytest.mark.slow
def test_recurrent_dqn_trains_until_ctrl_c(tmp_path: Path) -> None:
    arguments = ["--num-workers", "1", "--evaluate-every", "20", "--evaluation-episodes", "5", "--out", str(tmp_path)]
    with running("rl/recurrent_dqn.py", *arguments, directory=tmp_path) as example:
        example.wait_for_output("40 updates and")  # of the second evaluation
        os.killpg(example.process.pid, signal.SIGINT)  # as a terminal does: to all processes at once
        assert example.wait_for_exit() == 0, example.stderr
    assert "Stopped by Ctrl-C." in example.stdout
    assert re.search(r"Not solved: \d+ of 500 steps after \d+ s, [\d,]+ updates", example.stdout)
    exploration = [float(part) for part in re.findall(r"random (\d\.\d+)", example.stderr)]
    assert exploration[-1] < 1.0
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert "Traceback" not in example.stderr
