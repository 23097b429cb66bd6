"""The processes that are killed by the soak of a buffer in a file; see ``_soak_file.py``."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from _checked_steps import CheckedSteps, act, make_trajectory, new_numbers
from torch.utils.data import DataLoader

import embodichain_rl.engine.workers  # noqa: F401  # before processes are forked
from embodichain_rl import ByPriority, ChunkSampler, OnlineDataset, TrajectoryReplayBuffer
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.errors import ChunkTooLongError, EmptyBufferError, PinLimitError, TrajectoryEvictedError
from embodichain_rl.shared.memory import SharedBlock

LONGEST = 32
TRAJECTORIES = 48
LOADER_WORKERS = 2

DISCARDED = 7
"""Only trajectories whose ids are multiples of this are discarded."""

COMPRESSED = "compressed"
"""Name of the directory of a buffer whose images are kept encoded."""

RELABELLED = 1_000_000.0
"""Rewards from this on are labels; those of an episode are smaller."""

# Words that the killed processes leave: calls; the newest id that ``extend`` has returned; the id and the label of the
# last relabelling that was begun, and of the last one that ``relabel`` has returned for; the first id of the turn.
WRITES, BATCHES, SYNCS, NEWEST, BEGUN_ID, BEGUN, ENDED_ID, ENDED, DEAD, BEGIN = range(10)
WORDS = 16

CONTEXT = multiprocessing.get_context("fork")


class InstructedSteps(CheckedSteps):
    """The same, with a text that says which trajectory it is."""

    def __init__(self, longest: int, images: bool) -> None:
        super().__init__(longest, images)
        spaces = {**self.observation_space.spaces, "instruction": gymnasium.spaces.Text(60)}  # type: ignore[attr-defined]
        self.observation_space = gymnasium.spaces.Dict(spaces)

    def reset(self, **kwargs: Any) -> Any:
        numbers = self.observation_space
        self.observation_space = gymnasium.spaces.Dict(
            {name: space for name, space in numbers.spaces.items() if name != "instruction"}  # type: ignore[attr-defined]
        )
        try:
            return super().reset(**kwargs)
        finally:
            self.observation_space = numbers

    def _observed(self) -> dict[str, Any]:
        observed = super()._observed()
        return {**observed, "instruction": f"instruction {observed['label'][0]}"}


gymnasium.register("InstructedSteps-v0", entry_point=InstructedSteps)


def use(path: Path, block: SharedBlock, seed: int) -> None:
    """Use the buffer in every way, until the end."""
    os.setsid()
    torch.set_num_threads(1)
    words, chance = block.array(np.int64, (WORDS,)), random.Random(seed)
    engine = OnlineDataEngine(_cfg(path))
    rb = engine.replay_buffer
    words[BEGIN] = rb.storage.ledger.next_id
    CONTEXT.Process(target=_write, args=(rb, block)).start()  # forked before there are threads
    engine.start()
    dataset = OnlineDataset(engine, 1, 8)
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=LOADER_WORKERS, multiprocessing_context="fork"))
    rb.storage.sync_every(0.01)
    threading.Thread(target=_sync, args=(rb, words), daemon=True).start()
    sampler = ChunkSampler(2, weights=ByPriority(alpha=1.0))
    by_priority = TrajectoryReplayBuffer.open(path, sampler=sampler, batch_size=8)
    number = 0
    while True:
        next(batches)
        words[BATCHES] += 1
        with contextlib.suppress(ChunkTooLongError, TrajectoryEvictedError, EmptyBufferError, PinLimitError):
            chunks = by_priority.sample()
            by_priority.update_priority(chunks["trajectory", "id"][:2, 0].tolist(), [chance.random(), 2.0])
            live, pinned = rb.storage.ledger.live().all().tolist(), rb.pinned.tolist()
            if len(pinned) < 4:
                rb.pin(chance.choice(live))
            else:
                rb.unpin(pinned[0])
            rb.discard([each for each in live if each % DISCARDED == 0 and chance.random() < 0.3])
            number += 1
            words[BEGUN_ID], words[BEGUN] = target, label = chance.choice(live), int(RELABELLED) + number
            if rb.relabel(("next", "reward"), lambda steps, to=label: steps["next", "reward"] * 0 + to, ids=[target]):
                words[ENDED_ID] = -1
                words[ENDED] = label
                words[ENDED_ID] = target


def _sync(rb: TrajectoryReplayBuffer, words: np.ndarray) -> None:
    while True:
        rb.sync()
        words[SYNCS] += 1


def _cfg(path: Path, **settings: Any) -> OnlineDataEngineCfg:
    kwargs = {"longest": LONGEST, "images": True, "disable_env_checker": True}
    return OnlineDataEngineCfg(
        **{
            "buffer_size": TRAJECTORIES,
            "max_episode_steps": LONGEST + 1,
            "gym_config": {"id": f"{__name__}:InstructedSteps-v0", "kwargs": kwargs},
            "policy": act,
            "num_workers": 2,
            "max_worker_restarts": 10**9,
            "min_trajectories": 2,
            "start_method": "forkserver",
            "refill_threshold": None,
            "progress_bar": False,
            "buffer_path": path,
            "compress": {"pixels": "png"} if path.name == COMPRESSED else None,
            **settings,
        }
    )


def _write(rb: TrajectoryReplayBuffer, block: SharedBlock) -> None:
    torch.set_num_threads(1)
    words = block.array(np.int64, (WORDS,))
    while (schema := rb.storage.schema) is None:
        time.sleep(0.002)
    keys = [key if len(key) > 1 else key[0] for key, (_, _, is_text) in schema.kinds.items() if not is_text]
    for number in new_numbers():
        steps = make_trajectory(number, random.randint(1, LONGEST), keys)
        steps["instruction"] = steps["next", "instruction"] = f"instruction {number}"
        words[NEWEST] = rb.extend(steps)[0]
        words[WRITES] += 1


def fill(path: Path, block: SharedBlock) -> None:
    os.setsid()
    torch.set_num_threads(1)
    words = block.array(np.int64, (WORDS,))
    engine = OnlineDataEngine(_cfg(path, min_trajectories=None, refill_policy="manual"))
    words[BATCHES] = 1
    engine.start()
    words[SYNCS] = 1
    time.sleep(3600)
