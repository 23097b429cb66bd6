"""Ragged values and encoded images of a buffer in a file: what is published stays, whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from ragged_steps import check_ragged, frame_of, jagged, ragged_trajectory
from tensordict import TensorDict
from torchrl.envs import GymWrapper

from embodichain_rl import (
    JpegCodec,
    OnlineDataEngine,
    OnlineDataEngineCfg,
    PngCodec,
    TrajectoryReplayBuffer,
)
from embodichain_rl.cli import main
from embodichain_rl.errors import BufferFileError, CodecError, DiskFullError, TrajectoryTooLongError
from embodichain_rl.replay.durable import syncing
from embodichain_rl.replay.durable.commits import read_log
from embodichain_rl.replay.ledger import JOURNAL_BYTES
from embodichain_rl.replay.ledger.invariants import check_ledger

pytest.importorskip("imagecodecs", reason="imagecodecs is not installed: pip install 'embodichain-rl[images]'")
pytest.importorskip("simplejpeg", reason="simplejpeg is not installed: pip install 'embodichain-rl[images]'")

LONG_LOG = 8 << 20


class Backwards:
    """A codec of the user's own: the bytes of a frame in reverse order, after a mark."""

    def encode(self, frame: np.ndarray) -> bytes:
        return b"own" + frame.tobytes()[::-1]

    def decode(self, data: bytes, out: Any) -> None:
        assert data[:3] == b"own"
        out.reshape(-1)[:] = np.frombuffer(data[:2:-1], dtype=np.uint8)

    def __repr__(self) -> str:  # a test has its name, which must be the same in every process
        return "Backwards()"


