"""How much memory is left, asked before it is taken."""

from __future__ import annotations

from pathlib import Path

from embodichain_rl.errors import BufferMemoryError

__all__ = ["available_memory", "check_memory"]


def available_memory() -> int | None:
    """Returns the bytes that this process may still take, of the machine's and of its cgroups'; None if unknown."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                limits += _cgroup_room(Path("/sys/fs/cgroup"), path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                root = Path("/sys/fs/cgroup/memory")
                limits += _cgroup_room(root, path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    except OSError:
        pass
    return min(limits) if limits else None


def _cgroup_room(root: Path, path: str, limit_name: str, usage_name: str) -> list[int]:
    """Free bytes of a control group and of each one above it; pages of files that can be dropped count as free."""
    rooms = []
    group = root / path.lstrip("/")
    while group.is_relative_to(root):
        try:
            limit = (group / limit_name).read_text().strip()
            usage = int((group / usage_name).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            pass
        else:
            if limit != "max":
                rooms.append(int(limit) - usage + int(stat.get("inactive_file", 0)))
        group = group.parent
    return rooms


def check_memory(nbytes: int, what: str, remedy: str) -> None:
    """Refuses an allocation that the machine could not keep.

    Shared pages are taken when they are first touched: an allocation that does not fit would succeed now, and kill
    some process later.

    Raises:
        BufferMemoryError: with the bytes needed, the bytes free and ``remedy``.
    """
    free = available_memory()
    if free is not None and nbytes > free:
        raise BufferMemoryError(
            f"{what} needs {nbytes:,} bytes ({nbytes / 2**30:.2f} GiB), but this machine (or its cgroup) has "
            f"{free:,} bytes ({free / 2**30:.2f} GiB) free. {remedy}"
        )
