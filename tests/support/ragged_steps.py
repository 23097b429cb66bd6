"""Trajectories with ragged and image entries, in which every value identifies its trajectory and step."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase


def points_of(number: int, step: int) -> torch.Tensor:
    """Return the points ``[n, 3]`` of a step; between none and six."""
    n = (3 * number + 5 * step) % 7
    return torch.arange(3.0 * n).reshape(n, 3) + 1000.0 * number + 10.0 * step


def frame_of(number: int, step: int, shape: tuple[int, ...] = (4, 5, 3)) -> torch.Tensor:
    """Return the frame of a step."""
    size = torch.Size(shape).numel()
    return ((torch.arange(size) * (1 + number % 3) + 31 * number + 7 * step) % 256).to(torch.uint8).reshape(shape)


def jagged(values: list[torch.Tensor]) -> torch.Tensor:
    """Return values of unequal sizes as a jagged tensor."""
    offsets = torch.tensor([0, *map(len, values)]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(torch.cat(values), offsets)


def padded(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values of unequal sizes padded to the longest, and their lengths."""
    lengths = torch.tensor([len(value) for value in values])
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True), lengths


def ragged_trajectory(number: int, length: int, *, frames: tuple[int, ...] = (4, 5, 3)) -> TensorDict:
    """Return the steps ``[length]`` of trajectory ``number``, in padded form, so that they can be split."""
    points, lengths = padded([points_of(number, step) for step in range(length + 1)] + [torch.zeros(6, 3)])
    pixels = torch.stack([frame_of(number, step, frames) for step in range(length + 1)])
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = True
    return TensorDict(
        {
            "points": points[:length],
            "points_lengths": lengths[:length],
            "frame": pixels[:-1],
            "label": torch.stack([torch.full((length,), number), torch.arange(length)], dim=-1),
            "next": {
                "points": points[1 : length + 1],
                "points_lengths": lengths[1 : length + 1],
                "frame": pixels[1:],
                "done": done,
            },
        },
        [length],
    )


def check_ragged(data: TensorDictBase, *, same_bits: bool = True) -> TensorDictBase:
    """Compare all ragged values and frames of some steps with what was written; return the data.

    Args:
        data: steps of any batch size, from a buffer; steps of zeros are padding.
        same_bits: whether frames must be equal; else they may differ somewhat.
    """
    flat = data.reshape(-1)
    mask: Any = flat.get(("collector", "mask"), None)
    edges = mask is not None and not bool(mask.all())
    for at in range(len(flat)):
        step = flat[at]
        number, within = step["label"].tolist()
        if edges and not bool(mask[at]) and not step["frame"].any():
            continue
        for later in (0, 1):
            part = step["next"] if later else step
            expected, count = points_of(number, within + later), int(part["points_lengths"])
            assert count == len(expected), "another number of points"
            assert torch.equal(part["points"][:count], expected), "other points"
            assert not part["points"][count:].any(), "padding that is not zero"
            frame = frame_of(number, within + later, tuple(part["frame"].shape))
            differ = (frame.int() - part["frame"].int()).abs().max()
            assert differ == 0 if same_bits else differ < 200, "another frame"
    return data
