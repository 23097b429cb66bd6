"""``lerobot-train`` over a live buffer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.interop.lerobot.dataset import LiveDataset, as_lerobot
from embodichain_rl.interop.lerobot.packages import package

__all__ = ["main", "train"]

REPO_ID = "embodichain_rl/live"

USAGE = """usage: python -m embodichain_rl.interop.lerobot MODULE:FUNCTION [arguments of lerobot-train]

MODULE:FUNCTION  a function without arguments that returns a buffer or a started engine; or a dataset of as_lerobot
"""


def train(source: Any, arguments: Sequence[str] = (), **options: Any) -> None:
    """Run LeRobot's own ``lerobot-train`` over a live buffer.

    The dataset is that of :func:`as_lerobot`, with the ``delta_timestamps`` that the policy asks for. All else is
    LeRobot's: policies, processors, optimizers, checkpoints, logging. Worker processes of its ``DataLoader`` are forked
    by default, so they share the buffer.

    Args:
        source: a buffer, a storage or an engine that collects, with at least one trajectory.
        arguments: of ``lerobot-train``, such as ``["--policy.type=act", "--steps=2000"]``; ``--dataset.repo_id`` may be
            left out.
        options: of :func:`as_lerobot`, other than ``delta_timestamps`` and ``image_transforms``.

    Raises:
        MissingPackageError: when LeRobot is not installed.
        EmptyBufferError: when there is no trajectory yet.

    Example:
        >>> with OnlineDataEngine(cfg) as engine:  # doctest: +SKIP
        ...     train(engine, ["--policy.type=act", "--policy.push_to_hub=false", "--steps=2000"], fps=20)
    """
    script = package("lerobot.scripts.lerobot_train")
    arguments = [str(argument) for argument in arguments]
    if not any(argument.startswith("--dataset.repo_id") for argument in arguments):
        arguments = [f"--dataset.repo_id={REPO_ID}", *arguments]
    as_lerobot(source, **options)  # what is wrong is seen before the policy is made
    with _in_place_of(script, "make_dataset", lambda cfg: _dataset(cfg, source, options)), _command_line(arguments):
        script.train()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m embodichain_rl.interop.lerobot``; see ``USAGE``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE)
        return
    module, _, name = given[0].partition(":")
    if not module or not name:
        raise InvalidArgumentError(f"Got {given[0]!r}; needed is MODULE:FUNCTION, such as my_project.data:make_engine.")
    sys.path.insert(0, "")
    made = getattr(importlib.import_module(module), name)()
    stop = getattr(made, "stop", None)
    try:
        train(made, given[1:])
    finally:
        if stop is not None:
            stop()


def _dataset(cfg: Any, source: Any, options: dict[str, Any]) -> LiveDataset:
    """Do what LeRobot's ``make_dataset`` does."""
    factory = package("lerobot.datasets.factory")
    dataset = source if isinstance(source, LiveDataset) else as_lerobot(source, **options)
    settings = cfg.dataset.image_transforms
    transforms = package("lerobot.datasets.transforms").ImageTransforms(settings) if settings.enable else None
    dataset = dataset.with_windows(
        delta_timestamps=factory.resolve_delta_timestamps(cfg.policy, dataset.meta), image_transforms=transforms
    )
    if cfg.dataset.use_imagenet_stats:
        for name in dataset.meta.camera_keys:
            dataset.meta.fixed_stats[name] = {
                kind: torch.tensor(values, dtype=torch.float32).numpy()
                for kind, values in factory.IMAGENET_STATS.items()
            }
        dataset.meta.refresh()
    return dataset


@contextmanager
def _in_place_of(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["lerobot-train", *arguments]
    try:
        yield
    finally:
        sys.argv = before
