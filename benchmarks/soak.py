"""A soak test, for minutes to hours: an engine, its consumers and random faults. Are all guarantees kept?

An engine's workers, another writer, a sampler, a ``DataLoader`` with workers and a process that saves checkpoints run
at full speed. Random processes are killed (SIGKILL) or stopped for a while (SIGSTOP, SIGCONT), and the process that
saves checkpoints meets a full disk. Every key of every step of every chunk is checked, and the invariants of the ledger
are checked after every fault. There are four rounds, each with a separate buffer and engine: a buffer of one
trajectory, of two with images stored once, of many, and one with 512 KiB of ``/dev/shm`` (this round requires the
permission to mount and is skipped without it).

    python benchmarks/soak.py --seconds 600
    python benchmarks/soak.py --seconds 60 --rounds two
    python benchmarks/soak.py --seconds 600 --cluster
    python benchmarks/soak.py --file --kills 200

With ``--file``, the buffer is in a file, and everything that uses it gets SIGKILL in the same moment, again and again;
see ``_soak_file.py``. After each time, every trajectory that was published must be there bit by bit.

A call that takes longer than 5 s counts as hung, except in a process that met a fault. The recovery of such a process,
from the fault (SIGCONT) until its first completed call, may take 10 s. The exit code is 0 if no chunk was torn, nothing
hung, no write was lost except the current one of a killed writer, no invariant was violated, no process died without a
fault, and no process, descriptor or shared memory was leaked.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from _harness import print_table, write_report
from _soak_file import BROKEN_IN_FILES, soak_a_file
from _soak_parties import PARTIES
from _soak_round import END_LIMIT, Round, soak_one_round

MARK = "EMBODICHAIN_RL_SOAK"
"""An environment variable of every process of a round, to find the processes that it leaks."""

SMALL_SHM = "512k"


ROUNDS = {
    "one": Round(1),
    "two": Round(2, images=True, compact=True),
    "many": Round(256, images=True),
    "small shm": Round(16, images=True, small_shm=True),
}

BROKEN = (
    "torn",
    "hangs",
    "lost writes",
    "writes nobody made",
    "late recoveries",
    "broken invariants",
    "died by themselves",
    "leaked processes",
    "leaked descriptors",
    "leaked shared memory",
)
"""The counts that must be 0."""


@dataclass(frozen=True)
class Config:
    """The options of the test."""

    seconds: float = 600.0
    """Total duration."""
    every: float = 0.7
    """Average seconds between two faults."""
    rounds: tuple[str, ...] = tuple(ROUNDS)
    """The rounds to run. They share the time."""
    seed: int = 0
    """Seed of the faults."""
    faults: int = 0
    """Minimum number of faults per round, even if they take longer."""
    patience: float = 1.0
    """Factor on all time limits; more than 1 on a machine that is busy with other things."""
    file: bool = False
    """Kill everything that uses a buffer in a file, in place of the rounds."""
    kills: int = 200
    """How often, with ``file``."""
    cluster: bool = False
    """Run an engine on a Ray cluster of this machine instead; kill or stop its producers, gateway, raylets, head and
    learner. Needs the extra [ray]."""
    out: Path | None = None
    """Path of the JSON file for the report."""
    inside: bool = False
    """Run one round in this process and print its report as JSON. Each round is started with this option."""


# ----------------------------------------------------------------------------------------------------------- all rounds


def run(config: Config) -> dict[str, dict[str, Any]]:
    """Run each round in a separate process, and return the reports by name."""
    results = {}
    for number, name in enumerate(config.rounds):
        if ROUNDS[name].small_shm and not may_mount():
            print(f"The round {name!r} is left out: it takes the right to mount.", file=sys.stderr)
            continue
        results[name] = _run_round(name, config, config.seed + number)
    return results


def may_mount() -> bool:
    """Return whether this process can start another one with a separate ``/dev/shm``."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def _run_round(name: str, config: Config, seed: int) -> dict[str, Any]:
    seconds = config.seconds / len(config.rounds)
    arguments = ["--inside", "--rounds", name, "--seconds", f"{seconds}", "--every", f"{config.every}"]
    arguments += ["--faults", f"{config.faults}", "--patience", f"{config.patience}", "--seed", f"{seed}"]
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    if ROUNDS[name].small_shm:
        mount = f"mount -t tmpfs -o size={SMALL_SHM} tmpfs /dev/shm"
        command = ["unshare", "-m", "sh", "-c", f"{mount} && exec {shlex.join(command)}"]
    mark = f"{os.getpid()} {name} {time.monotonic_ns()}"
    completed = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, MARK: mark}, text=True)
    if completed.returncode:
        raise SystemExit(f"The round {name!r} broke off with exit code {completed.returncode}.")
    result = json.loads(completed.stdout.splitlines()[-1])
    deadline = time.monotonic() + END_LIMIT * config.patience
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    result["found"]["leaked processes"] = len(left)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return result


def _marked(mark: str) -> list[int]:
    """Return the live processes whose environment contains this mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(int(pid))
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def broken(results: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Return how often each guarantee was violated, summed over all rounds."""
    return {name: sum(result["found"].get(name, 0) for result in results.values()) for name in BROKEN}


def print_results(results: dict[str, dict[str, Any]]) -> None:
    names = [*results, "all"]

    def row(title: str, values: list[float]) -> list[str]:
        return [title, *(f"{value:,.0f}" for value in values), f"{sum(values):,.0f}"]

    def worst(title: str, values: list[float]) -> list[str]:
        return [title, *(f"{value:,.1f}" for value in values), f"{max(values):,.1f}"]

    rows = [
        row(title, [result[title] for result in results.values()])
        for title in ("chunks", "trajectories written", "reclaimed", "refused")
    ]
    for fault in sorted({fault for result in results.values() for fault in result["faults"]}):
        rows.append(row(fault, [result["faults"].get(fault, 0) for result in results.values()]))
    rows.append(row("faults", [sum(result["faults"].values()) for result in results.values()]))
    for name in BROKEN:
        rows.append(row(name, [result["found"].get(name, 0) for result in results.values()]))
    rows.append(worst("slowest recovery, s", [result["slowest recovery s"] for result in results.values()]))
    for kind in PARTIES:
        slowest = [result["slowest call ms"][kind] for result in results.values()]
        rows.append(worst(f"slowest call of the {kind}, ms", slowest))
    print_table("Soak", ["", *names], rows)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    if config.cluster:
        from _soak_cluster import soak_cluster

        _, problems = soak_cluster(config.seconds, config.seed, config.patience)
        raise SystemExit(bool(problems))
    if config.inside:
        (name,) = config.rounds
        settings = {"every": config.every, "seed": config.seed, "faults": config.faults, "patience": config.patience}
        result = soak_one_round(ROUNDS[name], seconds=config.seconds, **settings)
        return print(json.dumps(result))
    if config.file:
        counts = soak_a_file(config.kills, config.seed, config.patience)
        print_table("Soak of a buffer in a file", ["", "count"], [[name, f"{counts[name]:,}"] for name in counts])
        write_report(config.out, [{"config": {**asdict(config), "out": None}, "counts": counts}])
        wrong = {name: counts[name] for name in BROKEN_IN_FILES if counts[name]}
        if wrong:
            raise SystemExit(f"Broken: {wrong}")
        return None
    results = run(config)
    print_results(results)
    write_report(config.out, [{"config": {**asdict(config), "out": None}, "rounds": results}])
    found = {name: count for name, count in broken(results).items() if count}
    if found:
        raise SystemExit(f"Broken: {found}")


if __name__ == "__main__":
    main()
