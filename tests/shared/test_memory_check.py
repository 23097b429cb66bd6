"""A buffer that does not fit is refused before it takes any memory.

The limit is the memory of the machine, or that of a real cgroup.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from waiting import PATIENCE

from embodichain_rl import TrajectoryStorage
from embodichain_rl.errors import BufferMemoryError
from embodichain_rl.shared.memory_check import available_memory

LIMIT = 600 * 2**20
"""Memory limit of the cgroup, in bytes: enough for an interpreter with torch, but not for the buffer."""

ALLOCATE = """
import sys
open(sys.argv[1], "w").write("0")  # this process
import torch
from tensordict import TensorDict
from embodichain_rl import TrajectoryStorage
from embodichain_rl.errors import BufferMemoryError

step = TensorDict({"pixels": torch.zeros(2**20, dtype=torch.uint8), "next": {"done": torch.zeros(1).bool()}})
TrajectoryStorage(10, 50).allocate(step)
try:
    TrajectoryStorage(10, 2000).allocate(step)
except BufferMemoryError as error:
    print(error)
"""


def memory_group() -> tuple[Path, str] | None:
    """Return the memory cgroup of this process and the name of its limit file, or None if it has no cgroup."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
        if not controllers and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            return Path("/sys/fs/cgroup") / path.lstrip("/"), "memory.max"
    return None


@pytest.fixture
def cgroup() -> Iterator[Path]:
    found = memory_group()
    if found is None:
        pytest.skip("this process is in no memory cgroup")
    group, limit = found[0] / f"embodichain_rl-{os.getpid()}", found[1]
    try:
        group.mkdir()
        (group / limit).write_text(str(LIMIT))
    except OSError as error:
        pytest.skip(f"this process cannot create a cgroup: {error}")
    yield group
    group.rmdir()


def test_a_buffer_larger_than_the_cgroup_is_refused(cgroup: Path) -> None:
    command = [sys.executable, "-c", ALLOCATE, str(cgroup / "cgroup.procs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    found = re.search(r"needs ([\d,]+) bytes .* has ([\d,]+) bytes .* free\. Lower max_total_steps", done.stdout)
    assert found is not None, done.stdout
    needed, free = (int(number.replace(",", "")) for number in found.groups())
    assert needed > 2000 * 2**20
    assert free < LIMIT


def test_a_buffer_larger_than_the_machine_is_refused_and_takes_no_memory() -> None:
    free = available_memory()
    assert free is not None
    step = TensorDict({"pixels": torch.zeros(2**20, dtype=torch.uint8), "next": {"done": torch.zeros(1).bool()}})
    storage = TrajectoryStorage(10, 2 * free // 2**20)  # others may give memory back meanwhile
    with pytest.raises(BufferMemoryError, match="Lower max_total_steps, or store less per step"):
        storage.allocate(step)
    assert not storage.initialized
