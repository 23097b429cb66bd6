"""The resources that the workers need, and those that the machines of a cluster have, under Ray's names."""

from __future__ import annotations

from typing import Any

__all__ = ["needed_resources", "places_on", "shortage"]


def needed_resources(options: dict[str, Any]) -> dict[str, float]:
    """Return the resources that an actor with these options needs, under Ray's names."""
    needed = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), "memory": options.get("memory")}
    needed |= options.get("resources") or {}
    return {name: float(amount) for name, amount in needed.items() if amount}


def places_on(resources: dict[str, float], needed: dict[str, float]) -> int:
    """Return how many actors fit on a machine."""
    if not needed:
        return 1 << 30
    return min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in needed.items())


def shortage(head: str, room: int, workers: int, needed: dict[str, float], nodes: list[Any]) -> str:
    """Return what to tell of a cluster that has no room for all workers.

    Args:
        head: the address of the cluster.
        room: how many workers it has room for.
        workers: how many there are.
        needed: what each of them needs.
        nodes: the machines, as Ray lists them.
    """
    has = [{name: node["Resources"].get(name, 0.0) for name in needed} for node in nodes]
    return (
        f"The cluster at {head} has room for {room} of {workers} workers, each of which needs {needed}; its "
        f"{len(nodes)} machines have {has}."
    )
