"""An engine whose owner is killed, interrupted or ends without stopping it; each owner is a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest
from clockwork import clockwork_engine, order
from owning import owner
from scripts import reuse_fork_server
from waiting import PATIENCE, wait_until

from embodichain_rl.datasets import OnlineDataset

pytestmark = pytest.mark.slow

KILLED = """
def commands_of(start_method):
    (commands / start_method).mkdir()
    return commands / start_method

def main():
    engines = [
        clockwork_engine(commands_of(start_method), num_workers=num_workers, start_method=start_method)
        for start_method, num_workers in WORKERS.items()
    ]
    for engine in engines:
        engine.start()
    print("ready", flush=True)
    while True:
        for engine in engines:
            engine.sample_batch(4, 3)

if __name__ == "__main__":
    main()
"""

WORKERS = {"fork": 2, "spawn": 1, "forkserver": 2}  # every spawned one imports everything, which takes seconds


def test_an_owner_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    with owner(KILLED.replace("WORKERS", repr(WORKERS)), tmp_path) as running:
        running.says("ready")
        for start_method in WORKERS:  # one worker of each engine hangs; if there is another one, it goes on
            order(tmp_path / start_method, "step", "hang")
            wait_until(lambda start_method=start_method: list(tmp_path.glob(f"{start_method}/step-obeyed-by-*")))
        shared_files = running.shared_files()
        assert len(running.processes()) >= 1 + sum(WORKERS.values())
        running.process.kill()
        running.process.wait()
        running.is_gone()
        assert {file for file in shared_files if os.path.exists(file)} == set()


INTERRUPTED = """
import signal, threading

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever it was inherited as

def started(engine):
    return [child for child in multiprocessing.active_children() if "probe" not in child.name]

MOMENTS = {
    "probing": lambda engine: multiprocessing.active_children(),
    "starting": started,
    "filling": lambda engine: engine.stats()["workers"][0]["phase"] == "built",
}

def say(moment, engine):
    wait_until(lambda: MOMENTS[moment](engine))
    print(moment, flush=True)

def main():
    for moment in MOMENTS:
        order(commands, "step", "hang always")
        engine = clockwork_engine(commands, start_method=START_METHOD, shutdown_timeout=2.0)  # its worker hangs
        threading.Thread(target=say, args=(moment, engine)).start()
        try:
            engine.start()
        except KeyboardInterrupt:
            wait_for_children()
            print("interrupted while", moment, engine.state.name, flush=True)
    (commands / "step").unlink()
    with clockwork_engine(commands, num_workers=1, start_method=TRAINING_START_METHOD) as engine:
        print("training", flush=True)
        while True:
            engine.sample_batch(4, 3)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("whom", "start_method", "training"),
    [("the owner", "forkserver", "fork"), ("the process group", "spawn", "spawn")],
)
def test_ctrl_c(tmp_path: Path, whom: str, start_method: str, training: str) -> None:
    script = INTERRUPTED.replace("TRAINING_START_METHOD", repr(training)).replace("START_METHOD", repr(start_method))
    with owner(script, tmp_path) as running:

        def interrupt() -> None:
            if whom == "the owner":
                running.process.send_signal(signal.SIGINT)
            else:
                os.killpg(running.process.pid, signal.SIGINT)

        for moment in ("probing", "starting", "filling"):
            running.says(f"{moment}\n")
            interrupt()
            running.says(f"interrupted while {moment} STOPPED")
        assert running.errors == ""
        running.says("training")
        interrupt()
        assert running.ends() == -signal.SIGINT, running.errors
        # Of one process. It may follow the traceback of an exception that was being handled, such as an IndexError.
        handled = running.errors.count("During handling of the above exception")
        assert running.errors.count("Traceback") - handled == 1
        assert running.errors.splitlines()[-1] == "KeyboardInterrupt"


class Alarm(BaseException):
    """What the signal handler raises."""


def _sample_while_signals_arrive(commands: Path) -> None:
    """Sample in every way; exit with the number of signals whose exception was swallowed."""
    reuse_fork_server()  # for the probe
    raised: list[int] = []

    def handle(number: int, frame: object) -> None:
        raised.append(number)
        raise Alarm

    swallowed = 0
    with clockwork_engine(commands, num_workers=0) as engine:
        batches = iter(OnlineDataset(engine, 3, 4))
        signal.signal(signal.SIGALRM, handle)
        for sample in (lambda: engine.sample_batch(4, 3), lambda: next(batches)):
            for _ in range(500):
                raised.clear()
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-3))
                    while not raised:
                        sample()
                    swallowed += 1
                except Alarm:
                    pass
    sys.exit(min(swallowed, 100))


def test_no_signal_is_swallowed_while_it_samples(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_sample_while_signals_arrive, args=(tmp_path,))
    process.start()
    process.join(PATIENCE)
    process.kill()
    assert process.exitcode == 0


FORGOTTEN = """
if __name__ == "__main__":
    engine = clockwork_engine(commands, num_workers=2)
    engine.start()
    engine.sample_batch(4, 3)
    print("ready", flush=True)
    END
"""


@pytest.mark.parametrize("end", ["pass", "1 / 0"])
def test_an_engine_that_is_never_stopped_holds_nobody_up(tmp_path: Path, end: str) -> None:
    with owner(FORGOTTEN.replace("END", end), tmp_path) as running:
        running.says("ready")
        code = running.ends()
        if end == "1 / 0":
            assert code == 1
            assert running.errors.count("Traceback") == 1
            assert running.errors.splitlines()[-1] == "ZeroDivisionError: division by zero"
        else:
            assert code == 0
            assert running.errors == ""
