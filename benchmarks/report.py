"""A report of the targets, the measured results, and whether each target is met, from the files of the other scripts.

    make bench
    python benchmarks/report.py
    python benchmarks/report.py --results outputs/benchmarks --picture docs/pictures/sampling.png

It reads `sampling.json` and so on in the folder of the results. Missing files are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import tyro
from _harness import print_table

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS = "TrajectoryReplayBuffer"
SLICES = "SliceSampler(end_key)"
SHARED = "TensorDictReplayBuffer(shared=True)"

BLUE, GREY = "#2a6fb0", "#9a9a9a"

Result = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Compare the results with the targets."""

    results: Path = Path("outputs/benchmarks")
    """Folder with the JSON files."""
    picture: Path | None = None
    """Path of the picture of the speed relative to TorchRL's sampler. None: beside the results."""


@dataclass(frozen=True)
class Measured:
    """One measured value and its target."""

    what: str
    value: float
    target: float
    at_most: bool = False
    """Whether the target is an upper bound instead of a lower bound."""
    bound: float | None = None
    """The value if only the unavoidable work were done: one copy of as many bytes on one core; for the engine,
    collecting and writing without it; for the workers of a DataLoader, sending a number."""

    @property
    def met(self) -> bool:
        rounded = round(self.value, 2)  # as it is printed
        return rounded <= self.target if self.at_most else rounded >= self.target

    def row(self) -> tuple[str, ...]:
        target = f"{'at most' if self.at_most else 'at least'} {self.target:g}x"
        bound = "" if self.bound is None else f"{self.bound:.2f}x"
        return self.what, target, f"{self.value:.2f}x", "yes" if self.met else "no", bound


def name_of(case: Result) -> str:
    return "{kind} {trajectories} x {steps}, B {batch_size}, L {chunk_size}".format(**case)


def by(results: Iterable[Result], *keys: str, name: str = "contestant") -> dict[tuple[Any, ...], dict[str, Result]]:
    """Return the results of each case by contestant, or what else names them."""
    groups: dict[tuple[Any, ...], dict[str, Result]] = {}
    for result in results:
        place = tuple(json.dumps(result["case"]) if key == "case" else result[key] for key in keys)
        groups.setdefault(place, {})[result[name]] = result
    return groups


TARGETS = {
    ("states", 64): (15, 13),
    ("states", 512): (15, 13),
    ("states", 4096): (12, 10),
    ("states", 2_000): (20, 15),
    ("20 keys", 512): (13, 10),
}
"""The target against the SliceSampler by kind and number of trajectories, with one thread and with several."""


def of_sampling(results: list[Result]) -> Iterator[Measured]:
    every = [{"busy": False, **result} for result in results if "threads" in result]
    turns = by((result for result in every if not result["busy"]), "case", "threads")
    for (case, threads), times in turns.items():
        shape = json.loads(case)
        what = f"sample(): {name_of(shape)}, {threads} thread{'s' * (threads > 1)}"
        ours, slices, memcpy = (times[name]["median_s"] for name in (OURS, SLICES, "one memcpy"))
        target = TARGETS.get((shape["kind"], shape["trajectories"]), (10, 10))[threads > 1]
        yield Measured(f"{what}, against {SLICES}", slices / ours, target, bound=slices / memcpy)
        if times[OURS]["batch_bytes"] >= 5e6:
            target = 1.2 if threads > 1 else 0.8 if times[OURS]["batch_bytes"] < 2e7 else 0.9
            yield Measured(f"{what}, against one memcpy", memcpy / ours, target)
    # Helper threads copy batches of a megabyte and more. They must not be in the way of others.
    ours_alone = [result for result in every if result["busy"] and result["contestant"] == OURS]
    for (case,), _ in by(ours_alone, "case").items():
        of_threads = {r["threads"]: r for r in ours_alone if json.dumps(r["case"]) == case}
        if len(of_threads) < 2 or of_threads[1]["batch_bytes"] < 2**20:
            continue
        what = f"sample(): {name_of(json.loads(case))}, all cores busy, {max(of_threads)} threads against one"
        yield Measured(what, of_threads[1]["median_s"] / of_threads[max(of_threads)]["median_s"], 0.95)
    sizes = [result for result in results if "threads" not in result]
    if sizes:
        few, many = sizes
        what = f"sample(): {many['contestant']}, against {few['contestant']}"
        yield Measured(what, many["median_s"] / few["median_s"], 1.3, at_most=True)


def of_inserting(results: list[Result]) -> Iterator[Measured]:
    for (case,), times in by(results, "case").items():
        kind = json.loads(case)["kind"]
        peer, ours, memcpy = (times[name]["median_s"] for name in ("RoundRobinWriter", OURS, "memcpy"))
        target = 2.5 if kind == "states" else 8
        yield Measured(f"extend(): {kind}, against RoundRobinWriter", peer / ours, target, bound=peer / memcpy)


