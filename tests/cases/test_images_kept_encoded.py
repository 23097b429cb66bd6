"""Images that are kept as PNG or JPEG, or by a codec of the user's own."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from ragged_steps import check_ragged, ragged_trajectory
from tensordict import TensorDict
from torch.utils.data import DataLoader
from torchrl.envs import GymWrapper

from embodichain_rl import (
    ChunkSampler,
    JpegCodec,
    OnlineDataEngine,
    OnlineDataEngineCfg,
    OnlineDataset,
    PngCodec,
    TrajectoryReplayBuffer,
    accept_success,
    buffer_statistics,
)
from embodichain_rl.errors import (
    CodecError,
    ConfigError,
    InvalidArgumentError,
    SchemaMismatchError,
)
from embodichain_rl.replay.ledger.invariants import check_ledger

pytest.importorskip("imagecodecs", reason="imagecodecs is not installed: pip install 'embodichain-rl[images]'")
pytest.importorskip("simplejpeg", reason="simplejpeg is not installed: pip install 'embodichain-rl[images]'")

SHAPE = (24, 32, 3)
CODECS = {"png": 0.0, "jpeg": 12.0}
"""By codec, the largest mean difference of a smooth frame."""


class Halves:
    """A codec of the user's own: both halves of a frame are stored the wrong way round."""

    def encode(self, frame: np.ndarray) -> bytes:
        content = frame.tobytes()
        return content[len(content) // 2 :] + content[: len(content) // 2]

    def decode(self, data: bytes, out: Any = None) -> np.ndarray:
        half = len(data) - len(data) // 2
        return np.frombuffer(data[half:] + data[:half], dtype=np.uint8).reshape(SHAPE)


def smooth(number: int, step: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Return a frame as a renderer makes it."""
    places = np.indices(shape)
    values = 40 + 3 * number + 2 * step + places[0] + places[1] + 20 * places[2]
    return torch.from_numpy(values.clip(0, 255).astype(np.uint8))


def episode(number: int, length: int) -> TensorDict:
    frames = torch.stack([smooth(number, step) for step in range(length + 1)])
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = True
    return TensorDict(
        {
            "pixels": frames[:-1],
            "label": torch.stack([torch.full((length,), number), torch.arange(length)], dim=-1),
            "next": {"pixels": frames[1:], "done": done},
        },
        [length],
    )


def make_buffer(codec: Any = "png", **options: Any) -> TrajectoryReplayBuffer:
    settings = {"max_trajectories": 20, "max_total_steps": 200, "chunk_size": 3, "batch_size": 8}
    return TrajectoryReplayBuffer(**{**settings, "compress": {"pixels": codec} if codec else None, **options})


def check_frames(data: TensorDict, most: float = 0.0, keys: tuple[Any, ...] = ("pixels", ("next", "pixels"))) -> None:
    flat = data.reshape(-1)
    for row in range(len(flat)):
        number, step = flat["label"][row].tolist()
        for key in keys:
            frame = smooth(number, step + (key != "pixels"))
            assert (frame.float() - flat[key][row].float()).abs().mean() <= most


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("compact", [False, True, "views"])
def test_frames_stay_with_their_step_while_the_buffer_turns_over(codec: str, compact: Any) -> None:
    rb = make_buffer(codec, compact=compact)
    for number in range(40):
        rb.extend(episode(number, 4 + number % 9))
        check_frames(rb.sample(4), CODECS[codec])
    check_ledger(rb.storage.ledger)
    assert rb.sample()["pixels"].shape == (8, 3, *SHAPE)
    check_frames(rb[0], CODECS[codec])
    for sampler in (ChunkSampler(9, pad="both"), ChunkSampler(9, strict_length=False), ChunkSampler(2, stride=2)):
        other = TrajectoryReplayBuffer(storage=rb.storage, sampler=sampler, batch_size=4)
        check_frames(other.sample(), CODECS[codec])


def test_take_a_fraction_of_the_bytes() -> None:
    taken, announced = {}, {}
    for codec in (None, "png", "jpeg"):
        rb = make_buffer(codec)
        for number in range(20):
            frames = torch.stack([smooth(number, step, (96, 128, 3)) for step in range(11)])
            done = torch.zeros(10, 1, dtype=torch.bool)
            done[-1] = True
            rb.extend(TensorDict({"pixels": frames[:-1], "next": {"pixels": frames[1:], "done": done}}, [10]))
        stats = rb.stats()
        assert stats["steps"] == 200
        assert stats["bytes_used"] < 1.2 * stats["bytes_expected"]
        taken[codec], announced[codec] = stats["bytes_used"], stats["nbytes_per_step"]
    assert max(taken["jpeg"], taken["png"]) < taken[None] / 8
    assert announced["jpeg"] < announced[None] / 20


def test_a_frame_that_occurs_twice_is_encoded_and_stored_once() -> None:
    class Counting(PngCodec):
        encoded = 0

        def encode(self, frame: np.ndarray) -> bytes:
            type(self).encoded += 1
            return super().encode(frame)

    rb = make_buffer(Counting(), ragged_bytes=4000)
    rb.extend(episode(1, 10))
    assert Counting.encoded == 2 * 11  # the first data is looked at twice: before there is memory, and after
    rb.extend(episode(2, 10))
    assert Counting.encoded == 3 * 11
    check_frames(rb.sample())


def test_only_the_frames_of_a_window_are_decoded() -> None:
    class Counting(PngCodec):
        decoded = 0

        def decode(self, data: bytes, out: np.ndarray) -> None:
            type(self).decoded += 1
            super().decode(data, out)

    rb = make_buffer(Counting())
    rb.extend(episode(1, 40))
    rb.set_sampler(ChunkSampler(windows={"pixels": [0], "label": (0, 15)}, pad="after"))
    batch = rb.sample(16)
    assert batch["pixels"].shape == (16, 1, *SHAPE)
    assert Counting.decoded == len(batch["trajectory", "step"].unique())
    for row in range(16):
        number, step = batch["label"][row, 0].tolist()
        assert torch.equal(batch["pixels"][row, 0], smooth(number, step))
        assert batch["label"][row, :, 1].tolist() == [min(step + later, 39) for later in range(16)]


class CountingPng(PngCodec):
    """Counts the frames that it decodes."""

    decoded = 0

    def decode(self, data: bytes, out: np.ndarray) -> None:
        type(self).decoded += 1
        super().decode(data, out)


def test_a_frame_that_occurs_in_two_windows_is_decoded_once() -> None:
    rb = make_buffer(CountingPng())
    rb.extend(episode(1, 40))
    rb.set_sampler(ChunkSampler(windows={"pixels": [0, 1], ("next", "pixels"): [0, -1]}))
    batch = rb.sample(16)
    steps = batch["trajectory", "step"].tolist()
    assert CountingPng.decoded == len({step + later for step in steps for later in (0, 1)})
    for row, step in enumerate(steps):
        frames = torch.stack([smooth(1, step), smooth(1, step + 1)])
        assert torch.equal(batch["pixels"][row], frames)
        assert torch.equal(batch["next", "pixels"][row], frames.flip(0))
    assert set(batch.keys(True, True)) == {
        "index",
        "pixels",
        "pixels_is_pad",
        ("next", "pixels"),
        ("next", "pixels_is_pad"),
        ("trajectory", "id"),
        ("trajectory", "step"),
    }


def test_large_frames_of_jpeg_lie_where_they_are_decoded_fastest() -> None:
    rb = TrajectoryReplayBuffer(
        max_trajectories=2, max_total_steps=80, chunk_size=1, batch_size=8, compress={"pixels": "jpeg"}
    )
    frames = torch.zeros(4, 224, 224, 3, dtype=torch.uint8)
    done = torch.tensor([[0], [0], [0], [1]]).bool()
    rb.extend(TensorDict({"pixels": frames, "next": {"done": done}}, [4]))
    batch = rb.sample()
    assert batch["pixels"].data_ptr() % 32 == 16  # see skew_of
    assert not batch["pixels"].any()


@pytest.mark.parametrize(
    ("codec", "shape", "dtype"),
    [
        ("png", (3, 8, 10), torch.uint8),
        ("png", (8, 10), torch.uint8),
        ("png", (8, 10, 1), torch.uint8),
        ("png", (8, 10, 4), torch.uint8),
        ("png", (4, 8, 10), torch.uint8),
        ("png", (2, 8, 10, 3), torch.uint8),
        ("png", (8, 10), torch.uint16),
        (PngCodec(level=9), (8, 10, 2), torch.uint8),
    ],
)
def test_png_keeps_every_bit_of_frames_of(codec: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    frames = torch.randint(0, 60_000 if dtype == torch.uint16 else 256, (6, *shape)).to(dtype)
    rb = make_buffer(codec)
    done = torch.tensor([[0], [0], [0], [0], [0], [1]]).bool()
    rb.extend(TensorDict({"pixels": frames, "next": {"done": done}}, [6]))
    assert torch.equal(rb[0]["pixels"].int(), frames.int())


@pytest.mark.parametrize("shape", [(3, 24, 32), (24, 32), (24, 32, 1), (1, 24, 32)])
def test_jpeg_of_frames_of(shape: tuple[int, ...]) -> None:
    frames = torch.arange(6)[:, None].expand(6, 24 * 32 * (3 if 3 in shape else 1)).reshape(6, *shape) * 40
    rb = make_buffer(JpegCodec(quality=95))
    done = torch.tensor([[0], [0], [0], [0], [0], [1]]).bool()
    rb.extend(TensorDict({"pixels": frames.to(torch.uint8), "next": {"done": done}}, [6]))
    assert (rb[0]["pixels"].int() - frames).abs().max() <= 3


def test_a_codec_of_the_users_own() -> None:
    rb = make_buffer(Halves())
    for number in range(9):
        rb.extend(episode(number, 6))
    check_frames(rb.sample())
    check_frames(pickle.loads(pickle.dumps(rb)).sample())
    loader = DataLoader(OnlineDataset(rb, chunk_size=3, batch_size=4), batch_size=None, num_workers=1)
    check_frames(next(iter(loader)))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("by_item", [False, True])
def test_come_through_the_workers_of_a_loader(num_workers: int, by_item: bool) -> None:
    rb = make_buffer("jpeg", prefetch=2)
    for number in range(20):
        rb.extend(episode(number, 4 + number % 9))
    check_frames(rb.sample(), 12.0)
    dataset = OnlineDataset(rb, chunk_size=3, **({} if by_item else {"batch_size": 8}))
    loader = DataLoader(dataset, batch_size=8 if by_item else None, num_workers=num_workers)
    for _, batch in zip(range(3), loader, strict=False):
        assert batch["pixels"].shape == (8, 3, *SHAPE)
        check_frames(batch, 12.0)


@pytest.mark.parametrize("compact", [False, True])
def test_are_in_checkpoints_which_buffers_with_another_codec_load(tmp_path: Path, compact: bool) -> None:
    for codec in (None, "png"):
        rb = make_buffer(codec, compact=compact)
        for number in range(25):
            rb.extend(episode(number, 4 + number % 9))
        rb.dumps(tmp_path / str(codec))
        for other in (None, "png", "jpeg", Halves()):
            loaded, from_state = make_buffer(other, compact=compact), make_buffer(other, compact=compact)
            loaded.loads(tmp_path / str(codec))
            from_state.load_state_dict(rb.state_dict())
            for buffer in (loaded, from_state):
                assert len(buffer) == len(rb)
                check_frames(buffer[3], 12.0 if other == "jpeg" else 0.0)
                buffer.extend(episode(99, 5))
                check_frames(buffer[-1], 12.0 if other == "jpeg" else 0.0)


def test_a_checkpoint_of_a_codec_that_is_not_given_names_it(tmp_path: Path) -> None:
    rb = make_buffer(Halves())
    rb.extend(episode(1, 5))
    rb.dumps(tmp_path)
    for codec in ("png", "jpeg"):
        with pytest.raises(CodecError, match="a codec of your own, which this process does not have"):
            make_buffer(codec).loads(tmp_path)


def test_pieces_and_single_steps_are_joined() -> None:
    rb = make_buffer("png", compact=True)
    for piece in episode(4, 11).split([1, 4, 6]):
        rb.extend(piece)
    check_frames(rb[0])
    for step in episode(5, 4):
        rb.add(step)
    check_frames(rb[1])


def test_a_trajectory_that_is_broken_off_is_noticed() -> None:
    """The frames of both pieces are held against each other, although the first are encoded already."""
    for codec in ("png", "jpeg"):
        rb = make_buffer(codec)
        rb.extend(episode(1, 9)[:5])
        rb.extend(episode(7, 6))
        assert len(rb) == 2
        check_frames(rb[0], CODECS[codec])
        assert rb[1]["label"][:, 0].tolist() == [7] * 6
        assert rb.stats()["truncated"] == 1


def test_a_filter_sees_decoded_frames() -> None:
    from embodichain_rl import TrajectoryWriter

    seen: list[TensorDict] = []

    def accept(data: TensorDict) -> bool:
        seen.append(data)
        return accept_success is not None

    rb = make_buffer("png", writer=TrajectoryWriter(accept=accept))
    rb.extend(episode(3, 5))
    check_frames(seen[0])


def test_statistics_are_of_the_frames() -> None:
    plain, encoded = make_buffer(None), make_buffer("png")
    for number in range(9):
        plain.extend(episode(number, 6))
        encoded.extend(episode(number, 6))
    ours = buffer_statistics(encoded, ["pixels"], per_channel=["pixels"])["pixels"]
    theirs = buffer_statistics(plain, ["pixels"], per_channel=["pixels"])["pixels"]
    assert all(torch.equal(ours[name], theirs[name]) for name in ("mean", "std", "min", "max"))


class Camera(gymnasium.Env):
    """Observes a frame that says which step it is of."""

    observation_space = gymnasium.spaces.Dict({"pixels": gymnasium.spaces.Box(0, 255, SHAPE, np.uint8)})
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def _observe(self) -> Any:
        return {"pixels": np.full(SHAPE, 10 * self._step, np.uint8)}

    def reset(self, **kwargs: Any) -> Any:
        super().reset(**kwargs)
        self._step = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self._step += 1
        return self._observe(), 0.0, self._step == 12, False, {}


def test_the_workers_of_an_engine_encode() -> None:
    cfg = OnlineDataEngineCfg(
        buffer_size=6,
        max_episode_steps=20,
        env_factory=lambda: GymWrapper(Camera()),
        policy="random",
        compress={"pixels": "png"},
        compact=True,
    )
    with OnlineDataEngine(cfg) as engine:
        batch = engine.sample_batch(8, 4)
        assert engine.replay_buffer.storage.schema.fields[0].is_blob or any(
            field.is_blob for field in engine.replay_buffer.storage.schema.fields
        )
        steps = batch["trajectory", "step"]
        assert (batch["pixels"] == 10 * steps[..., None, None, None]).all()
        assert (batch["next", "pixels"] == 10 * (steps + 1)[..., None, None, None]).all()


class TestRefused:
    @pytest.mark.parametrize(
        "compress", [{"pixels": "webp"}, {"pixels": 3}, "png", {3: "png"}, {"pixels": PngCodec}, ["pixels"]]
    )
    def test_what_is_no_codec(self, compress: Any) -> None:
        with pytest.raises(InvalidArgumentError):
            make_buffer(None, compress=compress)
        with pytest.raises(ConfigError):
            OnlineDataEngineCfg(env_factory=Camera, compress=compress).validate()

    def test_options_of_codecs(self) -> None:
        for wrong in (lambda: JpegCodec(quality=0), lambda: PngCodec(level=0), lambda: JpegCodec(subsampling="1")):
            with pytest.raises(InvalidArgumentError):
                wrong()

    @pytest.mark.parametrize(
        ("codec", "frames"),
        [
            ("png", torch.zeros(4, 5, 6, 3)),
            ("png", torch.zeros(4, 6, dtype=torch.uint8)),
            ("jpeg", torch.zeros(4, 5, 6, 2, dtype=torch.uint8)),
            ("jpeg", torch.zeros(4, 5, 6, 3)),
        ],
    )
    def test_frames_that_the_codec_does_not_hold(self, codec: str, frames: torch.Tensor) -> None:
        data = TensorDict({"pixels": frames, "next": {"done": torch.ones(4, 1).bool()}}, [4])
        with pytest.raises(SchemaMismatchError, match="pixels"):
            make_buffer(codec).extend(data)

    def test_data_without_the_key(self) -> None:
        with pytest.raises(SchemaMismatchError, match="image"):
            make_buffer(None, compress={"image": "png"}).extend(episode(1, 5))

    def test_a_codec_that_fails(self) -> None:
        class Broken(Halves):
            def decode(self, data: bytes, out: Any = None) -> Any:
                return np.zeros(3, np.uint8)

        class Silent(Halves):
            def encode(self, frame: np.ndarray) -> Any:
                return None

        rb = make_buffer(Broken())
        rb.extend(episode(1, 5))
        with pytest.raises(CodecError, match="Broken"):
            rb.sample()
        with pytest.raises(CodecError, match="Silent"):
            make_buffer(Silent()).extend(episode(1, 5))

    def test_next_observations_that_differ_from_those_of_a_compact_buffer(self) -> None:
        data = episode(1, 6).clone()
        data["next", "pixels"][2] = 0
        with pytest.raises(SchemaMismatchError, match="step 2"):
            make_buffer("png", compact=True).extend(data)


def test_beside_ragged_values() -> None:
    rb = make_buffer(None, compress={"frame": "png"}, ragged=["points"], compact=True)
    for number in range(30):
        rb.extend(ragged_trajectory(number, 4 + number % 9, frames=SHAPE))
    check_ragged(rb.sample())
    check_ragged(rb[0])
