"""TorchRL's own scripts on TorchRL's buffers and on ``TrajectoryReplayBuffer``, side by side.

Copies the scripts of a checkout of TorchRL, replaces the constructors that ``clients.py`` names in one of two copies,
runs both, and prints a table. Nothing in the checkout is changed.

    make clients TORCHRL=~/rl
    python examples/clients/compare.py ~/rl --only SAC DreamerV3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from clients import CLIENTS, LEFT_OUT, Client
from substitute import substituted

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("torchrl", type=Path, help="a checkout of github.com/pytorch/rl, near v0.14.1")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of clients; all by default")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one script")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="more arguments for the scripts")
    arguments = parser.parse_args()
    chosen = [
        replace(client, arguments=(*client.arguments, *arguments.set))
        for client in CLIENTS
        if not arguments.only or client.name in arguments.only
    ]
    print(
        "| script | constructors | updates: theirs, ours | loss, first and last tenth: theirs; ours "
        "| ms a batch, median: theirs, ours | seconds |"
    )
    print("|---|---|---|---|---|---|")
    failed = []
    for client in chosen:
        line = compared(client, arguments.torchrl.expanduser(), arguments.timeout)
        failed += [client.name] if "failed" in line else []
        print(line, flush=True)
    for script, reason in LEFT_OUT.items():
        print(f"not run: {script}: {reason}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def compared(client: Client, torchrl: Path, timeout: float) -> str:
    """Return the line of the table for one script."""
    with tempfile.TemporaryDirectory() as directory:
        runs = []
        replaced = 0
        for name, buffers in (("theirs", {}), ("ours", client.buffers)):
            copy = Path(directory) / name
            folder = Path(client.script).parent
            shutil.copytree(torchrl / folder, copy / folder)
            count = 0
            for file in client.files or (client.script,):
                path = copy / file
                text, found = substituted(path.read_text(), buffers, client.numbers)
                path.write_text(text)
                count += found
            replaced = max(replaced, count)
            runs.append(run(copy / client.script, client.arguments, copy, timeout))
        if replaced < len(client.buffers):
            return f"| {client.name} | failed: the script has other constructors | | | | |"
        theirs, ours = runs
        errors = [f"{who}: {made['error']}" for who, made in (("theirs", theirs), ("ours", ours)) if "error" in made]
        if errors:
            return f"| {client.name} | failed: {'; '.join(errors)} | | | | |"
        if theirs["updates"] and not ours["updates"]:
            return f"| {client.name} | failed: no updates, where theirs has {theirs['updates']} | | | | |"
        updates = f"{theirs['updates']}, {ours['updates']}"
        losses = f"{losses_of(theirs)}; {losses_of(ours)}"
        speed = f"{per_batch(theirs)}, {per_batch(ours)}"
        return (
            f"| {client.name} | {replaced} | {updates} | {losses} | {speed} | "
            f"{theirs['seconds']:.0f}, {ours['seconds']:.0f} |"
        )


def run(script: Path, arguments: tuple[str, ...], copy: Path, timeout: float) -> dict[str, Any]:
    """Run a script in its folder; return what ``measured.py`` wrote down, or the last line of its error."""
    result = copy / "result.json"
    command = [sys.executable, str(HERE / "measured.py"), str(result), str(script), *arguments]
    environment = {**os.environ, "MPLBACKEND": "Agg", "SDL_VIDEODRIVER": "dummy", "HYDRA_FULL_ERROR": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")  # the networks are small, and collectors have processes of their own
    try:
        done = subprocess.run(
            command, cwd=script.parent, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it takes more than {timeout:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    made: dict[str, Any] = json.loads(result.read_text())
    return made


def losses_of(made: dict[str, Any]) -> str:
    """Return the mean losses of the first and the last tenth of the updates, as text."""
    return "-" if made["last_loss"] is None else f"{made['first_loss']:.3g} to {made['last_loss']:.3g}"


def per_batch(made: dict[str, Any]) -> str:
    """Return the milliseconds that a batch took, as text."""
    return f"{1000 * made['sample_seconds']:.2f}" if made["batches"] else "-"


if __name__ == "__main__":
    main()
