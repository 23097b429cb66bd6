"""What is drawn, in every mode, padding and window, against a slow and obvious reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import assert_uniform
from tensordict import TensorDict

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import (
    ChunkTooLongError,
    InvalidArgumentError,
    NothingToDrawError,
    SchemaMismatchError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.schema.segments import steps_left

Segments = list[int]
"""A trajectory by the lengths of its segments."""


def trajectory(number: int, segments: Segments) -> TensorDict:
    """Steps whose every value says which step of which trajectory it is."""
    steps = sum(segments)
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    at = torch.arange(steps)
    return TensorDict(
        {
            "observation": torch.stack([torch.full((steps,), number), at], -1).float(),
            "pixels": ((at + 7 * number) % 256).to(torch.uint8)[:, None, None].expand(steps, 2, 3),
            "action": at.double(),
            "segment_id": torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments)),
            "next": {"observation": torch.stack([torch.full((steps,), number), at + 1], -1).float(), "done": done},
        },
        [steps],
    )


def buffer_of(
    trajectories: list[Segments], sampler: ChunkSampler | None = None, **kwargs: Any
) -> TrajectoryReplayBuffer:
    settings = {"max_trajectories": 5, "max_total_steps": 60, "batch_size": 16, **kwargs}
    rb = TrajectoryReplayBuffer(sampler=sampler or ChunkSampler(1), **settings)
    for number, segments in enumerate(trajectories):
        rb.extend(trajectory(number, segments))
    return rb


def live(trajectories: list[Segments]) -> dict[int, Segments]:
    """What a buffer of 5 trajectories and 60 steps holds after them."""
    kept = dict(enumerate(trajectories))
    while len(kept) > 5 or sum(map(sum, kept.values())) > 60:
        del kept[next(iter(kept))]
    return kept


def segment_ids(segments: Segments) -> list[int]:
    return [number for number, steps in enumerate(segments) for _ in range(steps)]


# The reference: every place where a chunk, or a window, may be, one by one.


def pads_of(pad: str, length: int) -> tuple[int, int]:
    """By how many steps chunks may reach beyond each edge."""
    return (length - 1 if pad in ("before", "both") else 0, length - 1 if pad in ("after", "both") else 0)


def edges_of(segments: Segments, mode: str) -> list[tuple[int, int]]:
    """The first step and the end of whatever chunks lie within."""
    if mode != "segment":
        return [(0, sum(segments))]
    ends = list(itertools.accumulate(segments))
    return [(end - steps, end) for end, steps in zip(ends, segments, strict=True)]


def chunk_places(
    segments: Segments, length: int, mode: str, pads: tuple[int, int] = (0, 0), stride: int = 1, drop: int = 0
) -> list[tuple[int, int, int]]:
    """The first steps of all chunks that may be drawn from a trajectory, and the edges that they lie within."""
    ids = segment_ids(segments)
    places = []
    for begin, end in edges_of(segments, mode):
        for first in range(begin - length * stride, end):
            steps = [first + n * stride for n in range(length)]
            before, after = sum(step < begin for step in steps), sum(step >= end for step in steps)
            if before > pads[0] or after > pads[1] or before + after == length or first >= end - drop:
                continue
            changes = len({ids[step] for step in range(max(first, begin), min(steps[-1] + 1, end))}) > 1
            if mode != "boundary" or changes:
                places.append((first, begin, end))
    return places


def window_places(
    segments: Segments, offsets: list[int], mode: str, pads: tuple[int, int], drop: int = 0
) -> dict[int, tuple[int, int]]:
    """The steps that may be drawn, and the edges that their windows lie within."""
    return {
        step: (begin, end)
        for begin, end in edges_of(segments, mode)
        for step in range(begin, end - drop)
        if step + min(offsets) >= begin - pads[0] and step + max(offsets) < end + pads[1]
    }


segments_of_a_trajectory = st.lists(st.integers(1, 6), min_size=1, max_size=4)
several_trajectories = st.lists(segments_of_a_trajectory, min_size=1, max_size=9)


@st.composite
def chunk_options(draw: Any) -> dict[str, Any]:
    """Whatever a chunk may be, as arguments of a sampler."""
    length = draw(st.integers(1, 14))
    mode = draw(st.sampled_from(["episode", "segment", "boundary"]))
    options: dict[str, Any] = {"chunk_size": max(length, 2 * (mode == "boundary")), "sampling_mode": mode}
    if mode != "boundary":
        if draw(st.booleans()):
            options["pad"] = draw(st.sampled_from(["before", "after", "both"]))
        else:
            options["pad_before"] = draw(st.integers(0, length - 1))
            options["pad_after"] = draw(st.integers(0, length - 1))
        options["drop_n_last_frames"] = draw(st.integers(0, 3))
    if options.get("pad") != "both" and options.get("pad_before", 0) + options.get("pad_after", 0) < length:
        options["stride"] = draw(st.integers(1, 3))
    return options


@settings(max_examples=100, deadline=None)
@given(trajectories=several_trajectories, options=chunk_options())
def test_chunks_are_those_of_the_reference(trajectories: list[Segments], options: dict[str, Any]) -> None:
    length, mode, stride = options["chunk_size"], options["sampling_mode"], options.get("stride", 1)
    pads = pads_of(options.get("pad", "none"), length)
    pads = options.get("pad_before", pads[0]), options.get("pad_after", pads[1])
    drop = options.get("drop_n_last_frames", 0)
    rb = buffer_of(trajectories, ChunkSampler(**options))
    allowed = {
        number: chunk_places(segments, length, mode, pads, stride, drop)
        for number, segments in live(trajectories).items()
    }
    if not any(allowed.values()):
        with pytest.raises((ChunkTooLongError, NothingToDrawError)):
            rb.sample()
        return
    batch = rb.sample()
    assert batch.shape == (16, length)
    for chunk in batch:
        number = int(chunk["observation"][0, 0])
        whole = trajectory(number, trajectories[number])
        steps = chunk["trajectory", "step"]
        if not {"pad", "pad_before"} & {*options}:
            real = torch.ones(length, dtype=torch.bool)
            assert ("collector", "mask") not in chunk.keys(True)
        else:
            real = chunk["collector", "mask"]
        at = int(steps[real][0]) - stride * int(real.nonzero()[0])
        wanted = at + stride * torch.arange(length)
        found = [
            (begin, end)
            for first, begin, end in allowed[number]
            if first == at and torch.equal(steps, wanted.clamp(begin, end - 1))
        ]
        assert found
        assert torch.equal(real, wanted == steps)
        assert (chunk["trajectory", "id"] == number).all()
        for key in whole.keys(True, True):
            assert torch.equal(chunk[key], whole[key][steps]), key


@settings(max_examples=80, deadline=None)
@given(
    trajectories=several_trajectories,
    windows=st.dictionaries(
        st.sampled_from(["observation", "pixels", "action", ("next", "observation")]),
        st.tuples(st.integers(-6, 6), st.integers(0, 6)).map(lambda w: (w[0], w[0] + w[1]))
        | st.lists(st.integers(-6, 6), min_size=1, max_size=4),
        min_size=1,
    ),
    mode=st.sampled_from(["episode", "segment"]),
    pad=st.sampled_from(["none", "before", "after", "both"]),
    parts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    drop=st.integers(0, 3),
)
def test_windows_are_those_of_the_reference(
    trajectories: list[Segments], windows: Any, mode: str, pad: str, parts: tuple[float, float], drop: int
) -> None:
    relative = {key: list(range(w[0], w[1] + 1)) if isinstance(w, tuple) else w for key, w in windows.items()}
    offsets = [0, *itertools.chain(*relative.values())]
    pads = (99 if pad in ("before", "both") else 0, 99 if pad in ("after", "both") else 0)
    options: dict[str, Any] = {"pad": pad}
    if pad == "none":
        pads = int(parts[0] * -min(offsets)), int(parts[1] * max(offsets))
        options = {"pad_before": pads[0], "pad_after": pads[1]}
    rb = buffer_of(trajectories, ChunkSampler(windows=windows, sampling_mode=mode, drop_n_last_frames=drop, **options))
    allowed = {n: window_places(segments, offsets, mode, pads, drop) for n, segments in live(trajectories).items()}
    if not any(allowed.values()):
        with pytest.raises(ChunkTooLongError, match="windows that span"):
            rb.sample()
        return
    batch = rb.sample()
    assert batch.shape == (16,)
    for item in batch:
        number, step = int(item["trajectory", "id"]), int(item["trajectory", "step"])
        begin, end = allowed[number][step]
        whole = trajectory(number, trajectories[number])
        for key, steps in relative.items():
            wanted = step + torch.tensor(steps)
            expected, is_pad = whole[key][wanted.clamp(begin, end - 1)], (wanted < begin) | (wanted >= end)
            mask = f"{key}_is_pad"
            if key == ("next", "observation"):  # what comes before is the first observation
                expected[wanted < begin] = whole["observation"][begin]
                is_pad, mask = (wanted < begin - 1) | (wanted >= end), ("next", "observation_is_pad")
            assert torch.equal(item[key], expected)
            assert torch.equal(item[mask], is_pad)


@pytest.mark.parametrize(
    ("mode", "pad"),
    [
        ("segment", "none"),
        ("boundary", "none"),
        ("episode", "before"),
        ("episode", "after"),
        ("episode", "both"),
        ("segment", "after"),
        ("segment", "both"),
    ],
)
def test_draws_are_uniform_over_trajectories_and_then_over_their_places(mode: str, pad: str) -> None:
    trajectories = [[3, 9, 1], [4, 4], [2, 2, 2, 2], [11], [5, 1]]
    length = 3
    rb = buffer_of(
        trajectories, ChunkSampler(length, sampling_mode=mode, pad=pad), generator=torch.Generator().manual_seed(0)
    )
    places = [chunk_places(segments, length, mode, pads_of(pad, length)) for segments in trajectories]
    drawn: list[tuple[int, tuple[int, int]]] = []
    for _ in range(1500):
        batch = rb.sample()
        real = batch["collector", "mask"] if pad != "none" else torch.ones(16, length, dtype=torch.bool)
        steps = batch["trajectory", "step"]
        first_real, count = real.int().argmax(1), real.sum(1)
        first = steps[torch.arange(16), first_real]
        drawn += zip(
            batch["trajectory", "id"][:, 0].tolist(),
            zip((first - first_real).tolist(), (first + count).tolist(), strict=True),
            strict=True,
        )
    assert_uniform((number for number, _ in drawn), [number for number, there in enumerate(places) if there])
    for number, there in enumerate(places):
        expected = [(first, min(first + length, end)) for first, _, end in there]
        if len(expected) > 1:
            assert_uniform((place for n, place in drawn if n == number), expected)


def test_rare_places_of_a_long_trajectory_are_found() -> None:
    rb = buffer_of([[4000, 3000]], ChunkSampler(2, sampling_mode="boundary"), max_total_steps=7000)
    assert (rb.sample()["trajectory", "step"] == torch.tensor([3999, 4000])).all()
    rb = buffer_of([[1] * 500 + [8] + [1] * 500], ChunkSampler(8, sampling_mode="segment"), max_total_steps=7000)
    assert (rb.sample()["trajectory", "step"][:, 0] == 500).all()


def test_steps_left_count_down_to_the_end_of_each_segment() -> None:
    for segments in itertools.product([1, 2, 5], repeat=3):
        ids = np.array(segment_ids(list(segments)))
        expected = [steps - n for steps in segments for n in range(steps)]
        assert steps_left(ids).tolist() == expected
    assert steps_left(np.array([7, 7, 3, 7])).tolist() == [2, 1, 1, 1]


class TestDataset:
    """The dataset asks for all that the sampler can draw, in both modes."""

    def test_segments_and_padding(self) -> None:
        rb = buffer_of([[3, 3], [4, 4]])
        dataset = OnlineDataset(rb, 4, 8, None, "boundary", seed=0)
        segments = next(iter(dataset))["segment_id"]
        assert (segments[:, 0] != segments[:, -1]).all()
        padded = next(iter(OnlineDataset(rb, 30, 8, pad="both", seed=0)))
        assert padded.shape == (8, 30)
        assert not padded["collector", "mask"].all()

    def test_windows(self) -> None:
        rb = buffer_of([[6], [8]])
        windows = {"observation": (0, 0), "action": (0, 3)}
        batch = next(iter(OnlineDataset(rb, None, 8, windows=windows, pad="both", seed=0)))
        assert batch.shape == (8,)
        assert batch["action"].shape == (8, 4)
        item = next(iter(OnlineDataset(rb, None, windows=windows, pad="both", seed=0)))
        assert item.shape == ()
        times = OnlineDataset(rb, None, 8, delta_timestamps={"action": [0.0, 0.2]}, fps=10, pad="after", seed=0)
        assert (next(iter(times))["action"].diff() <= 2).all()

    def test_is_refused_over_what_can_only_hand_out_chunks(self) -> None:
        class Other:
            def sample_chunks(self, batch_size: int, chunk_size: int, *, generator: Any = None) -> TensorDict:
                return TensorDict({}, [batch_size, chunk_size])

        with pytest.raises(InvalidArgumentError, match="only supports plain chunks"):
            OnlineDataset(Other(), 4, pad="after")
        assert next(iter(OnlineDataset(Other(), 4, 2))).shape == (2, 4)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "Give chunk_size, the steps of a chunk, or windows"),
            ({"chunk_size": 4, "sampling_mode": "chunk"}, "sampling_mode='chunk'; it must be one of"),
            ({"chunk_size": 4, "pad": "left"}, "pad='left'; it must be one of"),
            ({"chunk_size": 4, "pad": "after", "sampling_mode": "boundary"}, "go with 'episode' and 'segment' only"),
            ({"sampling_mode": "boundary", "windows": {"a": (0, 1)}}, "go with 'episode' and 'segment' only"),
            ({"chunk_size": 4, "pad": "after", "pad_after": 2}, "Give pad_before and pad_after, in steps, or pad"),
            ({"chunk_size": 4, "pad_after": 4}, "each can be at most 3"),
            ({"chunk_size": 4, "pad_before": -1}, "pad_before must be an integer of at least 0"),
            ({"chunk_size": 4, "pad": "both", "stride": 2}, "chunks without a real step"),
            ({"chunk_size": 4, "stride": 0}, "stride must be an integer of at least 1"),
            ({"chunk_size": 4, "drop_n_last_frames": -1}, "drop_n_last_frames must be an integer of at least 0"),
            (
                {"chunk_size": 4, "drop_n_first_frames": 2, "sampling_mode": "segment"},
                "goes with sampling_mode='episode' only",
            ),
            (
                {"chunk_size": 4, "pad": "both", "sampling_mode": "segment", "replacement": False},
                "an offset may belong to two segments",
            ),
            ({"windows": {"a": (0, 1)}, "stride": 2}, "windows take lists of steps"),
            ({"windows": {"a": (-2, 3)}, "pad_after": 4}, "begin 2 steps before the drawn step and end 3 after it"),
            ({"windows": {"a": (-3, -2, 0)}}, r"needed is \(first, last\), or a list of steps"),
            ({"windows": {"a": []}}, "or a list of steps"),
            ({"chunk_size": 3, "tolerance_s": 0.1}, "without delta_timestamps"),
            ({"delta_timestamps": {"a": [0.0]}, "fps": 10, "tolerance_s": -1}, "tolerance_s must be"),
            ({"delta_timestamps": {"a": [0.0]}, "fps": "fps"}, "must be one of a trajectory value"),
            ({"delta_timestamps": {"a": [0.0, 0.1]}, "fps": ("trajectory", "fps")}, "Give pad='both'"),
            ({"chunk_size": 1, "sampling_mode": "boundary"}, "at least 2 steps"),
            ({"chunk_size": 4, "windows": {"a": (0, 1)}}, "a chunk_size and windows"),
            ({"chunk_size": lambda: 4, "windows": {"a": (0, 1)}}, "a chunk_size and windows"),
            ({"windows": {}}, "must be a mapping"),
            ({"windows": {"a": (1, 0)}}, "last step is before its first"),
            ({"windows": {"a": 3}}, r"needed is \(first, last\)"),
            ({"windows": {"a": (0, 1.5)}}, r"needed is \(first, last\)"),
            ({"windows": {"a": (False, True)}}, r"needed is \(first, last\)"),
            ({"windows": {3: (0, 1)}}, "a string or a tuple of strings"),
            ({"windows": {"a": (0, 1)}, "delta_timestamps": {"a": [0.0]}, "fps": 10}, "say the same"),
            ({"delta_timestamps": {"a": [0.0]}}, "go together"),
            ({"chunk_size": 3, "fps": 10}, "go together"),
            ({"delta_timestamps": {"a": [0.05]}, "fps": 10}, "lie between the steps at fps=10"),
            ({"delta_timestamps": {"a": []}, "fps": 10}, "needed is a list of seconds"),
            ({"delta_timestamps": {"a": [0.0]}, "fps": 0}, "fps"),
        ],
    )
    def test_arguments_that_can_not_work(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidArgumentError, match=message):
            ChunkSampler(**arguments)

    def test_segments_that_nobody_wrote(self) -> None:
        rb = TrajectoryReplayBuffer(
            max_trajectories=2, max_total_steps=20, sampler=ChunkSampler(2, sampling_mode="segment"), batch_size=4
        )
        rb.extend(trajectory(0, [4]).exclude("segment_id"))
        with pytest.raises(SchemaMismatchError, match="needs segments, but what is stored has no integer 'segment_id'"):
            rb.sample()

    def test_what_no_trajectory_has(self) -> None:
        trajectories = [[5], [7]]
        with pytest.raises(
            NothingToDrawError, match="chunk_size 3 with a change of segment, but no live trajectory of 2"
        ):
            buffer_of(trajectories, ChunkSampler(3, sampling_mode="boundary")).sample()
        with pytest.raises(ChunkTooLongError, match="the longest segment of 2 live trajectories has 7 steps"):
            buffer_of(trajectories, ChunkSampler(8, sampling_mode="segment")).sample()
        with pytest.raises(ChunkTooLongError, match=r"windows that span 12 steps, but the longest of 2 live .* has 7"):
            buffer_of(trajectories, ChunkSampler(windows={"action": (-1, 10)})).sample()
        with pytest.raises(SchemaMismatchError, match=r"windows for \[\('torque',\)\]"):
            buffer_of(trajectories, ChunkSampler(windows={"torque": (0, 1)})).sample()
        with pytest.raises(ChunkTooLongError, match="the buffer holds 60 steps at most"):
            buffer_of(trajectories, ChunkSampler(61, pad="both")).sample()

    def test_padding_in_a_plain_torchrl_buffer(self) -> None:
        from torchrl.data import TensorDictReplayBuffer

        rb = buffer_of([[5]])
        plain = TensorDictReplayBuffer(storage=rb.storage, sampler=ChunkSampler(3, pad="after"), batch_size=4)
        with pytest.raises(UnsupportedOperationError, match="Use a TrajectoryReplayBuffer"):
            plain.sample()

    def test_draws_of_trajectories_that_are_too_short_are_counted(self) -> None:
        rb = buffer_of([[2], [9]], ChunkSampler(5))
        for _ in range(5):
            assert (rb.sample()["trajectory", "id"] == 1).all()
        assert rb.stats()["unfit"] > 0
        assert buffer_of([[9]], ChunkSampler(5)).stats()["unfit"] == 0
