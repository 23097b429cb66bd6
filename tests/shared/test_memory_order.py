"""The memory barriers that x86-64 does not need; these tests make them on every processor."""

from __future__ import annotations

import platform
import sys

import pytest
import torch
from steps import Child, contents, make_buffer, small

from embodichain_rl.errors import SharingError
from embodichain_rl.shared import memory_order
from embodichain_rl.shared.memory_order import Membarrier

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="membarrier(2) is a system call of Linux")


@pytest.fixture
def barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the system calls of a processor with a weaker memory order, in this process and its forked children."""
    monkeypatch.setattr(memory_order, "_barrier", Membarrier())


@pytest.mark.usefixtures("barrier")
def test_a_buffer_works_with_barriers() -> None:
    rb = make_buffer(max_trajectories=3)
    child = Child("fork", rb)
    try:
        for number in range(20):
            rb.extend(small(number, 5 + number % 3))
            assert child.call(_write, 100 + number) == 1
        assert [number for number, _ in contents(rb)] == [118, 19, 119]
        assert torch.equal(child.call(contents_of), torch.tensor(contents(rb)))
    finally:
        child.end()


def _write(rb: object, number: int) -> int:
    assert memory_order._barrier is not None
    return int(rb.extend(small(number, 4)).min() >= 0)  # type: ignore[attr-defined]


def contents_of(rb: object) -> torch.Tensor:
    return torch.tensor(contents(rb))  # type: ignore[arg-type]


def test_a_failed_system_call_raises() -> None:
    barrier = Membarrier()
    barrier._number = 10_000  # no such call
    with pytest.raises(SharingError, match=r"membarrier\(2\) failed: Function not implemented"):
        barrier()


def test_an_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    with pytest.raises(SharingError, match="'pdp11'"):
        Membarrier()
