"""Pictures for papers and notebooks, by matplotlib (extra ``watch``), and films, by PyAV (extra ``lerobot``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.monitor.extras import needing
from embodichain_rl.monitor.trajectories import curves_of, images_of, segments_of, texts_of, without_padding
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer

__all__ = ["contact_sheet", "film", "plot_buffer", "plot_trajectory"]

COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")
FRAMES = 8
"""Frames of the film strip above the curves."""


def plot_trajectory(
    td: TensorDictBase, keys: Sequence[Any] | None = None, rb: TrajectoryReplayBuffer | None = None
) -> Any:
    """Draw a trajectory or a chunk: its images as a film strip, and its numbers as curves over its steps.

    Segments are shaded, and texts stand in the title.

    Args:
        td: ``[T]``, such as ``rb[0]``, ``rb.trajectory(id)`` or ``rb.sample()[0]``. Padding is left out.
        keys: the curves to draw; by default actions, rewards and observations with at most 32 numbers a step.
        rb: the buffer that it is from, to look up its texts where it has their ids.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        InvalidArgumentError: if ``td`` is no trajectory.
        MissingPackageError: without matplotlib.

    Example:
        >>> steps = TensorDict({"action": torch.randn(20, 2), "next": {"reward": torch.rand(20, 1)}}, [20])
        >>> len(plot_trajectory(steps).axes)
        2
    """
    steps = without_padding(_checked(td))
    curves, images = curves_of(steps, keys), images_of(steps)
    strips = list(images.items())
    rows = len(strips) + max(1, len(curves))
    heights = [1.1] * len(strips) + [1.5] * max(1, len(curves))
    figure = _figure(9.0, 0.8 + sum(heights))
    grid = figure.add_gridspec(rows, 1, height_ratios=heights)
    for row, (name, frames) in enumerate(strips):
        axes = figure.add_subplot(grid[row])
        shown = np.unique(np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int))
        height, width = frames.shape[1:3]
        axes.imshow(np.concatenate([_padded(frames[at]) for at in shown], axis=1), aspect="equal")
        axes.set_xticks([(number + 0.5) * (width + 2) for number in range(len(shown))], [str(at) for at in shown])
        axes.set_yticks([])
        axes.tick_params(length=0, labelsize=7)
        axes.set_title(name, fontsize=9, loc="left")
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_ylim(height + 1, -1)
    first = None
    for number, (name, values) in enumerate(curves.items()):
        axes = figure.add_subplot(grid[len(strips) + number], sharex=first)
        first = first or axes
        _curves(axes, name, values)
        _shade(axes, segments_of(steps), named=number == 0)
        axes.tick_params(labelbottom=number == len(curves) - 1)
    if first is not None:
        figure.axes[-1].set_xlabel("step")
        first.set_xlim(-0.5, len(steps) - 0.5)
    title = " · ".join(f"{name}: {text}" for name, text in texts_of(steps, None if rb is None else rb.storage).items())
    if title:
        figure.suptitle(title, fontsize=10, x=0.02, ha="left")
    return figure


def _curves(axes: Any, name: str, values: np.ndarray) -> None:
    for dimension in range(values.shape[1]):
        color = COLORS[dimension % len(COLORS)]
        style = "-" if dimension < len(COLORS) else "--"
        axes.plot(values[:, dimension], color=color, linewidth=1.2, linestyle=style, label=str(dimension))
    axes.set_title(name, fontsize=9, loc="left")
    axes.grid(True, color="#e5e7eb", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
    if 1 < values.shape[1] <= 8:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.0)


def _shade(axes: Any, segments: Sequence[tuple[int, int, int]], *, named: bool) -> None:
    if len(segments) < 2:
        return
    for number, (begin, end, segment) in enumerate(segments):
        if number % 2:
            axes.axvspan(begin - 0.5, end - 0.5, color="#f1f5f9", zorder=0)
        if named:
            axes.annotate(
                f"segment {segment}",
                (begin, 1.0),
                xycoords=("data", "axes fraction"),
                fontsize=6,
                color="#64748b",
                va="top",
            )


def plot_buffer(rb: TrajectoryReplayBuffer) -> Any:
    """Draw what is in a buffer: lengths, returns, ages, success by task, and where chunks were drawn from.

    Args:
        rb: the buffer, also one that is attached to.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        MissingPackageError: without matplotlib.
    """
    if not isinstance(rb, TrajectoryReplayBuffer):
        raise InvalidArgumentError(f"Got a {type(rb).__name__}; it must be a TrajectoryReplayBuffer.")
    stats = rb.stats()
    figure = _figure(10.0, 6.0)
    axes = figure.subplots(2, 3).ravel()
    _bars(axes[0], stats["histograms"]["length"], "length, steps", COLORS[0])
    _bars(axes[1], stats["histograms"]["return"], "return", COLORS[2])
    _ages(axes[2], stats["histograms"]["sampled_age"], "age when sampled, s")
    _lags(axes[3], stats["histograms"]["sampled_policy_lag"])
    _heat(figure, axes[4], np.array(stats["draws_by_place_and_age"]), stats["histograms"]["sampled_age"]["edges"])
    _shares(axes[5], stats)
    figure.suptitle(
        f"{stats['trajectories']:,} trajectories, {stats['steps']:,} steps, {stats['fill']:.0%} full; "
        f"{stats['samples']:,} chunks sampled",
        fontsize=11,
        x=0.02,
        ha="left",
    )
    return figure


def _bars(axes: Any, histogram: dict[str, list[float]], name: str, color: str) -> None:
    _plain(axes, name)
    edges = np.array(histogram["edges"])
    if not len(edges):
        return _nothing(axes)
    axes.bar(
        edges[:-1], histogram["counts"], np.diff(edges), align="edge", color=color, edgecolor="white", linewidth=0.4
    )
    axes.set_ylabel("trajectories", fontsize=8)


def _ages(axes: Any, histogram: dict[str, list[float]], name: str) -> None:
    _plain(axes, name)
    counts, edges = np.array(histogram["counts"]), np.array(histogram["edges"])
    if not counts.sum():
        return _nothing(axes)
    used = np.flatnonzero(counts[:-1])
    low, high = (used[0], used[-1] + 1) if len(used) else (0, 1)
    edges[0] = edges[1] / 2.0
    axes.stairs(counts[low:high], edges[low : high + 1], fill=True, color=COLORS[3])
    axes.set_xscale("log")
    axes.set_ylabel("chunks", fontsize=8)


def _lags(axes: Any, histogram: dict[str, list[float]]) -> None:
    _plain(axes, "policy lag when sampled, versions")
    counts = np.array(histogram["counts"])
    if not counts.sum():
        return _nothing(axes)
    last = int(np.flatnonzero(counts)[-1]) + 1
    labels = [f"{edge:g}" for edge in histogram["edges"]] + ["more"]
    axes.bar(range(last), counts[:last], color=COLORS[1], edgecolor="white", linewidth=0.4)
    every = max(1, last // 8)
    axes.set_xticks(range(0, last, every), labels[:last:every])
    axes.set_ylabel("chunks", fontsize=8)


def _heat(figure: Any, axes: Any, counts: np.ndarray, edges: Sequence[float]) -> None:
    _plain(axes, "where chunks were drawn")
    axes.grid(False)
    if not counts.sum():
        return _nothing(axes)
    used = np.flatnonzero(counts.sum(axis=0))
    low, high = int(used[0]), int(used[-1]) + 1
    shown = axes.imshow(
        counts[:, low:high].T, aspect="auto", origin="lower", cmap="Blues", extent=(0, 1, 0, high - low)
    )
    axes.set_xlabel("place in the trajectory: first to last step", fontsize=8)
    every = max(1, (high - low) // 5)
    ticks = range(0, high - low + 1, every)
    bounds = [edges[min(2 * (low + tick), len(edges) - 1)] for tick in ticks]
    axes.set_yticks(list(ticks), [f"{bound:.2g} s" for bound in bounds])
    axes.set_ylabel("age", fontsize=8)
    figure.colorbar(shown, ax=axes, fraction=0.05).ax.tick_params(labelsize=7)


def _shares(axes: Any, stats: dict[str, Any]) -> None:
    if stats["mixture_asked"]:
        _plain(axes, "mixture: asked for and drawn")
        names = [*stats["mixture_asked"]]
        at = np.arange(len(names))
        axes.barh(at + 0.2, [stats["mixture_asked"][name] for name in names], 0.4, color="#cbd5e1", label="asked for")
        drawn = [stats["mixture_drawn"].get(name, 0.0) for name in names]
        axes.barh(at - 0.2, drawn, 0.4, color=COLORS[0], label="drawn")
        axes.set_yticks(at, [str(name)[:18] for name in names])
        axes.legend(fontsize=7, frameon=False)
        return
    _plain(axes, "success by task")
    if not stats["success_by_task"]:
        return _nothing(axes, "no success stored")
    names = [*stats["success_by_task"]][:12]
    axes.barh([str(name)[:18] for name in names], [stats["success_by_task"][name] for name in names], color=COLORS[2])
    axes.set_xlim(0, 1)


def _plain(axes: Any, name: str) -> None:
    axes.set_title(name, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.grid(True, color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _nothing(axes: Any, text: str = "nothing yet") -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#94a3b8", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def contact_sheet(td: TensorDictBase, key: Any = None, columns: int = 8, frames: int = 32) -> Any:
    """Draw the images of a trajectory, or of a batch of chunks, as a sheet.

    Args:
        td: ``[T]``, a trajectory; or ``[B, T]``, of which each row is a chunk.
        key: the image to show; by default the first one.
        columns: images in a row of the sheet.
        frames: of a trajectory, at most so many images, evenly spread.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        InvalidArgumentError: if there are no images.
        MissingPackageError: without matplotlib.
    """
    many = td.ndim == 2
    rows = [without_padding(row) for row in td.unbind(0)] if many else [without_padding(_checked(td))]
    pictures: list[tuple[str, np.ndarray]] = []
    for number, row in enumerate(rows):
        images = images_of(row)
        name = next(iter(images), None) if key is None else _name(key)
        if name not in images:
            raise InvalidArgumentError(
                f"Got key={key!r}, but the images are {[*images]}: uint8 or float, [T, H, W, 3]."
            )
        wanted = min(columns if many else frames, len(row))
        for at in np.unique(np.linspace(0, len(row) - 1, wanted).round().astype(int)):
            pictures.append((f"chunk {number}, step {at}" if many else f"step {at}", images[name][at]))
    height, width = pictures[0][1].shape[:2]
    lines = -(-len(pictures) // columns)
    figure = _figure(9.0, 0.4 + lines * (9.0 / columns * height / width + 0.22))
    grid = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (label, picture) in zip(grid, pictures, strict=False):
        axes.imshow(picture)
        axes.set_title(label, fontsize=7, pad=2)
    return figure


def film(td: TensorDictBase, path: str | os.PathLike[str], key: Any = None, fps: float = 20.0) -> None:
    """Write the images of a trajectory to a video file, H.264 in MP4.

    Args:
        td: ``[T]``.
        path: the file, such as ``"episode.mp4"``.
        key: the image; by default all of them, side by side.
        fps: frames per second.

    Raises:
        InvalidArgumentError: if there are no images.
        MissingPackageError: without PyAV.
    """
    av = needing("lerobot", "av")
    images = images_of(without_padding(_checked(td)))
    if key is not None:
        images = {name: frames for name, frames in images.items() if name == _name(key)}
    if not images:
        raise InvalidArgumentError(f"Got key={key!r}, but there are no such images: uint8 or float, [T, H, W, 3].")
    height = max(frames.shape[1] for frames in images.values())
    tall = [np.pad(value, ((0, 0), (0, height - value.shape[1]), (0, 0), (0, 0))) for value in images.values()]
    frames = np.concatenate(tall, axis=2)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)))
    from fractions import Fraction

    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _figure(width: float, height: float) -> Any:
    figure = needing("watch", "matplotlib.figure").Figure(figsize=(width, height), layout="constrained", dpi=110)
    figure.patch.set_facecolor("white")
    needing("watch", "matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def _padded(frame: np.ndarray) -> np.ndarray:
    return np.pad(frame, ((0, 0), (0, 2), (0, 0)), constant_values=255)


def _name(key: Any) -> str:
    return key if isinstance(key, str) else ".".join(key)


def _checked(td: TensorDictBase) -> TensorDictBase:
    if not isinstance(td, TensorDictBase) or td.ndim != 1:
        shape = list(td.shape) if isinstance(td, (TensorDictBase, torch.Tensor)) else type(td).__name__
        raise InvalidArgumentError(
            f"Got {shape}; it must be one trajectory or chunk, a TensorDict [T], such as rb[0] or rb.sample()[0]."
        )
    return td
