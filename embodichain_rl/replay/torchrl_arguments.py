"""The arguments of TorchRL's buffers that a buffer of whole trajectories takes too, or refuses with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypedDict

import torch
from tensordict import NestedKey
from torchrl.data.replay_buffers.sample_units import Transition

from embodichain_rl._checks import keywords_of, unexpected_keyword
from embodichain_rl.errors import InvalidArgumentError, UnsupportedOperationError

__all__ = ["TorchRLArguments", "refuse_service", "torchrl_arguments"]


class TorchRLArguments(TypedDict, total=False):
    """The keyword arguments of :class:`torchrl.data.TensorDictReplayBuffer` that have another meaning here, or none."""

    priority_key: NestedKey
    transform_factory: Callable[[], Any] | None
    shared: bool
    compilable: bool | None
    delayed_init: bool | None
    dim_extend: int | None
    collate_fn: Callable[[Any], Any] | None
    checkpointer: Any
    sample_unit: Any
    consume_after_n_samples: int | None
    service_backend: str
    service_backend_options: dict[str, Any] | None
    transport: str
    transport_options: dict[str, Any] | None


HARMLESS: dict[str, Callable[[Any], bool]] = {
    # The buffer is shared between processes and complete from the start.
    "shared": lambda value: isinstance(value, bool),
    "delayed_init": lambda value: value is None or isinstance(value, bool),
    "compilable": lambda value: value is None or isinstance(value, bool),
    # Of data [B, T], each row is an environment: the time is dimension 1 whatever this says.
    "dim_extend": lambda value: value is None or (type(value) is int and value in (0, 1)),
    "checkpointer": lambda value: value is None,
    "sample_unit": lambda value: value is None or type(value) is Transition,
    "consume_after_n_samples": lambda value: value is None,
    "service_backend": lambda value: value == "direct",
    "service_backend_options": lambda value: not value,
    "transport": lambda value: value in ("auto", "direct"),
    "transport_options": lambda value: not value,
}
"""The values of arguments that mean what is the case anyway."""

INSTEAD = {
    "shared": "It must be True or False; the buffer is shared between processes from the start.",
    "delayed_init": "It must be True, False or None; the buffer is complete from the start.",
    "compilable": "It must be True, False or None; under torch.compile, calls of the buffer are graph breaks.",
    "dim_extend": "Data is [T], or [B, T] with one environment a row: transpose other data before it is extended.",
    "collate_fn": "It must be a function of a batch, a TensorDict.",
    "checkpointer": "Trajectories are saved by rb.dumps(path) and rb.state_dict() as they are stored. Leave it out.",
    "sample_unit": "Use sampler=ChunkSampler(chunk_size, pad=...) for consecutive steps, or ChunkSampler(windows=...) "
    "for the steps around one.",
    "consume_after_n_samples": "Use sampler=ChunkSampler(chunk_size, replacement=False) to draw every chunk once a "
    "pass.",
    "service_backend": "The buffer is in shared memory of this machine, and every process of it can use it directly. "
    "With Ray, build RayReplayBuffer(storage=..., sampler=..., writer=...) from the parts of this library.",
    "service_backend_options": "There is no service: every process of this machine uses the buffer directly.",
    "transport": "There is no transport: every process of this machine uses the shared memory directly.",
    "transport_options": "There is no transport: every process of this machine uses the shared memory directly.",
    "transform_factory": "It must be a function that returns a transform, without transform= beside it.",
    "priority_key": "It must be a key: a string, or a tuple of strings.",
    # Of other buffers of TorchRL, and of their samplers and storages.
    "alpha": "Use sampler=ChunkSampler(chunk_size, weights=ByPriority(alpha=..., beta=...)).",
    "beta": "Use sampler=ChunkSampler(chunk_size, weights=ByPriority(alpha=..., beta=...)).",
    "eps": "Use sampler=ChunkSampler(chunk_size, weights=ByPriority(eps=...)).",
    "reduction": "The priority of a chunk is that of its trajectory; of several the largest counts.",
    "slice_len": "Give chunk_size=slice_len.",
    "num_slices": "Give batch_size=num_slices, the number of chunks of a batch.",
    "pad_output": "Give strict_length=False: trajectories that are shorter than a chunk are padded, with a mask.",
    "span": "Use sampler=ChunkSampler(chunk_size, pad='both'), or pad_before= and pad_after=.",
    "end_keys": "Give end_key, one key; without it, done, terminated and truncated end a trajectory.",
    "max_size": "Give max_trajectories and max_total_steps.",
    "size": "Give max_trajectories and max_total_steps.",
    "capacity": "Give max_trajectories and max_total_steps.",
    "buffer_size": "Give max_trajectories and max_total_steps.",
    "scratch_dir": "The buffer is in memory. Save it with rb.dumps(path).",
    "replacement": "Use sampler=ChunkSampler(chunk_size, replacement=False).",
    "windows": "Use sampler=ChunkSampler(windows=...).",
    "pad": "Use sampler=ChunkSampler(chunk_size, pad=...).",
    "accept": "Use writer=TrajectoryWriter(accept=...).",
    "num_collectors": "It belongs to the collector.",
}
"""What to do in the place of an argument."""


def refuse_service(cls: type, service_backend: str, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse to be built as a service; TorchRL calls it for ``service_backend=`` other than ``"direct"``.

    Raises:
        InvalidArgumentError: always.
    """
    raise InvalidArgumentError(f"Got service_backend={service_backend!r}. {INSTEAD['service_backend']}")


