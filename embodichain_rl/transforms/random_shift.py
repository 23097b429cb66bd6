"""Random shifts of images."""

from __future__ import annotations

import math

import torch
from tensordict import NestedKey

from embodichain_rl._checks import checked_int
from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.transforms.augmentation import Key, RandomImageTransform

__all__ = ["RandomShift"]


class RandomShift(RandomImageTransform):
    """Transform that shifts images by a few pixels at random, the augmentation of DrQ and DrQ-v2.

    Images are padded by repeating their border, ``pad`` pixels at each side, and cropped to their size at a random
    place: see Kostrikov et al. 2020, arXiv:2004.13649, and Yarats et al. 2021, arXiv:2107.09645.

    Use it with ``rb.append_transform(...)``, ``TrajectoryReplayBuffer(transform=...)`` or
    ``OnlineDataset(transform=...)``. It augments what is sampled, on the device where the batch is. What is stored does
    not change.

    All steps of a chunk are shifted alike, and every camera in its own way. A key is a camera, and so is each index of
    the dimensions between steps and images, as in ``[B, L, K, C, H, W]``. ``("next", key)``, if it is in ``in_keys``,
    is shifted as ``key`` is. It accepts chunks ``[B, L]``, single chunks ``[L]``, batches of windows ``[B]``, and flat
    batches ``[N]``, whose chunks are told by ``("trajectory", "id")`` and ``("trajectory", "step")``. Without these,
    each step of a flat batch is a chunk of its own.

    Args:
        pad: the largest shift in each direction, in pixels.
        in_keys: the key of the images, or a list of several. Images are ``[..., C, H, W]`` or ``[..., H, W, C]``, of
            any dtype and number of channels.

    Keyword Args:
        per_step: shift every image in its own way, also the steps of a chunk and their next observations.
        per_camera: False: shift all cameras alike.
        channels_last: whether images are ``[H, W, C]`` (True) or ``[C, H, W]`` (False). None: as the sizes of the
            dimensions tell, for each key.
        generator: draws the shifts. None: that of the batch, which is the buffer's, the one of ``sample_chunks``, or
            the seeded stream of an ``OnlineDataset``; or else torch's global one. In the worker of a ``DataLoader``
            always that of the batch.

    Raises:
        InvalidArgumentError: when an argument is invalid; by a sample, when the layout of images can't be told, or
            ``pad`` is not smaller than they are.
        SchemaMismatchError: by a sample without images at one of the keys.

    Example:
        >>> from embodichain_rl.transforms import RandomShift
        >>> rb = TrajectoryReplayBuffer(
        ...     max_trajectories=9, max_total_steps=90, chunk_size=2, batch_size=4, transform=RandomShift(pad=4)
        ... )
        >>> pixels = torch.randint(256, (10, 3, 84, 84), dtype=torch.uint8)
        >>> done = (torch.arange(10) == 9).unsqueeze(1)
        >>> _ = rb.extend(TensorDict({"pixels": pixels, "next": {"done": done}}, [10]))
        >>> batch = rb.sample()
        >>> batch["pixels"].shape, batch["pixels"].dtype
        (torch.Size([4, 2, 3, 84, 84]), torch.uint8)
    """

    # Those of one image, and those of some images one behind the other, as frames are stacked.
    channel_counts = frozenset({1, 3, 4}), frozenset({2, 6, 8, 9, 12, 16})

    def __init__(
        self,
        pad: int = 4,
        in_keys: NestedKey | list[NestedKey] = "pixels",
        *,
        per_step: bool = False,
        per_camera: bool = True,
        channels_last: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_keys, per_step, per_camera, channels_last, generator)
        self.pad = checked_int("pad", pad, minimum=0)

    def _check(self, key: Key, value: torch.Tensor, channels: int) -> None:
        height, width = value.shape[-2:] if channels == -3 else value.shape[-3:-1]
        if self.pad >= min(height, width):
            raise InvalidArgumentError(
                f"Got pad={self.pad} for {key} with images of {height} x {width} pixels; it must be smaller than "
                "they are."
            )

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
        return torch.randint(2 * self.pad + 1, (2, *shape), generator=generator, device=device)

    def _augmented(self, value: torch.Tensor, channels: int, parameters: torch.Tensor) -> torch.Tensor:
        # Padded to the left and to the right, each line of an image is a range of one flat tensor, wherever the crop
        # begins. Selecting ranges copies line by line, which is several times faster than selecting pixels.
        across_dim, pixel = (-1, 1) if channels == -3 else (-2, value.shape[-1])
        height, width = value.shape[across_dim - 1], value.shape[across_dim]
        border = list(value.shape)
        border[across_dim] = self.pad
        left, right = (value.narrow(across_dim, at, 1).expand(border) for at in (0, width - 1))
        padded = torch.cat((left, value, right), across_dim).reshape(-1)

        planes = value.shape[: across_dim - 1]  # [*lead, C] or [*lead]
        down, across = (shift.view(*shift.shape, *(1,) * (len(planes) + 1 - shift.ndim)) for shift in parameters)
        line = (torch.arange(height, device=value.device) + (down - self.pad)).clamp_(0, height - 1)
        plane = torch.arange(math.prod(planes), device=value.device).view(*planes, 1)
        begin = ((plane * height + line) * (width + 2 * self.pad) + across) * pixel
        return padded.unfold(0, width * pixel, 1).index_select(0, begin.view(-1)).view(value.shape)
