"""The code examples of the README and of the documentation run, and print what their comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import run_script

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SNIPPETS = {
    f"{page.stem}-{number}": snippet
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name: str, tmp_path: Path) -> None:
    snippet = SNIPPETS[name]
    if "gymnasium_robotics" in snippet:
        pytest.importorskip("gymnasium_robotics", reason="needs the extra [robotics]")
    if "interop.lerobot" in snippet:
        pytest.importorskip("pyarrow", reason="needs the extra [lerobot]")
    script = tmp_path / "snippet.py"
    script.write_text(f"import os\n\nos.chdir({str(tmp_path)!r})\n{snippet}")  # some write files
    done = run_script(script, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = re.findall(r"print\(.*?\)  # (torch\.Size\(\[[\d, ]+\]\)|\d+|True)$", snippet, re.MULTILINE)
    for output in expected:
        assert output in done.stdout


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 4
