"""The buffer beside LeRobot's dataset, and the recorder.

python benchmarks/with_lerobot.py --what items       # a live dataset beside a LeRobotDataset of the same episodes
python benchmarks/with_lerobot.py --what recorder    # steps per second of an engine, with and without a recorder
python benchmarks/with_lerobot.py --what kills       # SIGKILL of the recorder or of the process with the buffer
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import tyro
from tensordict import NonTensorStack, TensorDict
from torch.utils.data import default_collate

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg, TrajectoryReplayBuffer
from embodichain_rl.interop.lerobot import LeRobotRecorder, as_lerobot, export

FPS = 20
WINDOW = {"action": [step / FPS for step in range(16)], "observation.state": [-1 / FPS, 0.0]}


def trajectory(number: int, length: int, image: bool) -> TensorDict:
    rng = np.random.default_rng(number)
    data = TensorDict({}, [length])
    data["observation", "state"] = torch.from_numpy(rng.normal(size=(length, 14)).astype(np.float32))
    data["action"] = torch.from_numpy(rng.normal(size=(length, 7)).astype(np.float32))
    if image:
        pixels = rng.integers(0, 256, (length, 96, 96, 3), dtype=np.uint8)
        data["observation", "images", "top"] = torch.from_numpy(pixels)
    data["next", "reward"] = torch.zeros(length, 1)
    data["next", "done"] = torch.arange(length)[:, None] == length - 1
    data["trajectory", "task"] = NonTensorStack(*[f"task {number % 3}"] * length)
    return data


def positions() -> list[int]:
    return [random.randrange(2000) for _ in range(16)]


def microseconds(call: Callable[[], Any], seconds: float = 2.0) -> float:
    """Return the median time of a call."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(times)


def items() -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    print("| episodes | what | LeRobotDataset | here | ratio |\n|---|---|---|---|---|")
    for name, image in (("states", False), ("states and an image of 96x96", True)):
        rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=10_000, chunk_size=2)
        for number in range(20):
            rb.extend(trajectory(number, 100, image))
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "dataset"
            export(rb, root, fps=FPS, cameras="image", progress=False)
            theirs = LeRobotDataset("benchmark/items", root=root, delta_timestamps=WINDOW)
            ours = as_lerobot(rb, delta_timestamps=WINDOW, fps=FPS)
            rows: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
                "an item": (lambda t=theirs: t[random.randrange(2000)], lambda o=ours: o[random.randrange(2000)]),
                "16 items, collated": (
                    lambda t=theirs: default_collate([t[at] for at in positions()]),
                    lambda o=ours: default_collate(o.__getitems__(positions())),
                ),
                "a batch of 16": (
                    lambda t=theirs: default_collate([t[at] for at in positions()]),
                    lambda o=ours: o.batch(positions()),
                ),
            }
            for what, (slow, fast) in rows.items():
                first, second = microseconds(slow), microseconds(fast)
                print(f"| {name} | {what} | {first:,.0f} us | {second:,.0f} us | {first / second:.0f} |", flush=True)


def recorder(rounds: int, seconds: float) -> None:
    cfg = OnlineDataEngineCfg(
        buffer_size=64,
        max_episode_steps=200,
        gym_config={"id": "HalfCheetah-v5", "max_episode_steps": 200},
        num_workers=1,
        refill_threshold=None,  # nobody samples
        seed=0,
        progress_bar=False,
    )
    with tempfile.TemporaryDirectory() as folder, OnlineDataEngine(cfg) as engine:
        ledger = engine.replay_buffer.storage.ledger

        def rate() -> float:
            before, begun = ledger.steps_written, time.perf_counter()
            time.sleep(seconds)
            return (ledger.steps_written - before) / (time.perf_counter() - begun)

        rates: dict[bool, list[float]] = {False: [], True: []}
        for number in range(rounds):
            rates[False].append(rate())
            with LeRobotRecorder(engine, Path(folder) / f"recording-{number}", fps=FPS):
                rates[True].append(rate())
        without, with_recorder = (statistics.median(rates[key]) for key in (False, True))
        print(f"steps/s without {without:,.0f}, with a recorder {with_recorder:,.0f}: {with_recorder / without:.3f}")


def collect(root: Path, connection: Any) -> None:
    """Publish episodes for ever, with a recorder; send the id of its process, and each time of publication."""
    rb = TrajectoryReplayBuffer(max_trajectories=50, max_total_steps=5000, chunk_size=2)
    with LeRobotRecorder(rb, root, fps=FPS, keys=["observation.state", "action"]) as started:
        connection.send(started.pid)
        number = 0
        while True:
            rb.extend(trajectory(number, 10 + number % 7, image=False))
            number += 1
            connection.send(time.monotonic())
            time.sleep(0.01)


def kills(count: int, seed: int) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    context, rng = multiprocessing.get_context("spawn"), random.Random(seed)
    lost = 0
    for round_ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "recording"
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=collect, args=(root, sender))
            process.start()
            recording = receiver.recv()
            published = [receiver.recv()]
            time.sleep(rng.uniform(2.5, 5.0))
            victim = rng.choice([process.pid, recording])
            killed = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            while receiver.poll(0.0):
                published.append(receiver.recv())
            if victim == recording:
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            while _alive(recording):
                time.sleep(0.1)
            needed = sum(moment < killed - 2.0 for moment in published)
            if not root.exists():
                print(
                    f"{round_ + 1:4d}: killed before anything was written; {needed} were published two seconds before"
                )
                lost += needed
                continue
            dataset = LeRobotDataset("benchmark/kills", root=root)
            assert len(dataset) == len(dataset.hf_dataset) == dataset.meta.total_frames
            states = dataset.hf_dataset.with_format("numpy")["observation.state"][:]
            at = 0
            for number in range(dataset.num_episodes):
                expected = trajectory(number, 10 + number % 7, image=False)
                assert np.array_equal(states[at : at + len(expected)], expected["observation", "state"].numpy())
                assert dataset[at]["task"] == f"task {number % 3}"
                at += len(expected)
            lost += max(0, needed - dataset.num_episodes)
            print(
                f"{round_ + 1:4d}: killed the {'recorder' if victim == recording else 'engine'}; "
                f"{dataset.num_episodes} episodes, {needed} were published two seconds before",
                flush=True,
            )
    print(f"{count} kills: every dataset opened, frames == rows, states and text to the bit; {lost} episodes lost")
    sys.exit(lost > 0)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def main(
    what: Literal["items", "recorder", "kills"],
    count: int = 200,
    rounds: int = 5,
    seconds: float = 20.0,
    seed: int = 0,
) -> None:
    """Measure.

    Args:
        what: see above.
        count: processes that are killed.
        rounds: rounds with and without a recorder.
        seconds: of each.
        seed: of the moments of the kills, and of who is killed.
    """
    if what == "items":
        items()
    elif what == "recorder":
        recorder(rounds, seconds)
    else:
        kills(count, seed)


if __name__ == "__main__":
    tyro.cli(main)
