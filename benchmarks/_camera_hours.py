"""The memory of an hour of cameras, for ``memory.py``: TorchRL's storages, ours, and ours with encoded images.

Three cameras of 224 x 224 pixels at 20 Hz. The frames are shaded bodies that move over a shaded background, with the
noise of a sensor, as a renderer makes them. The bytes of a step are measured on episodes of 100 steps, and extrapolated
to the 72,000 steps of an hour.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from _harness import print_table, take_turns
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer

from embodichain_rl import ChunkSampler, JpegCodec, TrajectoryReplayBuffer

CAMERAS = ("left", "right", "wrist")
SIDE, RATE, STEPS = 224, 20, 100
BATCH, ACTIONS = 32, 50
PER_HOUR = 3600 * RATE

_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


def rendered(camera: int, step: int, noise: np.random.Generator) -> np.ndarray:
    """Return a frame, ``uint8`` ``[224, 224, 3]``."""
    image = np.empty((SIDE, SIDE, 3), np.float32)
    image[..., 0] = 90 + 60 * _Y / SIDE
    image[..., 1] = 100 + 40 * _X / SIDE
    image[..., 2] = 120 + 30 * np.sin(_X / 40 + camera)
    for body in range(6):
        x, y = (60 + 30 * body + 3 * step) % SIDE, (40 + 25 * body + 2 * step + 20 * camera) % SIDE
        radius = 12 + 4 * body
        inside = (_X - x) ** 2 + (_Y - y) ** 2 < radius**2
        lit = 1 - ((_X - x + radius / 3) ** 2 + (_Y - y + radius / 3) ** 2)[inside] / (4 * radius**2)
        for channel in range(3):
            image[..., channel][inside] = 2.55 * ((body * 37 + channel * 71) % 100) * lit
    image += noise.normal(0, 1, image.shape).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def episode(number: int) -> TensorDict:
    """Return the steps of an episode, ``[100]``."""
    noise = np.random.default_rng(number)
    root, following = TensorDict({}, [STEPS]), TensorDict({}, [STEPS])
    for camera, name in enumerate(CAMERAS):
        frames = np.stack([rendered(camera, 7 * number + step, noise) for step in range(STEPS + 1)])
        root[name], following[name] = torch.from_numpy(frames[:-1].copy()), torch.from_numpy(frames[1:].copy())
    done = torch.zeros(STEPS, 1, dtype=torch.bool)
    done[-1] = True
    following["done"], root["next"] = done, following
    root["state"], root["action"] = torch.randn(STEPS, 14), torch.randn(STEPS, 14)
    return root


def buffer(episodes: int, codec: Any = None, *, compact: bool = False) -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(
        max_trajectories=episodes,
        max_total_steps=episodes * STEPS,
        chunk_size=1,
        compact=compact,
        compress=dict.fromkeys(CAMERAS, codec) if codec is not None else None,
    )


def measure_cameras(quick: bool, seconds: float) -> list[dict[str, Any]]:
    """Print and return the bytes of an hour, and how fast windows are drawn and episodes are collected."""
    count = 4 if quick else 12
    made = [episode(number) for number in range(count)]
    theirs = {"LazyTensorStorage": LazyTensorStorage(count * STEPS)}
    with tempfile.TemporaryDirectory() as folder:
        theirs["LazyMemmapStorage"] = LazyMemmapStorage(count * STEPS, scratch_dir=folder)
        per_step = {}
        for name, storage in theirs.items():
            other = TensorDictReplayBuffer(storage=storage)
            for steps in made:
                other.extend(steps.copy())
            tensors = storage._storage.exclude("index").values(True, True)
            per_step[name] = sum(value.nbytes for value in tensors) / (count * STEPS)
    ours = {
        "plain": buffer(count),
        "compact": buffer(count, compact=True),
        "PNG": buffer(count, "png", compact=True),
        "JPEG": buffer(count, "jpeg", compact=True),
    }
    extended = {}
    for name, rb in ours.items():
        begin = time.perf_counter()
        for steps in made:
            rb.extend(steps)
        extended[name] = (time.perf_counter() - begin) / (count * STEPS)
        per_step[name] = rb.stats()["bytes_used"] / (count * STEPS)
    reference = per_step["LazyTensorStorage"]
    cores = len(os.sched_getaffinity(0))
    windows = {threads: _windows(ours["JPEG"], made, seconds, threads) for threads in sorted({1, min(cores, 4)})}
    collected = _collected(quick)
    print_table(
        f"An hour of {len(CAMERAS)} cameras of {SIDE} x {SIDE} at {RATE} Hz: {PER_HOUR:,} steps",
        ("", "GB an hour", "times less than TorchRL", "extend, ms a step"),
        [
            (
                name,
                f"{nbytes * PER_HOUR / 1e9:.2f}",
                f"{reference / nbytes:.1f}",
                f"{1e3 * extended[name]:.2f}" if name in extended else "",
            )
            for name, nbytes in per_step.items()
        ],
    )
    for threads, share in windows.items():
        print(
            f"Windows of one frame and {ACTIONS} actions, {BATCH} of them, on {threads} threads: {share:.2f} of a bare "
            "loop over the codec."
        )
    print(f"Steps a second of a worker that renders and encodes (JPEG), of those without encoding: {collected:.2f}.")
    return [
        {"cameras": name, "bytes_per_hour": int(nbytes * PER_HOUR), "of_torchrl": nbytes / reference}
        for name, nbytes in per_step.items()
    ] + [{"windows_of_bare_loop": windows, "collection_with_encoding": collected}]


def _windows(rb: TrajectoryReplayBuffer, made: list[TensorDict], seconds: float, threads: int) -> float:
    """Return how fast batches of windows are made, of a loop that only decodes as many frames on as many threads."""
    rb.set_sampler(ChunkSampler(windows={**{name: [0] for name in CAMERAS}, "action": (0, ACTIONS - 1)}, pad="after"))
    codec = JpegCodec()
    encoded = {name: [codec.encode(frame.numpy()) for steps in made for frame in steps[name]] for name in CAMERAS}
    draw = random.Random(0)

    def bare() -> list[np.ndarray]:
        drawn = [draw.choices(of_camera, k=BATCH) for of_camera in encoded.values()]
        batch = [np.empty((BATCH, SIDE, SIDE, 3), np.uint8) for _ in drawn]
        frames = [*zip(itertools.chain(*drawn), itertools.chain(*batch), strict=True)]

        def decode(part: int) -> None:
            for content, frame in frames[part::threads]:
                codec.decode(content, frame)

        others = [pool.submit(decode, part) for part in range(1, threads)]
        decode(0)
        for other in others:
            other.result()
        return batch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(threads) as pool:
            times = take_turns({"bare": bare, "windows": lambda: rb.sample(BATCH)}, seconds=seconds)
    finally:
        torch.set_num_threads(before)
    return times["bare"].median / times["windows"].median


def _collected(quick: bool) -> float:
    """Return the steps a second with encoding, of those without."""
    spent = {}
    for codec in (None, "jpeg"):
        rb = buffer(4, codec, compact=True)
        rb.extend(episode(0))
        begin = time.perf_counter()
        for number in range(1, 3 if quick else 9):
            rb.extend(episode(number))
        spent[codec] = time.perf_counter() - begin
    return spent[None] / spent["jpeg"]
