"""Compiles the kernels. This file imports nothing of the package, so that a build can use it before there is one.

python embodichain_rl/replay/kernels/build.py
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
LIBRARY = Path(__file__).with_name("kernels.compiled.so")  # with a second dot, so that Python takes it for no module

FLAGS = ("-std=c11", "-O3", "-shared", "-fPIC", "-pthread", "-fvisibility=default", "-ffp-contract=off", "-Wall")
"""No ``-march=native``: a wheel runs on every processor. No contraction: NumPy computes the same bits."""


def checksum() -> int:
    """Return the checksum of the source, which a library returns that was compiled from it."""
    return zlib.crc32(SOURCE.read_bytes())


def compile_kernels(library: Path = LIBRARY, *, options: Sequence[str] = ()) -> Path:
    """Compile the kernels with the compiler in ``$CC``, or that of Python's configuration, or ``cc``.

    Args:
        library: the file to write. A process that has loaded an earlier one keeps it.
        options: further options of the compiler.

    Raises:
        OSError, subprocess.CalledProcessError: when there is no compiler, or it fails.
    """
    compilers = [os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc"]
    named = [shlex.split(compiler) for compiler in compilers if compiler]
    partial = library.with_suffix(f".{os.getpid()}.partial")
    arguments = [*FLAGS, f"-DSOURCE_CHECKSUM={checksum()}u", *options, "-o", str(partial), str(SOURCE)]
    try:
        for number, compiler in enumerate(named):
            try:
                subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True)
                break
            except FileNotFoundError:
                if number == len(named) - 1:
                    raise
        partial.replace(library)
    finally:
        partial.unlink(missing_ok=True)
    return library


if __name__ == "__main__":
    print(compile_kernels())
