"""What random transforms of images share: which images get the same parameters, and how these are drawn."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from tensordict import NestedKey, TensorDictBase
from torch.utils.data import get_worker_info
from torchrl.envs.transforms import Transform

from embodichain_rl._checks import checked_bool, checked_key
from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import ArgumentTypeError, InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.sampling import current_generator

__all__ = ["Key", "RandomImageTransform"]

Key: TypeAlias = tuple[str, ...]

IDS, STEPS, STARTS = ("trajectory", "id"), ("trajectory", "step"), "is_init"


class _Images(NamedTuple):
    """The images at one key of a batch, and which of them get the same parameters.

    Attributes:
        key: where they are.
        value: ``[*lead, C, H, W]`` or ``[*lead, H, W, C]``.
        channels: the dimension of the channels, -3 or -1.
        drawn: how many parameters are drawn along the first dimensions of ``lead``; 1: its images share them. They also
            share them along the dimensions that are left out.
        chunk_of: the chunk of each step of a flat batch, ``[N]``; None where the dimensions tell the chunks.
    """

    key: Key
    value: torch.Tensor
    channels: int
    drawn: tuple[int, ...]
    chunk_of: torch.Tensor | None


class RandomImageTransform(Transform):
    """What the random transforms of images share: which images get the same parameters, and who draws them."""

    channel_counts: ClassVar[tuple[frozenset[int], ...]]
    """The numbers of channels by which a layout is recognised, the usual ones first."""

    def __init__(
        self,
        in_keys: NestedKey | list[NestedKey],
        per_step: bool,
        per_camera: bool,
        channels_last: bool | None,
        generator: torch.Generator | None,
    ) -> None:
        keys = [checked_key(key) for key in (in_keys if isinstance(in_keys, list) else [in_keys])]
        if not keys or len(set(keys)) < len(keys):
            raise InvalidArgumentError(f"Got in_keys={in_keys!r}; needed is one key of images, or a list of several.")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ArgumentTypeError(f"Got generator={generator!r}; it must be a torch.Generator or None.")
        super().__init__(in_keys=keys, out_keys=keys)
        self._image_keys = keys
        self.per_step = checked_bool("per_step", per_step)
        self.per_camera = checked_bool("per_camera", per_camera)
        self.channels_last = None if channels_last is None else checked_bool("channels_last", channels_last)
        self.generator = generator

    @graph_break
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        found = [self._images(tensordict, key) for key in self._image_keys]
        augmented = tensordict.copy()  # of the structure; the tensors stay the same
        parameters: dict[Any, torch.Tensor] = {}
        for images in found:
            # ("next", key) is what the camera at key sees one step later.
            camera = images.key[1:] if images.key[0] == "next" and not self.per_step else images.key
            shared = camera if self.per_camera else None, images.drawn, images.value.device
            if shared not in parameters:
                parameters[shared] = self._drawn(images)
            if images.value.numel():
                of_images = _fitted(parameters[shared], images)
                augmented.set(images.key, self._augmented(images.value, images.channels, of_images))
        return augmented

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict  # what an environment returns is not augmented

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict  # neither is what a buffer is extended with

    @abstractmethod
    def _check(self, key: Key, value: torch.Tensor, channels: int) -> None:
        """Raise an error if these images can't be augmented."""

    @abstractmethod
    def _draw(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
        """Return random parameters ``[n, *shape]``."""

    @abstractmethod
    def _augmented(self, value: torch.Tensor, channels: int, parameters: torch.Tensor) -> torch.Tensor:
        """Return other images of the same shape and dtype.

        Args:
            value: ``[*lead, C, H, W]`` or ``[*lead, H, W, C]``.
            channels: the dimension of the channels, -3 or -1.
            parameters: ``[n, *lead]``, with 1 in place of dimensions along which images share them.
        """

    def _images(self, tensordict: TensorDictBase, key: Key) -> _Images:
        """Return the images at a key, after all checks."""
        value, ndim = tensordict.get(key, None), tensordict.ndim
        if not isinstance(value, torch.Tensor) or value.is_nested:
            got = "nothing" if value is None else type(value).__name__
            raise SchemaMismatchError(
                f"Got a batch with {got} at {key}; {type(self).__name__} needs a tensor of images there. The batch has "
                f"{sorted(map(str, tensordict.keys(True, True)))}. Several keys are given as a list: in_keys=[...]."
            )
        if value.ndim < ndim + 3 or 0 in value.shape[-3:]:
            raise SchemaMismatchError(
                f"Got {key} of shape {list(value.shape)} in a batch {list(tensordict.shape)}; needed are images "
                "[*batch, C, H, W] or [*batch, H, W, C]."
            )
        channels = self._channel_dim(key, value)
        self._check(key, value, channels)
        drawn, chunk_of = list(value.shape[:-3]), None
        windows = len(drawn) > ndim and _has_windows(tensordict, key)
        cameras = ndim + 1 if ndim < 2 and windows else ndim  # the first dimension of cameras
        if not self.per_step:
            if ndim == 1 and not windows:
                chunk_of = _chunk_of(tensordict)
            elif cameras:
                drawn[cameras - 1] = 1
        return _Images(key, value, channels, tuple(drawn if self.per_camera else drawn[:cameras]), chunk_of)

    def _channel_dim(self, key: Key, value: torch.Tensor) -> int:
        if self.channels_last is not None:
            return -1 if self.channels_last else -3
        for counts in self.channel_counts:
            possible = [dim for dim in (-3, -1) if value.shape[dim] in counts]
            if possible:
                break
        if len(possible) == 1:
            return possible[0]
        raise InvalidArgumentError(
            f"Got {key} with images of shape {list(value.shape[-3:])}, of which {'both' if possible else 'neither'} "
            "the first and the last dimension can be that of the channels. Pass channels_last=True for [H, W, C], "
            "channels_last=False for [C, H, W]."
        )

    def _drawn(self, images: _Images) -> torch.Tensor:
        device = images.value.device
        # Every worker of a DataLoader has a copy of the generator, and would draw the same numbers from it.
        own = self.generator if get_worker_info() is None else None
        generator = current_generator(None) if own is None else own
        if generator is None:
            return self._draw(images.drawn, None, device)
        if generator.device.type not in ("cpu", device.type):
            raise InvalidArgumentError(
                f"Got a batch on {device} and a generator on {generator.device}; the generator must be on the device "
                "of the batch or on the CPU."
            )
        # From the CPU, without waiting for the device: the few numbers are copied by the call.
        return self._draw(images.drawn, generator, generator.device).to(device, non_blocking=True)


def _fitted(parameters: torch.Tensor, images: _Images) -> torch.Tensor:
    """Return parameters ``[n, *drawn]`` with a dimension for each of ``lead``, for images ``[*lead, C, H, W]``."""
    if images.chunk_of is not None:
        parameters = parameters.index_select(1, images.chunk_of)
    left_out = images.value.ndim - 3 - len(images.drawn)
    return parameters.view(*parameters.shape, *(1 for _ in range(left_out)))


def _has_windows(tensordict: TensorDictBase, key: Key) -> bool:
    """Return whether the first dimension of a value, behind those of its batch ``[B]`` or ``[]``, is one of steps.

    It is in batches of windows, which come with padding masks, and where no step of a trajectory is in place of it.
    """
    mask = (*key[:-1], f"{key[-1]}_is_pad")
    return any(tensordict.get(name, None) is not None for name in (mask, ("trajectory", *mask))) or (
        tensordict.get(STEPS, None) is None
    )


def _chunk_of(tensordict: TensorDictBase) -> torch.Tensor | None:
    """Return the chunk of each step of a flat batch ``[N]``; None if the batch doesn't tell where they are from.

    Nothing is read from the device.
    """
    ids, steps = tensordict.get(IDS, None), tensordict.get(STEPS, None)
    if ids is None or steps is None or not len(ids):
        return None
    ids, steps = ids.view(-1), steps.view(-1)
    begins = torch.diff(ids, prepend=ids[:1]) != 0
    ahead = torch.diff(steps, prepend=steps[:1])
    # The steps of a chunk lie the same number of steps apart; where it is padded, the same one comes again.
    stride = torch.where(begins | (ahead <= 0), torch.iinfo(ahead.dtype).max, ahead).min()
    begins |= (ahead < 0) | (ahead > stride)
    starts = tensordict.get(STARTS, None)
    if starts is not None:
        begins[1:] |= starts.reshape(len(ids), -1)[1:, 0]
    return begins.cumsum(0)
