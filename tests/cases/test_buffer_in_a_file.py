"""What users do with a buffer in a file: stop and go on, share it by its path, look on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steps import LABEL, Child, check_chunk, contents, make_buffer, make_trajectory, small
from tensordict import TensorDict
from waiting import wait_until

from embodichain_rl import (
    ByPriority,
    ChunkSampler,
    OnlineDataEngine,
    OnlineDataEngineCfg,
    TrajectoryReplayBuffer,
    TrajectoryStorage,
)
from embodichain_rl.errors import (
    BufferFileError,
    BufferInUseError,
    BufferNotFoundError,
    DiskFullError,
    InvalidArgumentError,
    OwnerGoneError,
    ReadOnlyBufferError,
    SchemaMismatchError,
    TrajectoryTooLongError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.durable import BufferDirectory
from embodichain_rl.replay.ledger.invariants import check_ledger

SIX = [make_trajectory(number, 3 + number) for number in range(6)]
KEPT = [(2, 5), (3, 6), (4, 7), (5, 8)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "pick" / "buffer"


def another_boot(path: Path) -> None:
    """Let it look as if the machine had been started anew since the buffer was used."""
    users = json.loads((path / "users.json").read_text())
    (path / "users.json").write_text(json.dumps({**users, "boot": "an earlier one"}))


def in_a_process(action: Callable[[], object]) -> None:
    """Do something in a process that ends afterwards, or before."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            action()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


# ------------------------------------------------------------------------------------------------- stopping, going on


def test_run_the_script_again_and_it_goes_on(path: Path) -> None:
    first = make_buffer(SIX, path=path)
    ids = [int(first.storage[n]["trajectory", "id"][0]) for n in range(4)]
    del first
    again = make_buffer(path=path)
    assert contents(again) == KEPT
    assert [int(again.storage[n]["trajectory", "id"][0]) for n in range(4)] == ids
    assert again.write_count == sum(3 + number for number in range(6))
    assert again.extend(make_trajectory(6, 4))[0] == 6
    assert contents(again) == [*KEPT[1:], (6, 4)]
    check_ledger(again.storage.ledger)


