"""Configuration files made of nonsense, in YAML and JSON, given as an engine's ``gym_config``."""

from __future__ import annotations

from pathlib import Path

import pytest
from nonsense import Case, Place, Table, Try, assert_refused, configure

from embodichain_rl.errors import ConfigError, ConfigFileNotFoundError

TABLE = Table()


def holding(name: str, content: str | bytes) -> Try:
    """An engine that is configured by a file of this content."""

    def attempt(place: Place) -> None:
        file = place.folder / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        configure(gym_config=file)

    return attempt


def refuse(message: str, **contents: str | bytes) -> None:
    """Files, by their suffix; a number behind it tells several of one kind apart."""
    for suffix, content in contents.items():
        TABLE.refuse(ConfigError, message, holding(f"env.{suffix.rstrip('0123456789')}", content))


PENDULUM = '{"id": "Pendulum-v1", '

refuse(
    r"unknown keys: 'num_env' \(did you mean 'num_envs'\?\)", yaml="id: a\nnum_env: 2", json='{"id": "a", "num_env": 2}'
)
refuse(r"needs the key 'id', the environment's name; got 'num_envs'", yaml="num_envs: 2", json='{"num_envs": 2}')
refuse("needs the key 'id', the environment's name; got none", yaml="{}", json="{}")
refuse(r"gym_config\['id'\] must be the name of a registered environment, got 3\.", yaml="id: 3", json='{"id": 3}')
refuse(r"gym_config\['id'\] must be the name .* got None", yaml="id:", yaml2="id: ~", json='{"id": null}')
refuse(r"gym_config\['id'\] must be the name .* got True", yaml="id: yes", yaml2="id: on", json='{"id": true}')
refuse(r"gym_config\['id'\] must be the name .* got \['a'\]", yaml="id: [a]", json='{"id": ["a"]}')
refuse(r"gym_config\['id'\] must be the name .* got datetime\.date", yaml="id: 2001-01-01")
refuse(r"gym_config\['id'\] must be the name .* got b'hello'", yaml="id: !!binary aGVsbG8=")
refuse(
    r"'num_envs'\] must be an integer of at least 1, got 'two'",
    yaml="id: a\nnum_envs: two",
    json=PENDULUM + '"num_envs": "two"}',
)
refuse(
    r"'num_envs'\] must be an integer of at least 1, got 2\.0",
    yaml="id: a\nnum_envs: 2.0",
    json=PENDULUM + '"num_envs": 2.0}',
)
refuse(
    r"'num_envs'\] must be an integer of at least 1, got True",
    yaml="id: a\nnum_envs: true",
    json=PENDULUM + '"num_envs": true}',
)
refuse(
    r"'num_envs'\] must be an integer of at least 1, got inf",
    yaml="id: a\nnum_envs: .inf",
    json=PENDULUM + '"num_envs": 1e400}',
)
refuse(
    r"'max_episode_steps'\] must be .* got nan",
    yaml="id: a\nmax_episode_steps: .nan",
    json=PENDULUM + '"max_episode_steps": NaN}',
)
refuse(
    r"'kwargs'\] must be a mapping from argument names",
    yaml="id: a\nkwargs: 3",
    yaml2="id: a\nkwargs: {1: 2}",
    json=PENDULUM + '"kwargs": []}',
)
refuse(
    "contains 'id'; move it to gym_config itself",
    yaml="id: a\nkwargs: {id: b}",
    json=PENDULUM + '"kwargs": {"id": "b"}}',
)
refuse("a mapping of names to values; got nothing", yaml="", yaml2="# nothing", yaml3="---", json="null")
refuse("a mapping of names to values; got a list", yaml="- id: a", yml="[1, 2]", json='[{"id": "a"}]')
refuse("a mapping of names to values; got a str", yaml="Pendulum-v1", json='"Pendulum-v1"')
refuse("a mapping of names to values; got a set", yaml="!!set {id}")
refuse("python/object/apply:os.* contains data, never code", yaml="!!python/object/apply:os.getcwd []")
refuse("python/name:os.* contains data, never code", yaml="id: !!python/name:os.system")
refuse("tag '!custom'; a configuration contains data", yaml="id: a\nkwargs: {g: !custom 3}")
refuse("line 1, column 1: Expecting value", json="", json2="'id'", json3="id: Pendulum-v1")
refuse("line 1, column 14: Expecting property name", json='{"id": "a",  }')
refuse(r"line 2, column 1: expected ',' or '\]'", yaml="id: [unclosed\n")
refuse(r"line 2, column 1: found character '\\t'", yaml="id: a\n\tnum_envs: 2")
refuse("line 2, column 1: expected a single document in the stream, but found another", yaml="id: a\n---\nid: b\n")
refuse("line 1, column 3: found unhashable key", yaml="? [a, b]\n: 1\n")
refuse("the key 'id' occurs 2 times", yaml="id: a\nid: b", json='{"id": "a", "id": "b"}')
refuse("special characters are not allowed", yaml="id: a\x00")
refuse("nested too deeply", yaml="[" * 3000, json="[" * 200_000)
refuse(
    "limit .* for integer string conversion", yaml="num_envs: " + "9" * 5000, json='{"num_envs": ' + "9" * 5000 + "}"
)
refuse("UTF-8 text", yaml=b"\xff\xfe\x00", json=b"\x80")
refuse(r"must be one of \.json, \.yaml, \.yml; got '\.toml'", toml="id = 'a'")

TABLE.refuse(
    ConfigFileNotFoundError, "There is no configuration file .*", lambda p: configure(gym_config=p.folder / "a.yaml")
)
TABLE.refuse(
    ConfigError,
    "must be one of .*; got ''",
    lambda p: configure(gym_config=""),
    lambda p: configure(gym_config=p.folder),
)


def into_a_directory(place: Place) -> None:
    (place.folder / "env.json").mkdir()
    configure(gym_config=place.folder / "env.json")


def below_a_file(place: Place) -> None:
    (place.folder / "file").touch()
    configure(gym_config=place.folder / "file" / "env.yaml")


TABLE.refuse(
    ConfigError,
    "can't be read: .*. Give the path of a readable file",
    into_a_directory,
    below_a_file,
    lambda p: configure(gym_config=p.folder / ("long" * 100 + ".yaml")),
    lambda p: configure(gym_config="\0.yaml"),
)


@TABLE.each
def test_nonsense_is_refused_and_the_buffer_goes_on(place: Place, case: Case) -> None:
    assert_refused(case, place)


def test_no_tag_calls_anything(tmp_path: Path) -> None:
    (tmp_path / "env.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(ConfigError):
        configure(gym_config=tmp_path / "env.yaml")
    assert not (tmp_path / "made").exists()
