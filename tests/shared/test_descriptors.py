"""Memory that a process is given twice while it is started."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
from waiting import PATIENCE

from embodichain_rl.errors import SharingError
from embodichain_rl.shared import SharedBlock


class PickledApart:
    """A block on its way to a process, where it is the bytes of its pickle."""

    def __init__(self, block: SharedBlock) -> None:
        self._block = block

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (bytes(ForkingPickler.dumps(self._block)),)


def use(given: dict[str, Any], captured: Callable[[], SharedBlock], apart: bytes, answer: Connection) -> None:
    """Write through each of the three blocks; then read one whose first copy is gone."""
    for number, block in enumerate([given["block"], captured(), pickle.loads(apart)], start=1):
        block.mapped()[number] = number
    del block
    given.clear()
    captured.__closure__[0].cell_contents = None  # type: ignore[attr-defined]
    with pytest.raises(SharingError, match="has dropped the first one"):
        pickle.loads(apart)
    answer.send("done")


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_all_of_them_are_the_same_memory(start_method: str) -> None:
    block = SharedBlock(64)
    context = multiprocessing.get_context(start_method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=use, args=({"block": block}, lambda: block, PickledApart(block), sender))
    process.start()
    assert receiver.poll(PATIENCE)
    assert receiver.recv() == "done"
    process.join()
    assert block.mapped()[:5].tolist() == [0, 1, 2, 3, 0]
