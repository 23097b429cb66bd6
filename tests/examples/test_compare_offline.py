"""The comparison of a stream with fixed datasets as a user runs it, but short."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from example_process import EXAMPLES
from scripts import run_script

pytest.importorskip("gymnasium_robotics", reason="needs the extra [robotics]")


@pytest.mark.slow
def test_comparison_trains_on_all_datasets_and_draws(tmp_path: Path) -> None:
    arguments = ["--seeds", "3", "--fixed", "2", "4", "--buffer-size", "4", "--updates", "20", "--evaluate-every", "10"]
    arguments += ["--evaluation-episodes", "1", "--num-workers", "1", "--batch-size", "32", "--out", str(tmp_path)]
    done = run_script(EXAMPLES / "training/compare_offline.py", *arguments, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| trained on \| episodes \| 10 \| 20 \|\n", done.stdout)
    assert re.search(r"\| 4 episodes \| 4 \| \d+% \| \d+% \|\n", done.stdout)
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert [curve["data"] for curve in curves] == ["2 episodes", "4 episodes", "stream"]
    assert all(curve["updates"] == [10, 20] and curve["seed"] == 3 for curve in curves)
    assert curves[-1]["episodes"][-1] >= 4
    assert (tmp_path / "comparison.png").stat().st_size > 20_000
