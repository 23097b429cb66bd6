"""What happens to a whole job: signals to all its processes, a freezer, terminals, a lack of resources.

Each job is a process of its own, with workers that are real processes too.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import termios
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from clockwork import Clockwork, clockwork_cfg, order
from owning import Owner, owner
from scripts import redirect, reuse_fork_server
from waiting import PATIENCE, wait_until

from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineState
from embodichain_rl.engine.workers import supervision
from embodichain_rl.errors import ResourceShortageError
from embodichain_rl.shared import process_start, process_state

pytestmark = pytest.mark.slow

EVERYBODY = """
import signal, subprocess
import gymnasium
from clockwork import Clockwork

class WithSimulator(Clockwork):
    '''Starts a program, which its close() ends by SIGINT, as one does with simulators.'''

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.simulator = subprocess.Popen(["sleep", "3600"])

    def close(self):
        self.simulator.send_signal(signal.SIGINT)
        self.simulator.wait()
        super().close()

gymnasium.register("WithSimulator-v0", entry_point=WithSimulator)

seen = []

def main():
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), lambda number, frame: seen.append(number))
    print("signals may come", flush=True)
    import dataclasses
    from embodichain_rl import OnlineDataEngine
    cfg = clockwork_cfg(commands, num_workers=2, worker_timeout=10.0, max_worker_restarts=0)
    with OnlineDataEngine(dataclasses.replace(cfg, gym_config={**cfg.gym_config, "id": "WithSimulator-v0"})) as engine:
        print("ready", flush=True)
        wait_until(lambda: len(set(seen)) == 4)
        print("seen", flush=True)
        for frozen in range(2):
            inserted = engine.stats()["inserted"]
            wait_until(lambda: engine.sample_batch(4, 3) is not None and engine.stats()["inserted"] > inserted + 20)
            print("continues", frozen, flush=True)
            wait_until(lambda: (commands / f"go on {frozen}").exists())
        print("restarts", engine.stats()["restarts"], flush=True)

if __name__ == "__main__":
    main()
"""


def everybody_of(job: Owner) -> list[int]:
    """Return the Python processes of a job: those that are not simulators."""
    return [pid for pid in job.processes() if Path(f"/proc/{pid}/comm").read_text() != "sleep\n"]


def signal_all(job: Owner, *numbers: int) -> None:
    with contextlib.suppress(OSError):
        for pid in everybody_of(job):
            for number in numbers:
                os.kill(pid, number)


FREEZE = 12.0
"""Seconds that a job is frozen: longer than its ``worker_timeout``."""


BARE = ("env", "LC_ALL=C", "PYTHONOPTIMIZE=1", "sh", "-c", 'exec "$@" <&-', "sh")
"""Starts a program without a locale, assertions and standard input."""


def test_signals_to_every_process_and_a_freezer(tmp_path: Path) -> None:
    with owner(EVERYBODY, tmp_path, BARE) as job:
        job.says("signals may come")
        job.says("ready")  # benchmarks/operations.py sends them from the first moment on
        signal_all(job, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
        job.says("seen")
        job.says("continues 0")
        frozen = job.processes()
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(FREEZE)  # not to wait for something: this is what the job must not count
        for pid in frozen:  # not those that are found now: all that were stopped go on
            os.kill(pid, signal.SIGCONT)
        order(tmp_path, "go on 0", "")
        job.says("continues 1")
        order(tmp_path, "go on 1", "")
        job.says("restarts 0")
        assert job.ends() == 0
        assert job.errors == ""
        assert len(list(tmp_path.glob("closed-*"))) == 3  # the probe and two workers


class OnTerminal(Clockwork):
    """Changes the attributes of its terminal, as a console of a simulator does, and counts its steps in a file."""

    def __init__(self, commands: str) -> None:
        super().__init__(commands)
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        termios.tcsetattr(terminal, termios.TCSADRAIN, termios.tcgetattr(terminal))
        try:
            os.read(terminal, 1)
        except OSError as error:
            (self._commands / "read").write_text(str(error))
        os.close(terminal)
        self._steps = np.memmap(self._commands / "steps", np.int64, "r+", shape=(1,))

    def step(self, action: np.ndarray) -> Any:
        self._steps[0] += 1
        return super().step(action)


gymnasium.register("OnTerminal-v0", entry_point=OnTerminal)


def _shell(commands: Path, terminal: str) -> None:
    """Run an owner in the foreground of a terminal; put it there again where it stops."""
    os.setsid()
    fd = os.open(terminal, os.O_RDWR)  # becomes the terminal of the session
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    job = os.fork()
    if job == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(fd, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        redirect(commands / "stdout", commands / "stderr")
        logging.basicConfig()
        code = 1
        try:
            _own_on_terminal(commands)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    while True:
        _, status = os.waitpid(job, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
        order(commands, "stopped", "")
        wait_until(lambda: (commands / "fg").exists())
        os.tcsetpgrp(fd, job)
        os.killpg(job, signal.SIGCONT)


def _own_on_terminal(commands: Path) -> None:
    # The processes of a fork server would belong to the session of the server. So the probe is spawned.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gym_config = {"id": f"{__name__}:OnTerminal-v0", "kwargs": {"commands": str(commands)}}
    cfg = clockwork_cfg(commands, num_workers=1, max_worker_restarts=2, start_method="fork")
    with OnlineDataEngine(dataclasses.replace(cfg, gym_config=gym_config)) as engine:
        (commands / "workers").write_text(str(engine.stats()["workers"][0]["pid"]))
        print("ready", flush=True)
        wait_until(lambda: (commands / "die").exists())

        def is_replaced_when_it_is_killed(restarts: int) -> None:
            os.kill(engine.stats()["workers"][0]["pid"], signal.SIGKILL)
            acting = lambda: engine.stats()["workers"][0]["phase"] == "acting"  # noqa: E731
            wait_until(lambda: engine.stats()["restarts"] == restarts and acting())

        is_replaced_when_it_is_killed(1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        threading.Thread(target=_reap_everything, daemon=True).start()
        is_replaced_when_it_is_killed(2)
    assert multiprocessing.active_children() == []
    print("stopped", flush=True)


def _reap_everything() -> None:
    """Wait for whatever child ends, as the first process of a container does."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.001)


