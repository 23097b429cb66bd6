"""A part of the tests, with several versions of Python and of the packages that the library builds on.

    make matrix
    make matrix MATRIX_ARGS="--only py313-newest"

Each cell has a virtual environment of its own in ``--folder``. It takes up to 6 GB (torch with CUDA). Complete ones are
used again. Cells run one after the other. The table at the end is that of ``docs/compatibility.md``.

Interpreters are found on the PATH, as ``python3.12``, or with pyenv. A cell whose interpreter is missing is skipped.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[2]

TESTS = (
    "tests/replay/sampling",
    "tests/replay/schema",
    "tests/replay/test_buffer.py",
    "tests/replay/test_torchrl_behaviours.py",
    "tests/datasets",
    "tests/collectors/test_same_as_torchrl.py",
    "tests/test_imports.py",
    "tests/test_public_surface.py",
)
"""What runs in each cell, without the tests that are marked as slow."""

OTHERS = ("pytest", "pytest-timeout", "hypothesis", "torchdata", "psutil", "matplotlib")
"""What the tests need beside the dependencies of the package."""

SHOWN = ("torch", "torchrl", "tensordict", "gymnasium", "numpy")


@dataclass(frozen=True)
class Cell:
    """One set of versions."""

    name: str
    python: str
    """Such as ``3.12``."""
    packages: tuple[str, ...]
    """Requirements, with the version of those that are not the newest that can be installed."""


NEWEST = ("torch", "torchrl>=0.14,<0.15", "tensordict>=0.14.3,<0.15", "gymnasium", "numpy")
OLDEST = ("torch==2.7.0", "torchrl==0.14.0", "tensordict==0.14.3", "gymnasium==1.1.0", "numpy==1.26.4")
# Of the other dependencies, as pyproject.toml has them.
OLDEST_OTHERS = ("cloudpickle==3.0.0", "lazy_loader==0.5", "pyyaml==6.0", "tqdm==4.66.0", "tyro==0.9.0")

CELLS = (
    Cell("py311-oldest", "3.11", (*OLDEST, *OLDEST_OTHERS)),
    Cell("py311-newest", "3.11", NEWEST),
    Cell("py312-newest", "3.12", NEWEST),
    Cell("py313-newest", "3.13", NEWEST),
)


@dataclass(frozen=True)
class Config:
    """Run a part of the tests with several versions of Python, torch, TorchRL, tensordict and Gymnasium."""

    only: tuple[str, ...] = ()
    """Names of cells; by default all."""
    folder: Path = ROOT / "outputs" / "matrix"
    """Where the environments and the results are kept."""
    timeout: float = 3600.0
    """Seconds that the tests of a cell may take."""
    tests: Annotated[tuple[str, ...], tyro.conf.arg(help="Paths of tests; by default those of the table.")] = TESTS


def interpreter(version: str) -> str | None:
    """Return the path of an interpreter of a version such as ``3.12``, or None."""
    if sys.version.startswith(f"{version}."):
        return sys.executable
    candidates = [
        *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
        shutil.which(f"python{version}"),
    ]
    for path in filter(None, candidates):
        done = subprocess.run([path, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True)
        if done.stdout.decode().strip() == version:
            return str(path)
    return None


def environment(cell: Cell, folder: Path) -> Path | None:
    """Return the interpreter of a cell's environment, which is made if it is not complete; None without a Python."""
    python, complete = folder / cell.name / "bin" / "python", folder / cell.name / "complete"
    if complete.exists():
        return python
    base = interpreter(cell.python)
    if base is None:
        return None
    subprocess.run([base, "-m", "venv", "--clear", folder / cell.name], check=True)
    others = ("cloudpickle", "lazy_loader", "pyyaml", "tqdm", "tyro")
    named = {re.split(r"[=<>]", package)[0] for package in cell.packages}
    needed = [*cell.packages, *(package for package in others if package not in named), *OTHERS]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *needed], check=True)
    complete.touch()
    return python


def run(cell: Cell, config: Config) -> dict[str, object]:
    """Return the versions of a cell and how its tests ended."""
    python = environment(cell, config.folder)
    if python is None:
        return {
            "cell": cell.name,
            "versions": {},
            "result": f"skipped: no Python {cell.python} was found",
            "failed": [],
        }
    code = (
        "import json, platform; from importlib.metadata import version;"
        f"print(json.dumps({{'python': platform.python_version()}} | {{n: version(n) for n in {SHOWN}}}))"
    )
    versions = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True).stdout)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *config.tests]
    log = config.folder / f"{cell.name}.log"
    began = time.monotonic()
    with log.open("w") as output:
        try:
            subprocess.run(
                command,
                cwd=ROOT,
                env={"PYTHONPATH": str(ROOT), "PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(Path.home())},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=config.timeout,
            )
        except subprocess.TimeoutExpired:
            output.write(f"\nnot done after {config.timeout:.0f} s\n")
    text = log.read_text()
    return {
        "cell": cell.name,
        "versions": versions,
        "result": re.sub(r" in [\d.]+s.*", "", text.strip().splitlines()[-1]),
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE),
        "seconds": round(time.monotonic() - began),
    }


def main(config: Config) -> None:
    config.folder.mkdir(parents=True, exist_ok=True)
    path = config.folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for cell in CELLS:
        if not config.only or cell.name in config.only:
            print(cell.name, flush=True)
            results[cell.name] = run(cell, config)
            path.write_text(json.dumps(results, indent=2))
    print("\n| Python | " + " | ".join(SHOWN) + " | result |")
    print("|---" * (len(SHOWN) + 2) + "|")
    for cell in CELLS:
        if found := results.get(cell.name):
            versions = [found["versions"].get(name, "-") for name in ("python", *SHOWN)]
            print("| " + " | ".join([*versions, found["result"]]) + " |")
            for test in found["failed"]:
                print(f"  {cell.name}: {test}")
    if any(found["failed"] for found in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Config))
