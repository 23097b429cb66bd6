"""Random changes of the colours of images."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey

from embodichain_rl._checks import checked_float
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError
from embodichain_rl.transforms.augmentation import Key, RandomImageTransform

__all__ = ["RandomColorJitter"]

BRIGHTNESS, CONTRAST, SATURATION = range(3)

GRAY = (0.2989, 0.587, 0.114)
"""The weights of red, green and blue in the brightness of a pixel, as in torchvision."""


class RandomColorJitter(RandomImageTransform):
    """Transform that changes brightness, contrast and saturation of images at random, as torchvision's ``ColorJitter``.

    Each of the three changes is made with a random factor, in a random order. The formulas are those of torchvision:
    a change blends an image with black, with its mean brightness, or with its gray version, and clips the result.
    ``uint8`` is rounded down after each change. The hue is not changed.

    Use it as :class:`RandomShift`. All steps of a chunk are changed alike, and every camera in its own way, as
    described there.

    Args:
        brightness: the factor is drawn uniformly from ``[max(0, 1 - brightness), 1 + brightness]``, or from the range
            ``(min, max)`` that is given. 0: no change.
        contrast: the same for the contrast.
        saturation: the same for the saturation. Images with one channel have none.
        in_keys: the key of the images, or a list of several. Images are ``[..., C, H, W]`` or ``[..., H, W, C]`` with 1
            or 3 channels, ``uint8``, or of a floating-point dtype with values from 0 to 1.

    Keyword Args:
        per_step: change every image in its own way, also the steps of a chunk and their next observations.
        per_camera: False: change all cameras alike.
        channels_last: see :class:`RandomShift`.
        generator: see :class:`RandomShift`.

    Raises:
        InvalidArgumentError: when an argument is invalid; by a sample, when the layout of images can't be told.
        SchemaMismatchError: by a sample without images at one of the keys, or with images of another dtype or number of
            channels.

    Example:
        >>> from embodichain_rl.transforms import RandomColorJitter
        >>> jitter = RandomColorJitter(0.3, 0.3, (0.5, 1.5), in_keys=[("observation", "images", "front"), "wrist"])
        >>> batch = TensorDict({"wrist": torch.rand(4, 2, 3, 64, 64)}, [4, 2])
        >>> batch["observation", "images", "front"] = torch.randint(256, (4, 2, 48, 64, 3), dtype=torch.uint8)
        >>> jitter(batch)["observation", "images", "front"].dtype
        torch.uint8
    """

    channel_counts = (frozenset({1, 3}),)

    def __init__(
        self,
        brightness: float | tuple[float, float] = 0.0,
        contrast: float | tuple[float, float] = 0.0,
        saturation: float | tuple[float, float] = 0.0,
        in_keys: NestedKey | list[NestedKey] = "pixels",
        *,
        per_step: bool = False,
        per_camera: bool = True,
        channels_last: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_keys, per_step, per_camera, channels_last, generator)
        self.brightness = _factors("brightness", brightness)
        self.contrast = _factors("contrast", contrast)
        self.saturation = _factors("saturation", saturation)
        ranges = {BRIGHTNESS: self.brightness, CONTRAST: self.contrast, SATURATION: self.saturation}
        self._ranges = {change: factors for change, factors in ranges.items() if factors != (1.0, 1.0)}

    def _check(self, key: Key, value: torch.Tensor, channels: int) -> None:
        if value.dtype != torch.uint8 and not value.is_floating_point():
            raise SchemaMismatchError(
                f"Got {key} with images of {value.dtype}; RandomColorJitter needs torch.uint8, or a floating-point "
                "dtype with values from 0 to 1."
            )
        if value.shape[channels] not in (1, 3):
            raise SchemaMismatchError(
                f"Got {key} with images of {value.shape[channels]} channels; RandomColorJitter needs 1 or 3. If the "
                "channels are in another dimension, pass channels_last."
            )

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
        """Return the factor of each change, and then the numbers of the changes in their order."""
        count = len(self._ranges)
        drawn = torch.rand((2 * count, *shape), generator=generator, device=device)
        for factor, (low, high) in zip(drawn, self._ranges.values(), strict=False):
            factor.mul_(high - low).add_(low)
        drawn[count:] = drawn[count:].argsort(0)
        return drawn

    def _augmented(self, value: torch.Tensor, channels: int, parameters: torch.Tensor) -> torch.Tensor:
        changes = list(self._ranges)
        whole_numbers = value.dtype == torch.uint8
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        images = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
        # Two blocks of memory for all changes: on a CPU, new memory of this size costs more than what is computed.
        gray, spare = (torch.empty_like(images.narrow(channels, 0, 1)) for _ in range(2))
        parameters = parameters.to(dtype)[..., None, None, None]
        factors, order = parameters[: len(changes)], parameters[len(changes) :].long()
        for number in range(len(changes)):
            turn = order[number]
            factor = factors.gather(0, turn[None])[0]
            if SATURATION in changes and value.shape[channels] == 1:
                factor = torch.where(turn == changes.index(SATURATION), 1.0, factor)
            if changes == [BRIGHTNESS]:  # blended with black
                images.mul_(factor)
            else:
                _write_gray(images, channels, gray, spare, whole_numbers)
                other = _written_other(gray, changes, turn)
                images.mul_(factor).add_(other.mul_(1 - factor))
            images.clamp_(0, 255 if whole_numbers else 1)
            if whole_numbers:
                images.trunc_()
        return images.to(value.dtype)


def _write_gray(
    images: torch.Tensor, channels: int, gray: torch.Tensor, spare: torch.Tensor, whole_numbers: bool
) -> None:
    """Write the gray version of images to ``gray``, and something else to ``spare``."""
    if images.shape[channels] == 1:
        gray.copy_(images)
        return
    red, green, blue = images.split(1, channels)
    torch.mul(red, GRAY[0], out=gray)
    gray.add_(torch.mul(green, GRAY[1], out=spare))
    gray.add_(torch.mul(blue, GRAY[2], out=spare))
    if whole_numbers:
        gray.trunc_()


def _written_other(gray: torch.Tensor, changes: list[int], turn: torch.Tensor) -> torch.Tensor:
    """Return what images are blended with: black, their mean brightness, or their gray version; overwrite ``gray``."""
    other = gray.new_zeros(())
    if CONTRAST in changes:
        other = torch.where(turn == changes.index(CONTRAST), gray.mean((-3, -2, -1), keepdim=True), other)
    if SATURATION in changes:
        other = torch.where(turn == changes.index(SATURATION), gray, other, out=gray)
    return other


def _factors(name: str, value: Any) -> tuple[float, float]:
    """Return the range of a factor."""
    if not isinstance(value, (tuple, list)):
        strength = checked_float(name, value, minimum=0.0)
        return max(0.0, 1.0 - strength), 1.0 + strength
    if len(value) != 2:
        raise InvalidArgumentError(f"Got {name}={value!r}; it must be a number, or a range (min, max).")
    low, high = (checked_float(name, bound, minimum=0.0) for bound in value)
    if low > high:
        raise InvalidArgumentError(f"Got {name}={value!r}; the range (min, max) is empty.")
    return low, high