def test_on_a_terminal_where_nobody_waits_for_children_or_everybody_does(tmp_path: Path) -> None:
    np.memmap(tmp_path / "steps", np.int64, "w+", shape=(1,)).flush()
    steps = np.memmap(tmp_path / "steps", np.int64, "r", shape=(1,))
    keyboard, terminal = os.openpty()
    shell = multiprocessing.get_context("forkserver").Process(target=_shell, args=(tmp_path, os.ttyname(terminal)))
    shell.start()

    def output(name: str = "stdout") -> str:
        return (tmp_path / name).read_text() if (tmp_path / name).exists() else ""

    def says(word: str, name: str = "stdout") -> None:
        wait_until(lambda: word in output(name) or shell.exitcode is not None, lambda: f"{word!r}, {output('stderr')}")
        assert word in output(name), output("stderr")

    def stand_still() -> bool:
        before = int(steps[0])
        time.sleep(1.0)
        return int(steps[0]) == before

    try:
        says("ready")
        assert "Input/output error" in output("read")
        (worker,) = map(int, output("workers").split())

        os.kill(worker, signal.SIGSTOP)
        says(f"Process {worker} is stopped (state T)", "stderr")
        os.kill(worker, signal.SIGCONT)

        os.write(keyboard, b"\x1a")  # Ctrl-Z
        wait_until(lambda: (tmp_path / "stopped").exists())
        wait_until(stand_still, "the rest of the worker")
        before = int(steps[0])
        order(tmp_path, "fg", "")
        wait_until(lambda: steps[0] > before, "that the worker goes on")

        order(tmp_path, "die", "")
        says("stopped")
        shell.join(PATIENCE)
        assert shell.exitcode == 0, output("stderr")
        # Nobody gets the first worker's exit code; the second's goes to the thread that waits for everybody or to the
        # engine, whichever waits first, and the engine says what it got.
        unknown = output("stderr").count("ended with an exit code that is not known")
        assert unknown >= 1
        assert unknown + output("stderr").count("was killed by signal 9") == 2
    finally:
        shell.kill()
        shell.join()
        os.close(keyboard)
        os.close(terminal)


MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x1, 0x20, 0x4000, 0x40000
CLONE_NEWNS, CLONE_NEWPID = 0x20000, 0x20000000


def _unshare(what: int) -> None:
    assert ctypes.CDLL(None).unshare(what) == 0


def _mount(kind: str, at: str, flags: int = 0, options: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(kind.encode(), at.encode(), kind.encode(), flags, options.encode()) == 0, ctypes.get_errno()


def _enter_container() -> None:
    """Become the first process of a container with a ``/dev/shm`` of 256 KiB."""
    _unshare(CLONE_NEWNS | CLONE_NEWPID)
    _mount("none", "/", MS_PRIVATE | MS_REC)
    _mount("tmpfs", "/dev/shm", 0, "size=256k")
    first = os.fork()
    if first:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]))
    _mount("proc", "/proc")
    multiprocessing.current_process()._popen = None  # type: ignore[attr-defined]
    assert os.getpid() == 1


class LeavesSimulator(Clockwork):
    """Starts a program that nobody ends."""

    def __init__(self, commands: str) -> None:
        super().__init__(commands)
        for new_session in (False, True):
            program = subprocess.Popen(["sleep", "3600"], start_new_session=new_session)
            (self._commands / f"simulator-{os.getpid()}-{program.pid}").touch()


gymnasium.register("LeavesSimulator-v0", entry_point=LeavesSimulator)


@contextlib.contextmanager
def _full_shared_memory(directory: Path) -> Iterator[None]:
    end = threading.Event()

    def fill() -> None:
        with open("/dev/shm/full", "wb", buffering=0) as file:
            while not end.wait(0.001):  # also what others release
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(4096))

    thread = threading.Thread(target=fill)
    thread.start()
    wait_until(lambda: os.statvfs("/dev/shm").f_bavail == 0)
    yield
    end.set()
    thread.join()
    os.unlink("/dev/shm/full")


