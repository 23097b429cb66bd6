"""`--help` of every example lists its options."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from example_process import EXAMPLES

# Those of frameworks/ import large libraries, and test_frameworks.py runs them.
SCRIPTS = sorted(
    path for path in EXAMPLES.rglob("*.py") if "tyro.cli(" in path.read_text() and path.parent.name != "frameworks"
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_lists_the_options(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ("gymnasium_robotics", "mujoco", "matplotlib"):
        pytest.importorskip(extra, reason="needs the extras [robotics] and [examples]")
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    monkeypatch.syspath_prepend(script.parent)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--num-workers" in text or "--env" in text
    assert "usage:" in text


def test_there_are_examples() -> None:
    assert len(SCRIPTS) >= 7
