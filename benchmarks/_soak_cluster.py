"""``soak.py --cluster``: an engine on a Ray cluster of three raylets; every kind of process is killed or stopped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _harness import print_table
from _ray_cluster import OBJECT_STORE, start_head

__all__ = ["soak_cluster"]

MARK = "EMBODICHAIN_RL_SOAK_CLUSTER"
WORKERS = 2
WORKER_TIMEOUT = 10.0
NOTICED, GONE = 2.0, 2.0
"""Seconds in which a death must be noticed, and in which everything must have ended after the learner."""
BACK = 240.0
"""Seconds until new trajectories must arrive again. It includes the start of new actors, and of a new cluster."""


class ClusterSoak:
    """A cluster, a learner on it, and faults of both.

    Args:
        folder: for the learner's files.
        patience: a factor on all time limits.
    """

    def __init__(self, folder: Path, patience: float) -> None:
        self._patience = patience
        self._file = folder / "status.json"
        self._log = folder / "learner.log"
        self.problems: list[str] = []
        self.rows: list[list[str]] = []
        self._cluster: Any = None
        self._port = 0
        self._others: list[Any] = []
        self._start_cluster()
        self._learner = self._start_learner()

    def _note(self, row: list[str]) -> None:
        self.rows.append(row)
        print("; ".join(filter(None, row)), flush=True)

    # ------------------------------------------------------------------------------------------------- processes

    def _start_cluster(self) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
        head["node_ip_address"] = "127.0.0.1"
        if self._port:
            head["gcs_server_port"] = self._port
        self._cluster = start_head(head)
        self._port = int(self._cluster.address.rpartition(":")[2])
        self._others = []
        for _ in range(2):  # the workers are on one of them
            self._add_node()

    def _add_node(self) -> None:
        self._others.append(self._cluster.add_node(num_cpus=WORKERS, object_store_memory=OBJECT_STORE))

    def _start_learner(self) -> subprocess.Popen[bytes]:
        script = str(Path(__file__).with_name("_soak_learner.py"))
        arguments = [f"127.0.0.1:{self._port}", str(self._file), str(WORKERS), str(WORKER_TIMEOUT)]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, script, *arguments],
                env={**os.environ, MARK: "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def status(self) -> dict[str, Any]:
        """Return what the learner wrote last; empty before it samples."""
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads(self._file.read_text())
            return found
        return {}

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> float:
        """Wait, and return how long it took; note a problem if it took too long."""
        started = time.monotonic()
        while not condition():
            if self._learner.poll() is not None and self._learner.returncode != -signal.SIGKILL:
                self.problems.append(f"{what}: the learner exited with {self._learner.returncode}")
                return time.monotonic() - started
            if time.monotonic() - started > seconds * self._patience:
                self.problems.append(f"{what}: not within {seconds * self._patience:g} s")
                break
            time.sleep(0.02)
        return time.monotonic() - started

    def wait_for_inserts(self, what: str) -> float:
        """Wait until each worker has written another trajectory."""
        before = [worker["trajectories"] for worker in self.status().get("workers", [])] or [0] * WORKERS

        def more() -> bool:
            workers = self.status().get("workers", [])
            return len(workers) == WORKERS and all(
                worker["trajectories"] > then for worker, then in zip(workers, before, strict=True)
            )

        return self.wait(more, BACK, f"trajectories after {what}")

    # ----------------------------------------------------------------------------------------------------- faults

    def fault(self, name: str, strike: Callable[[], Any], limit: float) -> None:
        """Strike, and wait until the engine notices it and goes on."""
        restarts = self.status()["restarts"]
        strike()
        noticed = self.wait(lambda: self.status()["restarts"] > restarts, limit, f"notice of {name}")
        back = self.wait_for_inserts(name)
        self._note([name, f"{noticed:.2f} s", f"{back:.1f} s"])

    def kill_producer(self) -> None:
        """Kill a producer."""
        worker = random.choice(self.status()["workers"])
        self.fault("SIGKILL of a producer", lambda: os.kill(worker["pid"], signal.SIGKILL), NOTICED)

    def kill_gateway(self) -> None:
        """Kill the gateway."""
        children = Path(f"/proc/{self._learner.pid}/task/{self._learner.pid}/children").read_text().split()
        gateway = next(int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
        self.fault("SIGKILL of the gateway", lambda: os.kill(gateway, signal.SIGKILL), NOTICED)

    def _node_with_workers(self) -> Any:
        """Return a node without the head on which a worker runs; None if there is none."""
        pids = {worker["pid"] for worker in self.status()["workers"]}
        return next((node for node in self._others if pids & {*_descendants(_pid(node, "raylet"))}), None)

    def kill_raylet(self) -> None:
        """Kill the raylet of a machine that is not the head's."""
        node = self._node_with_workers()
        if node is None:
            self._note(["SIGKILL of a raylet", "no worker on it", ""])
            return
        self.fault("SIGKILL of a raylet", lambda: os.kill(_pid(node, "raylet"), signal.SIGKILL), NOTICED)
        self._cluster.remove_node(node, allow_graceful=False)
        self._others.remove(node)
        self._add_node()

    def freeze_node(self) -> None:
        """Stop all processes of a machine for longer than ``worker_timeout``."""
        node = self._node_with_workers()
        if node is None:
            self._note(["SIGSTOP of a machine", "no worker on it", ""])
            return
        pids = [_pid(node, "raylet"), *_descendants(_pid(node, "raylet"))]
        self.fault("SIGSTOP of a machine", lambda: _signal(pids, signal.SIGSTOP), WORKER_TIMEOUT + 1.0)
        _signal(pids, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)
        self._others.remove(node)
        self._add_node()

    def kill_gcs(self) -> None:
        """Kill the head's GCS, and start another cluster at its address."""

        def strike() -> None:
            os.kill(_pid(self._cluster.head_node, "gcs_server"), signal.SIGKILL)

        restarts = self.status()["restarts"]
        strike()
        noticed = self.wait(lambda: self.status()["restarts"] > restarts, NOTICED, "notice of the GCS")
        with contextlib.suppress(Exception):
            self._cluster.shutdown()
        self._start_cluster()
        back = self.wait_for_inserts("the GCS")
        self._note(["SIGKILL of the GCS", f"{noticed:.2f} s", f"{back:.1f} s"])

    def kill_learner(self) -> None:
        """Kill the learner; everything of it must end."""
        pids = [worker["pid"] for worker in self.status()["workers"]]
        children = _descendants(self._learner.pid)
        self._learner.kill()
        self._learner.wait()
        started = time.monotonic()
        while any(_lives(pid) for pid in (*pids, *children)):
            if time.monotonic() - started > GONE * self._patience:
                left = [pid for pid in (*pids, *children) if _lives(pid)]
                self.problems.append(f"SIGKILL of the learner: {left} live {GONE * self._patience:g} s later")
                break
            time.sleep(0.02)
        self._note(["SIGKILL of the learner", f"gone after {time.monotonic() - started:.2f} s", ""])

    def close(self) -> None:
        """End everything."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._learner.pid, signal.SIGKILL)
        self._learner.wait()
        with contextlib.suppress(Exception):
            self._cluster.shutdown()


def _pid(node: Any, kind: str) -> int:
    pid: int = node.all_processes[kind][0].process.pid
    return pid


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def soak_cluster(
    seconds: float,
    seed: int,
    patience: float = 1.0,
    faults: Sequence[Callable[[ClusterSoak], None]] = (
        ClusterSoak.kill_producer,
        ClusterSoak.kill_gateway,
        ClusterSoak.kill_raylet,
        ClusterSoak.freeze_node,
        ClusterSoak.kill_gcs,
    ),
) -> tuple[list[list[str]], list[str]]:
    """Run the soak for so many seconds, at least every fault once. At the end, the learner is killed.

    Args:
        seconds: how long.
        seed: of the choice of producers.
        patience: a factor on all time limits.
        faults: methods of :class:`ClusterSoak`.

    Returns:
        A row for each fault: its name, when it was noticed, and when each worker had written again; and what was wrong.
    """
    random.seed(seed)
    with tempfile.TemporaryDirectory(prefix="soak-cluster-") as folder:
        soak = ClusterSoak(Path(folder), patience)
        try:
            soak.wait(lambda: bool(soak.status()), BACK, "the first sample")
            started, rounds = time.monotonic(), 0
            while not soak.problems and (rounds == 0 or time.monotonic() - started < seconds):
                for strike in faults:
                    soak.wait_for_inserts("the fault before")
                    strike(soak)
                rounds += 1
            last = soak.status()
            soak.kill_learner()
        finally:
            soak.close()
        if soak.problems:
            print((Path(folder) / "learner.log").read_text()[-6000:])
    print_table(
        "An engine on a Ray cluster, and its faults", ("fault", "noticed", "each worker writes again"), soak.rows
    )
    print(f"\n{last['samples']:,} samples, {last['torn']} torn; the slowest took {1e3 * last['slowest']:.0f} ms")
    problems = [*soak.problems, *([f"{last['torn']} torn samples"] if last["torn"] else [])]
    for problem in problems:
        print(f"BROKEN: {problem}")
    return soak.rows, problems
