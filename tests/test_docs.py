"""The documents agree with the repository: links, the list of files, and the figure of the rooms."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {
    ROOT / "docs" / "changelog.md": ROOT / "CHANGELOG.md",
    ROOT / "docs" / "contributing.md": ROOT / "CONTRIBUTING.md",
}
"""Pages of the site that are made from other files; see ``docs/_site/hooks.py``."""
PACKAGE = ROOT / "embodichain_rl"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", document.read_text())
    for path, anchor in links:
        target = (document.parent / path).resolve() if path else document
        target = GENERATED.get(target, target)
        assert target.exists(), path
        if anchor:
            assert anchor in _anchors(target), f"{path}#{anchor}"


DRAWN_AS_ONE = {
    "_checks": "errors",
    "_compiling": "errors",
    "_progress": "errors",
    "_start_method": "errors",
    "engine": "data",
    "saving": "data",
    "checkpoint": "data",
    "progress": "data",
    "config_files": "config",
    "remote": "config",
}
DRAWN_AS_ONE |= dict.fromkeys(
    (
        "keeping",
        "limits",
        "parts",
        "placement",
        "querying",
        "torchrl_arguments",
    ),
    "buffer",
)
"""Modules that the figure shows in the box of another one."""


def _anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_design_lists_every_file_of_the_package() -> None:
    tree = re.search(r"### Files\n\n```\n(.*?)```", (ROOT / "docs/design.md").read_text(), re.DOTALL)
    assert tree is not None
    listed, folders = set(), [""]
    for line in filter(None, tree[1].splitlines()[1:]):
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [folders[depth - 1] + name]
        if not name.endswith("/"):
            listed.add(folders[depth])
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert listed == files


def test_the_figure_of_the_rooms_shows_all_imports_between_them() -> None:
    drawn = set(re.findall(r"^  (\w+) -> (\w+)$", (ROOT / "docs/figures/layers.dot").read_text(), re.MULTILINE))
    imports = _imports_between_rooms()
    assert drawn <= imports
    assert _reachable(drawn) == _reachable(imports)


def _imports_between_rooms() -> set[tuple[str, str]]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        names = re.findall(r"^\s*from embodichain_rl\.([\w.]+) import", path.read_text(), re.MULTILINE)
        room = _room(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        found |= {(room, _room(name)) for name in names}
    return {
        (importer, imported) for importer, imported in found if importer != imported and "" not in (importer, imported)
    }


def _room(module: str) -> str:
    """Return the name of a module's room in the figure, "" for the names that a package exports."""
    parts = module.removeprefix("replay.").removeprefix("engine.").split(".")
    name = "" if parts[0] in ("replay", "__init__") else parts[0]
    return DRAWN_AS_ONE.get(name, name)


def _reachable(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    reached = set(edges)
    while more := {(a, d) for (a, b), (c, d) in product(reached, repeat=2) if b == c} - reached:
        reached |= more
    return reached