FORMATS: dict[str, dict[str, Any]] = {
    "ragged": {"ragged": ["points"]},
    "png": {"compress": {"frame": "png"}},
    "jpeg": {"compress": {"frame": JpegCodec(quality=100)}},
    "own codec": {"compress": {"frame": Backwards()}},
    "a slow camera": {"every": {"frame": 4}},
    "a slow camera as png, and ragged": {"every": {"frame": 4}, "compress": {"frame": "png"}, "ragged": ["points"]},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "buffer"


def make_buffer(path: Path | None, **options: Any) -> TrajectoryReplayBuffer:
    limits = {"max_trajectories": 5, "max_total_steps": 100, "batch_size": 4}
    if "sampler" not in options:
        limits["chunk_size"] = 3
    return TrajectoryReplayBuffer(path=path, **{**limits, **options})


def scored(number: int, length: int) -> TensorDict:
    """Return a trajectory with a score that can be relabelled, and a text."""
    data = ragged_trajectory(number, length).set("score", torch.zeros(length, dtype=torch.int64))
    data["instruction"] = f"sort {number}"
    return data


def everything(rb: TrajectoryReplayBuffer) -> dict[int, TensorDict]:
    """Check the ledger; return the live trajectories by their ids."""
    check_ledger(rb.storage.ledger)
    return trajectories(rb)


def trajectories(rb: TrajectoryReplayBuffer) -> dict[int, TensorDict]:
    """Return the live trajectories by their ids; check their texts."""
    found = {}
    for number in rb.storage.ledger.live().all().tolist():
        data = rb.storage.trajectory(number).exclude("index", "trajectory")
        if "instruction" in data:
            assert rb.texts.resolve(data["instruction"]) == [f"sort {int(data['label'][0, 0])}"] * len(data)
        found[number] = data
    return found


def rooms_of(rb: TrajectoryReplayBuffer) -> list[int]:
    """Return the sizes of the regions of the live trajectories, in steps."""
    ledger = rb.storage.ledger
    rooms: list[int] = ledger._rooms_of(ledger.live().all() % ledger.num_rows).tolist()
    return rooms


def check_same(found: dict[int, TensorDict], expected: dict[int, TensorDict]) -> None:
    assert [*found] == [*expected]
    for number, data in found.items():
        assert set(data.keys(True, True)) == set(expected[number].keys(True, True))
        for key, value in data.items(True, True):
            assert torch.equal(value, expected[number][key]), (number, key)


def in_a_process(action: Callable[[], object], *, killed: bool = False) -> None:
    """Do something in a process that ends afterwards; or that gets SIGKILL at the end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            action()
            code = 0
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == (signal.SIGKILL if killed else 0)


def restart_the_machine(path: Path, arena_lost: bool = False) -> None:
    """Let it look as if the machine had been started anew; of the ledger, the disk has nothing.

    Args:
        path: the directory of the buffer.
        arena_lost: whether the disk has nothing of the arena either.
    """
    users = json.loads((path / "users.json").read_text())
    (path / "users.json").write_text(json.dumps({**users, "boot": "an earlier one"}))
    for name in ("ledger", "arena")[: 1 + arena_lost]:
        with open(path / name, "r+b") as file:
            size = os.fstat(file.fileno()).st_size
            file.truncate(0)
            file.truncate(size)


# ------------------------------------------------------------------------------------------------------ every format


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_sigkill_of_everything_loses_nothing(path: Path, tmp_path: Path, name: str, compact: bool) -> None:
    options = {**FORMATS[name], "compact": compact}

    def work() -> None:
        rb = make_buffer(path, **options)
        for number in range(8):
            rb.extend(ragged_trajectory(number, 2 + 5 * number % 11))
        rb.extend(ragged_trajectory(9, 6)[:4])  # what was begun is gone
        torch.save(everything(rb), tmp_path / "before")

    in_a_process(work, killed=True)
    before = torch.load(tmp_path / "before", weights_only=False)
    assert [*before] == [3, 4, 5, 6, 7]
    if name != "own codec":
        check_same(trajectories(TrajectoryReplayBuffer.open(path, mode="r")), before)
    rb = make_buffer(path, **options)
    check_same(everything(rb), before)
    same_bits = name != "jpeg"
    for number in range(8, 30):
        rb.extend(ragged_trajectory(number, 2 + 5 * number % 11))
        check_ragged(rb.sample(), same_bits=same_bits)
    found = everything(rb)
    assert [*found] == [*range(25, 30)]
    for data in found.values():
        check_ragged(data, same_bits=same_bits)


@pytest.mark.parametrize("synced", ["with their bytes", "on their own", "in a new log each time"])
@pytest.mark.parametrize("name", FORMATS)
def test_after_a_start_of_the_machine_what_was_synced_is_there(
    path: Path, tmp_path: Path, name: str, synced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = synced == "with their bytes"
    monkeypatch.setattr(syncing, "CARRIED", 1 << 20 if carried else 0)
    monkeypatch.setattr(syncing, "LOG_BYTES", 1 if synced == "in a new log each time" else LONG_LOG)

    def work() -> None:
        rb = make_buffer(path, **FORMATS[name])
        rb.sync()  # the first log begins before there are steps
        for number in range(8):
            rb.extend(ragged_trajectory(number, 2 + 5 * number % 11))
            rb.sync()
        torch.save((everything(rb), rooms_of(rb)), tmp_path / "before")
        rb.extend(ragged_trajectory(8, 2))  # not synced

    in_a_process(work)
    restart_the_machine(path, arena_lost=carried)
    rb = make_buffer(path, **FORMATS[name])
    before, rooms = torch.load(tmp_path / "before", weights_only=False)
    assert [*before] == [3, 4, 5, 6, 7]
    check_same(everything(rb), before)
    assert rooms_of(rb) == rooms
    for number in range(8, 30):
        rb.extend(ragged_trajectory(number, 2 + 5 * number % 11))
        check_ragged(rb.sample(), same_bits=name != "jpeg")
    check_ledger(rb.storage.ledger)


# ---------------------------------------------------------------------------------------------------- unequal sizes


def points_steps(number: int, chance: np.random.Generator) -> TensorDict:
    """Return a trajectory whose steps have between none and two hundred points, of which most have few."""
    length = int(chance.integers(1, 12))
    most = int(chance.choice([1, 3, 30, 200]))
    values = [torch.full((int(chance.integers(0, most + 1)), 3), float(number)) for _ in range(length)]
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = True
    counts = torch.tensor([[number, len(value), length] for value in values])
    return TensorDict({"points": jagged(values), "counts": counts, "next": {"done": done}}, [length])


def many_points(number: int, points: int = 30_000) -> TensorDict:
    """Return a trajectory of two steps, of which only the first has points."""
    values, done = [torch.full((points, 3), float(number)), torch.zeros(0, 3)], torch.tensor([[False], [True]])
    counts = torch.tensor([[number, points, 2], [number, 0, 2]])
    return TensorDict({"points": jagged(values), "counts": counts, "next": {"done": done}}, [2])


def check_points(rb: TrajectoryReplayBuffer) -> list[int]:
    """Check every point of every live trajectory; return their ids."""
    check_ledger(rb.storage.ledger)
    ids = rb.storage.ledger.live().all().tolist()
    for each in ids:
        data = rb.storage.trajectory(each)
        number, _, length = data["counts"][0].tolist()
        assert number == each
        assert len(data) == length
        assert torch.equal(data["points_lengths"], data["counts"][:, 1])
        mask = torch.arange(data["points"].shape[1]) < data["points_lengths"][:, None]
        assert (data["points"][mask] == number).all()
        assert not data["points"][~mask].any()
    return ids


def test_it_turns_over_with_very_unequal_sizes(path: Path, tmp_path: Path) -> None:
    """An outsider opens it in the middle, again and again; and so does a machine that starts, a copy of it."""
    chance = np.random.default_rng(0)
    limits = {"max_trajectories": 6, "max_total_steps": 60, "ragged": ["points"], "ragged_bytes": 1000}
    rb = make_buffer(path, **limits)
    rooms = set[int]()

    def outsider() -> None:
        other = TrajectoryReplayBuffer.open(path)
        assert other.storage.ledger.rooms_vary
        check_points(other)
        other.extend(points_steps(number, np.random.default_rng(number)))
        assert check_points(other)[-1] == number

    number = 0
    while number < 400:
        assert rb.extend(points_steps(number, chance))[0] == number
        number += 1
        rooms |= set((np.array(rooms_of(rb)) - rb.storage.ledger.live_rows().lengths).tolist())
        if number % 25 == 0:
            in_a_process(outsider, killed=True)
            number += 1
            synced = check_points(rb)
            rb.sync()
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            copy_of(path, tmp_path / "copy")
            restart_the_machine(tmp_path / "copy")
            assert check_points(TrajectoryReplayBuffer.open(tmp_path / "copy")) == synced
    assert max(rooms) > 12, "no region was larger than its trajectory"
    assert min(rooms) == 0
    assert rb.stats()["reclaimed"] == 0


def copy_of(path: Path, target: Path) -> None:
    """Copy a directory of a buffer without the address space of its texts and of the ledger's journal."""
    target.mkdir()
    for file in path.iterdir():
        size = file.stat().st_size
        used = {"texts": 1 << 16, "ledger": size - JOURNAL_BYTES}.get(file.name, size)
        with open(file, "rb") as source, open(target / file.name, "wb") as copy:
            copy.write(source.read(used))
            copy.truncate(size)


def test_it_is_closed_and_made_again_at_every_trajectory(path: Path) -> None:
    chance = np.random.default_rng(1)
    limits = {"max_trajectories": 4, "max_total_steps": 40, "ragged": ["points"], "ragged_bytes": 1000}
    rooms = list[int]()
    for number in range(40):
        rb = make_buffer(path, **limits)
        assert rooms_of(rb) == rooms
        if number % 7 == 0:
            rb.unpin(rb.pinned)
            rb.pin([max(0, number - 2)] if number else [])
        rb.extend(points_steps(number, chance))
        assert check_points(rb)[-1] == number
        rooms = rooms_of(rb)
        rb.close()
        if number % 3 == 0:
            restart_the_machine(path)


# ------------------------------------------------------------------------------------- pins, discards, labels, texts


@pytest.mark.parametrize("after", ["sigkill", "a start of the machine"])
@pytest.mark.parametrize("log_bytes", [LONG_LOG, 1], ids=["one log", "both logs"])
def test_pins_discards_labels_and_texts(
    path: Path, tmp_path: Path, after: str, log_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syncing, "LOG_BYTES", log_bytes)
    options = FORMATS["a slow camera as png, and ragged"]

    def work() -> None:
        rb = make_buffer(path, **options)
        for number in range(4):
            rb.extend(scored(number, 3 + number))
        rb.pin([1])
        rb.sync()
        assert rb.relabel("score", lambda steps: torch.full_like(steps["score"], 7), ids=[1, 3]) == 2
        for number in range(4, 7):
            rb.extend(scored(number, 3 + number))
        assert rb.discard([4]) == 1
        rb.sync()
        torch.save(everything(rb), tmp_path / "before")

    in_a_process(work, killed=True)
    if after != "sigkill":
        restart_the_machine(path)
    rb = make_buffer(path, **options)
    before = torch.load(tmp_path / "before", weights_only=False)
    assert [*before] == [1, 3, 5, 6]
    check_same(everything(rb), before)
    assert rb.pinned.tolist() == [1]
    assert {number: int(data["score"].unique()) for number, data in before.items()} == {1: 7, 3: 7, 5: 0, 6: 0}
    for number in range(7, 30):
        rb.extend(scored(number, 3 + number % 7))
    found = everything(rb)
    assert [*found] == [1, 26, 27, 28, 29]
    check_same({1: found[1]}, {1: before[1]})


def test_it_is_pinned_before_anything_else_is_done_with_it(path: Path) -> None:
    options = {"max_total_steps": None, "max_bytes": 400_000, **FORMATS["ragged"]}

    def work() -> None:
        rb = make_buffer(path, **options)
        for number in range(4):
            rb.extend(ragged_trajectory(number, 6))

    in_a_process(work)
    for rb in (TrajectoryReplayBuffer.open(path), make_buffer(path, **options)):
        rb.pin([2])
        check_ledger(rb.storage.ledger)
        rb.unpin([2])


# ---------------------------------------------------------------------------------------------------- what is opened


def test_a_codec_of_the_users_own_is_needed_to_decode(path: Path) -> None:
    def work() -> None:
        rb = make_buffer(path, compress={"frame": Backwards()})
        rb.extend(ragged_trajectory(0, 5))
        rb.sync()

    in_a_process(work)
    restart_the_machine(path)
    opened = TrajectoryReplayBuffer.open(path)
    with pytest.raises(CodecError, match="a codec of your own"):
        opened.sample()
    with pytest.raises(CodecError, match="a codec of your own"):
        opened.extend(ragged_trajectory(1, 5))
    opened.close()
    restart_the_machine(path)
    rb = make_buffer(path, compress={"frame": Backwards()})
    check_ragged(rb.sample())
    rb.extend(ragged_trajectory(1, 5))
    rb.sync()
    assert torch.equal(rb[1]["frame"], torch.stack([frame_of(1, step) for step in range(5)]))


@pytest.mark.parametrize(
    "other",
    [
        {"ragged": []},
        {"ragged": ["points", "frame"], "compress": None},
        {"compress": {"frame": PngCodec(level=9)}},
        {"compress": {"frame": "jpeg"}},
        {"compress": {"frame": Backwards()}},
        {"compress": None},
        {"ragged_bytes": 5},
        {"every": {"frame": 3}},
    ],
    ids=str,
)
def test_other_formats_are_refused(path: Path, other: dict[str, Any]) -> None:
    given = {"ragged": ["points"], "compress": {"frame": "png"}}
    make_buffer(path, **given)
    with pytest.raises(BufferFileError, match=r"Got .*=.*was made with .*ragged=\['points'\]"):
        make_buffer(path, **{**given, **other})
    make_buffer(path, **given).extend(ragged_trajectory(0, 4))


def test_the_order_of_keys_does_not_matter(path: Path) -> None:
    make_buffer(path, ragged=["a", ("b", "c")], every={"d": 2, "e": 3})
    make_buffer(path, ragged=[("b", "c"), "a"], every={"e": 3, "d": 2})


def test_ragged_values_that_were_not_announced(path: Path) -> None:
    """Jagged tensors are ragged whatever a buffer was told."""

    def work() -> None:
        rb = make_buffer(path)
        for number in range(9):
            rb.extend(points_steps(number, np.random.default_rng(number)))
            rb.sync()

    in_a_process(work)
    rb = make_buffer(path)
    assert check_points(rb)[-1] == 8
    rb.close()
    restart_the_machine(path)
    assert check_points(make_buffer(path))[-1] == 8


def test_the_command_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        rb = make_buffer(path, **FORMATS["a slow camera as png, and ragged"])
        for number in range(9):
            rb.extend(ragged_trajectory(number, 2 + 5 * number % 11))
        rb.sync()

    in_a_process(work, killed=True)
    for restarted in (False, True):
        if restarted:
            restart_the_machine(path)
        for command in ("sync", "verify", "info"):
            assert main(["buffer", command, str(path)]) == 0, capsys.readouterr().err
        said = capsys.readouterr().out
        assert "5 trajectories are safe" in said
        assert "the invariants hold, 5 trajectories were read" in said
        assert "synced up to id: 9" in said


# -------------------------------------------------------------------------------------------------- limits, the disk


@pytest.mark.parametrize("after", ["a restart", "sigkill", "a start of the machine"])
def test_limited_by_bytes(path: Path, after: str) -> None:
    options = {"max_total_steps": None, "max_bytes": 400_000, **FORMATS["a slow camera as png, and ragged"]}

    def work() -> None:
        rb = make_buffer(path, **options)
        for number in range(8):
            rb.extend(ragged_trajectory(number, 2 + 5 * number % 11))
        rb.sync()

    in_a_process(work, killed=after != "a restart")
    if after == "a start of the machine":
        restart_the_machine(path)
    rb = TrajectoryReplayBuffer.open(path, batch_size=4)
    assert [*everything(rb)] == [3, 4, 5, 6, 7]
    limit = rb.storage.max_total_steps
    assert limit > 100
    for number in range(60):
        rb.extend(ragged_trajectory(number, 5))
        check_ragged(rb.sample())
    check_ledger(rb.storage.ledger)
    assert rb.stats()["bytes_expected"] <= 400_000
    with pytest.raises(TrajectoryTooLongError):
        rb.extend(ragged_trajectory(0, limit + 1))


def test_a_full_disk_is_an_error_and_keeps_what_is_there(tmp_path: Path) -> None:
    """Room on the disk is taken for the bytes of blobs, too, before they are written: there is no SIGBUS."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")

    def work() -> None:
        rb = make_buffer(disk / "buffer", max_trajectories=300, max_total_steps=400, ragged_bytes=100_000)
        rb.extend(many_points(0))
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - (1 << 20)))

        def fill() -> None:
            for number in range(1, 200):
                rb.extend(many_points(number))

        with pytest.raises(DiskFullError, match="no room"):
            fill()
        number = len(check_points(rb))
        assert rb.extend(many_points(number, 10))[0] == number  # there is room for less

    try:
        in_a_process(work, killed=True)
        assert len(check_points(TrajectoryReplayBuffer.open(disk / "buffer"))) >= 2
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_checkpoints_of_it_and_into_it(path: Path, tmp_path: Path) -> None:
    options = FORMATS["a slow camera as png, and ragged"]
    rb = make_buffer(path, **options)
    for number in range(8):
        rb.extend(ragged_trajectory(number, 2 + 5 * number % 11))
    rb.pin([5])
    before = everything(rb)
    rb.dumps(tmp_path / "checkpoint")
    in_memory = make_buffer(None, **options)
    in_memory.loads(tmp_path / "checkpoint")
    check_same(everything(in_memory), before)

    def load() -> None:
        other = make_buffer(tmp_path / "other", **options)
        other.loads(tmp_path / "checkpoint")
        other.sync()

    in_a_process(load)
    restart_the_machine(tmp_path / "other")
    other = make_buffer(tmp_path / "other", **options)
    check_same(everything(other), before)
    assert other.pinned.tolist() == [5]


def test_records_of_steps_of_one_size_are_as_in_earlier_versions(path: Path) -> None:
    """The sizes of regions are in a record only where they vary."""
    for name, options in (("plain", {}), ("ragged", FORMATS["ragged"])):
        rb = make_buffer(path / name, **options)
        rb.extend(ragged_trajectory(0, 5))
        rb.sync()
        files = [(path / name / file).read_bytes() for file in ("commits.0", "commits.1")]
        (record,), _ = read_log(files, rb.storage.ledger.row_words)
        assert record.state is not None
        assert len(record.state.rows) == 1
        assert len(record.state.rooms) == (name == "ragged")


@pytest.mark.parametrize("points", [1, 100_000])
def test_records_carry_the_bytes_of_few_values_only(path: Path, points: int) -> None:
    rb = make_buffer(path, ragged=["points"], ragged_bytes=200_000)
    rb.extend(points_steps(0, np.random.default_rng(0)))
    rb.sync()
    rb.extend(many_points(1, points))
    rb.sync()
    records, _ = read_log([(path / f"commits.{n}").read_bytes() for n in (0, 1)], rb.storage.ledger.row_words)
    sizes = [len(piece.content) for piece in records[-1].pieces]
    assert (sum(sizes) >= 12) == (points == 1)
    assert rooms_of(rb)[1] * rb.storage.schema.blobs.slot >= 12 * points


def test_processes_share_it(path: Path) -> None:
    rb = make_buffer(path, **FORMATS["a slow camera as png, and ragged"])  # nothing was written yet
    onlooker = TrajectoryReplayBuffer.open(path, mode="r")

    def work() -> None:
        other = TrajectoryReplayBuffer.open(path)
        for number in range(7):
            other.extend(ragged_trajectory(number, 2 + 5 * number % 11))

    in_a_process(work, killed=True)
    rb.sync()
    for each in (rb, onlooker):
        found = trajectories(each)
        assert [*found] == [2, 3, 4, 5, 6]
        for data in found.values():
            check_ragged(data)
    rb.extend(ragged_trajectory(7, 4))
    assert [*everything(rb)] == [3, 4, 5, 6, 7]
    with pytest.raises(Exception, match='mode="r"'):
        onlooker.extend(ragged_trajectory(8, 4))


@pytest.mark.parametrize("options", [{}, {"max_total_steps": None, "max_bytes": 400_000}], ids=["steps", "bytes"])
def test_the_first_steps_arrive_while_another_process_syncs(
    path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that learns only in the middle of a sync how large regions are."""

    def write() -> None:
        other = TrajectoryReplayBuffer.open(path)
        for number in range(4):
            other.extend(ragged_trajectory(number, 2 + 5 * number % 11))

    def work() -> None:
        rb = make_buffer(path, **FORMATS["a slow camera as png, and ragged"], **options)
        rb.sync()
        real = syncing.state_of_ledger

        def state_of_ledger(*arguments: Any) -> Any:
            if not rb.storage.initialized:
                in_a_process(write, killed=True)
            return real(*arguments)

        monkeypatch.setattr(syncing, "state_of_ledger", state_of_ledger)
        rb.pin([])  # a change, so that there is something to sync
        rb.sync()

    in_a_process(work)
    restart_the_machine(path)
    found = everything(TrajectoryReplayBuffer.open(path))
    assert [*found] == [0, 1, 2, 3]
    for data in found.values():
        check_ragged(data)


# -------------------------------------------------------------------------------------------------------- an engine


class Camera(gymnasium.Env):
    """Episodes of six steps whose frames show their step."""

    observation_space = gymnasium.spaces.Dict({"pixels": gymnasium.spaces.Box(0, 255, (24, 32, 3), np.uint8)})
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self._at = 0
        return self._frame(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self._at += 1
        return self._frame(), 0.0, self._at == 6, False, {}

    def _frame(self) -> dict[str, np.ndarray]:
        return {"pixels": np.full((24, 32, 3), self._at, np.uint8)}


def engine_over(path: Path, num_workers: int) -> OnlineDataEngine:
    cfg = OnlineDataEngineCfg(
        buffer_size=8,
        max_episode_steps=10,
        num_workers=num_workers,
        env_factory=lambda: GymWrapper(Camera()),
        progress_bar=False,
        refill_policy="manual",
        buffer_path=path,
        compress={"pixels": "png"},
    )
    return OnlineDataEngine(cfg)


def test_an_engine_fills_only_what_is_missing(path: Path) -> None:
    frames = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(7, 24, 32, 3)
    with engine_over(path, num_workers=0) as engine:
        engine.replay_buffer.discard([0, 1, 2])
        engine.replay_buffer.close()
    restart_the_machine(path)
    with engine_over(path, num_workers=1) as engine:
        rb = engine.replay_buffer
        assert rb.storage.ledger.live().all().tolist() == [*range(3, 11)]
        for data in everything(rb).values():
            assert torch.equal(data["pixels"], frames[:-1])
            assert torch.equal(data["next", "pixels"], frames[1:])
