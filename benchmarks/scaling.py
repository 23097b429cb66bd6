"""A discrete simulation of clusters of 10, 100 and 1,000 machines that fail: where does one learner stop keeping up?

It advances all workers, machines and learners in steps of a tenth of a second. A worker simulates until its outbox is
full. Each learner's gateway answers one worker after the other: a message costs a fixed time, and the time of its bytes
at the rate of its core or of its network. Workers, machines and learners fail at random, with exponential times between
failures, and come back after the time that it takes to notice them and to start again.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --bytes-per-step 30000 --steps-per-second 200    # images
    python benchmarks/scaling.py --learners 8

The rates of a gateway are those that ``cluster.py`` measures; give those of your own machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from _harness import print_table, write_report

TICK = 0.1
"""Seconds of one step of the simulation."""


@dataclass(frozen=True)
class Config:
    """The options of the simulation."""

    nodes: tuple[int, ...] = (10, 100, 1000)
    """Numbers of machines with simulators."""
    learners: int = 1
    """Learner machines. Each has an equal share of the simulators, and a gateway of its own."""
    workers_per_node: int = 16
    """Simulators of one machine."""
    steps_per_second: float = 1000.0
    """Steps that one simulator takes, if it is never held up."""
    bytes_per_step: float = 200.0
    """Bytes of one step."""
    message_bytes: float = 2.0**20
    """Size at which a message is complete. It is answered after one second anyway."""
    gateway_mb_per_second: float = 300.0
    """What one core of a learner inserts, in MB/s."""
    message_seconds: float = 0.0005
    """What a gateway takes for a message, however small it is."""
    network_gbit: float = 25.0
    """The network of a learner machine, in Gbit/s."""
    node_days: float = 30.0
    """Mean days between two failures of one machine."""
    worker_days: float = 2.0
    """Mean days between two crashes of one simulator."""
    learner_days: float = 30.0
    """Mean days between two failures of one learner machine."""
    node_repair: float = 600.0
    """Seconds until a machine is back, from when it is noticed on."""
    worker_restart: float = 15.0
    """Seconds until a simulator is back, from when it is noticed on."""
    learner_repair: float = 300.0
    """Seconds until a learner trains again, from its checkpoint."""
    notice: float = 2.0
    """Seconds until a death is noticed."""
    frozen: float = 0.1
    """Share of the failures of machines in which it freezes, which is noticed after ``worker_timeout``."""
    worker_timeout: float = 60.0
    hours: float = 0.5
    """Simulated hours."""
    seed: int = 0
    out: Path | None = None
    """Where the report goes, as JSON."""


@dataclass(frozen=True)
class Result:
    """What a simulation found.

    Args:
        nodes: the number of machines.
        offered: MB/s that the simulators would make if nothing failed and nothing held them up.
        inserted: MB/s that arrived in the buffers.
        held: share of the time of the living simulators in which they waited for the gateway.
        down: share of the simulators' time in which they were not there.
        busy: share of the time in which the gateways were busy.
        replaced: workers that were replaced per day.
    """

    nodes: int
    offered: float
    inserted: float
    held: float
    down: float
    busy: float
    replaced: float

    @property
    def share(self) -> float:
        """The share of what is offered that arrives."""
        return self.inserted / self.offered


def simulate(cfg: Config, nodes: int) -> Result:
    """Simulate a cluster of so many machines."""
    rng = np.random.default_rng(cfg.seed)
    workers = nodes * cfg.workers_per_node
    node_of = np.arange(workers) // cfg.workers_per_node
    learner_of = np.arange(workers) % cfg.learners
    made_per_tick = cfg.steps_per_second * cfg.bytes_per_step * TICK
    byte_seconds = max(1 / (1e6 * cfg.gateway_mb_per_second), 8 / (1e9 * cfg.network_gbit))
    worker_back, node_back = np.zeros(workers), np.zeros(nodes)
    learner_back = np.zeros(cfg.learners)
    outbox = np.zeros(workers)
    answered = -rng.random(workers)  # not all at the same moment
    inserted = held = down = busy = 0.0
    replaced = 0
    ticks = round(3600 * cfg.hours / TICK)
    day = 86_400.0 / TICK
    for tick in range(ticks):
        now = tick * TICK
        failed_nodes = rng.random(nodes) < 1 / (cfg.node_days * day)
        if failed_nodes.any():
            count = int(failed_nodes.sum())
            notice = np.where(rng.random(count) < cfg.frozen, cfg.worker_timeout + 1.0, cfg.notice)
            node_back[failed_nodes] = now + notice + cfg.node_repair
            replaced += count * cfg.workers_per_node
        failed = rng.random(workers) < 1 / (cfg.worker_days * day)
        worker_back[failed] = now + cfg.notice + cfg.worker_restart
        replaced += int(failed.sum())
        learner_back[rng.random(cfg.learners) < 1 / (cfg.learner_days * day)] = now + cfg.learner_repair
        alive = (worker_back <= now) & (node_back <= now)[node_of] & (learner_back <= now)[learner_of]
        outbox[~alive] = 0.0  # what was on the way is lost: at most once
        full = outbox >= cfg.message_bytes
        down += float(np.count_nonzero(~alive))
        held += float(np.count_nonzero(alive & full))
        outbox[alive & ~full] += made_per_tick
        # Complete messages, and those that are a second old, in the order of their age.
        due = np.flatnonzero(alive & ((outbox >= cfg.message_bytes) | (now - answered >= 1.0)))
        due = due[np.argsort(answered[due], kind="stable")]
        for learner in range(cfg.learners):
            mine = due[learner_of[due] == learner]
            spent = np.cumsum(cfg.message_seconds + outbox[mine] * byte_seconds)
            served = mine[: np.searchsorted(spent, TICK, side="right")]
            if len(served):
                inserted += float(outbox[served].sum())
                busy += float(spent[len(served) - 1])
                outbox[served] = 0.0
                answered[served] = now
    return Result(
        nodes=nodes,
        offered=workers * made_per_tick / TICK / 1e6,
        inserted=inserted / (ticks * TICK) / 1e6,
        held=held / max(1.0, ticks * workers - down),
        down=down / (ticks * workers),
        busy=busy / (ticks * TICK * cfg.learners),
        replaced=replaced / (cfg.hours / 24),
    )


def learners_needed(cfg: Config, nodes: int) -> int:
    """Return how many learners keep up with so many machines, by the formula of docs/scaling.md."""
    rate = cfg.steps_per_second * cfg.bytes_per_step
    messages = max(1.0, rate / cfg.message_bytes)
    byte_seconds = max(1 / (1e6 * cfg.gateway_mb_per_second), 8 / (1e9 * cfg.network_gbit))
    return max(1, int(np.ceil(nodes * cfg.workers_per_node * (messages * cfg.message_seconds + rate * byte_seconds))))


def main() -> None:
    cfg = tyro.cli(Config)
    results = [simulate(cfg, nodes) for nodes in cfg.nodes]
    rows = []
    for result in results:
        rows.append(
            [
                f"{result.nodes:,}",
                f"{result.nodes * cfg.workers_per_node:,}",
                f"{result.offered:,.0f}",
                f"{result.inserted:,.0f}",
                f"{result.share:.0%}",
                f"{result.held:.0%}",
                f"{result.down:.2%}",
                f"{result.busy:.0%}",
                f"{result.replaced:,.0f}",
                f"{learners_needed(cfg, result.nodes)}",
            ]
        )
    print_table(
        f"{cfg.learners} learner(s), {cfg.hours:g} simulated hours",
        (
            "machines",
            "simulators",
            "offered MB/s",
            "inserted MB/s",
            "share",
            "held up",
            "down",
            "gateway busy",
            "replaced/day",
            "learners needed",
        ),
        rows,
    )
    report: list[dict[str, Any]] = [{**vars(result), "share": result.share} for result in results]
    write_report(cfg.out, report)


if __name__ == "__main__":
    main()
