"""One round of a soak test, in this process: an engine, further processes, and the faults injected into them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _checked_steps import act
from _soak_parties import LOADER_WORKERS, PARTIES, Count, Party, run_party
from tqdm import tqdm

# Imported before the descriptors are counted, and outside of an engine: TorchRL keeps an error of this import together
# with the frames of all callers, and so their engines.
import embodichain_rl.engine.workers  # noqa: F401
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.shared.memory import SharedBlock

__all__ = ["END_LIMIT", "Round", "soak_one_round"]

HANG = 5.0
"""Seconds after which a call counts as hung."""

RECOVERY = 10.0
"""Seconds within which a process must recover from a fault."""

START_LIMIT = 60.0
"""Timeout for the start of all processes, in seconds."""

END_LIMIT = 20.0
"""Timeout for the end of all processes, in seconds."""

POLL_INTERVAL = 0.01
"""Seconds between two checks of the processes."""

WORKERS = 2
"""Number of workers of the engine."""


@dataclass(frozen=True)
class Round:
    """A configuration to test."""

    max_trajectories: int
    longest: int = 64
    images: bool = False
    compact: bool = False
    small_shm: bool = False


class Soak:
    """One round: the engine, the other processes, and the faults and failures that were counted.

    Args:
        round_: the configuration to test.
        seconds: duration.
        every: average seconds between two faults.
        seed: seed of the faults.
        faults: minimum number of faults, even if they take longer than ``seconds``.
        patience: factor on all time limits.
        folder: the folder for checkpoints.
    """

    def __init__(
        self, round_: Round, *, seconds: float, every: float, seed: int, faults: int, patience: float, folder: Path
    ) -> None:
        self.round, self.seconds, self.every, self.folder = round_, seconds, every, folder
        self.least_faults, self.patience = faults, patience
        self.random = random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")
        self.kinds = list(PARTIES)
        self.shape = (len(self.kinds) + 1, int(Count.WORDS))
        self.counts = SharedBlock(8 * self.shape[0] * self.shape[1])
        self.rows = self.counts.array(np.int64, self.shape)
        self.faults: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.slowest_recovery = 0.0
        self.writer_kills = 0
        self.recovering: dict[str, tuple[float, str, Callable[[], bool]]] = {}
        self.hung_since: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        """Run the round and return its report."""
        with OnlineDataEngine(self.configured()) as self.engine:
            self.ledger = self.engine.replay_buffer.storage.ledger
            self.processes = {kind: self.start(kind) for kind in self.kinds}
            try:
                self.go()
                self.end_parties()
            finally:  # also after a failure of the engine
                for process in self.processes.values():
                    process.kill()
                    process.join()
            self.engine.stop()
            self.check_ledger()
            return self.report()

    def go(self) -> None:
        self.wait_for("a process", lambda: all(row[Count.CALLS] for row in self.rows[:-1]), START_LIMIT * self.patience)
        next_fault, end = time.monotonic(), time.monotonic() + self.seconds
        while (now := time.monotonic()) < end or self.faults.total() < self.least_faults:
            time.sleep(POLL_INTERVAL)
            self.look()
            if now >= next_fault:
                self.fault()
                next_fault = now + self.every * self.random.uniform(0.5, 1.5)
        end = time.monotonic() + RECOVERY * self.patience
        # What ended by itself is started again, so there is always something to wait for if it does so every time.
        while self.recovering and time.monotonic() < end:
            time.sleep(POLL_INTERVAL)
            self.look()
        self.found["late recoveries"] += len(self.recovering)

    def configured(self) -> OnlineDataEngineCfg:
        return OnlineDataEngineCfg(
            buffer_size=self.round.max_trajectories,
            max_episode_steps=self.round.longest + 1,  # longer than its episodes, so that it is not truncated
            gym_config={
                "id": "_checked_steps:CheckedSteps-v0",
                "kwargs": {
                    "longest": self.round.longest,
                    "images": self.round.images,
                    "disable_env_checker": True,
                },
            },
            policy=act,
            compact=self.round.compact,
            num_workers=WORKERS,
            max_worker_restarts=10**9,
            start_method="forkserver",
            refill_threshold=None,  # without a pause
            progress_bar=False,
        )

    def start(self, kind: str) -> Any:
        """Start a process of the given kind."""
        slot = self.kinds.index(kind)
        party = Party(self.engine, self.counts, self.shape, slot, self.round.longest, 8, self.folder)
        process = self.context.Process(target=run_party, args=(kind, party), name=kind)
        process.start()
        return process

    def row(self, kind: str) -> np.ndarray:
        return self.rows[self.kinds.index(kind)]

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit(f"{what} did not come to work within {seconds:.0f} s.")
            time.sleep(POLL_INTERVAL)

    # ---------------------------------------------------------------------------------------------------- monitoring

    def look(self) -> None:
        """Check which processes hang, have recovered, or died."""
        self.engine.check_health()
        now = time.monotonic()
        for kind, (since, fault, is_back) in list(self.recovering.items()):
            if is_back():
                self.slowest_recovery = max(self.slowest_recovery, now - since)
                del self.recovering[kind]
            elif now - since > RECOVERY * self.patience:
                self.say(f"{kind} was not back {RECOVERY * self.patience:.0f} s after {fault}")
                self.found["late recoveries"] += 1
                del self.recovering[kind]
        for kind, process in self.processes.items():
            if kind in self.recovering:
                continue
            if process.exitcode is not None:
                self.say(f"{kind} ended with exit code {process.exitcode}")
                self.found["died by themselves"] += 1
                self.processes[kind] = self.start(kind)
                self.expect_back(kind, "its own end", self.calls_from(kind))
            begun = int(self.row(kind)[Count.SINCE])
            if (
                begun
                and time.monotonic_ns() - begun > HANG * self.patience * 1e9
                and self.hung_since.get(kind) != begun
            ):
                self.say(f"{kind} hangs")
                self.hung_since[kind] = begun
                self.found["hangs"] += 1

    def expect_back(self, kind: str, fault: str, is_back: Callable[[], bool]) -> None:
        self.recovering[kind] = (time.monotonic(), fault, is_back)

    def calls_from(self, kind: str) -> Callable[[], bool]:
        """Return a function that tells whether the process has completed a call that started after now."""
        row = self.row(kind)
        calls = int(row[Count.CALLS])
        return lambda: int(row[Count.CALLS]) > calls

    def check_ledger(self) -> None:
        try:
            check_ledger(self.ledger)
        except AssertionError as error:
            self.say(str(error))
            self.found["broken invariants"] += 1

    def say(self, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)

    # --------------------------------------------------------------------------------------------------------- faults

    def fault(self) -> None:
        """Inject a fault into a random process that is not recovering, and check the ledger."""
        victims = [kind for kind in self.kinds if kind not in self.recovering]
        workers = [index for index in range(WORKERS) if f"worker {index}" not in self.recovering]
        kind = self.random.choice([*victims, *["worker"] * len(workers), *["DataLoader worker"]])
        number = self.random.choice([signal.SIGKILL, signal.SIGSTOP])
        if kind == "worker":
            self.hit_worker(self.random.choice(workers), number)
        elif kind == "DataLoader worker":
            self.hit_loader_worker(number)
        else:
            self.hit_party(kind, number)
        self.check_ledger()

    def hit_party(self, kind: str, number: signal.Signals) -> None:
        process, row = self.processes[kind], self.row(kind)
        if number == signal.SIGSTOP:
            self.stop_for_a_while(process.pid, row)
        else:
            process.kill()
            process.join()
            self.writer_kills += kind == "writer"
            row[Count.SINCE] = 0
            self.processes[kind] = self.start(kind)
        self.noted(kind, kind, number, self.calls_from(kind))

    def hit_worker(self, index: int, number: signal.Signals) -> None:
        record = self.engine.stats()["workers"][index]
        pid, written = record["pid"], record["trajectories"]
        if record["phase"] != "acting" or not pid:
            return
        if number == signal.SIGSTOP:
            self.stop_for_a_while(pid)
        else:
            os.kill(pid, number)
            self.writer_kills += 1

        def is_back() -> bool:
            now = self.engine.stats()["workers"][index]
            return now["trajectories"] > written + 1 and (number == signal.SIGSTOP or now["pid"] not in (0, pid))

        self.noted(f"worker {index}", "engine worker", number, is_back)

    def hit_loader_worker(self, number: signal.Signals) -> None:
        kind = "DataLoader consumer"
        row, consumer = self.row(kind), self.processes[kind]
        pid = int(row[Count.WORKERS + self.random.randrange(LOADER_WORKERS)])
        if kind in self.recovering or _parent_of(pid) != consumer.pid:
            return
        if number == signal.SIGSTOP:
            self.stop_for_a_while(pid, row)
            return self.noted(kind, "DataLoader worker", number, self.calls_from(kind))
        rebuilt = int(row[Count.REBUILT])
        os.kill(pid, number)
        calls = -1

        def is_back() -> bool:
            nonlocal calls
            if calls < 0:
                calls = int(row[Count.CALLS]) if row[Count.REBUILT] > rebuilt else -1
                return False
            return int(row[Count.CALLS]) > calls

        self.noted(kind, "DataLoader worker", number, is_back)

    def noted(self, who: str, victim: str, number: signal.Signals, is_back: Callable[[], bool]) -> None:
        self.faults[f"{number.name}: {victim}"] += 1
        self.expect_back(who, f"{number.name}: {victim}", is_back)

    def stop_for_a_while(self, pid: int, row: np.ndarray | None = None) -> None:
        """Stop a process for a while. Processes that wait for its lock must continue soon after."""
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic_ns()
        time.sleep(self.random.uniform(0.02, 0.6))
        if row is not None:
            row[Count.STOPPED] += time.monotonic_ns() - stopped
        os.kill(pid, signal.SIGCONT)

    # ------------------------------------------------------------------------------------------- end and report

    def end_parties(self) -> None:
        self.rows[-1, 0] = 1
        for kind, process in self.processes.items():
            process.join(END_LIMIT * self.patience)
            if process.exitcode is None:
                self.say(f"{kind} does not end")
                self.found["hangs"] += 1
            elif process.exitcode:
                self.say(f"{kind} ended with exit code {process.exitcode}")
                self.found["died by themselves"] += 1

    def report(self) -> dict[str, Any]:
        stats = self.engine.stats()
        published = self.ledger.stats()["published"]
        returned = int(self.row("writer")[Count.CALLS]) + sum(worker["trajectories"] for worker in stats["workers"])
        rows = self.rows[:-1]
        self.faults["full disk: saver"] = int(rows[:, Count.DISK_FULL].sum())
        self.found["torn"] = int(rows[:, Count.TORN].sum())
        self.found["lost writes"] = max(0, returned - published)
        self.found["writes nobody made"] = max(0, published - returned - self.writer_kills)
        slowest = {kind: float(self.row(kind)[Count.SLOWEST]) / 1e6 for kind in self.kinds}
        return {
            "chunks": int(rows[:, Count.CHUNKS].sum()),
            "trajectories written": published,
            "reclaimed": self.ledger.stats()["reclaimed"],
            "refused": int(rows[:, Count.REFUSED].sum()),
            "faults": dict(self.faults),
            "found": dict(self.found),
            "slowest recovery s": self.slowest_recovery,
            "slowest call ms": slowest,
        }


def soak_one_round(round_: Round, **settings: Any) -> dict[str, Any]:
    """Run a round in this process, with the settings of a :class:`Soak`, and add the leaked resources to its report."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    multiprocessing.set_forkserver_preload(
        ["embodichain_rl.engine.workers", "gymnasium", "torch.utils.data", "pandas", "h5py"]
    )
    # Start what the first use starts once and for all: the forkserver, and the lock of the progress bar.
    warm_up = multiprocessing.get_context("forkserver").Process(target=int)
    warm_up.start()
    warm_up.join()
    warm_up.close()
    tqdm.get_lock()
    gc.collect()
    before = _descriptors(), _shared_memories()
    folder = Path(tempfile.mkdtemp(prefix="embodichain_rl-soak-"))
    try:
        soak: Soak | None = Soak(round_, **settings, folder=folder)
        assert soak is not None
        result = soak.run()
    finally:
        shutil.rmtree(folder)
    soak = None
    gc.collect()
    result["found"]["leaked descriptors"] = max(0, _descriptors() - before[0])
    result["found"]["leaked shared memory"] = max(0, _shared_memories() - before[1])
    return result


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _shared_memories() -> int:
    """Return how many blocks of shared memory this process has mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum("/memfd:" in line or "/dev/shm/" in line for line in maps)


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    except OSError:
        return -1
