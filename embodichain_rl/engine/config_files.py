"""Reading of configuration files that describe an environment, in JSON or YAML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from embodichain_rl.errors import ConfigError, ConfigFileNotFoundError

__all__ = ["load_config"]


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which raises an error for a repeated key instead of keeping its last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key, count in Counter(keys).items():
            if count > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs {count} times in one mapping", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"the key {key!r} occurs {count} times in one object")
    return dict(pairs)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ConfigError(f"line {error.lineno}, column {error.colno}: {error.msg}") from error


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}{_problem(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(str(error)) from error


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "not readable"
    if problem.startswith("but ") and error.context:
        return f"{error.context}, {problem}"
    if "constructor for the tag" in problem:
        return f"{problem}; a configuration contains data, never code, so only the standard types of YAML are allowed"
    return problem


_PARSERS: dict[str, Callable[[str], Any]] = {".json": _parse_json, ".yaml": _parse_yaml, ".yml": _parse_yaml}


def load_config(path: str | PathLike[str]) -> dict[str, Any]:
    r"""Read a JSON or YAML file into a dict.

    The suffix determines the format: ``.json``, ``.yaml`` or ``.yml``. YAML is read with PyYAML's safe loader, so a
    file contains data, never code. A repeated key in a mapping raises an error. Both parsers would otherwise keep only
    its last value and silently drop a setting.

    Args:
        path: the path of a UTF-8 file whose top level is a mapping.

    Returns:
        The mapping, for instance a ``gym_config``.

    Raises:
        ConfigFileNotFoundError: there is no such file.
        ConfigError: the suffix is unknown, the file can't be read or parsed (the message names the line), or its top
            level is not a mapping.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "pendulum.yaml"
        >>> _ = file.write_text("id: Pendulum-v1\nmax_episode_steps: 100\n")
        >>> load_config(file)
        {'id': 'Pendulum-v1', 'max_episode_steps': 100}
    """
    path = Path(path)
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(
            f"{path}: the suffix of a configuration file must be one of {', '.join(_PARSERS)}; got {path.suffix!r}."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigFileNotFoundError(f"There is no configuration file {path} (in {Path.cwd()}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: a configuration file must be UTF-8 text; {error}.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path!r} can't be read: {error}. Give the path of a readable file.") from error
    try:
        config = parse(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error.__cause__
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: it is nested too deeply for a configuration.") from error
    if not isinstance(config, dict):
        got = "nothing" if config is None else f"a {type(config).__name__}"
        raise ConfigError(f"{path}: the top level of a configuration must be a mapping of names to values; got {got}.")
    return config
