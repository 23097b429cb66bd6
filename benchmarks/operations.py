"""Situations of operations that need programs of their own: every one is started, disturbed and ended for real.

    python benchmarks/operations.py                # all that this machine allows
    python benchmarks/operations.py nohup spawn    # those with these words in their names

Each situation prints "right", or what went wrong. The exit code is the number of those that went wrong.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PATIENCE = 600.0

PROGRAM = """
import multiprocessing, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
received = []
if "handlers" in sys.argv:
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), lambda number, frame: received.append(number))
multiprocessing.set_forkserver_preload(["embodichain_rl.engine.workers", "gymnasium"])
(folder / "runs").touch()

import gymnasium
from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg

class Greedy(gymnasium.Wrapper):
    # One instance takes ever more memory, once it is asked to.

    food = None

    def __init__(self):
        super().__init__(gymnasium.make("Pendulum-v1"))

    def step(self, action):
        if self.food is None and (folder / "eat").exists():
            try:
                (folder / "eaten").mkdir()
                self.food = []
            except FileExistsError:
                self.food = ()
        if isinstance(self.food, list):
            self.food.append(b"x" * (1 << 26))
        return super().step(action)

gymnasium.register("Greedy-v0", entry_point=Greedy)

if __name__ == "__main__":
    method = next((name for name in ("fork", "spawn") if name in sys.argv), "forkserver")
    cfg = OnlineDataEngineCfg(
        buffer_size=4, gym_config={"id": "Greedy-v0"}, max_episode_steps=200, num_workers=2, start_method=method,
        worker_timeout=8.0, initialization_timeout=500.0, shutdown_timeout=100.0, progress_bar=False,
    )
    if "threads" in sys.argv:
        import threading
        busy = lambda: [sum(range(10000)) for _ in iter(int, 1)]
        for _ in range(4):
            threading.Thread(target=busy, daemon=True).start()
    with OnlineDataEngine(cfg) as engine:
        (folder / "workers").write_text(" ".join(str(worker["pid"]) for worker in engine.stats()["workers"]))
        (folder / "ready").touch()
        while not (folder / "stop").exists():
            engine.sample_batch(8, 4)
            stats = engine.stats()
            (folder / "new").write_text(f"{stats['restarts']} {stats['inserted']}")
            os.replace(folder / "new", folder / "stats")
            time.sleep(0.01)
        print("the first line", flush=True)
        print("the second line", flush=True)
        if "handlers" in sys.argv:
            assert received
    (folder / "ended").touch()
"""

RANKS = """
import os, pathlib, signal, sys
folder = pathlib.Path(sys.argv[1])

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg

if __name__ == "__main__":
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    cfg = OnlineDataEngineCfg(
        buffer_size=4, gym_config={"id": "Pendulum-v1"}, max_episode_steps=200, start_method="fork",
        initialization_timeout=500.0, shutdown_timeout=100.0, progress_bar=False,
    )
    with OnlineDataEngine(cfg) as engine:
        engine.sample_batch(8, 4)
        (folder / f"rank {rank} attempt {attempt}").touch()
        while attempt == "0":
            engine.sample_batch(8, 4)
            if rank == "1" and (folder / "die").exists():
                os.kill(os.getpid(), signal.SIGKILL)
