"""Datasets for ``DataLoader`` workers that say what is loaded there; this module loads none of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

HEAVY = ("torchrl", "gymnasium", "transformers", "torchvision", "ray", "matplotlib", "rich", "IPython")
"""What takes long to load, or much memory, and is not needed to read chunks."""


def loaded() -> list[str]:
    """Return which of ``HEAVY`` this process has loaded."""
    return [name for name in HEAVY if name in sys.modules]


class InOneWorker(IterableDataset[Any]):
    """One item of each of several datasets, with what is loaded after it; then what their sources are.

    Args:
        datasets: datasets of this library.
    """

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = datasets

    def __iter__(self) -> Iterator[tuple[Any, list[str]]]:
        for dataset in self.datasets:
            yield next(iter(dataset)), loaded()
        yield [kind_of(dataset.source) for dataset in self.datasets], loaded()


def kind_of(source: Any) -> Any:
    """Return the name of the class of a source, or of each source of a mixture."""
    return [kind_of(each) for each in source] if isinstance(source, list) else type(source).__name__
