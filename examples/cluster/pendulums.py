"""Pendulums on all machines of a Ray cluster fill the buffer of this one; prints what arrives, and from where.

    ray start --head
    python examples/cluster/pendulums.py
    ray stop

Without a cluster: ``--address local`` starts one on this machine for as long as the script runs. See docs/scaling.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import tyro
from torch.utils.data import DataLoader

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg, OnlineDataset
from embodichain_rl.cluster import RayCluster


@dataclass(frozen=True)
class Config:
    """The options of the example."""

    address: str = "auto"
    """The cluster: "auto", "host:port" or "local"."""
    num_workers: int = 2
    """Number of simulators. Each takes one CPU of the cluster."""
    seconds: float = 10.0
    """How long it samples."""


def main() -> None:
    cfg = tyro.cli(Config)
    engine_cfg = OnlineDataEngineCfg(
        buffer_size=64,
        gym_config={"id": "Pendulum-v1"},
        policy="random",
        max_episode_steps=200,
        num_workers=cfg.num_workers,
        cluster=RayCluster(cfg.address),
    )
    with OnlineDataEngine(engine_cfg) as engine:
        batches, end = 0, time.monotonic() + cfg.seconds
        for _ in DataLoader(OnlineDataset(engine, chunk_size=16, batch_size=256), batch_size=None):
            batches += 1
            if time.monotonic() >= end:
                break
        stats = engine.stats()
    print(f"{batches:,} batches; {stats['inserted']:,} episodes; {stats['samples_per_insert']:.1f} samples per insert")
    for node in stats["nodes"]:
        print(
            f"{node['node']}: {len(node['workers'])} simulators, {node['bytes'] / 2**20:.1f} MiB in {node['messages']} "
            f"messages, lag {node['lag']:.2f} s"
        )


if __name__ == "__main__":
    main()
