"""A soak of a buffer in a file: all processes that use it get SIGKILL in the same moment, again and again.

An engine with two workers, another writer, a ``DataLoader`` with two workers, and threads that sync use the buffer at
full speed. Trajectories are drawn by priority, pinned, discarded and relabelled. Every key of every step says where
the step belongs, and every trajectory has a text of its own. In every second buffer, images are kept encoded. A process
that is not killed reads what is published. At a random moment, which may be the start, every other process is killed.
Then

* what the buffer holds is read once, before anything is recovered;
* the buffer is opened for writing: it must hold the same trajectories, bit by bit, with the same pins, texts, counts;
* it must hold what was seen before the death and was not evicted, and what ``extend`` and ``relabel`` returned for;
* the invariants of the ledger must hold;
* the engine of the next turn goes on from it.

At the end, engines that only fill a new buffer are killed again and again, until one is ready: all of them together
must have written as many trajectories as it holds.

All processes of a turn are forked from two that have imported everything: the engine's workers from a fork server, and
the others from the process that runs the turns. By these they are found.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _checked_steps import count_torn
from _soak_file_users import (
    BATCHES,
    BEGIN,
    BEGUN,
    BEGUN_ID,
    COMPRESSED,
    CONTEXT,
    DEAD,
    DISCARDED,
    ENDED,
    ENDED_ID,
    NEWEST,
    RELABELLED,
    SYNCS,
    TRAJECTORIES,
    WORDS,
    WRITES,
    fill,
    use,
)

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.errors import TrajectoryEvictedError
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.shared.memory import SharedBlock

__all__ = ["BROKEN_IN_FILES", "soak_a_file"]

DONE = ("kills", "of these while starting", "published", "seen before a death", "compared after it")

BROKEN_IN_FILES = (
    "lost",
    "changed",
    "torn",
    "wrong texts",
    "wrong labels",
    "unpinned",
    "broken invariants",
    "filled wrongly",
    "hangs",
)
"""The counts that must be 0."""

START_LIMIT = 60.0


class Found(NamedTuple):
    """What a process has found in the buffer."""

    digests: dict[int, str]
    """A digest of each live trajectory: all values but its rewards."""
    pinned: set[int]
    oldest: int
    """The oldest id of the range that is live, but for holes."""
    next_id: int
    counts: dict[str, int]


def soak_a_file(kills: int, seed: int, patience: float = 1.0, *, say: Callable[[str], None] = print) -> dict[str, int]:
    """Kill everything so many times; return the counts of what was done and found.

    Args:
        kills: how often.
        seed: seed of the moments.
        patience: factor on the time limits.
        say: called now and then with the counts.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    # A new interpreter: a forked one would take the fork server of this process, if there is one, for its own.
    conductor = multiprocessing.get_context("spawn").Process(target=_conduct, args=(kills, seed, patience, sender))
    conductor.start()
    sender.close()
    counts: dict[str, int] = {}
    with contextlib.suppress(EOFError):
        while True:
            counts = receiver.recv()
            if counts["kills"] % 20 == 0:
                say(f"{counts}")
    conductor.join()
    if conductor.exitcode:
        raise SystemExit(f"The soak broke off with exit code {conductor.exitcode} after {counts}.")
    return counts


def _conduct(kills: int, seed: int, patience: float, sender: Connection) -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what the killed processes leave is waited for here
    _start_server()
    found: Counter[str] = Counter()
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="embodichain_rl-soak-") as folder:
        path = Path(folder) / COMPRESSED
        for turn in range(kills):
            if turn % 10 == 9:
                shutil.rmtree(path, ignore_errors=True)  # begin with none, of the other kind
                path = path.with_name(COMPRESSED if path.name == "plain" else "plain")
            _one_kill(path, chance, found, patience, early=turn % 5 == 4)
            sender.send({name: found[name] for name in (*DONE, *BROKEN_IN_FILES)})
        _fill_in_turns(Path(folder) / "another", chance, found, patience)
        sender.send({name: found[name] for name in (*DONE, *BROKEN_IN_FILES)})


