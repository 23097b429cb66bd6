"""The main file of an example's interpreter: the example's processes are forked with all imports loaded.

They are started by "forkserver", where they would be spawned otherwise. As with "spawn", each of them imports the
example and inherits nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium  # noqa: F401  # here and below, for the server
from scripts import fork_server, run_as_main

import embodichain_rl.datasets.online_data
import embodichain_rl.engine.data
import embodichain_rl.engine.worker  # noqa: F401

if __name__ == "__main__":
    script, *arguments = sys.argv[1:]
    fork_server()
    # Its output is redirected already, to files in one directory.
    stdout, stderr = (Path(f"/proc/self/fd/{number}").resolve() for number in (1, 2))
    run_as_main(Path(script), arguments, stdout, stderr)
