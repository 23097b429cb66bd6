"""The demo of datasets over a live engine as a user runs it, but short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from example_process import EXAMPLES
from scripts import run_script


@pytest.mark.slow
def test_demo_samples_in_every_way(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium_robotics", reason="needs the extra [robotics]")
    arguments = ["--seconds", "0.3", "--num-workers", "1", "--buffer-size", "4"]
    arguments += ["--num-loader-workers", "1"]
    done = run_script(EXAMPLES / "agents/datasets/online_dataset_demo.py", *arguments, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"next\.observation +\[32, 16, 10\] +torch\.float64", done.stdout)
    assert len(re.findall(r"\d batches/s", done.stdout)) == 4
    assert re.search(r"items \[16\] +\[32, 16\] +L = 16 ", done.stdout)
    assert re.search(r"batches \[32, 8 to 32\] +\[32, \d+\] +L = \d+", done.stdout)
    assert re.search(r"[1-9][\d,]* episodes written", done.stdout)
    assert "Traceback" not in done.stderr