def _start_server() -> None:
    """Start the fork server of this process and of those that are forked from it."""
    sys.modules["__main__"] = types.ModuleType("__main__")  # no worker imports it again
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # it removes the semaphores of those that were killed
    multiprocessing.set_forkserver_preload(["_soak_file_users", "embodichain_rl.engine.workers", "pandas", "h5py"])
    process = multiprocessing.get_context("forkserver").Process(target=int)
    process.start()
    process.join()
    forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]


def _one_kill(path: Path, chance: random.Random, found: Counter[str], patience: float, *, early: bool) -> None:
    block = SharedBlock(8 * WORDS)
    words = block.array(np.int64, (WORDS,))
    words[[NEWEST, BEGUN_ID, ENDED_ID, BEGIN]] = -1
    users = CONTEXT.Process(target=use, args=(path, block, chance.getrandbits(32)))
    users.start()
    receiver, sender = CONTEXT.Pipe(duplex=False)
    onlooker = CONTEXT.Process(target=_look_on, args=(path, block, sender))
    onlooker.start()
    sender.close()
    try:
        deadline = time.monotonic() + START_LIMIT * patience
        while not early and not words[[WRITES, BATCHES, SYNCS]].all():
            if users.exitcode is not None or time.monotonic() > deadline:
                found["hangs"] += 1
                _say(f"the processes did not come to work: {words.tolist()}")
                break
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 1.0 if early else 0.5))
    finally:
        _kill_all(users.pid, chance)
        users.join()
    words[DEAD] = 1
    found["kills"] += 1
    found["of these while starting"] += early
    seen, at_death = receiver.recv() if receiver.poll(START_LIMIT * patience) else ({}, None)
    found["hangs"] += onlooker.exitcode not in (None, 0)
    onlooker.join()
    if at_death is None:
        found["hangs"] += (path / "buffer.json").exists()
        return
    receiver, sender = CONTEXT.Pipe(duplex=False)
    checker = CONTEXT.Process(target=_check, args=(path, words.tolist(), seen, at_death, sender))
    checker.start()
    sender.close()
    try:
        found.update(receiver.recv())
    except EOFError:
        found["hangs"] += 1
        _say("the buffer could not be opened")
    checker.join()


def _fill_in_turns(path: Path, chance: random.Random, found: Counter[str], patience: float) -> None:
    """Kill engines that fill a buffer when it is a third full, and two thirds full; let the next one fill it."""
    for turn in range(3):
        block = SharedBlock(8 * WORDS)
        words = block.array(np.int64, (WORDS,))
        filling = CONTEXT.Process(target=fill, args=(path, block))
        filling.start()
        deadline = time.monotonic() + START_LIMIT * patience
        enough = TRAJECTORIES // 3 * (turn + 1)
        while not words[SYNCS] and filling.exitcode is None and time.monotonic() < deadline:
            if enough < TRAJECTORIES and words[BATCHES] and _published(path) >= enough:
                break
            time.sleep(0.001)
        ready = bool(words[SYNCS])
        _kill_all(filling.pid, chance)
        filling.join()
        found["kills"] += 1
        published = _published(path)
        found["filled wrongly"] += published > TRAJECTORIES or (ready and published != TRAJECTORIES)
        if ready:
            return
    found["hangs"] += 1


def _published(path: Path) -> int:
    return int(TrajectoryReplayBuffer.open(path, mode="r").storage.ledger.next_id)


