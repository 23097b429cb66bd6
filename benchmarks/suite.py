"""Run all topics in sequence, then compare the results with the targets.

    python benchmarks/suite.py
    python benchmarks/suite.py --quick

The docstring of each script says what it measures. Each topic runs in a separate process, which is forked from this one
after torch and TorchRL are imported, since the imports take seconds.
"""

from __future__ import annotations

import multiprocessing
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import torchrl.collectors  # noqa: F401  # imported for the forked processes
import tyro

import embodichain_rl.engine.data  # noqa: F401  # as above

TOPICS = ("sampling", "inserting", "together", "collecting", "streaming", "memory", "features", "profile_calls")

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    """Run all topics."""

    quick: bool = False
    """Less of everything, in about a minute, to check that it runs."""
    out: Path = Path("outputs/benchmarks")
    """Directory of the JSON files for the results."""


def run(script: str, arguments: list[str]) -> None:
    """Run a script, as ``python script arguments`` does."""
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def main(config: Config) -> None:
    context = multiprocessing.get_context("fork")
    for topic in TOPICS:
        print(f"== {topic}", flush=True)
        arguments = ["--quick"] if config.quick else []
        script = str(HERE / f"{topic}.py")
        process = context.Process(target=run, args=(script, [*arguments, "--out", str(config.out / f"{topic}.json")]))
        process.start()
        process.join()
        if process.exitcode != 0:
            sys.exit(f"{topic} failed with exit code {process.exitcode}.")
    run(str(HERE / "report.py"), ["--results", str(config.out)])


if __name__ == "__main__":
    main(tyro.cli(Config))
