"""Long episodes that come in pieces: their steps are written once, to where they stay, and take their memory once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from instructions import EVERY, run_in_child_until
from steps import check_chunk, check_trajectory, contents, make_buffer, make_trajectory
from tensordict import TensorDict
from waiting import PATIENCE

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer, TrajectoryWriter
from embodichain_rl.replay.ledger import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger, _Waiting
from embodichain_rl.replay.writing import pending
from embodichain_rl.shared import own_process


@pytest.fixture
def every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every piece be written to the arena, however short it is."""
    monkeypatch.setattr(pending, "LONG_BYTES", 1)


def in_pieces(rb: TrajectoryReplayBuffer, data: TensorDict, length: int) -> torch.Tensor:
    ids = [rb.extend(data[begin : begin + length]) for begin in range(0, len(data), length)]
    return torch.cat(ids)


def images(steps: int, number: int = 1) -> TensorDict:
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    pixels = torch.full((steps, 128, 128), number, dtype=torch.uint8)
    return TensorDict({"pixels": pixels, "next": {"done": done}}, [steps])


def own_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def test_an_episode_in_pieces_takes_its_memory_once() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=4000, chunk_size=4)
    piece, last = images(20)[:10], images(10)
    rb.storage.allocate(piece)
    for _ in range(6):
        rb.extend(piece)
    before, used = own_memory(), rb.stats()["bytes_used"]
    for _ in range(180):
        rb.extend(piece)
    taken = own_memory() - before + rb.stats()["bytes_used"] - used
    assert taken < 1.3 * 180 * 10 * 128 * 128
    assert rb.stats()["pending_steps"] == 1860
    rb.extend(last)
    assert rb.storage.num_steps == 1870
    assert rb.stats()["pending_steps"] == 0
    assert rb.stats()["bytes_used"] < 1.15 * 1870 * 128 * 128
    check_ledger(rb.storage.ledger)


@pytest.mark.usefixtures("every_piece")
@pytest.mark.parametrize("options", [{}, {"compact": True}, {"max_bytes": 1 << 20}, {"max_trajectories": 3}])
def test_every_piece_comes_back_bit_for_bit(options: dict[str, Any]) -> None:
    rb = make_buffer(**{"max_trajectories": 50, "max_total_steps": 400, **options})
    rng = np.random.default_rng(0)
    for number in range(60):
        length = int(rng.integers(1, 60))
        fields = ["observation", "pixels", "action", ("next", "observation")]
        data = make_trajectory(number, length, fields=fields)
        if options.get("compact"):
            data["next", "observation"][:-1] = data["observation"][1:]
        ids = in_pieces(rb, data, int(rng.integers(1, 12)))
        check_ledger(rb.storage.ledger)
        assert (rb[-1]["pixels"] == data["pixels"]).all()
        assert (rb[-1]["next", "observation"] == data["next", "observation"]).all()
        assert int(ids[-1]) == int(rb[-1]["trajectory", "id"][0])
    assert rb.stats()["writing"] == 0


@pytest.mark.usefixtures("every_piece")
def test_several_environments_write_long_episodes_at_the_same_time() -> None:
    rb = make_buffer(max_trajectories=20, max_total_steps=2000)
    data = [make_trajectory(number, 50 + 10 * number) for number in range(8)]
    for begin in range(0, 120, 7):
        for number, episode in enumerate(data):
            piece = episode[begin : begin + 7]
            if len(piece):
                piece["collector", "traj_ids"] = torch.full((len(piece),), number)
                rb.extend(piece)
        check_ledger(rb.storage.ledger)
    assert sorted(contents(rb)) == [(number, 50 + 10 * number) for number in range(8)]
    for whole in rb.storage:
        check_chunk(whole)


@pytest.mark.usefixtures("every_piece")
def test_segments_reach_across_pieces() -> None:
    rb = make_buffer(max_trajectories=10, max_total_steps=1000, sampler=ChunkSampler(20, sampling_mode="segment"))
    data = make_trajectory(1, 60)
    data["segment_id"] = torch.arange(60)[:, None] // 20
    in_pieces(rb, data, 7)
    batch = rb.sample(64)
    assert (batch["segment_id"] == batch["segment_id"][:, :1]).all()
    assert len(rb.storage.ledger.live_rows().longest_segments) == 1
    assert rb.storage.ledger.live_rows().longest_segments[0] == 20


@pytest.mark.usefixtures("every_piece")
def test_what_was_begun_is_stored_as_truncated_or_dropped() -> None:
    rb = make_buffer(max_trajectories=10, max_total_steps=1000)
    for number in (1, 2):
        data = make_trajectory(number, 40, ends=False)
        data["next", "truncated"] = torch.zeros(40, 1, dtype=torch.bool)
        in_pieces(rb, data, 6)
        if number == 1:
            assert rb.writer.truncate_pending() == 1
        else:
            assert rb.writer.discard_pending() == 40
        check_ledger(rb.storage.ledger)
        assert rb.storage.ledger._slots[:, 0].max() == -1, "a region was not given back"
    assert len(rb) == 1
    assert rb[0]["next", "truncated"][:, 0].tolist() == [False] * 39 + [True]
    assert rb[0]["next", "done"][:, 0].tolist() == [False] * 39 + [True]
    assert set(rb[0]["label"][:, 0].tolist()) == {1}


