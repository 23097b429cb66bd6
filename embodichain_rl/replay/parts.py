"""The parts that a buffer is composed of, and its checkpoint: checks of them; and the graph breaks of its methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.writers import Writer

from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import CheckpointError, InvalidArgumentError
from embodichain_rl.replay.storage import TrajectoryStorage, refuse_samplers_of_steps
from embodichain_rl.replay.writing import TrajectoryWriter

__all__ = ["METADATA", "check_checkpoint", "check_sampler", "check_storage", "check_writer", "with_graph_breaks"]

METADATA = "buffer_metadata.json"
"""The file of a checkpoint that TorchRL writes last."""

Buffer = TypeVar("Buffer", bound=type)


def with_graph_breaks(cls: Buffer) -> Buffer:
    """Decorate the methods that TorchRL's class defines as our own are; see :func:`graph_break`."""
    inherited = ("add", "empty", "can_sample", "next", "update_priority", "state_dict", "read_all_in_order")
    for name in (*inherited, "__getitem__", "__iter__", "__len__", "write_count"):
        method = getattr(cls, name)
        if isinstance(method, property):
            setattr(cls, name, property(graph_break(method.fget)))  # type: ignore[type-var]
        else:
            setattr(cls, name, graph_break(method))
    return cls


def check_storage(storage: Any) -> None:
    """Refuse what can't be the storage of the buffer."""
    if not isinstance(storage, TrajectoryStorage):
        raise InvalidArgumentError(f"Got storage={storage!r}; a TrajectoryReplayBuffer needs a TrajectoryStorage.")


def check_sampler(sampler: Any) -> None:
    """Refuse what can't be the sampler of the buffer."""
    if not isinstance(sampler, Sampler):
        raise InvalidArgumentError(f"Got sampler={sampler!r}; it must be a ChunkSampler, or a sampler of TorchRL.")
    refuse_samplers_of_steps(sampler)


def check_writer(writer: Any) -> None:
    """Refuse what can't be the writer of the buffer."""
    if not isinstance(writer, TrajectoryWriter):
        got = type(writer).__name__ if isinstance(writer, Writer) else repr(writer)
        raise InvalidArgumentError(f"Got writer={got}; a TrajectoryReplayBuffer needs a TrajectoryWriter.")


def check_checkpoint(path: str | Path) -> dict[str, Any]:
    """Refuse a directory without a whole checkpoint; return the content of its last file.

    Raises:
        CheckpointError: when it is damaged, or was not written to the end.
    """
    try:
        content = json.loads((Path(path) / METADATA).read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"No readable {METADATA} in {path}: {error}. The checkpoint is damaged, or was not written to the end; "
            "load another one."
        ) from error
