"""Replaces constructors in the text of a script."""

from __future__ import annotations

import ast
from collections.abc import Mapping

__all__ = ["substituted"]

IMPORT = (
    "from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer; "
    "from embodichain_rl.transforms import FlatChunks  # noqa: E702\n"
)


def substituted(source: str, buffers: Mapping[tuple[str, str], str], numbers: Mapping[str, int]) -> tuple[str, int]:
    """Return the text of a script with other constructors and numbers, and how many constructors were replaced.

    Args:
        source: the text.
        buffers: what is assigned instead, by the name that is assigned to and the class that is called.
        numbers: the numbers that are assigned, or passed by keyword, by name.

    Example:
        >>> substituted("rb = ReplayBuffer(LazyTensorStorage(9))", {("rb", "ReplayBuffer"): "Mine()"}, {})[0][-9:]
        'rb = Mine()'[-9:]
    """
    tree = ast.parse(source)
    edits: list[tuple[ast.expr, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            called = getattr(value.func, "id", None) if isinstance(value, ast.Call) else None
            if (name, called) in buffers:
                edits.append((value, buffers[name, called]))
            elif name in numbers and isinstance(value, ast.Constant):
                edits.append((value, str(numbers[name])))
        elif isinstance(node, ast.keyword) and node.arg in numbers and isinstance(node.value, ast.Constant):
            edits.append((node.value, str(numbers[node.arg])))
    lines = source.splitlines(keepends=True)
    for node, text in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        before, after = lines[first].encode()[: node.col_offset], lines[last].encode()[node.end_col_offset :]
        lines[first : last + 1] = [before.decode() + text + after.decode()]
    replaced = sum(text in buffers.values() for _, text in edits)
    if replaced:
        lines.insert(_line_after_future(tree), IMPORT)
    return "".join(lines), replaced


def _line_after_future(tree: ast.Module) -> int:
    """Return the number of lines before the first statement that an import may come before."""
    ends = [0]
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not (docstring or future):
            break
        ends.append(node.end_lineno or node.lineno)
    return ends[-1]