def _check(path: Path, words: list[int], seen: dict[int, str], at_death: Found, sender: Connection) -> None:
    """Open the buffer, compare it with what was there, and send the counts."""
    found: Counter[str] = Counter()
    rb = TrajectoryReplayBuffer.open(path)
    ledger = rb.storage.ledger
    try:
        check_ledger(ledger)
    except AssertionError as error:
        _say(str(error))
        found["broken invariants"] += 1
    now = _found(rb)
    found["published"] = now.next_id - words[BEGIN] if words[BEGIN] >= 0 else 0
    found["seen before a death"] = len(seen)
    found["lost"] += now.next_id != at_death.next_id or now.counts != at_death.counts
    found["lost"] += len(at_death.digests.keys() ^ now.digests.keys())
    found["changed"] += sum(now.digests.get(number) != digest for number, digest in at_death.digests.items())
    found["unpinned"] += now.pinned != at_death.pinned

    def must_be_there(number: int) -> bool:
        return number >= now.oldest and number % DISCARDED != 0

    newest = words[NEWEST]
    found["lost"] += now.next_id <= newest or (must_be_there(newest) and newest not in now.digests)
    found["lost"] += sum(must_be_there(number) and number not in now.digests for number in seen)
    found["changed"] += sum(now.digests.get(number, digest) != digest for number, digest in seen.items())
    if now.digests:
        whole = rb.storage[:]
        mask, label = whole["collector", "mask"], whole["label"]
        ids, numbers = whole["trajectory", "id"][:, 0].tolist(), label[:, 0, 0].tolist()
        for key in ("instruction", ("next", "instruction")):
            texts = [rb.texts.resolve(row[real]) for row, real in zip(whole[key], mask, strict=True)]
            wrong = [set(text) != {f"instruction {number}"} for text, number in zip(texts, numbers, strict=True)]
            found["wrong texts"] += sum(wrong)
        rewards, expected = whole["next", "reward"][..., 0], (label[..., 3] & 0xFFFF).float()
        for row, number in enumerate(ids):
            values = set(rewards[row][mask[row]].tolist())
            if min(values) >= RELABELLED:
                found["wrong labels"] += len(values) != 1  # half of it relabelled
                rewards[row] = expected[row]
            if number == words[ENDED_ID]:  # another relabelling of it may have begun
                allowed = {float(words[ENDED])} | ({float(words[BEGUN])} if number == words[BEGUN_ID] else set())
                found["wrong labels"] += not values <= allowed
        steps = whole.exclude("index", "trajectory", "instruction", ("next", "instruction"))
        found["torn"] += count_torn(steps[mask][:, None]) + int((mask.sum(-1) != label[:, 0, 2]).sum())
        found["torn"] += int((label[..., 1] != torch.arange(mask.shape[1]))[mask].sum())
        found["compared after it"] += len(ids)
    rb.close()
    sender.send(found)


def _found(rb: TrajectoryReplayBuffer) -> Found:
    ledger = rb.storage.ledger
    stats = ledger.stats()
    counts = {name: stats[name] for name in ("trajectories", "steps", "published")}
    digests = _digests(rb, set(ledger.live().all().tolist()))
    return Found(digests, set(rb.pinned.tolist()), ledger.live_range()[0], ledger.next_id, counts)


def _digests(rb: TrajectoryReplayBuffer, numbers: set[int]) -> dict[int, str]:
    """Return the digests of those of these trajectories that are live."""
    digests = {}
    for number in numbers if rb.storage.initialized else ():
        with contextlib.suppress(TrajectoryEvictedError):
            values = rb.storage.trajectory(number).exclude(("next", "reward"), "index")
            leaves = sorted(values.items(True, True), key=lambda item: str(item[0]))
            content = b"".join(_bytes(value) for _, value in leaves)
            digests[number] = hashlib.sha256(content).hexdigest()
    return digests


def _bytes(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _look_on(path: Path, block: SharedBlock, sender: Connection) -> None:
    """Read what is published until all others are dead; then read all that is there, and send both."""
    torch.set_num_threads(1)
    words, seen = block.array(np.int64, (WORDS,)), dict[int, str]()
    rb: TrajectoryReplayBuffer | None = None
    while not words[DEAD]:
        if rb is None and (path / "buffer.json").exists():
            rb = TrajectoryReplayBuffer.open(path, mode="r")
        if rb is not None:
            seen |= _digests(rb, set(rb.storage.ledger.live().all().tolist()) - seen.keys())
        time.sleep(0.01)
    if rb is None and (path / "buffer.json").exists():
        rb = TrajectoryReplayBuffer.open(path, mode="r")
    sender.send((seen, None if rb is None else _found(rb)))


# ----------------------------------------------------------------------------------------------------------- killing


def _kill_all(leader: int | None, chance: random.Random) -> None:
    """Kill the processes of a turn, in any order, until none is left."""
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    while doomed := _users(leader, server):
        chance.shuffle(doomed)
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def _users(leader: int | None, server: int | None) -> list[int]:
    """Return the processes that have not ended: those of the session of the leader, and the children of the server."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            state, parent, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:4]
            if state not in "ZX" and (pid == leader or int(session) == leader or int(parent) == server):
                found.append(pid)
    return found


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
