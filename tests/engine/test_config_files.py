from __future__ import annotations

from pathlib import Path

import pytest

from embodichain_rl.engine.config_files import load_config
from embodichain_rl.errors import ConfigError, ConfigFileNotFoundError

CONFIG = {"id": "Pendulum-v1", "num_envs": 2, "kwargs": {"g": 9.5}}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("env.json", '{"id": "Pendulum-v1", "num_envs": 2, "kwargs": {"g": 9.5}}'),
        ("env.yaml", "id: Pendulum-v1\nnum_envs: 2\nkwargs:\n  g: 9.5\n"),
        ("env.YML", "# a comment\nid: Pendulum-v1\nnum_envs: 2\nkwargs: {g: 9.5}\n"),
        ("merged.yaml", "base: &base {g: 9.5}\nid: Pendulum-v1\nnum_envs: 2\nkwargs: {<<: *base}\n"),
    ],
)
def test_reads_json_and_yaml(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    config = load_config(tmp_path / name)
    config.pop("base", None)
    assert config == CONFIG


def test_missing_file_is_an_error_of_both_kinds(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileNotFoundError, match=r"nowhere\.json") as caught:
        load_config(str(tmp_path / "nowhere.json"))
    assert isinstance(caught.value, ConfigError)
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("env.toml", "id = 'Pendulum-v1'", r"must be one of \.json, \.yaml, \.yml; got '\.toml'"),
        ("env.json", '{\n  "id": "Pendulum-v1",\n  "num_envs" 2\n}', r"env\.json: line 3, column 14"),
        ("env.yaml", "id: Pendulum-v1\nkwargs: [1, 2\n", r"env\.yaml: line 3, column 1: expected ',' or '\]'"),
        ("env.yaml", "id: Pendulum-v1\nkwargs: !!python/name:os.system\n", r"line 2, column 9"),
        ("env.json", "[1, 2]", "mapping of names to values; got a list"),
        ("env.yaml", "Pendulum-v1\n", "got a str"),
        ("env.yaml", "# nothing\n", "got nothing"),
        ("env.json", '{"id": "a", "id": "b"}', "'id' occurs 2 times"),
        ("env.yaml", "id: a\nkwargs:\n  g: 1\n  g: 2\n", r"line 3, column 3: the key 'g' occurs 2 times"),
    ],
)
def test_refuses_what_is_no_configuration(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / name)


def test_refuses_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "env.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "env.json")
