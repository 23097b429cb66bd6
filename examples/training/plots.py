"""Figures of a training on a live stream, and of the learned policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # renders without a window, even if there is a screen

import matplotlib.pyplot as plt
import numpy as np
from progress import History
from studies import Curve, wilson_interval

BLUE, ORANGE, GREEN, PURPLE, GREY, RED = "#2a6fb0", "#d9731a", "#2e8b57", "#7a4fa3", "#8a8a8a", "#b03a2e"
COLORS, DASHES = (RED, GREY, ORANGE, PURPLE, GREEN, BLUE), ("-", "--", "-.", ":")


Panel = Callable[[plt.Axes, History], None]
"""A function that plots a part of a history."""


def plot_ratio(axis: plt.Axes, history: History) -> None:
    _draw(axis, history, "samples_per_insert", GREEN)
    axis.set(ylabel="chunks sampled\nper episode inserted", ylim=(0, None))


def plot_fill(axis: plt.Axes, history: History) -> None:
    _draw(axis, history, "fill", PURPLE)
    axis.set(ylabel="buffer fill", ylim=(0, 1.08))
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    inserted = axis.twinx()
    _draw(inserted, history, "episodes", GREY, ls="--")
    inserted.set_ylabel("episodes inserted", color=GREY)
    inserted.set_ylim(0, None)


def plot_frames(axis: plt.Axes, history: History, looks: int = 20) -> None:
    """Plot the frames collected and trained on per second, as means over some looks."""
    times = np.array([look.time for look in history.looks])
    for name, label, color in (("steps_written", "collected", GREEN), ("steps_trained", "trained on", PURPLE)):
        frames = np.array([getattr(look, name) for look in history.looks])
        rates = (frames[looks:] - frames[:-looks]) / (times[looks:] - times[:-looks])
        axis.plot((times[looks:] + times[:-looks]) / 2, rates, color=color, label=label)
    axis.set(ylabel="frames per second", ylim=(0, None))
    axis.legend(loc="best", frameon=False, ncols=2)


def plot_memory(axis: plt.Axes, history: History, announced: int, next_stored: int) -> None:
    """Plot the memory of the buffer.

    Args:
        axis: where it is plotted.
        history: of the training.
        announced: the bytes that the buffer is expected to take when it is full.
        next_stored: those that it would take if the next observations were stored too.
    """
    for size, label, style in (
        (next_stored, "announced without compact=True", ":"),
        (announced, "announced with compact=True", "--"),
    ):
        axis.axhline(size / 1e6, color=GREY, ls=style, label=label)
    axis.plot(
        [look.time for look in history.looks],
        [look.bytes_used / 1e6 for look in history.looks],
        color=BLUE,
        label="used",
    )
    axis.set(ylabel="memory of the\nbuffer in MB", ylim=(0, 1.5 * next_stored / 1e6))
    axis.legend(loc="upper right", frameon=False, ncols=3, fontsize=8)


def plot_history(
    history: History,
    target: float | None,
    episodes: int,
    loss_name: str,
    title: str,
    path: Path,
    panels: Sequence[Panel] = (plot_ratio, plot_fill),
) -> None:
    """Plot success, loss and other figures over wall-clock time, one above the other.

    Args:
        history: what is plotted.
        target: the success at which the training ends; None: there is no such one.
        episodes: the episodes of an evaluation.
        loss_name: what the loss is.
        title: the title of the figure.
        path: where it is written.
        panels: what is below success and loss.
    """
    figure, axes = plt.subplots(
        2 + len(panels),
        1,
        figsize=(8, 9),
        sharex=True,
        height_ratios=(3, *[2] * (1 + len(panels))),
        layout="constrained",
    )
    figure.suptitle(title)
    success, loss, *others = axes

    times = [evaluation.time for evaluation in history.evaluations]
    rates = np.array([evaluation.success for evaluation in history.evaluations])
    low, high = wilson_interval(rates, episodes)
    success.errorbar(times, rates, yerr=(rates - low, high - rates), color=BLUE, marker="o", capsize=3, lw=1.5)
    if target is not None:
        success.axhline(target, color=GREY, ls="--", lw=1)
        success.text(
            0.005, target, f"target {target:.0%}", color=GREY, va="bottom", transform=success.get_yaxis_transform()
        )
    success.set(ylabel=f"success on unseen goals\n({episodes} episodes, 95 % interval)", ylim=(-0.04, 1.04))
    success.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))

    _draw(loss, history, "loss", ORANGE)
    loss.set(ylabel=f"loss\n({loss_name})", yscale="log")
    loss.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    loss.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())

    for panel, axis in zip(panels, others, strict=True):
        panel(axis, history)
    axes[-1].set_xlabel("seconds since the start")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if history.ready is not None:
            axis.axvline(history.ready, color=GREY, ls=":", lw=1)
    if history.ready is not None:
        loss.annotate(
            " training begins", (history.ready, 0.1), xycoords=loss.get_xaxis_transform(), color=GREY, va="center"
        )
    axes[0].set_xlim(0, None)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_comparison(curves: dict[str, list[Curve]], episodes: int, title: str, path: Path) -> None:
    """Plot success over updates for each kind of data, as means over the seeds with their range, and the data below."""
    figure, (success, drawn) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    figure.suptitle(title)
    for color, (_, runs) in zip(_draw_successes(success, curves), curves.items(), strict=True):
        drawn.plot(runs[0].updates, np.mean([run.episodes for run in runs], 0), color=color, marker="o", ms=4)
    success.set(ylabel=f"success on unseen goals\n({episodes} episodes; mean and range over seeds)", ylim=(-0.04, 1.04))
    success.legend(loc="best", frameon=False)
    drawn.set(ylabel="different episodes\nto draw from until then", xlabel="updates", yscale="log")
    drawn.set_xlim(0, None)
    drawn.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    drawn.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%d"))
    drawn.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    for axis in (success, drawn):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_successes(axis: plt.Axes, curves: dict[str, list[Curve]]) -> list[str]:
    """Draw the success for each kind of data, as means over the seeds with their range. Return the colors."""
    colors = []
    for number, (name, runs) in enumerate(curves.items(), start=-len(curves)):  # the last one is always blue
        colors.append(COLORS[number % len(COLORS)])
        rates = np.array([run.success for run in runs])
        dashes = DASHES[number % len(DASHES)]
        axis.plot(runs[0].updates, rates.mean(0), color=colors[-1], ls=dashes, marker="o", ms=4, label=name)
        axis.fill_between(runs[0].updates, rates.min(0), rates.max(0), color=colors[-1], alpha=0.15, lw=0)
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    return colors


def _draw(axis: plt.Axes, history: History, name: str, color: str, **line: str) -> None:
    points = [(look.time, getattr(look, name)) for look in history.looks if getattr(look, name) is not None]
    axis.plot(*np.array(points, dtype=float).reshape(-1, 2).T, color=color, **line)


def plot_episode(
    frames: np.ndarray, at_goal: list[bool], title: str, path: Path, rows: int = 2, columns: int = 5
) -> None:
    """Make a contact sheet of evenly spaced frames `[T, height, width, 3]` of an episode, until the goal is reached."""
    reached = at_goal.index(True) if any(at_goal) else len(frames) - 1
    shown = np.linspace(0, min(reached + 2, len(frames) - 1), rows * columns).round().astype(int)
    height, width = frames.shape[1:3]
    figure, axes = plt.subplots(
        rows, columns, figsize=(12, rows * (12 / columns * height / width + 0.2)), layout="constrained"
    )
    figure.suptitle(title)
    for axis, step in zip(axes.flat, shown, strict=True):
        axis.imshow(frames[step])
        axis.set_title(f"step {step + 1}" + (", at the goal" if at_goal[step] else ""), fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(color=GREEN if at_goal[step] else GREY, linewidth=2 if at_goal[step] else 1)
    figure.savefig(path, dpi=120)
    plt.close(figure)
