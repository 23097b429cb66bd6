"""The kernels as tests need them: compiled ones, their twin, and both one part at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from embodichain_rl.errors import NativeKernelsError
from embodichain_rl.replay.host import chunk_batches
from embodichain_rl.replay.kernels import TWIN, Draws, Kernels, SamplePlan, Targets, compiled
from embodichain_rl.replay.kernels.build import compile_kernels

NAMES = ("compiled", "twin")


def kernels_named(name: str) -> Kernels:
    """Returns kernels, or skips the test where there is no compiler."""
    if name == "twin":
        return TWIN
    try:
        return compiled()
    except NativeKernelsError as error:
        pytest.skip(str(error))


def in_parts(kernels: Kernels) -> Kernels:
    """Returns kernels that do all of their work in Python calls of their parts, between which a test may stop."""

    def copy(plan: SamplePlan, draws: Draws, base: int, targets: Targets, threads: int) -> int:
        kernels.gather(plan, draws, base, targets, threads)
        kernels.write_index(plan, draws, base, targets)
        return kernels.check(plan, draws)

    def sample(
        plan: SamplePlan, numbers: int, missing: int, draws: Draws, base: int, targets: Targets, threads: int
    ) -> int:
        return kernels.draw(plan, numbers, missing, draws) or copy(plan, draws, base, targets, threads)

    return kernels._replace(sample=sample, copy=copy)


def use(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets buffers that are made from now on use these kernels."""
    monkeypatch.setattr(chunk_batches, "kernels", lambda: kernels)


def compile_with(directory: Path, *options: str) -> Path:
    """Compiles the kernels with options, or skips the test where there is no compiler."""
    try:
        return compile_kernels(directory / "kernels.so", options=options)
    except OSError as error:
        pytest.skip(f"no C compiler: {error}")
