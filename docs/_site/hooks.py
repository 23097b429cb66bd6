"""Pages of the site that are made from files of the repository: scripts that pages link to, changes, contributing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(((?:\.\./)+)([\w/.-]+)\)")
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file outside ``docs`` that a page links to."""
    for page, source in PAGES.items():
        text = re.sub(r"\]\((?:docs/)([\w/.-]+)", r"](\1", (ROOT / source).read_text())
        files.append(File.generated(config, page, content=re.sub(r"\]\((?=[A-Z])", "](../", text)))
    linked = set()
    for file in files.documentation_pages():
        linked |= {match[2] for match in LINK.finditer(file.content_string) if _leads_out(file, match)}
    linked -= {*PAGES.values(), "README.md"}
    for path in sorted(linked):
        files.append(File.generated(config, _page_of(path), content=_content_of(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links to files of the repository lead to their pages."""
    pages = {source: page for page, source in PAGES.items()} | {"README.md": "index.md"}

    def link(match: re.Match[str]) -> str:
        if not _leads_out(page.file, match):
            return match[0]
        return f"]({match[1].removeprefix('../')}{pages.get(match[2]) or _page_of(match[2])})"

    return LINK.sub(link, markdown)


def _leads_out(file: File, match: re.Match[str]) -> bool:
    return match[1].count("../") > file.src_uri.count("/")


def _page_of(path: str) -> str:
    return f"source/{path}.md"


def _content_of(path: str) -> str:
    source = ROOT / path
    if not source.exists():
        raise PluginError(f"A page links to {path}, which does not exist.")
    if source.is_dir():
        names = "\n".join(f"* `{path}/{entry.name}`" for entry in sorted(source.glob("*.py")))
        return f"# {path}\n\n{names}\n"
    language = {".py": "python", ".toml": "toml"}.get(source.suffix, "text")
    return f"# {path}\n\n````{language}\n{source.read_text()}````\n"
