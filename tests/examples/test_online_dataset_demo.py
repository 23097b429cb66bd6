"""Runs the demo of datasets over a live engine as a user would, in short form."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE_WITH_SCRIPTS

DEMO = Path(__file__).parents[2] / "examples" / "agents" / "datasets" / "online_dataset_demo.py"


@pytest.mark.slow
def test_demo_draws_in_every_way() -> None:
    pytest.importorskip("gymnasium_robotics", reason="needs the extra [robotics]")
    arguments = ["--seconds", "0.3", "--num-workers", "1", "--buffer-size", "4"]
    arguments += ["--num-loader-workers", "1"]
    done = subprocess.run(
        [sys.executable, DEMO, *arguments], capture_output=True, text=True, timeout=PATIENCE_WITH_SCRIPTS
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"next\.observation +\[32, 16, 10\] +torch\.float64", done.stdout)
    assert len(re.findall(r"\d batches/s", done.stdout)) == 4
    assert re.search(r"items \[16\] +\[32, 16\] +L = 16 ", done.stdout)
    assert re.search(r"batches \[32, 8 to 32\] +\[32, \d+\] +L = \d+", done.stdout)
    assert re.search(r"[1-9][\d,]* episodes written", done.stdout)
    assert "Traceback" not in done.stderr