@contextlib.contextmanager
def _no_files(directory: Path) -> Iterator[None]:
    with _limit(resource.RLIMIT_NOFILE, max(map(int, os.listdir("/proc/self/fd")))):
        yield


@contextlib.contextmanager
def _no_processes(directory: Path) -> Iterator[None]:
    # `ulimit -u` does not hold for root.
    group = Path(f"/sys/fs/cgroup/pids/embodichain_rl-{os.getpid()}")
    group.mkdir()
    (group / "pids.max").write_text("1")
    (group / "cgroup.procs").write_text(str(os.getpid()))
    yield
    (group.parent / "cgroup.procs").write_text(str(os.getpid()))
    group.rmdir()


@contextlib.contextmanager
def _no_address_space(directory: Path) -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with _limit(resource.RLIMIT_AS, pages * resource.getpagesize()):
        yield


@contextlib.contextmanager
def _no_directory(directory: Path) -> Iterator[None]:
    gone = directory / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    yield
    os.chdir(directory)


@contextlib.contextmanager
def _limit(what: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))
    yield
    resource.setrlimit(what, (soft, hard))


SHORTAGES = {
    "/dev/shm is full": _full_shared_memory,
    "ulimit -n": _no_files,
    "ulimit -u": _no_processes,
    "ulimit -v": _no_address_space,
    "The working directory": _no_directory,
}


def _own_with_shortages(commands: Path, start_method: str, names: list[str]) -> None:
    reuse_fork_server()
    redirect(commands / "stdout", commands / "stderr")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage().lower())  # type: ignore[method-assign]
    logging.getLogger("embodichain_rl.engine").addHandler(handler)
    if start_method == "fork":  # the only one that gives the processes the namespaces of this one
        _enter_container()
    supervision.FIRST_WAIT = 1.0
    settings = {"num_workers": 2, "max_worker_restarts": 1000, "start_method": start_method}
    gym_config = {"id": f"{__name__}:LeavesSimulator-v0", "kwargs": {"commands": str(commands)}}
    cfg = dataclasses.replace(clockwork_cfg(commands, **settings), gym_config=gym_config)
    with OnlineDataEngine(cfg) as engine:

        def kill(index: int) -> None:
            os.kill(engine.stats()["workers"][index]["pid"], signal.SIGKILL)

        def kill_all() -> None:
            for worker in engine.stats()["workers"]:
                if worker["phase"] == "acting":
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker["pid"], signal.SIGKILL)

        def all_act() -> bool:
            return all(worker["phase"] == "acting" for worker in engine.stats()["workers"])

        wait_until(all_act)
        wait_until(lambda: _simulators(commands) == 4, "the end of the simulators of the probe")
        engine.sample_batch(4, 3)
        for name in names:
            wait_until(all_act)
            restarts = engine.stats()["restarts"]
            with SHORTAGES[name](commands):
                kill(0)
                wait_until(lambda name=name: any(name.lower() in message for message in messages), name)
                engine.sample_batch(4, 3)
            wait_until(lambda restarts=restarts: all_act() and engine.stats()["restarts"] > restarts)
            print(name, flush=True)
        with SHORTAGES[names[-1]](commands):
            # One may be replaced in what the other one has just released.
            wait_until(lambda: kill_all() or engine.state is OnlineDataEngineState.FAILED, "the failure")
            try:
                engine.sample_batch(4, 3)
            except ResourceShortageError as error:
                print("failed:", error, error.__notes__, flush=True)
    # They were killed while the engine ended; how long a process takes to go is up to the system.
    wait_until(lambda: _simulators(commands) == 0, "the end of the simulators")
    if os.getpid() == 1:
        assert [pid for pid in os.listdir("/proc") if pid.isdigit() and process_state(int(pid)) == "Z"] == []


def _simulators(commands: Path) -> int:
    """Return the number of simulators that run."""
    pids = [int(file.name.split("-")[-1]) for file in commands.glob("simulator-*")]
    return sum(process_start(pid) >= 0 for pid in pids)


RIGHTS = os.getuid() == 0 and os.access("/sys/fs/cgroup/pids", os.W_OK)


@pytest.mark.parametrize(
    ("start_method", "names"),
    [
        ("forkserver", ["The working directory"]),
        pytest.param(
            "fork",
            ["ulimit -n", "ulimit -v", "ulimit -u", "/dev/shm is full"],
            marks=pytest.mark.skipif(not RIGHTS, reason="needs the rights of root, and a cgroup to count processes"),
        ),
    ],
)
def test_one_of_two_workers_is_replaced_while_a_resource_is_short(
    tmp_path: Path, start_method: str, names: list[str]
) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_own_with_shortages, args=(tmp_path, start_method, names))
    process.start()
    process.join(PATIENCE)
    process.kill()
    process.join()
    output = (tmp_path / "stdout").read_text().splitlines()
    assert output[:-1] == names, (tmp_path / "stderr").read_text()
    assert output[-1].startswith("failed: ")
    assert names[-1].lower() in output[-1].lower()
    assert "no other worker is left" in output[-1]
    assert process.exitcode == 0
