"""Trajectories and chunks in Rerun (extra ``rerun``): images, scalars, texts and segments on one time line."""

from __future__ import annotations

import os
from typing import Any

from tensordict import TensorDictBase

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.monitor.extras import needing
from embodichain_rl.monitor.trajectories import curves_of, images_of, segments_of, texts_of, without_padding

__all__ = ["log_to_rerun"]


def log_to_rerun(
    td: TensorDictBase,
    *,
    path: str | os.PathLike[str] | None = None,
    connect: str | None = None,
    spawn: bool = False,
    name: str = "embodichain_rl",
    fps: float | None = None,
) -> Any:
    """Send a trajectory, or the chunks of a batch, to a recording or to a viewer.

    Every chunk is a tree of its own, ``chunk/0``, ``chunk/1``, ..., on the time line ``step``, and with ``fps`` also on
    ``time``. With none of ``path``, ``connect`` and ``spawn``, what is logged stays in the stream that is returned.

    Args:
        td: ``[T]`` or ``[B, T]``. Padding is left out.
        path: the file of the recording, such as ``"episode.rrd"``.
        connect: the address of a viewer that runs, such as ``"rerun+http://127.0.0.1:9876/proxy"``.
        spawn: whether a viewer is started.
        name: the name of the recording.
        fps: steps per second.

    Returns:
        The ``rerun.RecordingStream``.

    Raises:
        InvalidArgumentError: if ``td`` has no steps, or several targets are given.
        MissingPackageError: without the Rerun SDK.
    """
    if not isinstance(td, TensorDictBase) or td.ndim not in (1, 2):
        raise InvalidArgumentError("Needed is a trajectory [T] or a batch of chunks [B, T], such as rb.sample().")
    if sum((path is not None, connect is not None, spawn)) > 1:
        raise InvalidArgumentError("Give one of path, connect and spawn.")
    rr = needing("rerun", "rerun")
    stream = rr.RecordingStream(name)
    if path is not None:
        stream.save(os.fspath(path))
    elif connect is not None:
        stream.connect_grpc(connect)
    elif spawn:
        stream.spawn()
    if td.ndim == 1:
        _log(rr, stream, "trajectory", without_padding(td), fps)
    else:
        for number, chunk in enumerate(td.unbind(0)):
            _log(rr, stream, f"chunk/{number}", without_padding(chunk), fps)
    stream.flush()
    return stream


def _log(rr: Any, stream: Any, root: str, td: TensorDictBase, fps: float | None) -> None:
    images, curves = images_of(td), curves_of(td)
    starts = {begin: segment for begin, _, segment in segments_of(td)}
    for name, text in texts_of(td).items():
        stream.log(f"{root}/text/{name}", rr.TextDocument(text), static=True)
    for step in range(len(td)):
        stream.set_time("step", sequence=step)
        if fps is not None:
            stream.set_time("time", duration=step / fps)
        for name, frames in images.items():
            stream.log(f"{root}/image/{name}", rr.Image(frames[step]))
        for name, values in curves.items():
            stream.log(f"{root}/{name}", rr.Scalars(values[step]))
        if step in starts:
            stream.log(f"{root}/segment", rr.TextLog(f"segment {starts[step]} begins"))
            stream.log(f"{root}/segment_id", rr.Scalars(float(starts[step])))
