"""Film strips of episodes on the table, seen from above."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from plots import BLUE, GREEN, GREY, ORANGE, plt
from tabletop import Actor, Table, World

FRAMES = 6


@torch.no_grad()
def plot_strip(world: World, actors: Mapping[str, Actor | None], seed: int, path: Path) -> None:
    """Draw the same episode as each of the actors plays it, one in a row. None is the expert."""
    shown = np.linspace(0, world.steps - 1, FRAMES).round().astype(int)
    figure, axes = plt.subplots(
        len(actors), FRAMES, figsize=(1.9 * FRAMES, 2.0 * len(actors)), layout="constrained", squeeze=False
    )
    for row, (name, actor) in zip(axes, actors.items(), strict=True):
        hands, goals = _play(world, actor, seed)
        for axis, step in zip(row, shown.tolist(), strict=True):
            there = np.linalg.norm(hands[step] - goals[step]) < world.tolerance
            color = GREEN if there else GREY
            axis.plot(*goals[: step + 1].T, color=ORANGE, lw=1, alpha=0.6)
            axis.plot(*hands[: step + 1].T, color=BLUE, lw=1)
            axis.add_patch(plt.Circle(goals[step], world.tolerance, color=ORANGE, alpha=0.35, lw=0))
            axis.plot(*hands[step], "o", color=BLUE, ms=5)
            axis.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[], aspect="equal")
            axis.set_title(f"step {step + 1}" + (", at the goal" if there else ""), fontsize=8)
            for spine in axis.spines.values():
                spine.set(color=color, linewidth=2 if there else 1)
        row[0].set_ylabel(name.replace(" ", "\n", 1), fontsize=8)
    figure.suptitle("One unseen episode: the hand (blue) and its goal (orange)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _play(world: World, actor: Actor | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the hand and the goal, `[steps, 2]`."""
    table = Table(world, 1, torch.Generator().manual_seed(seed))
    hands, goals = [], []
    for _ in range(world.steps):
        table.step(table.expert() if actor is None else actor(table.observation()).clamp(-1.0, 1.0))
        hands.append(table.hand[0])
        goals.append(table.goal()[0][0])
    return torch.stack(hands).numpy(), torch.stack(goals).numpy()
