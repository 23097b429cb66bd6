"""How entries are nested: TensorDicts inside TensorDicts, with batch dimensions and classes of their own."""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from tensordict import TensorDict, is_tensor_collection, is_tensorclass

from embodichain_rl.errors import SchemaMismatchError

__all__ = ["Key", "Nest", "Node", "is_nested", "key_name", "node_of"]

Key = tuple[str, ...]

_known_classes: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""The tensorclasses that this process has written, by their names. Those of a function can't be imported."""


@dataclass(frozen=True, slots=True)
class Node:
    """A nested TensorDict that differs from a plain one with the batch size of its parent.

    Attributes:
        key: where it is.
        shape: its batch dimensions beyond those of the data, such as ``(n_agents,)``.
        names: the names of these dimensions; empty where they have none.
        tensorclass: the class, as ``"module:qualified name"``; empty for a plain TensorDict.
    """

    key: Key
    shape: tuple[int, ...] = ()
    names: tuple[str | None, ...] = ()
    tensorclass: str = ""

    def resolve_class(self, *, import_it: bool = True) -> Any:
        """Return the tensorclass.

        Args:
            import_it: whether its module is imported if it is not loaded.

        Raises:
            SchemaMismatchError: when this process does not know the class.
        """
        found = _known_classes.get(self.tensorclass)
        if found is not None:
            return found
        module_name, _, qualified_name = self.tensorclass.partition(":")
        try:
            found = importlib.import_module(module_name) if import_it else sys.modules[module_name]
            for name in qualified_name.split("."):
                found = getattr(found, name)
        except (AttributeError, ImportError, KeyError, ValueError):
            found = None
        if not (isinstance(found, type) and is_tensorclass(found)):
            raise SchemaMismatchError(
                f"Got entries of the tensorclass {self.tensorclass} at {self.key}, which is not known in this process. "
                "Define it at the top level of a module, and import that module first."
            )
        _known_classes[self.tensorclass] = found
        return found


def key_name(key: Key) -> str:
    """Return a key as a user writes it."""
    return repr(key[0]) if len(key) == 1 else repr(key)


def is_nested(value: object) -> bool:
    """Return whether an entry of a TensorDict is itself a TensorDict or a tensorclass, and not text or another object.

    Example:
        >>> is_nested(TensorDict({}, [])), is_nested(torch.zeros(3))
        (True, False)
    """
    return is_tensor_collection(value) and hasattr(value, "items") and not getattr(value, "_is_non_tensor", False)


def node_of(key: Key, value: Any, batch_dims: int) -> Node | None:
    """Describe a nested TensorDict; None where it is a plain one with the batch size of the data.

    Args:
        key: where it is.
        value: a TensorDict or a tensorclass.
        batch_dims: dimensions of the data's batch size.
    """
    shape, names, tensorclass = tuple(value.batch_size[batch_dims:]), (), ""
    if shape and value._has_names():
        names = tuple(value.names[batch_dims:])
        names = names if any(names) else ()
    if is_tensorclass(value):
        cls = type(value)
        tensorclass = f"{cls.__module__}:{cls.__qualname__}"
        _known_classes[tensorclass] = cls
    return Node(key, shape, names, tensorclass) if shape or tensorclass else None


class _Branch:
    """One TensorDict to be built: its entries, by name the number of a tensor or another branch."""

    __slots__ = ("entries", "node")

    def __init__(self) -> None:
        self.entries: dict[str, int | _Branch] = {}
        self.node: Node | None = None

    def child(self, name: str) -> _Branch:
        found = self.entries.setdefault(name, _Branch())
        assert isinstance(found, _Branch), "a key can't be a tensor and a TensorDict"
        return found


