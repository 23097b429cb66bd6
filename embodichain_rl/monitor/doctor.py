"""Checks of the machine and the installation, and a self-test of the buffer with rates."""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
import os
import platform
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDict

from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.kernels import TWIN, kernels
from embodichain_rl.shared import available_memory

__all__ = ["Finding", "examine"]

GIB = 2**30
SMALL_SHM, SMALL_MEMORY = GIB, 2 * GIB
FEW_FILES = 1024


class Finding(NamedTuple):
    """The result of one check. A note is worth knowing; a problem must be mended."""

    subject: str
    level: Literal["ok", "note", "problem"]
    text: str


def examine(seconds: float = 5.0) -> Iterator[Finding]:
    """Yield the results of all checks, each as soon as it is known.

    Args:
        seconds: of the self-test; 0 for none.
    """
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    yield Finding("interpreter", "ok", sys.executable)
    yield from _versions()
    yield _kernels()
    yield _shm()
    yield _memory()
    yield _files()
    yield Finding("start method", "ok", f"{multiprocessing.get_start_method(allow_none=True) or _default_method()}")
    yield _gpu()
    yield _mujoco()
    if seconds > 0:
        yield from _self_test(seconds)


def _default_method() -> str:
    return f"{multiprocessing.get_all_start_methods()[0]} (the default)"


def _versions() -> Iterator[Finding]:
    """Compare what is installed with what the package asks for."""
    try:
        needed = importlib.metadata.requires("embodichain-rl") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("versions", "note", "embodichain-rl is not installed, but imported from a folder")
        needed = []
    shown, wrong = [], []
    for requirement in needed:
        if "extra ==" in requirement:
            continue
        found = re.match(r"([A-Za-z0-9_.-]+)(.*)", requirement.split(";")[0].strip())
        assert found is not None
        name, bounds = found[1], found[2]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if name in ("torch", "tensordict", "torchrl", "numpy", "gymnasium"):
            shown.append(f"{name} {version}")
        if not _fits(version, bounds):
            wrong.append(f"{name} {version} is not {bounds}")
    if wrong:
        yield Finding("versions", "problem", "; ".join(wrong) + ": install what is asked for")
    elif shown:
        yield Finding("versions", "ok", ", ".join(shown))


def _fits(version: str, bounds: str) -> bool:
    def parts(text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", text.split("+")[0])[:3])

    for bound in filter(None, bounds.split(",")):
        found = re.match(r"\s*(>=|<|==|<=|>)\s*(.+)", bound)
        if found is None:
            continue
        have, limit = parts(version), parts(found[2])
        have = have[: len(limit)] if found[1] in ("==", "<=") else have
        fits = {">=": have >= limit, "<": have < limit, "==": have == limit, "<=": have <= limit, ">": have > limit}
        if not fits[found[1]]:
            return False
    return True


def _kernels() -> Finding:
    if kernels() is not TWIN:
        return Finding("kernels", "ok", "compiled, in use")
    return Finding(
        "kernels",
        "note",
        "not compiled: sampling is several times slower. Install a C compiler, and install the package again, with "
        "NATIVE=1 to see what is wrong",
    )


def _shm() -> Finding:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return Finding("/dev/shm", "note", f"not there ({error}); DataLoader workers need it")
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < SMALL_SHM:
        return Finding(
            "/dev/shm", "note", f"{text}: buffers do not need it, but DataLoader workers do (docker run --shm-size=8g)"
        )
    return Finding("/dev/shm", "ok", text)


def _memory() -> Finding:
    left = available_memory()
    limit = _cgroup_limit()
    text = f"{left / GIB:.1f} GiB left" if left is not None else "unknown"
    text += f", the limit of the cgroup is {limit / GIB:.1f} GiB" if limit is not None else ", no limit of a cgroup"
    if left is not None and left < SMALL_MEMORY:
        return Finding("memory", "note", f"{text}: little for a buffer")
    return Finding("memory", "ok", text)


def _cgroup_limit() -> int | None:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def _files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft:,} may be open (ulimit -n), at most {hard:,}"
    if soft < FEW_FILES:
        return Finding("open files", "note", f"{text}: each worker needs some twenty; raise it (ulimit -n {FEW_FILES})")
    return Finding("open files", "ok", text)


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("gpu", "ok", "none; buffers are on the CPU")
    name, free = torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[0]
    return Finding("gpu", "ok", f"{name}, {free / GIB:.1f} GiB free, CUDA {torch.version.cuda}")


def _mujoco() -> Finding:
    try:
        mujoco: Any = importlib.import_module("mujoco")
    except ImportError:
        return Finding("mujoco", "ok", "not installed")
    backend = os.environ.get("MUJOCO_GL", "the default")
    try:
        model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GLFW warns of what is raised as well
            renderer = mujoco.Renderer(model, 8, 8)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        renderer.update_scene(data)
        renderer.render()
        renderer.close()
    except Exception as error:  # whatever OpenGL raises
        return Finding(
            "mujoco",
            "note",
            f"{mujoco.__version__}, but it can't render with MUJOCO_GL={backend}: {str(error).splitlines()[0][:60]}. "
            "Set MUJOCO_GL=egl (GPU) or osmesa (CPU) if you need images",
        )
    return Finding("mujoco", "ok", f"{mujoco.__version__}, renders with MUJOCO_GL={backend}")


def _self_test(seconds: float) -> Iterator[Finding]:
    """Let a child process write while this one samples; every chunk must be consecutive steps of one trajectory."""
    rb = TrajectoryReplayBuffer(max_trajectories=64, max_total_steps=64 * 100, chunk_size=16, batch_size=32)
    rb.extend(_trajectory(0))
    context: Any = multiprocessing.get_context(multiprocessing.get_all_start_methods()[0])
    writer = context.Process(target=_write, args=(rb, seconds), daemon=True)
    writer.start()
    batches, broken, end = 0, 0, time.monotonic() + seconds
    while time.monotonic() < end:
        batch = rb.sample()
        batches += 1
        steps = batch["observation"][..., 1]
        numbers = batch["observation"][..., 0]
        torn = (steps.diff(dim=1) != 1).any() | (numbers != numbers[:, :1]).any()
        broken += int(torn)
    writer.join(10.0)
    stats = rb.stats()
    rb.close()
    if writer.exitcode != 0:
        yield Finding("self-test", "problem", f"a process that wrote to the buffer ended with {writer.exitcode}")
    elif broken:
        yield Finding("self-test", "problem", f"{broken} of {batches} batches were torn: please report this")
    else:
        rates = f"{stats['inserted'] / seconds:,.0f} trajectories/s inserted by another process"
        yield Finding("self-test", "ok", f"{32 * batches / seconds:,.0f} chunks/s sampled, {rates}, none torn")


def _trajectory(number: int) -> TensorDict:
    steps = torch.arange(100, dtype=torch.float32)
    observation = torch.stack([torch.full_like(steps, float(number)), steps], dim=-1)
    done = torch.zeros(100, 1, dtype=torch.bool)
    done[-1] = True
    return TensorDict({"observation": observation, "next": {"done": done}}, [100])


def _write(rb: TrajectoryReplayBuffer, seconds: float) -> None:
    end, number = time.monotonic() + seconds, 1
    while time.monotonic() < end:
        rb.extend(_trajectory(number))
        number += 1
