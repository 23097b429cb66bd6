"""The main process gets SIGKILL: its DataLoader workers end, whatever they were doing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from waiting import wait_until

from embodichain_rl.shared.processes import process_start

TRAIN = """
import multiprocessing, sys, torch
from tensordict import TensorDict
from torch.utils.data import DataLoader
from embodichain_rl import OnlineDataset, TrajectoryReplayBuffer

if __name__ == "__main__":
    rb = TrajectoryReplayBuffer(max_trajectories=4, max_total_steps=80, chunk_size=4)
    done = (torch.arange(16) == 15).view(-1, 1)
    rb.extend(TensorDict({"observation": torch.zeros(16, 2), "next": {"done": done}}, [16]))
    dataset = OnlineDataset(rb, 4, 8)
    batches = [
        iter(DataLoader(dataset, None, num_workers=2, multiprocessing_context=method)) for method in sys.argv[1:]
    ]
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    sys.stdin.readline()
"""


def test_while_workers_start(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    main = subprocess.Popen(
        [sys.executable, str(script), "spawn", "forkserver"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert main.stdout is not None
    workers = [int(pid) for pid in main.stdout.readline().split()]
    assert len(workers) == 4
    starts = [process_start(pid) for pid in workers]
    main.send_signal(signal.SIGKILL)
    main.communicate()
    wait_until(
        lambda: all(process_start(pid) != start for pid, start in zip(workers, starts, strict=True)),
        "the end of the workers",
    )


BLOCKS = """
import sys, threading

if __name__ == "__mp_main__":  # in the process that is started: it comes no further
    print("importing", flush=True)
    threading.Event().wait()

import multiprocessing
import embodichain_rl

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    print(process.pid, flush=True)
    sys.stdin.readline()
"""


def test_while_a_process_imports_the_program(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(BLOCKS)
    main = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert main.stdout is not None
    lines = {main.stdout.readline().strip(), main.stdout.readline().strip()}  # in any order
    assert "importing" in lines
    (pid,) = map(int, lines - {"importing"})
    start = process_start(pid)
    main.send_signal(signal.SIGKILL)
    main.wait()
    wait_until(lambda: process_start(pid) != start, "the end of the process")