class Nest:
    """Builds TensorDicts that all have the same keys and the same structure.

    TensorDict's public constructor checks every shape again. That takes ten times as long, more than the copy of a
    small batch. So a function is generated for each structure, which only fills in the tensors: it takes about 3 us for
    fourteen tensors. Equal structures share it. A nest is a small picklable description; it is equal to another one if
    both build the same.

    Args:
        keys: one for each tensor.
        nodes: the nested TensorDicts that differ from plain ones with the batch size of the root.

    Example:
        >>> step = Nest([("observation",), ("next", "reward")]).build([torch.zeros(4, 3), torch.zeros(4, 1)], [4])
        >>> step["next"].batch_size
        torch.Size([4])
        >>> agents = Nest([("agents", "position")], [Node(("agents",), (2,))])
        >>> agents.build([torch.zeros(4, 2, 3)], [4])["agents"].batch_size
        torch.Size([4, 2])
    """

    __slots__ = ("fill", "keys", "nodes")

    fill: Callable[[Sequence[torch.Tensor], torch.Size, torch.device | None], TensorDict]
    """The generated function: as :meth:`build`, for a batch size that is a ``torch.Size`` already."""

    def __init__(self, keys: Iterable[Key], nodes: Iterable[Node] = ()) -> None:
        self.keys, self.nodes = tuple(keys), tuple(nodes)
        self.fill = _generated(self.keys, self.nodes)

    def build(
        self, values: Sequence[torch.Tensor], batch_size: Sequence[int], device: torch.device | None = None
    ) -> TensorDict:
        """Build a TensorDict of ``batch_size`` from one tensor ``[*batch_size, ...]`` per key, all on ``device``."""
        return self.fill(values, torch.Size(batch_size), device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Nest) and (self.keys, self.nodes) == (other.keys, other.nodes)

    def __hash__(self) -> int:
        return hash((self.keys, self.nodes))

    def __reduce__(self) -> tuple[type[Nest], tuple[tuple[Key, ...], tuple[Node, ...]]]:
        return Nest, (self.keys, self.nodes)


@lru_cache(maxsize=256)
def _generated(
    keys: tuple[Key, ...], nodes: tuple[Node, ...]
) -> Callable[[Sequence[torch.Tensor], torch.Size, torch.device | None], TensorDict]:
    """Generate the function that builds TensorDicts of one structure."""
    root = _Branch()

    def at(key: Key) -> _Branch:
        branch = root
        for part in key:
            branch = branch.child(part)
        return branch

    for number, key in enumerate(keys):
        at(key[:-1]).entries[key[-1]] = number
    for node in nodes:
        at(node.key).node = node
    lines = ["def build(values, batch_size, device=None):"]
    if keys:
        lines.append(f"    {', '.join(f'v{number}' for number in range(len(keys)))}, = values")
    names: dict[str, Any] = {"new": object.__new__, "TensorDict": TensorDict}
    lines.append(f"    return {_generate(root, lines, names)}")
    exec("\n".join(lines), names)  # only names of the code above, and keys as literals
    return names["build"]


def _generate(branch: _Branch, lines: list[str], names: dict[str, Any]) -> str:
    """Add the lines that build one TensorDict, after those of its children; return the variable that it is in."""
    entries = [
        f"{name!r}: {f'v{entry}' if isinstance(entry, int) else _generate(entry, lines, names)}"
        for name, entry in branch.entries.items()
    ]
    node = branch.node or Node(())
    data = f"t{len(lines)}"
    # The attributes that TensorDict's own unchecked constructor sets.
    lines += [
        f"    {data} = new(TensorDict)",
        f"    {data}._device = device",
        f"    {data}._tensordict = {{{', '.join(entries)}}}",
        f"    {data}._batch_size = batch_size" + (f" + {node.shape!r}" if node.shape else ""),
        f"    {data}._td_dim_names = "
        + (f"[None] * len(batch_size) + {list(node.names)!r}" if any(node.names) else "None"),
    ]
    if not node.tensorclass:
        return data
    names[f"n{len(lines)}"] = node
    return f"n{len(lines)}.resolve_class()._from_tensordict({data})"
