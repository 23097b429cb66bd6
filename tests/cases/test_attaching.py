"""What users do with the buffer of a process that is not their parent: by its id, by a handle, from a notebook."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from steps import Child, check_chunk, contents, make_buffer, make_trajectory
from waiting import wait_until

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.errors import InvalidArgumentError, ReadOnlyBufferError, SharingError, UnsupportedOperationError


@pytest.fixture
def outsider() -> Any:
    child = Child("fork", None)  # begun before there is a buffer
    yield child
    child.end()


def look(_: Any, target: Any) -> list[tuple[int, int]]:
    rb = TrajectoryReplayBuffer.attach(target, mode="r")
    check_chunk(rb.sample())
    return contents(rb)


def write(_: Any, target: Any, number: int) -> list[tuple[int, int]]:
    rb = TrajectoryReplayBuffer.attach(target)
    rb.extend(make_trajectory(number, 4))
    return contents(rb)


def test_a_process_that_is_no_child_gets_the_same_buffer_by_its_handle(outsider: Child) -> None:
    rb = make_buffer([make_trajectory(number, 5) for number in range(3)])
    assert len(rb.handle) < 64
    assert rb.handle.isprintable()
    assert outsider.call(look, rb.handle) == contents(rb)
    assert outsider.call(write, rb.handle, 7) == contents(rb) == [(0, 5), (1, 5), (2, 5), (7, 4)]


def serve(_: Any) -> int:
    global _served
    _served = make_buffer([make_trajectory(1, 5)])
    return os.getpid()


def serve_two(_: Any) -> tuple[int, list[str]]:
    global _served
    _served = [make_buffer([make_trajectory(number, 5)]) for number in (1, 2)]
    return os.getpid(), [rb.handle for rb in _served]


_served: Any = None


def test_by_the_id_of_the_process_and_it_stays_when_that_dies(outsider: Child) -> None:
    owner = Child("spawn", None)
    rb = TrajectoryReplayBuffer.attach(owner.call(serve))
    assert contents(rb) == [(1, 5)]
    assert rb.batch_size == 8
    owner.process.kill()
    owner.process.join()
    rb.extend(make_trajectory(2, 6))
    assert contents(rb) == [(1, 5), (2, 6)]
    assert rb.sample().shape == (8, 3)
    assert rb.sample_chunks(4, 2).shape == (4, 2)
    # One of two, and what is refused, from the same interpreter: starting one takes seconds.
    with pytest.raises(SharingError, match=r"no process|has 0 such"):
        TrajectoryReplayBuffer.attach(owner.process.pid)
    pid, handles = outsider.call(serve_two)
    with pytest.raises(SharingError, match="attach to one of"):
        TrajectoryReplayBuffer.attach(pid)
    assert [contents(TrajectoryReplayBuffer.attach(handle)) for handle in handles] == [[(1, 5)], [(2, 5)]]


def test_looking_on_changes_nothing_and_delays_nobody(outsider: Child) -> None:
    rb = make_buffer([make_trajectory(1, 5)])
    outsider.call(look, rb.handle)
    os.kill(outsider.process.pid, signal.SIGSTOP)
    try:
        for number in range(2, 40):
            rb.extend(make_trajectory(number, 5))
    finally:
        os.kill(outsider.process.pid, signal.SIGCONT)
    onlooker = TrajectoryReplayBuffer.attach(rb.handle, mode="r")
    with pytest.raises(ReadOnlyBufferError):
        onlooker.extend(make_trajectory(1, 5))


def test_nothing_is_left_behind() -> None:
    rb = make_buffer([make_trajectory(1, 5)])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        contents(TrajectoryReplayBuffer.attach(rb.handle, mode="r"))
    import gc

    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to change the user")
def test_another_user_is_refused(outsider: Child) -> None:
    rb = make_buffer([make_trajectory(1, 5)])
    with pytest.raises(SharingError, match="user"):
        outsider.call(look_as_another_user, rb.handle)
    stranger = subprocess.Popen(["sleep", "600"], user=65534)
    try:
        wait_until(lambda: os.path.exists(f"/proc/{stranger.pid}/ns/pid"), "the process")
        with pytest.raises(SharingError, match="is of user 65534, this one is of user 0"):
            TrajectoryReplayBuffer.attach(stranger.pid)
    finally:
        stranger.kill()
        stranger.wait()


def look_as_another_user(_: Any, handle: str) -> None:
    os.seteuid(65534)
    try:
        look(_, handle)
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to make a namespace")
def test_another_pid_namespace_is_refused() -> None:
    command = ["unshare", "-p", "-f", sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    inside = subprocess.Popen(command)
    try:

        def child() -> str:
            with open(f"/proc/{inside.pid}/task/{inside.pid}/children") as file:
                return file.read().strip()

        wait_until(child, "the namespace")
        wait_until(lambda: os.readlink(f"/proc/{child()}/ns/pid") != os.readlink("/proc/self/ns/pid"), "the namespace")
        with pytest.raises(SharingError, match="another pid namespace"):
            TrajectoryReplayBuffer.attach(int(child()))
        os.kill(int(child()), signal.SIGKILL)
    finally:
        inside.kill()
        inside.wait()


@pytest.mark.parametrize("target", ["", "a", "1:2", "1:2:3:4", -1, 1.5, None, True, "²"])
def test_bad_targets(target: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="id of a process, or a handle"):
        TrajectoryReplayBuffer.attach(target)


def test_a_handle_of_a_process_that_has_ended() -> None:
    rb = make_buffer()
    pid, _, number = rb.handle.split(":")
    with pytest.raises(SharingError, match="has ended"):
        TrajectoryReplayBuffer.attach(f"{pid}:1:{number}")
    with pytest.raises(UnsupportedOperationError, match="has a handle"):
        _ = TrajectoryReplayBuffer.attach(rb.handle).handle