"""


class Job:
    """The program in a process group of its own, with its folder.

    Args:
        wrapper: the command line that starts the interpreter.
        words: arguments of the program.
        program: its code.
        shell: a shell command in which ``"$@"`` is the program, instead of ``wrapper``.
    """

    def __init__(
        self, *words: str, wrapper: tuple[str, ...] = (), shell: str | None = None, program: str = PROGRAM
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="embodichain_rl-operations-"))
        (self.folder / "program.py").write_text(program)
        command = [sys.executable, str(self.folder / "program.py"), str(self.folder), *words]
        wrapper = ("sh", "-c", shell, "sh") if shell is not None else wrapper
        self.output = (self.folder / "output").open("wb")
        self.process = subprocess.Popen(
            [*wrapper, *command],
            stdout=self.output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "EMBODICHAIN_RL_JOB": str(self.folder)},
        )

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait until a condition holds; raise if the program ends before."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"no {what}: {(self.folder / 'output').read_text()[-2000:]}")
            time.sleep(0.02)

    def ready(self) -> None:
        """Wait until the engine is ready."""
        self.wait((self.folder / "ready").exists, "ready engine")

    def stats(self) -> tuple[int, int]:
        """Return the numbers of restarts and of trajectories."""
        with contextlib.suppress(OSError, ValueError):
            restarts, inserted = map(int, (self.folder / "stats").read_text().split())
            return restarts, inserted
        return 0, 0

    def goes_on(self, restarts: int = 0) -> None:
        """Wait until new trajectories arrive; the number of restarts must be this."""
        self.wait(lambda: self.stats()[0] >= restarts, "replacement")
        before = self.stats()[1]
        self.wait(lambda: self.stats()[1] > before + 3, "new trajectories")
        assert self.stats()[0] == restarts, f"{self.stats()[0]} restarts"

    def stop(self, code: int = 0) -> None:
        """Let the program end, and check that nothing is left of it."""
        (self.folder / "stop").touch()
        found = self.process.wait(PATIENCE)
        assert found == code, f"exit code {found}: {(self.folder / 'output').read_text()[-2000:]}"
        self.left_nothing()

    def left_nothing(self) -> None:
        """Wait until all processes of the job have ended."""
        end = time.monotonic() + 60.0
        while self.pids():
            assert time.monotonic() < end, f"left: {[_command(pid) for pid in self.pids()]}"
            time.sleep(0.05)

    def pids(self) -> list[int]:
        """Return the processes of the job."""
        mark = f"EMBODICHAIN_RL_JOB={self.folder}".encode()
        return [
            int(name) for name in os.listdir("/proc") if name.isdigit() and mark in _read(name, "environ").split(b"\0")
        ]

    def signal(self, number: int) -> None:
        """Send a signal to every process of the job."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """Kill what is left."""
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.output.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(pid: str | int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""


def _command(pid: int) -> str:
    return f"{pid} {_read(pid, 'cmdline').replace(bytes(1), b' ').decode()[:200]}"


def _disturbed(job: Job) -> None:
    job.wait((job.folder / "runs").exists, "program")
    while not (job.folder / "ready").exists() and job.process.poll() is None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            job.signal(number)
        time.sleep(0.05)
    job.ready()


def signals_from_the_first_moment_spawn() -> None:
    """Every process gets SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 all the time while the engine starts."""
    with running("handlers", "spawn") as job:
        _disturbed(job)
        job.goes_on()
        job.stop()


def signals_from_the_first_moment_fork() -> None:
    """The same with fork."""
    with running("handlers", "fork") as job:
        _disturbed(job)
        job.goes_on()
        job.stop()


def frozen_while_it_starts() -> None:
    """All processes are stopped and continued again and again from the beginning."""
    with running() as job:
        job.wait((job.folder / "runs").exists, "program")
        while not (job.folder / "ready").exists() and job.process.poll() is None:
            job.signal(signal.SIGSTOP)
            time.sleep(1.0)
            job.signal(signal.SIGCONT)
            time.sleep(1.0)
        job.ready()
        job.signal(signal.SIGSTOP)
        time.sleep(20.0)
        job.signal(signal.SIGCONT)
        job.goes_on()
        job.stop()


def cgroup_freezer() -> None:
    """A freezer of the kernel, as of `docker pause`."""
    group = Path("/sys/fs/cgroup/freezer") / f"embodichain_rl-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise Skip(f"no cgroup freezer: {error}") from None
    with running() as job:
        job.ready()
        for pid in job.pids():
            (group / "cgroup.procs").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        time.sleep(20.0)
        (group / "freezer.state").write_text("THAWED")
        job.goes_on()
        job.stop()
    _remove(group)


def out_of_memory_in_a_cgroup() -> None:
    """The kernel kills a worker that takes more memory than the cgroup of the workers has; it is replaced."""
    group = Path("/sys/fs/cgroup/memory") / f"embodichain_rl-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(1 << 29))
    except OSError as error:
        raise Skip(f"no cgroup of memory, version 1: {error}") from None
    with running("fork") as job:
        job.ready()
        for pid in (job.folder / "workers").read_text().split():
            (group / "cgroup.procs").write_text(pid)
        (job.folder / "eat").touch()
        job.goes_on(restarts=1)
        assert "oom_kill 1" in (group / "memory.oom_control").read_text()
        job.stop()
    _remove(group)


def _remove(group: Path) -> None:
    """Remove a cgroup, once the kernel has let go of the processes that have ended in it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def fork_server_is_killed() -> None:
    """The server that has started the workers is killed; the workers go on, and can be replaced."""
    with running() as job:
        job.ready()
        for pid in job.pids():
            if b"multiprocessing.forkserver" in _read(pid, "cmdline") and _parent(pid) == job.process.pid:
                os.kill(pid, signal.SIGKILL)
        job.goes_on()
        os.kill(int((job.folder / "workers").read_text().split()[0]), signal.SIGKILL)
        job.goes_on(restarts=1)
        job.stop()


