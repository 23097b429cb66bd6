"""The documentation site: it is built without a warning, and its reference has every public name."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
from pathlib import Path

import pytest
from public_surface import MODULES

ROOT = Path(__file__).parents[1]


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra [docs]")
    pytest.importorskip("material", reason="needs the extra [docs]")
    pytest.importorskip("mkdocstrings_handlers.python", reason="needs the extra [docs]")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    warnings: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    collect = Collect(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(collect)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=False)
        with contextlib.redirect_stderr(io.StringIO()):  # announcements of the theme
            build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(collect)
    assert not warnings, "\n".join(warnings)
    page = (tmp_path / "site" / "reference" / "replay.html").read_text()
    assert 'id="embodichain_rl.TrajectoryReplayBuffer.sample"' in page
    assert "Return" in page
    source = (tmp_path / "site" / "source" / "examples" / "training" / "preemptible.py.html").read_text()
    assert "def main" in re.sub(r"<[^>]*>", "", source)


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    paths = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    described = [_resolve(path) for path in paths if path not in MODULES]
    missing = []
    for path in (path for path in MODULES if path not in paths):  # a page shows all of a module, or some names of it
        module = importlib.import_module(path)
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and not any(value is other for other in described):
                missing.append(f"{path}.{name}")
    assert not missing, f"no page of docs/reference has {missing}: add a line `::: {missing[0]}` there"


def _resolve(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
