"""Everything at once, for minutes to hours: an engine, its consumers, and faults at random; is a promise ever broken?

An engine's workers, a writer beside them, a sampler, a ``DataLoader`` with workers and one who saves checkpoints run
at full speed. One of these processes after the other is killed (SIGKILL) or stopped for a while (SIGSTOP, SIGCONT), and
the one who saves meets a full disk. Every key of every step of every chunk is checked, and the ledger is held against
its invariants after every fault. There are four rounds, each with a buffer, an engine and processes of its own: of one
trajectory, of two with images stored once, of many, and one where ``/dev/shm`` has 512 KiB (this one needs the right to
mount, and is left out without).

    python benchmarks/soak.py --seconds 600
    python benchmarks/soak.py --seconds 60 --rounds two

A call that takes longer than 5 s counts as hung, but for calls of those who met a fault: what these take, from the
fault (SIGCONT) until their first call comes back, is their recovery, and may take 10 s. The exit code is 0 when no
chunk was torn, nothing hung, no write was lost but the one that a killed writer was at, no invariant was broken, no
process died by itself, and no process, descriptor or shared memory was left behind.
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
from _soak_parties import PARTIES
from _soak_round import END_LIMIT, Round, soak_one_round

MARK = "EMBODICHAIN_RL_SOAK"
"""In the environment of every process of a round, to find those that it leaves behind."""

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
"""What must be 0."""


@dataclass(frozen=True)
class Config:
    """What to run."""

    seconds: float = 600.0
    """How long in all."""
    every: float = 0.7
    """Seconds between two faults, on average."""
    rounds: tuple[str, ...] = tuple(ROUNDS)
    """Which rounds; they share the time."""
    seed: int = 0
    """Of the faults."""
    faults: int = 0
    """How many faults each round has at least, also where that takes longer."""
    patience: float = 1.0
    """What the limits of time are multiplied by; more than 1 on a machine that is busy with other things."""
    out: Path | None = None
    """Where to write the report, as JSON."""
    inside: bool = False
    """Run one round in this process, and print what came of it as JSON: what each round is started with."""


# ----------------------------------------------------------------------------------------------------------- all rounds


def run(config: Config) -> dict[str, dict[str, Any]]:
    """Runs each round in a process of its own; returns what came of each, by name."""
    results = {}
    for number, name in enumerate(config.rounds):
        if ROUNDS[name].small_shm and not may_mount():
            print(f"The round {name!r} is left out: it takes the right to mount.", file=sys.stderr)
            continue
        results[name] = _run_round(name, config, config.seed + number)
    return results


def may_mount() -> bool:
    """Whether this process can give another one a ``/dev/shm`` of its own."""
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
    """The processes that were started in an environment with this mark, and live."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(int(pid))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def broken(results: dict[str, dict[str, Any]]) -> dict[str, int]:
    """How often each promise was broken, in all rounds together."""
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
    if config.inside:
        (name,) = config.rounds
        settings = {"every": config.every, "seed": config.seed, "faults": config.faults, "patience": config.patience}
        result = soak_one_round(ROUNDS[name], seconds=config.seconds, **settings)
        return print(json.dumps(result))
    results = run(config)
    print_results(results)
    write_report(config.out, [{"config": {**asdict(config), "out": None}, "rounds": results}])
    found = {name: count for name, count in broken(results).items() if count}
    if found:
        raise SystemExit(f"Broken: {found}")


if __name__ == "__main__":
    main()
