"""Runs that are ended by a cluster and go on later, and errors of a machine that lacks something."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import redirect, reuse_fork_server
from tensordict import TensorDict
from torch.utils.data import DataLoader
from waiting import PATIENCE, wait_until

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg, OnlineDataset, TrajectoryReplayBuffer
from embodichain_rl.errors import ResourceShortageError
from embodichain_rl.shared import process_start

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "training" / "preemptible.py"


def _run_example(folder: Path, output: Path) -> None:
    redirect(output, output)
    multiprocessing.set_start_method("forkserver", force=True)
    reuse_fork_server()
    sys.argv = [str(EXAMPLE), "--folder", str(folder), "--save-every", "3", "--steps", "1000000"]
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_a_run_that_is_preempted_goes_on(tmp_path: Path) -> None:
    last = 0
    for number, to_everybody in ((signal.SIGTERM, True), (signal.SIGUSR1, False)):
        output = tmp_path / f"output-{number}"
        output.touch()
        process = multiprocessing.get_context("forkserver").Process(
            target=_run_example, args=(tmp_path / "run", output)
        )
        process.start()
        try:
            wait_until(
                lambda output=output, process=process: "saved" in output.read_text() or process.exitcode is not None,
                lambda output=output: output.read_text(),
            )
            assert process.pid is not None
            for pid in [process.pid, *(_workers_of(process.pid) if to_everybody else ())]:
                os.kill(pid, number)
            process.join(PATIENCE)
            assert process.exitcode == 0, output.read_text()
        finally:
            process.kill()
        lines = output.read_text().splitlines()
        if last:
            assert lines[0] == f"goes on after step {last}"
        *_, saved, end = lines
        last = int(saved.removeprefix("saved after step "))
        assert end == f"preempted after step {last}"


def _workers_of(owner: int) -> list[int]:
    """Return the processes that map shared memory of this owner: its workers, which the fork server has started."""
    blocks = _blocks(owner)
    others = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in (owner, os.getpid())]
    found = [pid for pid in others if blocks & _blocks(pid)]
    assert found
    return found


def _blocks(pid: int) -> set[str]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[4] for line in lines if "memfd:embodichain_rl" in line}


THE_OWNERS = {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


def _obey_the_owner_only(worker: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        while signal.sigwaitinfo(THE_OWNERS).si_pid != parent.pid:
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_the_recipe_for_workers_of_a_dataloader(start_method: str) -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=4, max_total_steps=80, chunk_size=4)
    rb.extend(_episode())
    loader = DataLoader(
        OnlineDataset(rb, 4, 8),
        batch_size=None,
        num_workers=1,
        worker_init_fn=_obey_the_owner_only,
        multiprocessing_context=start_method,
    )
    before = set(multiprocessing.active_children())
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, THE_OWNERS)
    batches = iter(loader)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, THE_OWNERS)
    (worker,) = set(multiprocessing.active_children()) - before
    assert worker.pid is not None
    if start_method == "forkserver":  # the server of the tests was started without the mask
        wait_until(lambda: _blocks_sigterm(worker.pid))
    for number in THE_OWNERS:
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)  # now, while it starts
    next(batches)
    for number in THE_OWNERS:
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    for _ in range(20):
        assert next(batches).shape == (8, 4)
    assert worker.is_alive()
    with contextlib.suppress(RuntimeError):  # torch reports its end
        worker.terminate()  # as torch does with a worker that hangs
        worker.join(PATIENCE)
    assert not worker.is_alive()


def _blocks_sigterm(pid: int) -> bool:
    (mask,) = re.findall(r"^SigBlk:\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


def _episode() -> TensorDict:
    done = (torch.arange(16) == 15).view(-1, 1)
    return TensorDict({"observation": torch.zeros(16, 2), "next": {"done": done}}, [16])


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    reuse_fork_server()
    try:
        sender.send(function(*arguments))
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}")


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function in a process of its own, or its error as text."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    assert receiver.poll(PATIENCE)
    answer = receiver.recv()
    process.join(PATIENCE)
    return answer


def _with_limit(limit: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    value = pages * resource.getpagesize() if limit == resource.RLIMIT_AS else 100_000
    resource.setrlimit(limit, (value, value))
    rb = TrajectoryReplayBuffer(max_trajectories=1000, max_total_steps=1_000_000, chunk_size=4)
    rb.extend(_episode())


def _engine(**settings: Any) -> OnlineDataEngine:
    cfg = {"buffer_size": 2, "gym_config": {"id": "Pendulum-v1"}, "start_method": "forkserver", **settings}
    return OnlineDataEngine(OnlineDataEngineCfg(**cfg))


def _without_shared_memory(kind: str) -> None:
    libc = ctypes.CDLL(None)
    assert libc.unshare(0x20000) == 0  # a mount namespace of its own
    assert libc.mount(b"none", b"/", None, 0x44000, None) == 0  # private, recursively
    if kind == "read-only":
        assert libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 1, None) == 0
    else:
        assert libc.mount(b"tmpfs", b"/dev", b"tmpfs", 0, None) == 0
        with contextlib.suppress(OSError):
            os.mknod("/dev/null", 0o020666, os.makedev(1, 3))
    _engine(progress_bar=False, max_worker_restarts=0).start()


def _without_stderr() -> str:
    os.close(2)
    sys.stderr = None
    with _engine() as engine:  # with its progress bar
        return str(list(engine.sample_batch(2, 4).shape))


def test_an_error_names_the_limit() -> None:
    answer = in_a_process(_with_limit, resource.RLIMIT_FSIZE)
    assert answer.startswith("ResourceShortageError")
    assert "`ulimit -f`" in answer
    answer = in_a_process(_with_limit, resource.RLIMIT_AS)
    assert answer.startswith("ResourceShortageError")
    assert "`ulimit -v`" in answer
    assert issubclass(ResourceShortageError, OSError)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("kind", ["read-only", "absent"])
def test_an_error_names_what_pythons_locks_need(kind: str) -> None:
    answer = in_a_process(_without_shared_memory, kind)
    assert answer.startswith("ResourceShortageError"), answer
    assert "/dev/shm can't be written" in answer
    assert "Python's locks and semaphores are files there" in answer


def test_stderr_is_closed() -> None:
    assert in_a_process(_without_stderr) == "[2, 4]"
    script = (
        "import embodichain_rl, os; assert os.readlink('/proc/self/fd/2') == '/dev/null', os.listdir('/proc/self/fd')"
    )
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", script]
    assert subprocess.run(command, check=False).returncode == 0


def _leave_programs(pids: str) -> Any:
    programs = [subprocess.Popen(["sleep", "3600"], start_new_session=away) for away in (False, True)]
    Path(pids).write_text(" ".join(str(program.pid) for program in programs))
    from embodichain_rl.engine.environments import EnvMaker

    return EnvMaker({"id": "Pendulum-v1"})()


def test_nothing_is_left_of_a_probe(tmp_path: Path) -> None:
    from functools import partial

    from embodichain_rl.engine.workers import probe_env

    probe_env(partial(_leave_programs, str(tmp_path / "pids")), timeout=PATIENCE, start_method="forkserver")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_until(lambda: all(process_start(pid) < 0 for pid in pids), "the end of the programs")
