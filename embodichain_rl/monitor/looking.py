"""A trajectory as the web page shows it: its images as data, its curves, segments and texts."""

from __future__ import annotations

import base64
import io

import numpy as np

from embodichain_rl.monitor.extras import needing
from embodichain_rl.monitor.trajectories import curves_of, images_of, segments_of, texts_of
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["Look", "look_at"]

STRIP, STRIP_HEIGHT = 10, 96
"""Frames of the film strip, and their height in pixels, at most."""


class Look:
    """What there is to see in a trajectory.

    Attributes:
        length (int): its steps.
        texts (dict): by name.
        images (dict): by name, ``uint8`` ``[T, H, W, 3]``.
        curves (dict): by name, ``float64`` ``[T, n]``.
        segments (list): see :func:`segments_of`.
    """

    def __init__(self, storage: TrajectoryStorage, number: int) -> None:
        td = storage.trajectory(number)
        self.length = len(td)
        self.texts = texts_of(td, storage)
        self.images = images_of(td)
        self.curves = curves_of(td)
        self.segments = segments_of(td)

    def frame(self, name: str, step: int) -> str:
        """Return one image, as the address of a PNG."""
        return _png(self.images[name][step])

    def strip(self, name: str) -> str:
        """Return some images side by side, as the address of a PNG."""
        frames = self.images[name]
        shown = np.unique(np.linspace(0, len(frames) - 1, min(STRIP, len(frames))).round().astype(int))
        every = max(1, -(-frames.shape[1] // STRIP_HEIGHT))
        return _png(np.concatenate([_with_gap(frames[at, ::every, ::every]) for at in shown], axis=1))


def look_at(storage: TrajectoryStorage, number: int) -> Look:
    """Return what there is to see in the trajectory with an id.

    Raises:
        TrajectoryEvictedError: if it is not in the buffer any more.
    """
    return Look(storage, number)


def _with_gap(frame: np.ndarray) -> np.ndarray:
    return np.pad(frame, ((0, 0), (0, 1), (0, 0)), constant_values=255)


def _png(picture: np.ndarray) -> str:
    target = io.BytesIO()
    needing("watch", "PIL.Image").fromarray(np.ascontiguousarray(picture)).save(target, format="PNG")
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()
