"""Compiles the kernels when a wheel is built, also for an editable installation.

Without a C compiler the wheel is pure, and NumPy does the same work. With the environment variable ``NATIVE=1`` that is
an error.
"""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import sys
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileKernels(BuildHookInterface):
    """Adds the compiled kernels to the wheel, and tags it for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are collected."""
        build = runpy.run_path(f"{self.root}/embodichain_rl/replay/kernels/build.py")
        build["LIBRARY"].unlink(missing_ok=True)
        try:
            if sys.platform != "linux":
                raise OSError(f"the kernels are for Linux, not for {sys.platform}")
            build["compile_kernels"]()
        except (OSError, subprocess.CalledProcessError) as error:
            message = f"The kernels were not compiled: {error} {getattr(error, 'stderr', None) or ''}"
            if os.environ.get("NATIVE") == "1":
                raise RuntimeError(message) from error
            self.app.display_warning(f"{message}\nThe package is complete without them, but sampling is slower.")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
