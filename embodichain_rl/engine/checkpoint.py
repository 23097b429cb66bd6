"""Checkpoints of an engine: what a training needs to go on after it was stopped.

A checkpoint is a directory with ``engine.json`` and one folder that it names. The folder has the buffer and
``states.pt``: the weights of the policy, and what the user saves besides. The JSON file is replaced last, as a whole.
So an earlier checkpoint counts until the new one is whole. Reading one executes nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embodichain_rl.engine.config import OnlineDataEngineCfg
from embodichain_rl.errors import CheckpointError, ConfigError, InvalidArgumentError, StateMismatchError
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.storage import checked_name, going_on_from, new_folder, writing_to
from embodichain_rl.shared import sync_folder, write_durably

__all__ = ["SavedEngine", "changed_fields", "read_checkpoint", "write_checkpoint"]

FORMAT = 1
KIND, NOTED_IN, BUFFER, STATES = "engine", "engine.json", "buffer", "states.pt"

FIXED = ("buffer_size", "max_episode_steps", "compact", "refill_policy", "seed")
"""The fields of a configuration that must be those of the engine that was saved."""


@dataclass(frozen=True)
class SavedEngine:
    """The content of a checkpoint of an engine.

    Attributes:
        buffer (Path): the checkpoint of the buffer.
        fields (dict): the fields of the configuration that are numbers, text, or nests of these.
        unsaved (list): the names of the other fields that were given, such as ``policy``.
        engine (dict): counts of the engine, as :meth:`OnlineDataEngine.save` gives them.
        weights (dict | None): the weights of the policy; None if it has none.
        states (dict): what the user has saved besides, by name.
    """

    buffer: Path
    fields: dict[str, Any]
    unsaved: list[str]
    engine: dict[str, Any]
    weights: dict[str, Any] | None
    states: dict[str, Any]

    def cfg(self, given: OnlineDataEngineCfg | None, changes: Mapping[str, Any]) -> OnlineDataEngineCfg:
        """Return the configuration for an engine that goes on.

        Args:
            given: a configuration; None: the one that was saved.
            changes: fields to change.

        Raises:
            ConfigError: if fields that could not be saved are missing.
            StateMismatchError: if fields differ that the checkpoint depends on.
        """
        if given is None:
            missing = [name for name in self.unsaved if name not in changes]
            if missing:
                raise ConfigError(
                    f"The configuration in the checkpoint is without {', '.join(missing)}, which can't be saved in a "
                    f"file. Pass the configuration, OnlineDataEngine.load(path, cfg), or these: {missing[0]}=..."
                )
            given = OnlineDataEngineCfg(**{**self.fields, **changes})
        elif changes:
            given = given.replace(**changes)
        different = changed_fields(self.fields, _plain_fields(given)[0])
        if different:
            raise StateMismatchError(
                f"The checkpoint is of an engine with another configuration: {'; '.join(different)}. Give the same, or "
                "make a new engine and load only the trajectories: engine.replay_buffer.loads(path_of_a_buffer)."
            )
        return given


def changed_fields(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return descriptions of the fields that must be the same and are not."""
    before, after = _compared(saved), _compared(now)
    return [f"{name} was {before[name]!r}, and is {after[name]!r}" for name in before if before[name] != after[name]]


def _compared(fields: Mapping[str, Any]) -> dict[str, Any]:
    gym_config = fields.get("gym_config")
    return {
        **{name: fields.get(name) for name in FIXED},
        "gym_config['id']": gym_config.get("id") if isinstance(gym_config, Mapping) else None,
        "pacing by refill_threshold": fields.get("refill_threshold") is not None,
    }


def _plain_fields(cfg: OnlineDataEngineCfg) -> tuple[dict[str, Any], list[str]]:
    """Return the fields that JSON can hold, and the names of the others that were given."""
    plain: dict[str, Any] = {}
    others = []
    for name, value in cfg.to_dict().items():
        try:
            same = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            others.append(name)
            continue
        plain[name] = tuple(same) if isinstance(value, tuple) else same
    return plain, others


def write_checkpoint(
    path: Path,
    buffer: TrajectoryReplayBuffer,
    cfg: OnlineDataEngineCfg,
    engine: Mapping[str, Any],
    weights: Mapping[str, Any] | None,
    states: Mapping[str, Any],
) -> None:
    """Write a checkpoint; see :class:`SavedEngine` for the arguments.

    Raises:
        InvalidArgumentError: if a state has something else than numbers, text, tensors, and nests of these.
        CheckpointWriteError: if the directory can't be written to, or the disk is full.
    """
    content = _packed_states({"weights": weights, "states": dict(states)})
    fields, unsaved = _plain_fields(cfg)
    with writing_to(path), new_folder(path, KIND, NOTED_IN) as (folder, alone):
        with going_on_from(_earlier_buffer(path) if alone else folder):
            buffer.dumps(folder / BUFFER)
        write_durably(folder / STATES, content)
        sync_folder(folder)
        noted = {"format": FORMAT, "folder": folder.name, "cfg": fields, "unsaved": unsaved, "engine": dict(engine)}
        write_durably(path / NOTED_IN, json.dumps(noted).encode())


def _earlier_buffer(path: Path) -> Path:
    """Return the checkpoint of the buffer in the earlier checkpoint; a path that does not exist if there is none."""
    try:
        return path / checked_name(json.loads((path / NOTED_IN).read_text())["folder"], KIND) / BUFFER
    except (OSError, ValueError, KeyError, TypeError):
        return path / "no checkpoint"


def _packed_states(states: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    try:
        torch.save(states, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception as error:
        raise InvalidArgumentError(
            f"A state that was given to save() can't be stored: {error}. Give tensors, numbers, text, and dicts and "
            "lists of these, such as what state_dict() returns; or an object with state_dict()."
        ) from error
    return file.getvalue()


def read_checkpoint(path: Path) -> SavedEngine:
    """Read a checkpoint of an engine, without its buffer.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    try:
        noted = json.loads((path / NOTED_IN).read_text())
        if noted["format"] != FORMAT:
            raise CheckpointError(
                f"The checkpoint at {path} has the format {noted['format']!r}, this version reads {FORMAT}."
            )
        folder = path / checked_name(noted["folder"], KIND)
        states = torch.load(folder / STATES, weights_only=True)
        saved = SavedEngine(
            folder / BUFFER, noted["cfg"], noted["unsaved"], noted["engine"], states["weights"], states["states"]
        )
        saved.engine["limiter"], saved.engine["session"] = saved.engine["limiter"], int(saved.engine["session"])
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises errors of many types
        raise CheckpointError(
            f"There is no readable checkpoint of an engine at {path}: {error!r}. It is damaged, or was made by "
            "replay_buffer.dumps(), which saves the buffer alone: load that one with replay_buffer.loads()."
        ) from error
    state_key = saved.fields.get("state_key")
    saved.fields["state_key"] = tuple(state_key) if isinstance(state_key, list) else state_key
    return saved
