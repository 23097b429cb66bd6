"""What an earlier checkpoint has written of the trajectories that are still live: it is not written again.

A part of a checkpoint is a folder with one file per field, that is never changed. The next checkpoint in the same place
names the folder again, or links its files, as long as half of its steps are still live. So a checkpoint writes what was
published since the one before, and its files take at most twice what is live.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embodichain_rl.errors import CheckpointError
from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.storage.saving.generations import checked_name
from embodichain_rl.replay.storage.saving.state import IDS, POLICY_VERSIONS
from embodichain_rl.shared import sync_folder

__all__ = [
    "DESCRIPTION",
    "KEPT",
    "PARTS",
    "VALUES",
    "VERSIONS_OF_ROWS",
    "EarlierParts",
    "KeptPart",
    "earlier_at",
    "going_on_from",
    "row_versions",
]

DESCRIPTION, VALUES = "trajectories.json", "values"
PARTS, KEPT, VERSIONS_OF_ROWS = "parts", "kept", "rows"

MOST_PARTS = 16
"""Number of parts of a checkpoint. The smallest ones beyond it are written anew, together."""

_earlier: ContextVar[Path | None] = ContextVar("earlier", default=None)


@contextmanager
def going_on_from(path: Path) -> Iterator[None]:
    """Let the checkpoints that are written in this block go on from the one at ``path``, which is in another place."""
    token = _earlier.set(path)
    try:
        yield
    finally:
        _earlier.reset(token)


def earlier_at(path: Path) -> Path:
    """Return where the earlier checkpoint is, for a new one at ``path``."""
    return _earlier.get() or path


def row_versions(rows: Rows) -> list[list[int]]:
    """Return what tells each trajectory from others with its id, and from itself before it was relabelled."""
    numbers: list[list[int]] = np.stack([rows.published_at, rows.changes], axis=1).tolist()
    return numbers


@dataclass(frozen=True)
class KeptPart:
    """A part of an earlier checkpoint that counts in the next one.

    Attributes:
        folder (Path): its files.
        description (dict): its entry in the description of the next checkpoint.
    """

    folder: Path
    description: dict[str, Any]

    @property
    def ids(self) -> list[int]:
        """The ids of its trajectories that count."""
        ids = self.description[IDS]
        return [ids[position] for position in self.description[KEPT]]

    def bring_to(self, path: Path) -> None:
        """Link the files into the directory of the next checkpoint, unless they are there."""
        target = path / self.folder.name
        if target == self.folder:
            return
        target.mkdir()
        for file in self.folder.iterdir():
            try:
                os.link(file, target / file.name)
            except OSError:  # a file system without links
                shutil.copyfile(file, target / file.name)
                with open(target / file.name, "rb+") as copied:
                    os.fsync(copied.fileno())
        sync_folder(target)


class EarlierParts:
    """The parts of an earlier checkpoint; none if it is damaged.

    Args:
        path: the directory of that checkpoint; None: there is none.
        ledger: a number that identifies the ledger of the storage.
        schema: the schema of the storage, as JSON.
        shifted: the shifted fields of the new checkpoint.
    """

    def __init__(self, path: Path | None, ledger: int, schema: str, shifted: Mapping[int, int]) -> None:
        self._parts: list[tuple[Path, dict[str, Any]]] = []
        if path is None:
            return
        try:
            description = json.loads((path / DESCRIPTION).read_text())
            if description["ledger"] != ledger or description["schema"] != schema:
                return
            if IDS not in description:
                end, count = description["next_id"], len(description["lengths"])
                description[IDS] = [*range(end - count, end)]
            for part in [description, *description[PARTS]]:
                folder = path / checked_name(part["folder"], VALUES)
                written = {int(number): source for number, source in part["shifted"].items()}
                if part["lengths"] and written == shifted and _is_whole(folder, part):
                    self._parts.append((folder, part))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError):
            self._parts = []

    def that_have(self, rows: Rows) -> list[KeptPart]:
        """Return the parts of which enough is live.

        Args:
            rows: the live trajectories.
        """
        now = dict(zip(rows.ids.tolist(), row_versions(rows), strict=True))
        found: list[tuple[int, KeptPart]] = []
        for folder, part in self._parts:
            written = zip(part[IDS], part[VERSIONS_OF_ROWS], strict=True)
            kept = [position for position, (number, version) in enumerate(written) if now.get(number) == version]
            steps = sum(part["lengths"][position] for position in kept)
            if kept and 2 * steps >= sum(part["lengths"]):
                names = ("folder", "lengths", "texts", "shifted", "sizes", IDS, POLICY_VERSIONS, VERSIONS_OF_ROWS)
                found.append((steps, KeptPart(folder, {**{name: part[name] for name in names}, KEPT: kept})))
        found.sort(key=lambda one: -one[0])
        return [part for _, part in found[:MOST_PARTS]]


def _is_whole(folder: Path, part: Mapping[str, Any]) -> bool:
    lists = (IDS, VERSIONS_OF_ROWS, POLICY_VERSIONS)
    if any(len(part[name]) != len(part["lengths"]) for name in lists):
        return False
    return {file.name: file.stat().st_size for file in folder.iterdir()} == part["sizes"]
