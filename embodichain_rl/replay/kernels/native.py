"""Loads the compiled kernels, and chooses between them and their NumPy twin."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embodichain_rl.errors import InvalidArgumentError, NativeKernelsError
from embodichain_rl.replay.kernels import twin
from embodichain_rl.replay.kernels.build import LIBRARY, SOURCE, checksum
from embodichain_rl.replay.kernels.first_numbers import FIRST_NUMBERS, first_numbers
from embodichain_rl.replay.kernels.plans import Draws, SamplePlan, Targets

__all__ = ["TWIN", "VARIABLE", "Kernels", "compiled", "kernels"]

VARIABLE = "EMBODICHAIN_RL_NATIVE"
"""The environment variable that decides: 0: never compiled kernels; 1: always; not set: if there are any."""


class Kernels(NamedTuple):
    """The kernels, compiled or in NumPy; ``kernels.c`` explains what each of them does.

    ``numbers`` and ``base`` are addresses: of ``float64`` random numbers, and of the block of a batch.
    """

    is_compiled: bool
    sample: Callable[[SamplePlan, int, int, Draws, int, Targets, int], int]
    copy: Callable[[SamplePlan, Draws, int, Targets, int], int]
    draw: Callable[[SamplePlan, int, int, Draws], int]
    gather: Callable[[SamplePlan, Draws, int, Targets, int], None]
    write_index: Callable[[SamplePlan, Draws, int, Targets], None]
    check: Callable[[SamplePlan, Draws], int]
    first_numbers: Callable[[np.ndarray], np.ndarray] = first_numbers
    """Of seeds, ``int64`` ``[n]``, the numbers that their generators draw first, ``float64`` ``[n, FIRST_NUMBERS]``."""


TWIN = Kernels(False, twin.sample, twin.copy, twin.draw, twin.gather, twin.write_index, twin.check)


def compiled(library: Path = LIBRARY) -> Kernels:
    """Load compiled kernels. Their calls release the GIL.

    Raises:
        NativeKernelsError: when there are none, or when they were compiled from another source than this version's.
    """
    if not library.exists():
        raise NativeKernelsError(
            f"There are no compiled kernels: no file {library}. Install a C compiler and then the package again (in a "
            f"clone of the project, `python {SOURCE.with_name('build.py')}` is enough), or unset {VARIABLE}."
        )
    try:
        functions = ctypes.CDLL(str(library))
        functions.ec_source.restype = ctypes.c_uint32
        other = SOURCE.exists() and functions.ec_source() != checksum()
    except (OSError, AttributeError) as error:
        raise NativeKernelsError(f"The compiled kernels can't be loaded: {error}. Compile them again.") from error
    if other:
        raise NativeKernelsError(
            f"The compiled kernels in {library} are not those of this version. Install the package again (in a clone "
            f"of the project, `python {SOURCE.with_name('build.py')}` is enough)."
        )
    address, word = ctypes.c_void_p, ctypes.c_int64

    def function(name: str, *arguments: type, returns: type | None = word) -> Callable[..., int]:
        found: Callable[..., int] = ctypes.CFUNCTYPE(returns, *arguments)((name, functions))
        return found

    ec_sample = function("ec_sample", address, address, word, address, address, address, word)
    ec_copy = function("ec_copy", address, address, address, address, word)
    ec_draw = function("ec_draw", address, address, word, address)
    ec_gather = function("ec_gather", address, address, address, address, word, returns=None)
    ec_index = function("ec_index", address, address, address, address, returns=None)
    ec_check = function("ec_check", address, address)
    ec_first_numbers = function("ec_first_numbers", address, word, address, returns=None)

    def sample(
        plan: SamplePlan, numbers: int, missing: int, draws: Draws, base: int, targets: Targets, threads: int
    ) -> int:
        return ec_sample(plan.address, numbers, missing, draws.address, base, targets.address, threads)

    def copy(plan: SamplePlan, draws: Draws, base: int, targets: Targets, threads: int) -> int:
        return ec_copy(plan.address, draws.address, base, targets.address, threads)

    def draw(plan: SamplePlan, numbers: int, missing: int, draws: Draws) -> int:
        return ec_draw(plan.address, numbers, missing, draws.address)

    def gather(plan: SamplePlan, draws: Draws, base: int, targets: Targets, threads: int) -> None:
        ec_gather(plan.address, draws.address, base, targets.address, threads)

    def write_index(plan: SamplePlan, draws: Draws, base: int, targets: Targets) -> None:
        ec_index(plan.address, draws.address, base, targets.address)

    def check(plan: SamplePlan, draws: Draws) -> int:
        return ec_check(plan.address, draws.address)

    def numbers_of(seeds: np.ndarray) -> np.ndarray:
        seeds, numbers = np.ascontiguousarray(seeds, np.int64), np.empty((len(seeds), FIRST_NUMBERS))
        ec_first_numbers(seeds.ctypes.data, len(seeds), numbers.ctypes.data)
        return numbers

    return Kernels(True, sample, copy, draw, gather, write_index, check, numbers_of)


@cache
def kernels() -> Kernels:
    """Return the kernels of this process: compiled ones, or their twin; see ``VARIABLE``.

    Raises:
        NativeKernelsError: when compiled kernels are required, and there are none.
        InvalidArgumentError: when the variable is neither 0 nor 1.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "0", "1"):
        raise InvalidArgumentError(
            f"Got {VARIABLE}={wanted!r}; it must be 0 (NumPy), 1 (compiled kernels), or not set (compiled, if there "
            "are any)."
        )
    if wanted == "0":
        return TWIN
    try:
        return compiled()
    except NativeKernelsError:
        if wanted == "1":
            raise
        return TWIN
