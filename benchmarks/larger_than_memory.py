"""A buffer in a file that is several times as large as the free memory: it is filled, sampled, and opened again.

The processes that use it are in a cgroup with little memory, which the page cache of the files counts to. So the kernel
writes pages to the disk while the buffer is filled, and reads them while it is sampled. Every value is checked.

    python benchmarks/larger_than_memory.py --free 256

This takes the right to make a memory cgroup of version 1.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from _harness import in_a_fork, print_table, write_report
from tensordict import TensorDict

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.replay.ledger.invariants import check_ledger

MIB = 1 << 20
IMAGE = (64, 64, 3)
STEPS = 100


@dataclass(frozen=True)
class Config:
    """The options."""

    free: int = 256
    """Free memory of the processes, in MiB."""
    times: float = 4.0
    """Size of the buffer, relative to the free memory."""
    batches: int = 200
    """Batches that are sampled after it was filled, and after it was opened again."""
    folder: Path | None = None
    """Where the buffer is made and removed; by default the folder for temporary files."""
    out: Path | None = None
    """Path of the JSON file for the report."""


class NoCgroup(Exception):
    """This process can't make a memory cgroup."""


@contextlib.contextmanager
def limited_memory(nbytes: int) -> Iterator[Path]:
    """Make a memory cgroup with a limit, and remove it at the end.

    Raises:
        NoCgroup: if this process can't.
    """
    group = Path("/sys/fs/cgroup/memory") / f"embodichain_rl-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise NoCgroup(f"no cgroup of memory, version 1, can be made: {error}") from None
    try:
        try:
            (group / "memory.limit_in_bytes").write_text(str(nbytes))
        except OSError as error:
            raise NoCgroup(f"the memory of a cgroup can't be limited: {error}") from None
        yield group
    finally:
        with contextlib.suppress(OSError):  # else what is left of the files counts to the parent
            (group / "memory.force_empty").write_text("0")
        group.rmdir()


def run(config: Config) -> dict[str, float]:
    """Fill, sample and open the buffer; return what was measured.

    Raises:
        NoCgroup: if this process can't make a memory cgroup.
    """
    step = torch.Size(IMAGE).numel()
    count = int(config.times * config.free * MIB / (step * STEPS)) + 1
    with tempfile.TemporaryDirectory(dir=config.folder) as folder, limited_memory(config.free * MIB) as group:
        path = Path(folder) / "buffer"
        found = _in_group(group, lambda: _fill(path, count, config.batches))
        found |= _in_group(group, lambda: _open_again(path, count, config.batches))
        found["memory.failcnt"] = float((group / "memory.failcnt").read_text())
        found["largest use of memory, MiB"] = float((group / "memory.max_usage_in_bytes").read_text()) / MIB
    return {"free memory, MiB": float(config.free), "buffer, MiB": count * STEPS * step / MIB, **found}


def _in_group(group: Path, work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Do something in a process in the cgroup."""

    def act() -> dict[str, float]:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        return work()

    result: dict[str, float] = in_a_fork(act)
    return result


def _trajectory(number: int) -> TensorDict:
    done = (torch.arange(STEPS) == STEPS - 1)[:, None]
    label = torch.stack([torch.full((STEPS,), number), torch.arange(STEPS)], -1)
    return TensorDict(
        {"label": label, "pixels": _pixels(label), "next": TensorDict({"done": done}, [STEPS])},
        [STEPS],
    )


def _pixels(label: torch.Tensor) -> torch.Tensor:
    value = (label[..., 0] * 7 + label[..., 1] * 13).to(torch.uint8)
    return value[..., None, None, None].expand(*value.shape, *IMAGE)


def _checked(data: Any) -> None:
    assert (data["pixels"] == _pixels(data["label"])).all(), "a wrong value"
    assert (data["label"][..., 1].diff(dim=-1) == 1).all(), "not consecutive"


def _sampled(rb: TrajectoryReplayBuffer, batches: int, begin: float, when: str) -> dict[str, float]:
    _checked(rb.sample())
    first = time.perf_counter()
    for _ in range(batches):
        _checked(rb.sample())
    rate = batches / (time.perf_counter() - first)
    return {f"first batch {when}, s": first - begin, f"batches/s {when}": rate}


def _fill(path: Path, count: int, batches: int) -> dict[str, float]:
    rb = TrajectoryReplayBuffer(
        path=path, max_trajectories=count, max_total_steps=count * STEPS, chunk_size=8, batch_size=8
    )
    begin = time.perf_counter()
    for number in range(count):
        rb.extend(_trajectory(number))
    filled = time.perf_counter()
    found = _sampled(rb, batches, filled, "after filling")
    rb.close()
    return {"MiB/s filled": count * STEPS * torch.Size(IMAGE).numel() / MIB / (filled - begin), **found}


def _open_again(path: Path, count: int, batches: int) -> dict[str, float]:
    begin = time.perf_counter()
    rb = TrajectoryReplayBuffer.open(path)
    found = _sampled(rb, batches, begin, "after opening")
    check_ledger(rb.storage.ledger)
    assert len(rb) == count
    for number in range(count):
        trajectory = rb.trajectory(number)
        assert trajectory["label"][0, 0] == number
        _checked(trajectory)
    rb.close()
    return found


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        found = run(config)
    except NoCgroup as reason:
        raise SystemExit(f"Left out: {reason}") from None
    print_table("Larger than memory", ["", ""], [[name, f"{value:,.2f}"] for name, value in found.items()])
    write_report(config.out, [found])


if __name__ == "__main__":
    main()
