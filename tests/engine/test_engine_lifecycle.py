"""How an engine comes and goes with its owner, a process of its own in each of these tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from clockwork import order
from owning import owner
from waiting import wait_until

KILLED = """
def main():
    engine = clockwork_engine(commands, num_workers=2, start_method=START_METHOD)
    engine.start()
    print("ready", flush=True)
    while True:
        engine.sample_batch(4, 3)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_an_owner_that_is_killed_leaves_nothing(tmp_path: Path, start_method: str) -> None:
    script = KILLED.replace("START_METHOD", repr(start_method))
    with owner(script, tmp_path) as running:
        running.says("ready")
        order(tmp_path, "step", "hang")  # one worker hangs, the other one goes on
        wait_until(lambda: list(tmp_path.glob("step-obeyed-by-*")))
        shared_files = running.shared_files()
        assert len(running.processes()) >= 3
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
    with clockwork_engine(commands, num_workers=2, start_method=START_METHOD) as engine:
        print("training", flush=True)
        while True:
            engine.sample_batch(4, 3)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(("whom", "start_method"), [("the owner", "fork"), ("the process group", "spawn")])
def test_ctrl_c(tmp_path: Path, whom: str, start_method: str) -> None:
    with owner(INTERRUPTED.replace("START_METHOD", repr(start_method)), tmp_path) as running:

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
        assert running.ends() == -signal.SIGINT
        assert running.errors.count("Traceback") == 1
        assert running.errors.splitlines()[-1] == "KeyboardInterrupt"


RUNG = """
import random, signal

class Rung(BaseException):
    pass

def ring(number, frame):
    rung.append(number)
    raise Rung

def main():
    with clockwork_engine(commands, num_workers=0) as engine:
        batches = iter(OnlineDataset(engine, 3, 4))
        signal.signal(signal.SIGALRM, ring)
        for sample in (lambda: engine.sample_batch(4, 3), lambda: next(batches)):
            for _ in range(500):
                rung.clear()
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-3))
                    while not rung:
                        sample()
                    print("swallowed", flush=True)
                except Rung:
                    pass

rung = []

if __name__ == "__main__":
    from embodichain_rl.datasets import OnlineDataset
    main()
"""


def test_no_signal_is_swallowed_while_it_samples(tmp_path: Path) -> None:
    with owner(RUNG, tmp_path) as running:
        assert running.ends() == 0
        assert (running.output, running.errors) == ("", "")


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