def _parent(pid: int) -> int:
    return int(_read(pid, "stat").rpartition(b")")[2].split()[1])


def nohup_and_hang_up() -> None:
    """All processes get SIGHUP under nohup."""
    with running(shell='exec nohup "$@"') as job:
        job.ready()
        job.signal(signal.SIGHUP)
        job.goes_on()
        job.stop()


def hang_up() -> None:
    """All processes get SIGHUP without a handler: the owner ends, and its workers with it."""
    with running() as job:
        job.ready()
        job.signal(signal.SIGHUP)
        assert job.process.wait(PATIENCE) == -signal.SIGHUP
        job.left_nothing()


def fork_beside_busy_threads() -> None:
    """The workers are forked while threads of the owner compute."""
    with running("threads", "fork") as job:
        job.ready()
        job.goes_on()
        job.stop()


def bare() -> None:
    """No locale, no assertions, all standard streams closed."""
    with running(wrapper=("env", "LC_ALL=C", "PYTHONOPTIMIZE=1", "sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")) as job:
        job.ready()
        job.goes_on()
        job.stop()


def head() -> None:
    """The output goes to `head -1`."""
    with running(shell='"$@" | head -1') as job:
        job.ready()
        job.goes_on()
        job.stop()
        assert (job.folder / "output").read_text().startswith("the first line\n")


def first_process_of_a_container_with_a_read_only_root() -> None:
    """PID 1, with a root that can't be written, and small file systems for /tmp and /dev/shm."""
    if os.getuid() != 0:
        raise Skip("only root may mount")
    shell = (
        "mount --make-rprivate / && mount -t tmpfs -o size=1m none /dev/shm && cd / && "
        'export TMPDIR="$EMBODICHAIN_RL_JOB" && mount --bind "$TMPDIR" "$TMPDIR" && '
        'mount -o remount,ro,bind / && exec "$@"'
    )
    with running("fork", wrapper=("unshare", "-p", "-f", "-m", "--mount-proc", "sh", "-c", shell, "sh")) as job:
        job.ready()
        job.goes_on()
        job.stop()


def torchrun_starts_all_ranks_again() -> None:
    """One of two ranks, each with an engine, is killed; torchrun ends the other one, and starts both again."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "--no-python")
    with running(wrapper=(sys.executable, *torchrun), program=RANKS) as job:
        for attempt in range(2):
            for rank in range(2):
                job.wait((job.folder / f"rank {rank} attempt {attempt}").exists, f"rank {rank}, attempt {attempt}")
            (job.folder / "die").touch()
        job.stop()


class Skip(Exception):
    """The machine does not allow it."""


@contextlib.contextmanager
def running(*words: str, **options: Any) -> Iterator[Job]:
    """Run a job, see :class:`Job`, in the ``with`` block."""
    job = Job(*words, **options)
    try:
        yield job
    finally:
        job.close()


SITUATIONS = [
    signals_from_the_first_moment_spawn,
    signals_from_the_first_moment_fork,
    frozen_while_it_starts,
    cgroup_freezer,
    out_of_memory_in_a_cgroup,
    fork_server_is_killed,
    nohup_and_hang_up,
    hang_up,
    fork_beside_busy_threads,
    bare,
    head,
    first_process_of_a_container_with_a_read_only_root,
    torchrun_starts_all_ranks_again,
]


def main() -> int:
    wrong = 0
    for situation in SITUATIONS:
        name = situation.__name__.replace("_", " ")
        if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
            continue
        try:
            situation()
            result = "right"
        except Skip as reason:
            result = f"skipped: {reason}"
        except AssertionError as error:
            result, wrong = f"WRONG: {error}", wrong + 1
        print(f"{name:52} {result}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