def of_together(results: list[Result]) -> Iterator[Measured]:
    roles = [result for result in results if "role" in result]
    for (case,), _ in by(roles, "case").items():
        rates = {(r["contestant"], r["role"]): r["calls_per_second"] for r in roles if json.dumps(r["case"]) == case}
        kind = json.loads(case)["kind"]
        yield Measured(
            f"sample() beside a writer at full speed: {kind}, against alone",
            rates[OURS, "sample"] / rates[OURS, "sample alone"],
            0.95 if kind == "states" else 0.9,
            bound=rates["memcpy", "copy"] / rates["memcpy", "copy alone"],
        )
    loaded = (result for result in results if "source" in result)
    for (case,), sources in by(loaded, "case", name="source").items():
        times = {source: result["median_s"] for source, result in sources.items()}
        kind = json.loads(case)["kind"]
        for workers, target in ((0, 0.3), (2, 0.6)):
            items, batches = (times[f"{what}, num_workers={workers}"] for what in ("items", "batches"))
            what = f"DataLoader of {kind}, {workers} workers: items, against batches"
            yield Measured(what, batches / items, target)
        for workers, target in ((1, 0.8), (2, 1.3)):
            what = f"DataLoader of {kind}, {workers} worker{'s' * (workers > 1)}: batches, against rb.sample()"
            ours, bound = (
                times["rb.sample()"] / times[f"{source}, num_workers={workers}"] for source in ("batches", "numbers")
            )
            yield Measured(what, ours, target, bound=bound)


def of_memory(results: list[Result]) -> Iterator[Measured]:
    for result in results:
        if "layout" not in result:
            continue
        compact = "" if result["layout"] == "compact=False" else f", {result['layout']}"
        yield Measured(
            f"memory: episodes {result['case']['name']}{compact}, against TorchRL's storage",
            result["bytes_when_full"] / result["torchrl_bytes"],
            0.55 if compact else 1.05,
            at_most=True,
        )


OPTIONS_OF_THE_BUFFER = ("prefetch=2", "renamed by a transform", "return_info=True", "another batch size")


def of_features(results: list[Result]) -> Iterator[Measured]:
    for (case,), ways in by(results, "case", name="way").items():
        for way in OPTIONS_OF_THE_BUFFER:
            what = f"sample() of {json.loads(case)['kind']}: {way}, against plain chunks"
            yield Measured(what, ways[way]["median_s"] / ways["plain chunks"]["median_s"], 1.3, at_most=True)


def of_streaming(results: list[Result]) -> Iterator[Measured]:
    for (case,), rates in by(results, "case").items():
        what = "steps/s through engine and buffer: {env}, {policy} policy, against the collector".format(
            **json.loads(case)
        )
        writing = rates["collector that writes to a buffer"]["of_alone"]
        yield Measured(what, rates["engine and buffer"]["of_alone"], 0.95, bound=writing)


def of_collecting(results: list[Result]) -> Iterator[Measured]:
    for result in results:
        if result["contestant"] == "GymnasiumCollector":
            what = "steps/s of the collector: {env}, {policy} policy, against the bare loop".format(**result["case"])
            yield Measured(what, result["of_bare_loop"], 0.8)


def of_peers(results: list[Result]) -> Iterator[Measured]:
    for (case,), times in by(results, "case").items():
        shape = json.loads(case)
        target = 1.2 if shape["kind"] == "images" else 2.5 if shape["trajectories"] < 1000 else 1.6
        ratio = times["Flashbax"]["median_s"] / times[OURS]["median_s"]
        yield Measured(f"sample(): {name_of(shape)}, against Flashbax", ratio, target)


TOPICS: dict[str, Callable[[list[Result]], Iterator[Measured]]] = {
    "sampling": of_sampling,
    "inserting": of_inserting,
    "together": of_together,
    "memory": of_memory,
    "features": of_features,
    "streaming": of_streaming,
    "collecting": of_collecting,
    "peers": of_peers,
}


def draw(results: list[Result], path: Path) -> None:
    """Draw how many times as long TorchRL's sampler takes, for each case."""
    quiet = (result for result in results if "threads" in result and not result.get("busy"))
    turns = by(quiet, "case", "threads")
    threads = sorted({number for _, number in turns})
    cases = list(dict.fromkeys(case for case, _ in turns))
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(cases) + 1.2), layout="constrained")
    height = 0.8 / len(threads)
    for place, number in enumerate(threads):
        ratios = [turns[case, number][SLICES]["median_s"] / turns[case, number][OURS]["median_s"] for case in cases]
        at = [row + (place - (len(threads) - 1) / 2) * height for row in range(len(cases))]
        bars = axis.barh(at, ratios, height=0.9 * height, color=(BLUE, GREY)[place % 2])
        bars.set_label(f"{number} thread{'s' * (number > 1)}")
        axis.bar_label(bars, fmt="%.1fx", padding=3, fontsize=8)
    axis.axvline(10, color="black", lw=0.8, ls=":")
    axis.set_yticks(range(len(cases)), [name_of(json.loads(case)) for case in cases])
    axis.invert_yaxis()
    axis.set_xlabel(f"how many times as long {SLICES} takes (dotted: 10x)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(config: Config) -> None:
    found = {
        topic: json.loads(path.read_text())["results"]
        for topic in TOPICS
        if (path := config.results / f"{topic}.json").exists()
    }
    if not found:
        raise SystemExit(f"There are no results in {config.results}: run `make bench` first.")
    measured = [figure for topic, results in found.items() for figure in TOPICS[topic](results)]
    met = sum(figure.met for figure in measured)
    print_table(
        f"{met} of {len(measured)} targets met",
        ("", "target", "measured", "met", "bound"),
        [figure.row() for figure in measured],
    )
    if "sampling" in found:
        picture = config.picture or config.results / "sampling.png"
        draw(found["sampling"], picture)
        print(f"\n{picture}")


if __name__ == "__main__":
    main(tyro.cli(Config))
