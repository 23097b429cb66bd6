"""Videos of episodes: one file for each episode and camera."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from embodichain_rl.errors import DatasetReadError
from embodichain_rl.interop.lerobot.packages import package

__all__ = ["decode", "encode", "video_info"]

GROUP = 2
"""The distance of key frames, as in LeRobot: so single frames are found fast."""

QUALITY = "30"
"""The constant rate factor, as in LeRobot."""


def encode(path: Path, images: np.ndarray, fps: float, codec: str) -> None:
    """Write images ``uint8`` ``[T, H, W, 3]`` as a video.

    Args:
        path: of the new file.
        images: its frames.
        fps: frames per second.
        codec: such as ``"h264"`` or ``"libsvtav1"``.
    """
    av = package("av")
    rate = Fraction(fps).limit_denominator(1000)
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream(codec, rate, options={"g": str(GROUP), "crf": QUALITY})
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # beside the collectors
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def decode(path: Path, start: float, count: int, fps: float) -> np.ndarray:
    """Return the ``count`` frames of a video that begin at the time ``start``, ``uint8`` ``[count, H, W, 3]``.

    Raises:
        DatasetReadError: when there are less.
    """
    av = package("av")
    images: list[np.ndarray] = []
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.thread_type = "AUTO"
        if start > 0.0:
            file.seek(int(start / stream.time_base), stream=stream)
        for frame in file.decode(stream):
            if frame.time is not None and frame.time < start - 0.5 / fps:
                continue
            images.append(frame.to_ndarray(format="rgb24"))
            if len(images) == count:
                return np.stack(images)
    raise DatasetReadError(f"Got {path} with {len(images)} frames from {start:.3f} s on; needed are {count}.")


def video_info(path: Path) -> dict[str, Any]:
    """Return what ``info.json`` has of a video."""
    av = package("av")
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        return {
            "video.height": stream.height,
            "video.width": stream.width,
            "video.codec": stream.codec.canonical_name,
            "video.pix_fmt": stream.pix_fmt,
            "video.is_depth_map": False,
            "video.fps": int(stream.base_rate),
            "video.channels": 3,
            "has_audio": False,
        }