@pytest.mark.parametrize("made", ["by a buffer", "by an engine"])
def test_killed_as_soon_as_it_is_there(path: Path, made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        # The first thing that is done with the new directory.
        monkeypatch.setattr(BufferDirectory, "_enter", lambda self: os.kill(os.getpid(), signal.SIGKILL))
        if made == "by a buffer":
            make_buffer(path=path, sampler=ChunkSampler(5), end_key=("next", "terminated"))
        OnlineDataEngine(
            OnlineDataEngineCfg(buffer_size=4, max_episode_steps=20, gym_config={"id": "A-v0"}, buffer_path=path)
        )

    in_a_process(work)
    for mode in ("r", "r+"):
        rb = TrajectoryReplayBuffer.open(path, mode=mode)
        assert rb._sampler.chunk_size == (5 if made == "by a buffer" else 1)
        assert rb.batch_size == (8 if made == "by a buffer" else None)
        assert len(rb) == 0


def test_an_argument_that_is_refused_leaves_no_directory(path: Path) -> None:
    for wrong in ({"batch_size": 0}, {"chunk_size": 0}, {"chunk_size": None}):
        with pytest.raises(InvalidArgumentError):
            make_buffer(path=path, **wrong)
    assert not path.exists()


def described(number: int, length: int) -> TensorDict:
    data = make_trajectory(number, length)
    data["instruction"] = f"lift cube {number}"
    data["trajectory"] = TensorDict({"goal": torch.full((length, 2), float(number))}, [length])
    return data


def fill_and_die(_: Any, path: str) -> None:
    rb = make_buffer(path=path, sampler=ChunkSampler(3, weights=ByPriority(alpha=1.0, eps=1e-12)))
    for number in range(6):
        rb.extend(described(number, 3 + number))
    rb.sample()
    rb.update_priority([2, 5], [3.0, 7.0])
    rb.extend(described(7, 9)[:4])  # what was begun is gone
    os.kill(os.getpid(), signal.SIGKILL)


def test_sigkill_of_everything_loses_nothing_that_was_published(path: Path) -> None:
    child = Child("fork", None)
    child.begin(fill_and_die, str(path))
    wait_until(lambda: not child.process.is_alive(), "the death of the child")
    rb = make_buffer(path=path, sampler=ChunkSampler(3, weights=ByPriority(alpha=1.0, eps=1e-12)))
    assert contents(rb) == KEPT
    whole = rb.storage[:]
    assert rb.texts.resolve(whole["instruction"][:, 0]) == [f"lift cube {number}" for number, _ in KEPT]
    assert whole["trajectory", "goal"][:, 0, 0].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert rb.storage.ledger.weights_of(np.arange(2, 6)).tolist() == pytest.approx([3.0, 1.0, 1.0, 7.0])
    check_ledger(rb.storage.ledger)
    assert check_chunk(rb.sample()).shape == (8, 3)


def die_while_writing(_: Any, path: str) -> None:
    storage = TrajectoryStorage.open(path)
    storage.ledger.reserve(10)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_being_written_is_reclaimed_at_the_next_start(path: Path) -> None:
    def fill() -> None:
        make_buffer(SIX, path=path)

    in_a_process(fill)
    in_a_process(lambda: die_while_writing(None, str(path)))
    assert TrajectoryReplayBuffer.open(path, mode="r").stats()["writing"] == 1
    again = make_buffer(path=path)
    assert again.stats()["writing"] == 0
    assert again.stats()["reclaimed"] == 1
    assert contents(again) == KEPT


@pytest.mark.parametrize("compact", [False, True])
def test_images_stored_once_come_back(path: Path, compact: bool) -> None:
    make_buffer(SIX, path=path, compact=compact)
    assert contents(TrajectoryReplayBuffer.open(path)) == KEPT


# ------------------------------------------------------------------------------------------------- sharing by the path


def extend_at(_: Any, path: str, number: int) -> list[tuple[int, int]]:
    rb = TrajectoryReplayBuffer.open(path)
    assert rb.batch_size == 8
    check_chunk(rb.sample())
    rb.extend(make_trajectory(number, 4))
    return contents(rb)


def test_a_process_that_is_no_child_opens_it_and_writes(path: Path) -> None:
    child = Child("fork", None)  # begun before there is a buffer
    rb = make_buffer(SIX, path=path)
    assert child.call(extend_at, str(path), 9) == contents(rb) == [*KEPT[1:], (9, 4)]
    child.end()


def make_at(_: Any, path: str, number: int) -> int:
    rb = make_buffer(path=path)
    rb.extend(small(number, 4))
    wait_until(lambda: rb.stats()["published"] >= 3, "the others")
    return len(rb)


def test_ranks_that_all_make_it_share_one(path: Path) -> None:
    ranks = [Child("fork", None) for _ in range(3)]
    for number, rank in enumerate(ranks):
        rank.begin(make_at, str(path), number)
    assert [rank.result() for rank in ranks] == [3, 3, 3]
    assert sorted(contents(TrajectoryReplayBuffer.open(path))) == [(0, 4), (1, 4), (2, 4)]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    for rank in ranks:
        rank.end()


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_children_get_it_as_any_buffer(path: Path, start_method: str) -> None:
    rb = make_buffer(SIX, path=path)
    child = Child(start_method, rb)
    child.call(extend_given, 11)
    assert contents(rb) == [*KEPT[1:], (11, 5)]
    rb.sync()
    child.call(extend_and_sync, 12)
    child.end()


def extend_given(rb: TrajectoryReplayBuffer, number: int) -> None:
    rb.extend(make_trajectory(number, 5))


def extend_and_sync(rb: TrajectoryReplayBuffer, number: int) -> None:
    extend_given(rb, number)
    rb.sync()


def test_the_directory_is_moved_and_copied(path: Path, tmp_path: Path) -> None:
    make_buffer(SIX, path=path).sync()
    shutil.copytree(path, tmp_path / "copy")
    path.rename(tmp_path / "moved")
    for there in ("copy", "moved"):
        assert contents(TrajectoryReplayBuffer.open(tmp_path / there)) == KEPT


def test_a_copy_of_the_object_has_memory_of_its_own(path: Path) -> None:
    import copy

    rb = make_buffer(SIX, path=path)
    other = copy.deepcopy(rb)
    other.extend(make_trajectory(9, 3))
    assert contents(rb) == KEPT
    assert other.path is None
    assert rb.path == path


# ------------------------------------------------------------------------------------------------------ only looking on


def test_looking_on_sees_what_comes_and_changes_nothing(path: Path) -> None:
    rb = make_buffer(SIX, path=path)
    onlooker = TrajectoryReplayBuffer.open(path, mode="r")
    assert contents(onlooker) == KEPT
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    check_chunk(onlooker.sample())
    assert onlooker.trajectory(3).shape == (6,)
    assert len(onlooker.query()) == 4
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
    rb.extend(make_trajectory(6, 4))
    assert contents(onlooker) == contents(rb)
    assert onlooker.stats()["published"] == 7


def test_looking_on_refuses_every_change(path: Path) -> None:
    make_buffer(SIX, path=path)
    rb = TrajectoryReplayBuffer.open(path, mode="r")
    prioritized = TrajectoryReplayBuffer.open(path, mode="r", sampler=ChunkSampler(3, weights=ByPriority()))
    for change in (
        lambda: rb.extend(make_trajectory(6, 4)),
        rb.empty,
        rb.sync,
        lambda: rb.load_state_dict(make_buffer(SIX).state_dict()),
        lambda: rb.texts.intern("new"),
        prioritized.sample,
    ):
        with pytest.raises(ReadOnlyBufferError, match='mode="r"'):
            change()
    assert contents(rb) == KEPT


def test_looking_on_at_what_is_read_only_on_the_disk(path: Path) -> None:
    make_buffer(SIX, path=path)
    for file in path.iterdir():
        file.chmod(0o444)
    path.chmod(0o555)
    assert contents(TrajectoryReplayBuffer.open(path, mode="r")) == KEPT
    path.chmod(0o755)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_is_not_there_is_not_opened(path: Path) -> None:
    with pytest.raises(BufferNotFoundError, match="There is no buffer at") as refusal:
        TrajectoryReplayBuffer.open(path)
    assert isinstance(refusal.value, FileNotFoundError)
    path.mkdir(parents=True)
    (path / "notes.txt").touch()
    with pytest.raises(BufferFileError, match="exists, but is no buffer"):
        make_buffer(path=path)
    assert os.listdir(path) == ["notes.txt"]


@pytest.mark.parametrize(
    "other",
    [{"max_trajectories": 5}, {"max_total_steps": 200}, {"compact": True}, {"optional_keys": ["wrist"]}],
    ids=str,
)
def test_other_limits_are_refused(path: Path, other: dict[str, Any]) -> None:
    make_buffer(SIX, path=path)
    with pytest.raises(BufferFileError, match=f"Got {next(iter(other))}=.*was made with max_trajectories=4"):
        make_buffer(path=path, **other)


def test_other_keys_are_refused(path: Path) -> None:
    make_buffer(SIX, path=path)
    with pytest.raises(SchemaMismatchError):
        make_buffer(path=path).extend(small(0, 4))


def changed_header(**changes: Any) -> Any:
    def change(path: Path) -> None:
        header = json.loads((path / "buffer.json").read_text())
        (path / "buffer.json").write_text(json.dumps({**header, **changes}))

    return change


def cut(name: str, size: int) -> Any:
    return lambda path: os.truncate(path / name, size)


DAMAGES = {
    "half a header": cut("buffer.json", 50),
    "an empty header": cut("buffer.json", 0),
    "another checksum": changed_header(checksum=1),
    "another limit in the header": changed_header(settings={}),
    "another version": changed_header(format=99),
    "another layout": changed_header(layout="0123"),
    "half a ledger": cut("ledger", 4096),
    "half a schema": cut("schema", 10),
    "half a table of texts": cut("texts", 4096),
    "half an arena": cut("arena", 5000),
    "no arena": lambda path: (path / "arena").unlink(),
    "no users": lambda path: (path / "users.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("mode", ["r+", "r"])
def test_damage_is_found(path: Path, damage: str, mode: Any) -> None:
    def work() -> None:
        make_buffer(SIX, path=path)

    in_a_process(work)  # what is mapped must not be cut
    DAMAGES[damage](path)
    with pytest.raises(BufferFileError, match=r"damaged|version|can't be"):
        contents(TrajectoryReplayBuffer.open(path, mode=mode))


def test_a_buffer_in_use_in_another_pid_namespace_is_refused(path: Path) -> None:
    rb = make_buffer(SIX, path=path)
    users = json.loads((path / "users.json").read_text())
    (path / "users.json").write_text(json.dumps({**users, "namespace": "pid:[1]"}))
    with pytest.raises(BufferInUseError, match="another pid namespace"):
        TrajectoryReplayBuffer.open(path)
    (path / "users.json").write_text(json.dumps({**users, "boot": "other", "host": "gpu7"}))
    with pytest.raises(BufferInUseError, match="another machine, gpu7"):
        TrajectoryReplayBuffer.open(path)
    del rb


@pytest.mark.parametrize("value", [3, "", b"x", True])
def test_bad_paths_and_modes(path: Path, value: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        make_buffer(path=value)
    make_buffer(path=path)
    with pytest.raises(InvalidArgumentError, match="mode="):
        TrajectoryReplayBuffer.open(path, mode=value)


def test_sync_needs_a_file() -> None:
    with pytest.raises(UnsupportedOperationError, match="path="):
        make_buffer().sync()
    with pytest.raises(UnsupportedOperationError, match="path="):
        make_buffer(sync_every=1.0)


# ------------------------------------------------------------------------------------------------------------- the disk


def test_room_is_taken_as_it_is_used(path: Path) -> None:
    rb = make_buffer(path=path, max_trajectories=1000, max_total_steps=10_000_000)
    rb.extend(SIX[0])
    sizes = {file.name: (file.stat().st_size, file.stat().st_blocks * 512) for file in path.iterdir()}
    assert sizes["arena"][0] > 2_000_000_000
    assert sum(taken for _, taken in sizes.values()) < 200_000_000


def test_a_full_disk_is_an_error_and_keeps_what_is_there(tmp_path: Path) -> None:
    pytest.importorskip("ctypes")
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        rb = make_buffer(path=disk / "buffer", max_trajectories=1000, max_total_steps=60_000)
        step = TensorDict({"image": torch.zeros(10, 64, 64, 3, dtype=torch.uint8)}, [10])
        step["next", "done"] = torch.zeros(10, 1, dtype=torch.bool)
        step["next", "done"][-1] = True
        with pytest.raises(DiskFullError, match=r"needs .* bytes .*free"):
            rb.extend(step)  # 60,000 images can never fit
        rb = make_buffer(path=disk / "small", max_trajectories=1000, max_total_steps=3_000)
        rb.extend(step)
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - (1 << 20)))
        written = 1

        def fill() -> None:
            nonlocal written
            while written < 400:
                rb.extend(step)
                written += 1

        with pytest.raises(DiskFullError, match="no room") as refusal:
            fill()
        assert isinstance(refusal.value, OSError)
        assert 1 < written < 300
        assert len(rb) == written
        assert rb.sample().shape == (8, 3)
        with pytest.raises(DiskFullError):
            rb.extend(step)
        check_ledger(rb.storage.ledger)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --------------------------------------------------------------------------------------------- the machine starts anew


def by_priority() -> ChunkSampler:
    return ChunkSampler(3, weights=ByPriority(alpha=1.0, eps=1e-12))


def test_after_a_power_cut_what_was_synced_is_there(path: Path) -> None:
    def work() -> None:
        rb = make_buffer(SIX[:5], path=path, sampler=by_priority())
        rb.sample()
        rb.update_priority([3], 5.0)
        rb.sync()
        rb.extend(SIX[5])  # not synced

    in_a_process(work)
    another_boot(path)
    with pytest.raises(BufferFileError, match="Open it once without a mode"):
        TrajectoryReplayBuffer.open(path, mode="r")
    rb = make_buffer(path=path)
    assert contents(rb) == [(1, 4), (2, 5), (3, 6), (4, 7)]
    ledger = rb.storage.ledger
    assert ledger.weights_of(np.array([2, 3, 4])).tolist() == pytest.approx([1.0, 5.0, 1.0])
    assert 0 <= time.monotonic_ns() - int(ledger.published_at(np.array([3]))[0]) < 3600e9
    check_ledger(ledger)
    rb.extend(SIX[5])
    check_chunk(rb.sample())


def test_without_a_sync_a_power_cut_empties_it(path: Path) -> None:
    def work() -> None:
        make_buffer(SIX, path=path)

    in_a_process(work)
    another_boot(path)
    rb = make_buffer(path=path)
    assert len(rb) == 0
    rb.extend(small(1, 4))  # of other keys
    assert contents(rb) == [(1, 4)]


def test_texts_and_values_survive_a_power_cut(path: Path) -> None:
    def work() -> None:
        rb = make_buffer(path=path)
        for number in range(3):
            rb.extend(described(number, 4))
            rb.sync()
        rb.texts.intern("not synced")

    in_a_process(work)
    another_boot(path)
    rb = make_buffer(path=path)
    whole = rb.storage[:]
    assert rb.texts.resolve(whole["instruction"][:, 0]) == [f"lift cube {number}" for number in range(3)]
    assert whole["trajectory", "goal"][:, 0, 0].tolist() == [0.0, 1.0, 2.0]
    assert len(rb.texts) == 4
    assert whole[LABEL][:, 0, 0].tolist() == [0, 1, 2]


def test_sync_every_so_many_seconds(path: Path) -> None:
    rb = make_buffer(SIX, path=path, sync_every=0.05)
    wait_until(lambda: rb.storage.ledger.last_commit()[1] == 6, "the thread")
    with pytest.raises(InvalidArgumentError):
        make_buffer(path=path, sync_every=0)


def pin_and_discard(path: Path) -> TrajectoryReplayBuffer:
    """Make a buffer of six trajectories, of which 1 is pinned and 4 discarded; the limit evicts 0 and 2."""
    rb = make_buffer(max_trajectories=4, max_total_steps=1000, chunk_size=3, path=path)
    for trajectory in SIX[:3]:
        rb.extend(trajectory)
    rb.pin([1])
    for trajectory in SIX[3:5]:
        rb.extend(trajectory)
    assert rb.discard([4]) == 1
    rb.extend(SIX[5])
    return rb


def check_pinned_and_discarded(rb: TrajectoryReplayBuffer) -> None:
    check_ledger(rb.storage.ledger)
    assert rb.storage.ledger.live().all().tolist() == [1, 2, 3, 5]
    assert rb.pinned.tolist() == [1]
    assert contents(rb) == [(1, 4), (2, 5), (3, 6), (5, 8)]
    for number in range(6, 12):  # the pinned one stays
        rb.extend(make_trajectory(number, 3 + number))
    check_ledger(rb.storage.ledger)
    assert rb.storage.ledger.live().all().tolist() == [1, 9, 10, 11]
    assert contents(rb)[0] == (1, 4)


def test_pins_and_holes_survive_sigkill(path: Path) -> None:
    def work() -> None:
        pin_and_discard(path)
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_process(work)
    check_pinned_and_discarded(TrajectoryReplayBuffer.open(path))


@pytest.mark.parametrize("when", ["synced at once", "synced before and after"])
def test_pins_and_holes_survive_a_power_cut(path: Path, when: str) -> None:
    def work() -> None:
        if when == "synced at once":
            pin_and_discard(path).sync()
            return
        rb = make_buffer(max_trajectories=4, max_total_steps=1000, chunk_size=3, path=path)
        for trajectory in SIX[:3]:
            rb.extend(trajectory)
        rb.sync()
        rb.pin([1])
        rb.sync()
        for trajectory in SIX[3:5]:
            rb.extend(trajectory)
        rb.sync()
        rb.discard([4])
        rb.sync()
        rb.extend(SIX[5])
        rb.sync()

    in_a_process(work)
    (path / "ledger").write_bytes(bytes((path / "ledger").stat().st_size))  # what the disk has of it counts for nothing
    another_boot(path)
    check_pinned_and_discarded(TrajectoryReplayBuffer.open(path))


def test_what_is_pinned_stays_and_what_is_discarded_goes_without_another_sync(path: Path) -> None:
    def work() -> None:
        rb = make_buffer(max_trajectories=4, max_total_steps=40, chunk_size=3, path=path)
        for trajectory in SIX[:4]:
            rb.extend(trajectory)
        rb.pin([1])
        rb.sync()
        rb.discard([2])
        for number in range(6, 30):  # over the room of all but the pinned one
            rb.extend(make_trajectory(number, 8))

    in_a_process(work)
    another_boot(path)
    rb = TrajectoryReplayBuffer.open(path)
    check_ledger(rb.storage.ledger)
    assert contents(rb) == [(1, 4)]
    assert rb.pinned.tolist() == [1]


def test_what_takes_the_room_of_a_discarded_trajectory_is_not_taken_for_it(path: Path) -> None:
    def work() -> None:
        rb = make_buffer([small(number, 10) for number in range(4)], path=path, max_total_steps=40)
        rb.sync()
        rb.discard([1])
        rb.extend(small(4, 10))

    in_a_process(work)
    another_boot(path)
    rb = TrajectoryReplayBuffer.open(path)
    check_ledger(rb.storage.ledger)
    assert contents(rb) == [(0, 10), (2, 10), (3, 10)]


def test_a_checkpoint_of_it_has_the_pins(path: Path, tmp_path: Path) -> None:
    pin_and_discard(path).dumps(tmp_path / "checkpoint")
    rb = make_buffer(max_trajectories=4, max_total_steps=1000, chunk_size=3)
    rb.loads(tmp_path / "checkpoint")
    check_pinned_and_discarded(rb)


def test_a_closed_buffer_can_be_opened_again(path: Path) -> None:
    rb = make_buffer(max_trajectories=4, max_total_steps=1000, chunk_size=3, path=path, batch_size=4)
    rb.extend(SIX[0])
    batch = rb.sample()
    rb.close()
    for use in (rb.sample, rb.sync, lambda: rb.extend(SIX[1]), lambda: rb[0]):
        with pytest.raises(OwnerGoneError, match="was closed"):
            use()
    rb.close()
    check_chunk(batch[0])
    again = TrajectoryReplayBuffer.open(path)
    assert contents(again) == [(0, 3)]
    again.extend(SIX[1])
    assert len(again) == 2


BY_BYTES: dict[str, Any] = {"max_trajectories": 4, "max_total_steps": None, "max_bytes": 1_000_000, "chunk_size": 3}


@pytest.mark.parametrize("after", ["a restart", "sigkill", "a power cut"])
def test_limited_by_bytes(path: Path, after: str) -> None:
    def work() -> None:
        rb = make_buffer(SIX, path=path, **BY_BYTES)
        rb.sync()

    in_a_process(work) if after != "a restart" else make_buffer(SIX, path=path, **BY_BYTES).close()
    if after == "a power cut":
        another_boot(path)
    rb = TrajectoryReplayBuffer.open(path, batch_size=8)
    assert contents(rb) == KEPT
    limit = rb.storage.max_total_steps
    assert limit == make_buffer(**BY_BYTES, trajectories=SIX).storage.max_total_steps > 100
    for number in range(40):
        rb.extend(make_trajectory(number, 5))
    check_chunk(rb.sample())
    check_ledger(rb.storage.ledger)
    assert rb.stats()["bytes_expected"] <= 1_000_000
    with pytest.raises(BufferFileError, match="max_bytes=2000000"):
        make_buffer(path=path, **{**BY_BYTES, "max_bytes": 2_000_000})
    with pytest.raises(TrajectoryTooLongError):
        rb.extend(make_trajectory(0, limit + 1))


def test_its_room_is_taken_at_once_if_reserved(path: Path) -> None:
    limits = {"max_trajectories": 100, "max_total_steps": 100_000, "chunk_size": 3}
    rb = make_buffer(path=path, reserve=True, **limits)
    rb.extend(SIX[0])
    expected = rb.stats()["bytes_expected"]
    assert expected > 4_000_000
    assert (path / "arena").stat().st_blocks * 512 > 0.9 * expected
    rb.close()
    assert contents(TrajectoryReplayBuffer.open(path)) == [(0, 3)]


def rewards(rb: TrajectoryReplayBuffer) -> dict[int, list[float]]:
    ids = rb.storage.ledger.live().all().tolist()
    return {number: rb.storage.trajectory(number)["next", "reward"].flatten().tolist() for number in ids}


def add(value: float) -> Callable[[TensorDict], torch.Tensor]:
    return lambda trajectory: trajectory["next", "reward"] * 0 + value


@pytest.mark.parametrize("synced", ["never", "before", "after", "before and after"])
def test_labels_are_changed_and_the_power_fails(path: Path, synced: str) -> None:
    def work() -> None:
        rb = make_buffer(SIX[:4], path=path)
        if "before" in synced:
            rb.sync()
        rb.extend(SIX[4])
        assert rb.relabel(("next", "reward"), add(7.0), ids=[1, 2, 4]) == 3
        assert rewards(rb)[2] == [7.0] * 5
        if "after" in synced:
            rb.sync()

    in_a_process(work)
    found = rewards(TrajectoryReplayBuffer.open(path, mode="r"))
    assert [number for number in found if set(found[number]) == {7.0}] == [1, 2, 4]
    another_boot(path)
    rb = make_buffer(path=path)
    check_ledger(rb.storage.ledger)
    after = rewards(rb)
    kept = {"never": [], "before": [1, 2, 3], "after": [1, 2, 3, 4], "before and after": [1, 2, 3, 4]}[synced]
    assert [*after] == kept
    assert all(after[number] == found[number] for number in kept if number in found)
    assert rb.relabel(("next", "reward"), add(9.0)) == len(kept)
    assert all(set(values) == {9.0} for values in rewards(rb).values())


def test_texts_are_changed_and_the_power_fails(path: Path) -> None:
    def work() -> None:
        rb = make_buffer(path=path)
        for number in range(3):
            rb.extend(described(number, 4))
        rb.sync()
        rb.relabel("instruction", lambda trajectory: "a new one", ids=[1])
        rb.relabel(("trajectory", "goal"), lambda trajectory: trajectory["trajectory", "goal"][0] + 5.0, ids=[2])

    in_a_process(work)
    another_boot(path)
    whole = make_buffer(path=path).storage[:]
    texts = TrajectoryReplayBuffer.open(path).texts.resolve(whole["instruction"][:, 0])
    assert texts == ["lift cube 0", "a new one", "lift cube 2"]
    assert whole["trajectory", "goal"][:, 0, 0].tolist() == [0.0, 1.0, 7.0]


def test_very_many_changes_do_not_fill_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embodichain_rl.replay.durable.syncing.LOG_BYTES", 64 * 1024)
    rb = make_buffer(SIX, path=path)
    rb.sync()
    for number in range(200):
        rb.relabel(("next", "reward"), add(float(number)))
    assert max((path / f"commits.{n}").stat().st_size for n in (0, 1)) < 256 * 1024
    check_ledger(rb.storage.ledger)
    rb.close()
    another_boot(path)
    assert all(set(values) == {199.0} for values in rewards(make_buffer(path=path)).values())


@pytest.mark.parametrize("at", ["the record", "the first change", "the note that all is changed"])
def test_killed_while_labels_are_changed(path: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_in = {
        "the record": "commits.CommitLog.set_last",
        "the first change": "syncing.Syncer._change",
        "the note that all is changed": "commits.CommitLog.end_changes",
    }[at]

    def work() -> None:
        rb = make_buffer(SIX, path=path)
        rb.sync()
        monkeypatch.setattr(f"embodichain_rl.replay.durable.{killed_in}", lambda *_: os.kill(os.getpid(), 9))
        if at == "the note that all is changed":  # it is made before, too
            monkeypatch.setattr("embodichain_rl.replay.durable.syncing.Syncer._finish_changes", lambda self: None)
        rb.relabel(("next", "reward"), add(7.0))

    in_a_process(work)
    rb = TrajectoryReplayBuffer.open(path)
    before = rewards(rb)
    check_ledger(rb.storage.ledger)
    rb.sync()  # makes what was begun
    after = rewards(rb)
    assert before.keys() == after.keys() == {2, 3, 4, 5}
    changed = {number: set(values) == {7.0} for number, values in after.items()}
    assert set(changed.values()) == {at != "the record"}
    rb.relabel(("next", "reward"), add(8.0), ids=[3])
    rb.close()
    another_boot(path)
    recovered = rewards(make_buffer(path=path))
    assert recovered == {**after, 3: [8.0] * 6}
