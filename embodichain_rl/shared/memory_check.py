"""Compare an allocation with the memory that is left, before it is made."""

from __future__ import annotations

from pathlib import Path

from embodichain_rl.errors import BufferMemoryError

__all__ = ["available_memory", "check_memory"]


def available_memory() -> int | None:
    """Return the bytes that this process can still use, or None if unknown.

    This is the least of what the machine has left and what each control group (cgroup) of the process has left.
    """
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                limits += _free_in_cgroups(Path("/sys/fs/cgroup"), path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                root = Path("/sys/fs/cgroup/memory")
                limits += _free_in_cgroups(root, path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    except OSError:
        pass
    return min(limits) if limits else None


def _free_in_cgroups(root: Path, path: str, limit_name: str, usage_name: str) -> list[int]:
    """Return the free bytes of a cgroup and of each of its ancestors.

    Pages of the page cache that the kernel can drop count as free.
    """
    free = []
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
                free.append(int(limit) - usage + int(stat.get("inactive_file", 0)))
        group = group.parent
    return free


def check_memory(nbytes: int, what: str, remedy: str) -> None:
    """Refuse an allocation that does not fit into the available memory.

    The kernel provides a page of shared memory only at the first page fault. Without this check, an allocation that is
    too large would succeed now, and the kernel would kill some process later.

    Args:
        nbytes: size of the allocation, in bytes.
        what: name of the allocation, the subject of the error message.
        remedy: last sentence of the error message, which says what to change.

    Raises:
        BufferMemoryError: if more than the available bytes are needed.
    """
    free = available_memory()
    if free is not None and nbytes > free:
        raise BufferMemoryError(
            f"{what} needs {nbytes:,} bytes ({nbytes / 2**30:.2f} GiB), but this machine (or its cgroup) has "
            f"{free:,} bytes ({free / 2**30:.2f} GiB) free. {remedy}"
        )
