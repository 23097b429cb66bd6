"""The public surface of the library as text: every public name, with its signature, one parameter a line.

``make surface`` writes it to ``docs/public_surface.txt``. ``tests/test_public_surface.py`` compares that file with the
code, so a change of the surface is always part of a change of the file.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

FILE = Path(__file__).parents[2] / "docs" / "public_surface.txt"

MODULES = (
    "embodichain_rl",
    "embodichain_rl.replay",
    "embodichain_rl.datasets",
    "embodichain_rl.datasets.sampler",
    "embodichain_rl.engine",
    "embodichain_rl.engine.data",
    "embodichain_rl.collectors",
    "embodichain_rl.cluster",
    "embodichain_rl.monitor",
    "embodichain_rl.interop.embodichain",
    "embodichain_rl.interop.lerobot",
    "embodichain_rl.interop.minari",
    "embodichain_rl.transforms",
    "embodichain_rl.errors",
)
"""Modules whose paths users import from, the shortest first."""

OPERATORS = {"__call__", "__enter__", "__getitem__", "__iter__", "__len__", "__setitem__"}
"""What a class is used by besides its methods."""

HEADER = """\
# Every public name and its signature. `make surface` writes this file; see docs/stability.md.
"""


def public_surface() -> str:
    """Return the public surface. What a class inherits from another library is not in it."""
    lines: list[str] = []
    shown: dict[int, str] = {}
    for path in MODULES:
        module = importlib.import_module(path)
        lines += ["", f"[{path}]"]
        for name in sorted(module.__all__):
            value = getattr(module, name)
            if id(value) in shown:
                lines.append(f"{name} = {shown[id(value)]}")
            else:
                lines += _described(name, value)
                if isinstance(value, type | FunctionType):
                    shown[id(value)] = f"{path}.{name}"
    return HEADER + "\n".join(lines) + "\n"


def _described(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        yield f"class {name}({bases})"
        if issubclass(value, Enum):
            yield from (f"    {name}.{member.name} = {member.value!r}" for member in value)
        constructor = next((vars(base)["__init__"] for base in _ours(value) if "__init__" in vars(base)), None)
        if constructor is not None and not issubclass(value, Enum):
            yield from _callable(name, constructor, is_method=True)
        entries = {entry for base in _ours(value) for entry in vars(base)}
        for attribute in sorted(entry for entry in entries if not entry.startswith("_") or entry in OPERATORS):
            yield from _attribute(f"{name}.{attribute}", inspect.getattr_static(value, attribute))
    elif callable(value) and hasattr(value, "__code__"):
        yield from _callable(name, value)
    else:
        yield f"{name}: {type(value).__name__}"


def _ours(class_: type) -> list[type]:
    return [base for base in class_.__mro__ if base.__module__.startswith("embodichain_rl")]


def _attribute(path: str, value: Any) -> Iterator[str]:
    value = getattr(value, "__wrapped__", value) if isinstance(value, property) else value
    if isinstance(value, property):
        returns = f" -> {_annotation(value.fget.__annotations__['return'])}" if _returns(value.fget) else ""
        yield f"    {path}{returns} (property{', can be set' if value.fset else ''})"
    elif isinstance(value, classmethod | staticmethod):
        kind = type(value).__name__
        yield from _callable(path, value.__func__, is_method=isinstance(value, classmethod), note=f" ({kind})")
    elif inspect.isfunction(value):
        yield from _callable(path, value, is_method=True)
    elif not isinstance(value, Enum):
        yield f"    {path}"


def _returns(function: Any) -> bool:
    return "return" in getattr(function, "__annotations__", {})


def _callable(path: str, function: Callable[..., Any], is_method: bool = False, note: str = "") -> Iterator[str]:
    signature = inspect.signature(function)
    returned = signature.return_annotation
    returns = "" if returned in (signature.empty, None, "None") else f" -> {_annotation(returned)}"
    yield f"    {path}(){returns}{note}"
    keyword_only = False
    for parameter in list(signature.parameters.values())[1 if is_method else 0 :]:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "        *"
        yield f"        {_parameter(parameter)}"
        if parameter.kind is parameter.VAR_POSITIONAL:
            keyword_only = True
        if parameter.kind is parameter.VAR_KEYWORD:
            yield from (f"            {option}" for option in _options(function, parameter))
        if parameter.kind is parameter.POSITIONAL_ONLY:
            yield "        /"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    annotation = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
    default = "" if parameter.default is parameter.empty else f" = {_value(parameter.default)}"
    return f"{stars}{parameter.name}{annotation}{default}"


def _options(function: Any, parameter: inspect.Parameter) -> Iterator[str]:
    """Return the options of ``**options: Unpack[SomeTypedDict]``, each with its type."""
    match = re.fullmatch(r"Unpack\[(\w+)\]", _annotation(parameter.annotation))
    options = inspect.unwrap(function).__globals__.get(match[1]) if match else None
    if options is not None:
        for name, annotation in sorted(options.__annotations__.items()):
            yield f"{name}: {_annotation(getattr(annotation, '__forward_arg__', annotation))}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _value(value: Any) -> str:
    """Return a default as text, without an address in memory."""
    return getattr(value, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(value))


if __name__ == "__main__":
    FILE.write_text(public_surface())
    print(FILE)