def torchrl_arguments(given: Mapping[str, Any], transform: Any, own: Callable[..., Any]) -> dict[str, Any]:
    """Return the keyword arguments for TorchRL's constructor.

    Args:
        given: the arguments that the constructor of the buffer does not name.
        transform: its argument ``transform``.
        own: that constructor, whose arguments are suggested for misspelled ones.

    Raises:
        InvalidArgumentError, UnsupportedOperationError: for arguments of TorchRL's buffers that this one does not take,
            with what to do in their place.
        TypeError: for names that no buffer has.
    """
    rest: dict[str, Any] = {"transform": transform}
    collate: Callable[[Any], Any] | None = None
    for name, value in given.items():
        if name == "priority_key" and isinstance(value, str | tuple):
            rest[name] = value
        elif name == "transform_factory" and (value is None or (callable(value) and transform is None)):
            rest["transform"] = transform if value is None else value()
        elif name == "collate_fn" and (value is None or callable(value)):
            collate = value
        elif name in HARMLESS and HARMLESS[name](value):
            continue
        elif name in ("sample_unit", "consume_after_n_samples"):
            raise UnsupportedOperationError(
                f"Got {name}={value!r}; the items of the buffer are whole trajectories. {INSTEAD[name]}"
            )
        elif name in INSTEAD:
            unknown = "" if name in TorchRLArguments.__annotations__ else ", which is no argument of this buffer"
            raise InvalidArgumentError(f"Got {name}={value!r}{unknown}. {INSTEAD[name]}")
        else:
            names = [*keywords_of(own), *TorchRLArguments.__annotations__]
            raise unexpected_keyword("TrajectoryReplayBuffer", name, names)
    if collate is not None:
        rest["transform"] = _after(collate, rest["transform"])
    return rest


def _after(collate: Callable[[Any], Any], transform: Any) -> Any:
    """Return the transform that applies ``collate`` first: a batch is collated already when it is gathered."""
    from torchrl.envs.transforms import Compose  # loads all environments

    from embodichain_rl.replay.batches import Collate

    if transform is None:
        return Collate(collate)
    if not callable(transform):
        return transform  # refused by the buffer
    return Compose(Collate(collate), transform if isinstance(transform, torch.nn.Module) else Collate(transform))
