"""What imitation learning asks of chunks and windows: padding, frame stacks, rates, segments, lists of steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated_device import SimulatedDevice
from steps import check_chunk, make_buffer, make_trajectory, small
from tensordict import TensorDict

from embodichain_rl import (
    ChunkSampler,
    TrajectoryReplayBuffer,
    TrajectoryStorage,
)
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import ChunkTooLongError, InvalidArgumentError, SchemaMismatchError

FPS = ("trajectory", "fps")


def drawn_steps(rb: TrajectoryReplayBuffer, batches: int = 60) -> set[tuple[int, int]]:
    """The trajectories and the steps that are drawn: the first steps of chunks, or those that windows are around."""
    found = set()
    for _ in range(batches):
        batch = rb.sample()
        steps = batch["trajectory", "step"]
        if batch.ndim == 2:
            real = batch.get(("collector", "mask"), torch.ones_like(steps).bool()).int().argmax(1)
            steps = steps[torch.arange(len(real)), real] - real
        found |= {*zip(batch["trajectory", "id"].reshape(len(batch), -1)[:, 0].tolist(), steps.tolist(), strict=True)}
    return found


class TestHorizons:
    """Diffusion policy: a horizon of 16, 2 observations, 8 actions: pad_before=1, pad_after=7."""

    def test_chunks_reach_beyond_each_edge_by_their_own_number_of_steps(self) -> None:
        rb = make_buffer([small(0, 20), small(1, 9), small(2, 7)], sampler=ChunkSampler(16, pad_before=1, pad_after=7))
        expected = {(n, first) for n, steps in ((0, 20), (1, 9)) for first in range(-1, steps - 16 + 7 + 1)}
        assert drawn_steps(rb) == expected
        batch = rb.sample()
        assert int((~batch["collector", "mask"]).sum(1).max()) <= 8

    def test_windows_reach_beyond_each_edge_by_their_own_number_of_steps(self) -> None:
        windows = {"observation": (-1, 0), "label": (-1, 14)}
        asked: list[dict[str, Any]] = [
            {"pad_before": 1, "pad_after": 7},
            {"pad": "both", "drop_n_last_frames": 7},  # LeRobot's way to say it
        ]
        for options in asked:
            rb = make_buffer([small(0, 20), small(1, 9)], sampler=ChunkSampler(windows=windows, **options))
            assert drawn_steps(rb) == {(n, step) for n, steps in ((0, 20), (1, 9)) for step in range(steps - 7)}
            batch = rb.sample()
            steps = batch["trajectory", "step"][:, None] + torch.arange(-1, 15)
            assert torch.equal(batch["label_is_pad"], (steps < 0) | (steps >= batch["label"][:, :1, 2]))

    def test_first_and_last_frames_are_never_drawn(self) -> None:
        rb = make_buffer(
            [small(0, 12), small(1, 5)],
            sampler=ChunkSampler(4, pad="after", drop_n_first_frames=2, drop_n_last_frames=3),
        )
        assert drawn_steps(rb) == {(0, step) for step in range(2, 9)}
        rb = make_buffer([small(0, 12)], sampler=ChunkSampler(2, drop_n_last_frames=3))
        assert drawn_steps(rb) == {(0, step) for step in range(9)}

    def test_every_chunk_once(self) -> None:
        sampler = ChunkSampler(6, pad_before=2, pad_after=3, drop_n_last_frames=1, replacement=False)
        rb = make_buffer([small(0, 9), small(1, 11)], sampler=sampler, batch_size=1)
        chunks = [(0, first) for first in range(-2, 7)] + [(1, first) for first in range(-2, 9)]
        batches = [rb.sample() for _ in chunks]
        found = []
        for batch in batches:
            first = int(batch["collector", "mask"][0].int().argmax())
            found.append((int(batch["trajectory", "id"][0, 0]), int(batch["trajectory", "step"][0, first]) - first))
        assert sorted(found) == chunks

    def test_through_a_dataset(self) -> None:
        rb = make_buffer([small(0, 20)])
        item = next(iter(OnlineDataset(rb, 16, pad_before=1, pad_after=7, seed=0)))
        assert item.shape == (16,)

    def test_sizes_that_change(self) -> None:
        sizes = iter([2, 9] * 20)
        rb = make_buffer([small(0, 12)], sampler=ChunkSampler(lambda: next(sizes), pad_after=7))
        assert {rb.sample().shape[1] for _ in range(10)} == {2, 9}


def steps_with_pixels(length: int) -> TensorDict:
    data = make_trajectory(0, length, fields=["observation", ("next", "observation")])
    pixels = torch.arange(length + 1)[:, None]
    data["pixels"], data["next", "pixels"] = pixels[:-1].clone(), pixels[1:].clone()
    return data


class TestFrameStacks:
    @pytest.mark.parametrize("compact", [False, True])
    @pytest.mark.parametrize("device", [False, True])
    def test_the_next_stack_is_the_stack_of_the_next_step(self, compact: bool, device: bool) -> None:
        windows: dict[Any, Any] = {"pixels": (-3, 0), ("next", "pixels"): (-3, 0)}
        where: Any = SimulatedDevice() if device else "cpu"
        storage = TrajectoryStorage(4, 100, compact=compact, device=where)
        rb = make_buffer([], storage=storage, sampler=ChunkSampler(windows=windows, pad="before"), batch_size=64)
        rb.extend(steps_with_pixels(6))
        rb.storage.flush()
        batch = rb.sample()
        frames = batch["trajectory", "step"][:, None] + torch.arange(-3, 1)
        assert (frames < 0).any()
        assert torch.equal(batch["pixels"][..., 0], frames.clamp(min=0))
        assert torch.equal(batch["next", "pixels"][..., 0], (frames + 1).clamp(min=0))
        assert torch.equal(batch["pixels_is_pad"], frames < 0)
        assert torch.equal(batch["next", "pixels_is_pad"], frames + 1 < 0)
        rb.storage.close()

    def test_within_a_segment(self) -> None:
        data = steps_with_pixels(8).set("segment_id", torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]))
        windows: dict[Any, Any] = {"pixels": (-3, 0), ("next", "pixels"): [-3, 0]}
        sampler = ChunkSampler(windows=windows, pad="before", sampling_mode="segment")
        batch = make_buffer([data], sampler=sampler, batch_size=64).sample()
        step = batch["trajectory", "step"]
        begin = torch.where(step < 3, 0, 3)
        assert torch.equal(batch["pixels"][:, 0, 0], torch.maximum(step - 3, begin))
        assert torch.equal(batch["next", "pixels"][:, 0, 0], torch.maximum(step - 2, begin))


class TestListsOfSteps:
    def test_are_the_steps_of_a_window(self) -> None:
        windows: dict[Any, Any] = {"label": [-12, -8, -4, 0], "observation": [-5, 0], "action": (0, 3)}
        rb = make_buffer([make_trajectory(0, 30)], sampler=ChunkSampler(windows=windows))
        batch = rb.sample()
        assert batch["observation"].shape[1] == 2
        assert batch["action"].shape[1] == 4
        steps = batch["trajectory", "step"][:, None] + torch.tensor([-12, -8, -4, 0])
        assert torch.equal(batch["label"][..., 1], steps)

    def test_of_a_sampler_can_be_shown_and_given_again(self) -> None:
        sampler = ChunkSampler(windows={"label": [-12, 0]}, pad="both")
        assert "windows={('label',): [-12, 0]}" in repr(sampler)
        assert repr(ChunkSampler(**sampler.options)) == repr(sampler)


class TestStride:
    """A chunk of steps that lie apart: L steps, each ``stride`` steps after the one before."""

    def test_of_chunks(self) -> None:
        rb = make_buffer([make_trajectory(0, 11), make_trajectory(1, 20)], sampler=ChunkSampler(4, stride=3))
        assert drawn_steps(rb) == {(0, 0), (0, 1), *((1, first) for first in range(11))}
        batch = rb.sample()
        assert batch.shape == (8, 4)
        assert (batch["label"][..., 1].diff() == 3).all()
        assert torch.equal(batch["label"][..., 1], batch["trajectory", "step"])
        assert torch.equal(rb[batch["index"]]["label"], batch["label"])
        check_chunk(batch[:, :1])

    def test_of_padded_chunks(self) -> None:
        rb = make_buffer([make_trajectory(0, 11)], sampler=ChunkSampler(4, stride=3, pad="after"), batch_size=32)
        batch = rb.sample()
        wanted = batch["trajectory", "step"][:, :1] + 3 * torch.arange(4)
        assert torch.equal(batch["label"][..., 1], wanted.clamp(max=10))
        assert torch.equal(batch["collector", "mask"], wanted <= 10)

    def test_that_no_trajectory_is_long_enough_for(self) -> None:
        with pytest.raises(ChunkTooLongError, match=r"chunk_size 4, which takes 10 steps, but the longest .* has 9"):
            make_buffer([small(0, 9)], sampler=ChunkSampler(4, stride=3)).sample()


class TestRates:
    """Trajectories that were recorded at different rates."""

    def episode(self, number: int, fps: float, length: int = 40, **columns: Any) -> TensorDict:
        data = small(number, length)
        data[FPS] = torch.full((length,), float(fps))
        for key, value in columns.items():
            data[key] = value
        return data

    def test_each_is_read_at_its_own(self) -> None:
        sampler = ChunkSampler(delta_timestamps={"label": [-0.1, 0.0, 0.2]}, fps=FPS, pad="both")
        rb = make_buffer([self.episode(0, 10), self.episode(1, 30)], sampler=sampler, batch_size=64)
        batch = rb.sample()
        rate = torch.where(batch["trajectory", "id"] == 0, 1, 3)
        steps = batch["trajectory", "step"][:, None] + rate[:, None] * torch.tensor([-1, 0, 2])
        assert torch.equal(batch["label"][..., 1], steps.clamp(0, 39))
        assert torch.equal(batch["label_is_pad"], (steps < 0) | (steps > 39))
        assert rate.unique().tolist() == [1, 3]

    def test_a_wrong_one_is_an_error(self) -> None:
        sampler = ChunkSampler(delta_timestamps={"label": [0.0, 0.1, 0.2]}, fps=10)
        with pytest.raises(InvalidArgumentError, match=r"at fps=10, .* \[30\.\] steps per second.*Give fps="):
            make_buffer([self.episode(1, 30)], sampler=sampler).sample()
        assert make_buffer([self.episode(1, 10)], sampler=sampler).sample()["label"].shape == (8, 3, 4)

    def test_a_wrong_one_is_an_error_by_the_timestamps(self) -> None:
        sampler = ChunkSampler(delta_timestamps={"label": [0.0, 0.1, 0.2]}, fps=10)
        for fps in (10, 30):
            data = small(0, 40).set("timestamp", torch.arange(40) / fps)
            rb = make_buffer([data], sampler=sampler)
            if fps == 10:
                assert (rb.sample()["label"][..., 1].diff() == 1).all()
            else:
                with pytest.raises(InvalidArgumentError, match=r"by 'timestamp', not 0.1 s. Give the fps"):
                    rb.sample()

    def test_times_between_the_steps_of_one_of_them(self) -> None:
        asked: dict[str, Any] = {"delta_timestamps": {"label": [0.0, 0.1]}, "fps": FPS, "pad": "both"}
        rb = make_buffer([self.episode(0, 25)], sampler=ChunkSampler(**asked))
        with pytest.raises(InvalidArgumentError, match="lie between the steps at fps=25"):
            rb.sample()
        rb.set_sampler(ChunkSampler(**asked, tolerance_s=0.021))
        assert (rb.sample()["label_is_pad"][:, 0] == 0).all()

    def test_a_tolerance(self) -> None:
        times = {"label": [0.0, 0.101]}
        with pytest.raises(InvalidArgumentError, match=r"a larger tolerance_s than 0\.0001"):
            ChunkSampler(delta_timestamps=times, fps=10)
        batch = make_buffer(
            [small(0, 9)], sampler=ChunkSampler(delta_timestamps=times, fps=10, tolerance_s=2e-3)
        ).sample()
        assert (batch["label"][..., 1].diff() == 1).all()
        jitter = small(0, 40).set("timestamp", torch.arange(40) / 10 + 0.002 * torch.rand(40))
        sampler = ChunkSampler(delta_timestamps={"label": [0.0, 0.1]}, fps=10)
        with pytest.raises(InvalidArgumentError, match="by 'timestamp'"):
            make_buffer([jitter], sampler=sampler, batch_size=100).sample()
        sampler = ChunkSampler(delta_timestamps={"label": [0.0, 0.1]}, fps=10, tolerance_s=5e-3)
        assert make_buffer([jitter], sampler=sampler).sample().shape == (8,)

    def test_that_are_not_stored(self) -> None:
        sampler = ChunkSampler(delta_timestamps={"label": [0.0]}, fps=FPS, pad="both")
        with pytest.raises(SchemaMismatchError, match="what is stored has no number there for each trajectory"):
            make_buffer([small(0, 9)], sampler=sampler).sample()

    def test_that_are_no_rates(self) -> None:
        sampler = ChunkSampler(delta_timestamps={"label": [0.0]}, fps=FPS, pad="both")
        with pytest.raises(InvalidArgumentError, match="must be positive"):
            make_buffer([self.episode(0, 0)], sampler=sampler).sample()


class TestSegments:
    data = small(0, 12).set("segment_id", torch.tensor([0] * 5 + [1] * 3 + [2] * 4))
    edges = torch.tensor([[0, 5]] * 5 + [[5, 8]] * 3 + [[8, 12]] * 4)

    def test_actions_are_padded_at_the_end_of_the_segment(self) -> None:
        sampler = ChunkSampler(6, pad="after", sampling_mode="segment")
        batch = make_buffer([self.data], sampler=sampler, batch_size=64).sample()
        first = batch["trajectory", "step"][:, :1]
        wanted, end = first + torch.arange(6), self.edges[first[:, 0], 1:]
        assert torch.equal(batch["label"][..., 1], torch.minimum(wanted, end - 1))
        assert torch.equal(batch["collector", "mask"], wanted < end)
        assert (batch["segment_id"] == batch["segment_id"][:, :1]).all()

    def test_windows_end_at_the_edges_of_the_segment(self) -> None:
        sampler = ChunkSampler(windows={"label": (-3, 4)}, pad="both", sampling_mode="segment")
        rb = make_buffer([self.data], sampler=sampler, batch_size=64)
        batch = rb.sample()
        step = batch["trajectory", "step"]
        wanted, edges = step[:, None] + torch.arange(-3, 5), self.edges[step]
        assert torch.equal(batch["label"][..., 1], torch.minimum(torch.maximum(wanted, edges[:, :1]), edges[:, 1:] - 1))
        assert torch.equal(batch["label_is_pad"], (wanted < edges[:, :1]) | (wanted >= edges[:, 1:]))
        assert drawn_steps(rb) == {(0, step) for step in range(12)}

    def test_windows_without_padding_lie_within_the_segment(self) -> None:
        sampler = ChunkSampler(windows={"label": (-1, 2)}, sampling_mode="segment")
        rb = make_buffer([self.data], sampler=sampler)
        assert drawn_steps(rb) == {(0, step) for step in (1, 2, 9)}

    def test_every_window_once(self) -> None:
        sampler = ChunkSampler(windows={"label": (-1, 2)}, sampling_mode="segment", replacement=False)
        rb = make_buffer([self.data], sampler=sampler, batch_size=1)
        assert sorted(int(rb.sample()["trajectory", "step"]) for _ in range(3)) == [1, 2, 9]
