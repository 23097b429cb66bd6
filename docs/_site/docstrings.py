"""Sphinx's roles in docstrings as links and code of Markdown, for the API reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod|attr|data|exc|obj):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Turn the roles and literal blocks of every docstring into Markdown."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Change the docstrings of a package that has been loaded."""
        if pkg.path == "embodichain_rl":
            _change(pkg, set())


def _change(obj: griffe.Object | griffe.Alias, seen: set[str]) -> None:
    if obj.is_alias or obj.path in seen:
        return
    seen.add(obj.path)
    if obj.docstring is not None:
        obj.docstring.value = markdown(obj.docstring.value)
    for member in obj.members.values():
        _change(member, seen)


def markdown(text: str) -> str:
    """Return a docstring with Markdown's code in place of roles and literal blocks, and examples found."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    return re.sub(r"::\n\n((?:(?: {4}.*)?\n)+?)(?=\S|\Z)", _fence, text + "\n").removesuffix("\n")


def _fence(match: re.Match[str]) -> str:
    code = "\n".join(line.removeprefix("    ") for line in match[1].strip("\n").splitlines())
    return f":\n\n```text\n{code}\n```\n\n"