@pytest.mark.usefixtures("every_piece")
def test_an_episode_that_is_not_accepted_leaves_no_region() -> None:
    writer = TrajectoryWriter(accept=lambda trajectory: len(trajectory) != 30)
    rb = make_buffer(max_trajectories=10, max_total_steps=1000, writer=writer)
    for number, length in enumerate((30, 31, 30)):
        in_pieces(rb, make_trajectory(number, length), 4)
    assert [length for _, length in contents(rb)] == [31]
    assert rb.storage.ledger._slots[:, 0].max() == -1


@pytest.mark.usefixtures("every_piece")
def test_a_buffer_that_is_emptied_or_forgotten_gives_regions_back() -> None:
    rb = make_buffer(max_trajectories=10, max_total_steps=1000)
    storage = rb.storage
    in_pieces(rb, make_trajectory(0, 30, ends=False), 6)
    rb.empty()
    in_pieces(rb, make_trajectory(1, 30), 6)
    assert contents(rb) == [(1, 30)]
    in_pieces(rb, make_trajectory(2, 30, ends=False), 6)
    assert storage.ledger._slots[:, 0].max() >= 0
    ledger = storage.ledger
    del rb, storage
    gc.collect()
    assert ledger._slots[:, 0].max() == -1


def test_the_end_of_an_episode_in_pieces_waits_for_a_recorder() -> None:
    ledger = Ledger(2, 30, 120, usual_steps=60)
    region = ledger.reserve_pieces(10)
    assert region is not None
    for _ in range(2):
        ledger.publish(ledger.reserve(10))
    hold = ledger.holds.claim(0, *own_process())
    region = ledger.grow(region, 16) or region
    paused = []

    def read_on(waiting: Any, held: int) -> None:
        paused.append(held)
        ledger.holds.advance(hold, held + 1)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_Waiting, "pause", read_on)
        ended = ledger.end_pieces(region, 10)
    assert paused == [0]
    assert ledger.publish(ended) == 2
    assert ledger.live_range() == (1, 3)
    check_ledger(ledger)


@pytest.mark.usefixtures("every_piece")
def test_a_forked_child_does_not_give_the_region_of_its_parent_back() -> None:
    rb = make_buffer(max_trajectories=10, max_total_steps=1000)
    data = make_trajectory(0, 40)
    in_pieces(rb, data[:30], 6)

    def collect() -> None:
        rb.writer.discard_pending()
        gc.collect()
        in_pieces(rb, make_trajectory(1, 20), 5)

    child = multiprocessing.get_context("fork").Process(target=collect)
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0
    rb.extend(data[30:])
    assert contents(rb) == [(1, 20), (0, 40)]
    check_trajectory(rb[1], 0, 40)


@pytest.mark.usefixtures("every_piece")
def test_the_region_of_a_killed_process_is_used_again() -> None:
    rb = make_buffer(max_trajectories=4, max_total_steps=400)
    rb.storage.allocate(make_trajectory(0, 1))

    def die() -> None:
        in_pieces(rb, make_trajectory(0, 100, ends=False), 10)
        os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=die)
    child.start()
    child.join(PATIENCE)
    assert rb.storage.ledger._slots[:, 0].max() >= 0
    rb.storage.ledger._slots[:, 3] = 0  # as if it was long ago
    rb.extend(make_trajectory(1, 30))
    assert rb.stats()["reclaimed"] == 1
    assert rb.storage.ledger._slots[:, 0].max() == -1


@pytest.mark.usefixtures("every_piece")
@pytest.mark.slow
def test_killed_at_any_instruction_of_an_episode_in_pieces() -> None:
    torch.set_num_threads(1)
    rb = make_buffer(max_trajectories=3, max_total_steps=100)
    for number in range(4):
        rb.extend(make_trajectory(number, 10))
    data = make_trajectory(77, 24)
    ledger, instruction, killed = rb.storage.ledger, 0, 0
    while run_in_child_until(instruction, lambda: in_pieces(rb, data, 6)):
        check_ledger(ledger)
        ledger._slots[:, 3] = 0  # the age of what the dead left
        in_pieces(rb, make_trajectory(100 + killed, 5 + killed % 19), 4)
        check_ledger(ledger)
        check_chunk(rb.sample())
        assert len(rb) == 3
        for whole in rb.storage:
            check_chunk(whole)
        killed += 1
        instruction += 13 * EVERY
    assert killed > 20, f"only {killed} instructions were reached"
    rb.extend(make_trajectory(0, 5))
    assert ledger._slots[:, 0].max() == -1


@pytest.mark.usefixtures("every_piece")
def test_pieces_in_a_file(tmp_path: Path) -> None:
    rb = make_buffer(max_trajectories=10, max_total_steps=1000, path=tmp_path / "buffer")
    in_pieces(rb, make_trajectory(5, 64), 6)
    in_pieces(rb, make_trajectory(6, 64, ends=False), 6)
    rb.close()
    again = TrajectoryReplayBuffer.open(tmp_path / "buffer", chunk_size=4)
    assert contents(again) == [(5, 64)]
    again.close()


def test_all_live_trajectories_at_once_take_no_memory_for_padding() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=2000, chunk_size=4)
    for number in range(90):
        rb.extend(images(2, number))
    rb.extend(images(1500, 91))
    before = own_memory()
    whole = rb[:]
    assert own_memory() - before < 1.3 * 1680 * 128 * 128
    assert whole.shape == (91, 1500)
    assert whole["pixels"][:90, :2].flatten(1).eq(torch.arange(90)[:, None]).all()
    assert not whole["pixels"][:90, 2].any()
    assert whole["pixels"][90].eq(91).all()
    assert whole["collector", "mask"].sum(-1).tolist() == [2] * 90 + [1500]
