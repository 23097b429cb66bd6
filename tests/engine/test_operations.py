"""What happens to a whole job: signals to all its processes, a freezer, terminals, a lack of resources.

Each job is a process of its own, with workers that are real processes too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from clockwork import order
from owning import Owner, owner

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
    cfg = clockwork_cfg(commands, num_workers=2, worker_timeout=4.0, max_worker_restarts=0)
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


def signal_all(job: Owner, number: int) -> None:
    with contextlib.suppress(OSError):
        for pid in everybody_of(job):
            os.kill(pid, number)


FREEZE = 6.0
"""Seconds that a job is frozen: longer than its ``worker_timeout``."""


def test_signals_to_every_process_and_a_freezer(tmp_path: Path) -> None:
    with owner(EVERYBODY, tmp_path) as job:
        job.says("signals may come")
        while "ready" not in job.output and job.process.poll() is None:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
                signal_all(job, number)
            time.sleep(0.05)
        job.says("seen")
        job.says("continues 0")
        for pid in job.processes():
            os.kill(pid, signal.SIGSTOP)
        time.sleep(FREEZE)  # not to wait for something: this is what the job must not count
        for pid in job.processes():
            os.kill(pid, signal.SIGCONT)
        order(tmp_path, "go on 0", "")
        job.says("continues 1")
        order(tmp_path, "go on 1", "")
        job.says("restarts 0")
        assert job.ends() == 0
        assert job.errors == ""
        assert len(list(tmp_path.glob("closed-*"))) == 3  # the probe and two workers
