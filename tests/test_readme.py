"""The README's snippets run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE_WITH_SCRIPTS

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number: int, tmp_path: Path) -> None:
    snippet = SNIPPETS[number]
    if "gymnasium_robotics" in snippet:
        pytest.importorskip("gymnasium_robotics", reason="needs the extra [robotics]")
    script = tmp_path / "snippet.py"
    script.write_text(snippet)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=PATIENCE_WITH_SCRIPTS)
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"print\(.*?\)  # (torch\.Size\(\[[\d, ]+\]\))$", snippet, re.MULTILINE)
    for shape in promised:
        assert shape in done.stdout


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 4
