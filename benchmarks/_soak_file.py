"""A soak of a buffer in a file: all processes that use it get SIGKILL in the same moment, again and again.

An engine with two workers, another writer, a ``DataLoader`` with a worker, and a thread that syncs use the buffer at
full speed; trajectories are pinned and unpinned. Another process looks on, and notes what is published. Then every one
of them is killed, and the buffer is opened and checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from _checked_steps import act, count_torn, make_trajectory, new_numbers
from torch.utils.data import DataLoader

import embodichain_rl.engine.planning  # noqa: F401  # before processes are forked
from embodichain_rl import OnlineDataset, TrajectoryReplayBuffer
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.errors import ChunkTooLongError, EmptyBufferError, PinLimitError, TrajectoryEvictedError
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.shared.memory import SharedBlock

__all__ = ["FOUND", "soak_a_file"]

FOUND = ("lost", "changed", "torn", "unpinned", "broken invariants", "hangs")
"""The counts that must be 0."""

LONGEST = 64
TRAJECTORIES = 64
START_LIMIT = 60.0

# Words that the killed processes leave: calls of each party, and the newest id that the writer got.
WRITES, BATCHES, SYNCS, NEWEST, PINNED_FROM = range(5)


def soak_a_file(kills: int, seed: int, patience: float = 1.0) -> dict[str, int]:
    """Kill everything so many times; return the counts of what was done and found."""
    found: Counter[str] = Counter()
    chance = random.Random(seed)
    # Start the server now: its children since then are those to kill.
    warm_up = _CONTEXT.Process(target=int)
    warm_up.start()
    server = _parent(warm_up.pid)
    warm_up.join()
    with tempfile.TemporaryDirectory(prefix="embodichain_rl-soak-") as folder:
        path = Path(folder) / "buffer"
        for _ in range(kills):
            _one_kill(path, server, chance, found, patience)
    return {name: found[name] for name in ("kills", "published", "checked", *FOUND)}


_CONTEXT = multiprocessing.get_context("forkserver")


def _one_kill(path: Path, server: int, chance: random.Random, found: Counter[str], patience: float) -> None:
    block = SharedBlock(8 * 8)
    words = block.array(np.int64, (8,))
    words[NEWEST] = -1
    before = _children()
    others = before.get(server, set())
    process = _CONTEXT.Process(target=_use, args=(path, block, chance.getrandbits(32)))
    process.start()
    seen: dict[int, str] = {}
    published, pinned = 0, set[int]()
    try:
        # Sometimes while they start, else when all are at work.
        early = chance.random() < 0.2
        deadline = time.monotonic() + START_LIMIT * patience
        while not early and not words[[WRITES, BATCHES, SYNCS]].all():
            if process.exitcode is not None or time.monotonic() > deadline:
                found["hangs"] += 1
                print("the processes did not come to work", file=sys.stderr, flush=True)
                break
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 3.0 if early else 0.5))
        if (path / "buffer.json").exists():
            looking_on = TrajectoryReplayBuffer.open(path, mode="r")
            pinned = set(looking_on.pinned.tolist())
            seen, published = _digests(looking_on), looking_on.storage.ledger.next_id
            del looking_on
    finally:
        _kill_all(server, others, process.pid)
        process.join()
    found["kills"] += 1
    if not (path / "buffer.json").exists():
        return
    newest = int(words[NEWEST])
    rb = TrajectoryReplayBuffer.open(path)
    ledger = rb.storage.ledger
    try:
        check_ledger(ledger)
    except AssertionError as error:
        print(error, file=sys.stderr, flush=True)
        found["broken invariants"] += 1
    live = set(ledger.live().all().tolist())
    oldest = ledger.live_range()[0]
    found["lost"] += ledger.next_id < max(published, newest + 1)
    found["lost"] += len({number for number in seen if number >= oldest} - live)
    found["lost"] += newest >= oldest and newest not in live
    # Those that were unpinned while they were looked at may be gone.
    found["unpinned"] += len(pinned - live - {int(words[PINNED_FROM])})
    now = _digests(rb)
    found["changed"] += sum(now[number] != seen[number] for number in now.keys() & seen.keys())
    found["published"] = ledger.next_id
    if len(rb):
        whole = rb.storage[:]
        mask, label = whole["collector", "mask"], whole["label"]
        found["torn"] += count_torn(whole) + int((mask.sum(-1) != label[:, 0, 2]).sum())
        found["checked"] += len(whole)
    rb.close()


def _digests(rb: TrajectoryReplayBuffer) -> dict[int, str]:
    """Return the id and a digest of all values of each live trajectory."""
    digests = {}
    for number in rb.storage.ledger.live().all().tolist() if rb.storage.initialized else ():
        with contextlib.suppress(TrajectoryEvictedError):
            values = sorted(rb.storage.trajectory(number).items(True, True), key=lambda item: str(item[0]))
            content = b"".join(
                value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for _, value in values
            )
            digests[number] = hashlib.sha256(content).hexdigest()
    return digests


# ------------------------------------------------------------------------------------------ the processes to be killed


def _use(path: Path, block: SharedBlock, seed: int) -> None:
    """Use the buffer in every way, until the end."""
    torch.set_num_threads(1)
    words, chance = block.array(np.int64, (8,)), random.Random(seed)
    engine = OnlineDataEngine(_cfg(path))
    engine.start()
    rb = engine.replay_buffer
    writer = _CONTEXT.Process(target=_write, args=(rb, block))
    writer.start()
    rb.storage.sync_every(0.01)
    batches = iter(
        DataLoader(OnlineDataset(engine, 1, 8), batch_size=None, num_workers=1, multiprocessing_context="fork")
    )
    while True:
        next(batches)
        words[BATCHES] += 1
        with contextlib.suppress(ChunkTooLongError, TrajectoryEvictedError, EmptyBufferError, PinLimitError):
            rb.sample_chunks(8, chance.randint(1, 4))
            pinned = rb.pinned.tolist()
            if len(pinned) < 4:
                rb.pin(chance.choice(rb.storage.ledger.live().all().tolist()))
            else:
                words[PINNED_FROM] = pinned[0]
                rb.unpin(pinned[0])
        rb.sync()
        words[SYNCS] += 1


def _cfg(path: Path) -> OnlineDataEngineCfg:
    kwargs = {"longest": LONGEST, "images": True, "disable_env_checker": True}
    return OnlineDataEngineCfg(
        buffer_size=TRAJECTORIES,
        max_episode_steps=LONGEST + 1,
        gym_config={"id": "_checked_steps:CheckedSteps-v0", "kwargs": kwargs},
        policy=act,
        num_workers=2,
        max_worker_restarts=10**9,
        min_trajectories=2,
        start_method="forkserver",
        refill_threshold=None,
        progress_bar=False,
        buffer_path=path,
    )


def _write(rb: TrajectoryReplayBuffer, block: SharedBlock) -> None:
    torch.set_num_threads(1)
    words = block.array(np.int64, (8,))
    schema = rb.storage.schema
    assert schema is not None
    keys = [field.key if len(field.key) > 1 else field.key[0] for field in schema.fields]
    for number in new_numbers():
        words[NEWEST] = rb.extend(make_trajectory(number, random.randint(1, LONGEST), keys))[0]
        words[WRITES] += 1


# ----------------------------------------------------------------------------------------------------------- killing


def _kill_all(server: int, others: set[int], first: int | None) -> None:
    """Kill the children that the fork server has beside these, and all their descendants, until none is left."""
    while True:
        children = _children()
        doomed = list(children.get(server, set()) - others)
        for pid in doomed:
            doomed += children.get(pid, set())
        if not doomed:
            return
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _children() -> dict[int, set[int]]:
    """Return the children of each process, without those that have ended."""
    children: dict[int, set[int]] = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), set()).add(int(pid))
    return children


def _parent(pid: int | None) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
