"""A live buffer where a ``LeRobotDataset`` stood, held against LeRobot itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch.utils.data import DataLoader
from waiting import PATIENCE

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.errors import (
    DatasetReadError,
    DatasetWriteError,
    EmptyBufferError,
    InvalidArgumentError,
    SchemaMismatchError,
    TrajectoryIndexError,
)
from embodichain_rl.interop.lerobot import LeRobotRecorder, as_lerobot, export, load

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lerobot", reason="LeRobot is not installed: see docs/lerobot.md")

from lerobot.datasets.lerobot_dataset import LeRobotDataset

FPS = 10
LENGTHS = (20, 21, 22, 23)
TASKS = ("lift the cube", "open the drawer")
FEATURES: dict[str, dict[str, Any]] = {
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
    "observation.images.top": {"dtype": "image", "shape": (8, 12, 3), "names": ["height", "width", "channels"]},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    "torque": {"dtype": "float64", "shape": (2,), "names": None},
    "gripper": {"dtype": "int32", "shape": (1,), "names": None},
    "tactile": {"dtype": "float32", "shape": (2, 3), "names": None},
    "buttons": {"dtype": "uint8", "shape": (4,), "names": None},
    "note": {"dtype": "string", "shape": (1,), "names": None},
}
WINDOWS = {
    "observation.state": [-0.1, 0.0],
    "observation.images.top": [-0.1, 0.0],
    "action": [step / FPS for step in range(8)],
    "next.reward": [0.0, 0.1],
}


def episode(number: int, length: int) -> dict[str, Any]:
    """Return the values of an episode by feature, ``[T, *shape]``."""
    rng = np.random.default_rng(number)
    return {
        "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
        "observation.images.top": rng.integers(0, 256, (length, 8, 12, 3), dtype=np.uint8),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
        "next.reward": rng.normal(size=(length, 1)).astype(np.float32),
        "next.done": (np.arange(length) == length - 1)[:, None],
        "torque": rng.normal(size=(length, 2)),
        "gripper": rng.integers(-5, 5, (length, 1)).astype(np.int32),
        "tactile": rng.normal(size=(length, 2, 3)).astype(np.float32),
        "buttons": rng.integers(0, 256, (length, 4), dtype=np.uint8),
        "note": [f"note {step}" for step in range(length)],
        "task": TASKS[number % 2],
    }


def trajectory(number: int, length: int) -> TensorDict:
    """Return the same episode as a user of TorchRL has it."""
    data = TensorDict({}, [length])
    for name, values in episode(number, length).items():
        if name == "task":
            data["trajectory", "task"] = NonTensorStack(*[values] * length)
        elif isinstance(values, list):
            data[name] = NonTensorStack(*values)
        else:
            data[tuple(name.split("."))] = torch.from_numpy(values)
    return data


def make_buffer(**options: Any) -> TrajectoryReplayBuffer:
    settings = {"max_trajectories": 100, "max_total_steps": 5000, "chunk_size": 2, **options}
    return TrajectoryReplayBuffer(**settings)


@pytest.fixture(scope="module")
def rb() -> TrajectoryReplayBuffer:
    buffer = make_buffer()
    for number, length in enumerate(LENGTHS):
        buffer.extend(trajectory(number, length))
    return buffer


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same episodes, recorded by LeRobot."""
    root = tmp_path_factory.mktemp("lerobot") / "dataset"
    dataset = LeRobotDataset.create("test/recorded", fps=FPS, features=FEATURES, root=root, use_videos=False)
    record_with_lerobot(dataset, range(len(LENGTHS)))
    return root


def record_with_lerobot(dataset: LeRobotDataset, numbers: Iterable[int]) -> None:
    for number in numbers:
        values = episode(number, LENGTHS[number])
        for step in range(LENGTHS[number]):
            frame = {
                name: value[step] for name, value in values.items() if not isinstance(value, str) and name != "note"
            }
            dataset.add_frame({**frame, "note": values["note"][step], "task": values["task"]})
        dataset.save_episode()
    dataset.finalize()


def opened(root: Path, **options: Any) -> LeRobotDataset:
    return LeRobotDataset("test/opened", root=root, **options)


def assert_equal_items(ours: Any, theirs: Any, frames: int = 64, but: tuple[str, ...] = ()) -> None:
    for position in range(frames):
        own, other = ours[position], theirs[position]
        assert own.keys() == other.keys()
        for name in own.keys() - set(but):
            if isinstance(other[name], str):
                assert own[name] == other[name], name
            else:
                assert own[name].dtype == other[name].dtype, name
                assert torch.equal(own[name], other[name]), (name, position)


def rows_and_frames(root: Path) -> tuple[int, int, int]:
    dataset = opened(root)
    assert len(dataset.hf_dataset) == len(dataset) == dataset.meta.total_frames
    assert len(dataset.meta.episodes) == dataset.num_episodes
    return dataset.num_episodes, len(dataset), len(dataset.hf_dataset)


# ------------------------------------------------------------------------------------------------------------- items


@pytest.mark.parametrize("windows", [None, WINDOWS])
def test_items_equal_those_of_lerobot_key_by_key(
    rb: TrajectoryReplayBuffer, recorded: Path, windows: dict[str, list[float]] | None
) -> None:
    ours = as_lerobot(rb, delta_timestamps=windows, fps=FPS)
    theirs = opened(recorded, delta_timestamps=windows)
    assert len(ours) == len(theirs) == sum(LENGTHS)
    assert_equal_items(ours, theirs, frames=64 if windows else 10)


def test_items_and_exports_are_the_same_where_images_are_kept_encoded(
    rb: TrajectoryReplayBuffer, tmp_path: Path
) -> None:
    pytest.importorskip("imagecodecs", reason="imagecodecs is not installed: pip install 'embodichain-rl[images]'")
    encoded = make_buffer(compress={("observation", "images", "top"): "png"})
    for number, length in enumerate(LENGTHS):
        encoded.extend(trajectory(number, length))
    ours, plain = (as_lerobot(buffer, fps=FPS, delta_timestamps=WINDOWS) for buffer in (encoded, rb))
    assert_equal_items(ours, plain, frames=16)
    for name, buffer in (("encoded", encoded), ("plain", rb)):
        export(buffer, tmp_path / name, fps=FPS)
    assert_equal_items(opened(tmp_path / "encoded"), opened(tmp_path / "plain"), frames=16)


def test_features_and_tasks_equal_those_of_lerobot(rb: TrajectoryReplayBuffer, recorded: Path) -> None:
    ours, theirs = as_lerobot(rb, fps=FPS).meta, opened(recorded).meta
    assert ours.fps == theirs.fps
    assert ours.tasks.to_dict() == theirs.tasks.to_dict()
    assert ours.features.keys() == theirs.features.keys()
    for name, feature in theirs.features.items():
        assert ours.features[name]["dtype"] == feature["dtype"]
        assert tuple(ours.features[name]["shape"]) == tuple(feature["shape"])
    for column in ("dataset_from_index", "dataset_to_index", "length", "episode_index"):
        assert list(ours.episodes[column]) == list(theirs.episodes[column])


def test_statistics_are_those_of_lerobot(rb: TrajectoryReplayBuffer, recorded: Path) -> None:
    ours, theirs = as_lerobot(rb, fps=FPS).meta.stats, opened(recorded).meta.stats
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].keys() == values.keys()
        if FEATURES.get(name, {}).get("dtype") in ("uint8", "image") or name == "tactile":
            continue  # LeRobot's deviations of bytes overflow, and matrices are reduced to their last axis
        for kind in ("min", "max", "mean", "std", "count"):
            assert ours[name][kind].shape == values[kind].shape
            np.testing.assert_allclose(ours[name][kind], values[kind], rtol=1e-5, atol=1e-6, err_msg=f"{name} {kind}")
    assert ours["observation.images.top"]["mean"].shape == (3, 1, 1)
    assert 0.4 < ours["observation.images.top"]["mean"].mean() < 0.6


def test_a_loader_shuffles_and_collates_the_frames(rb: TrajectoryReplayBuffer) -> None:
    dataset = as_lerobot(rb, delta_timestamps=WINDOWS, fps=FPS)
    batches = list(DataLoader(dataset, batch_size=16, shuffle=True, num_workers=1))
    index = torch.cat([batch["index"] for batch in batches])
    assert index.sort().values.tolist() == list(range(sum(LENGTHS)))
    batch = dataset.batch(batches[0]["index"].tolist())
    for name, value in batch.items():
        same = batches[0][name] == value
        assert same if isinstance(same, bool) else same.all(), name


def test_frames_keep_their_numbers_while_data_streams() -> None:
    rb = make_buffer(max_trajectories=3)
    for number in range(3):
        rb.extend(trajectory(number, 10))
    dataset = as_lerobot(rb, fps=FPS, refresh_s=0.0)
    before = dataset[15]
    for number in range(3, 5):
        rb.extend(trajectory(number, 12))
    assert dataset[0]["index"] == 20
    assert dataset[0]["episode_index"] == 2
    assert dataset.meta.total_frames == len(dataset) == 34
    assert dataset.meta.stats["action"]["count"] == 34
    assert before["index"] == 15
    assert dataset[40]["index"] == 20 + 40 % 34  # a position of an epoch that began before
    with pytest.raises(TrajectoryIndexError, match="54"):
        dataset[54]


def test_what_is_no_dataset_is_refused(rb: TrajectoryReplayBuffer) -> None:
    with pytest.raises(EmptyBufferError):
        as_lerobot(make_buffer(), fps=FPS)
    with pytest.raises(InvalidArgumentError, match="Give fps"):
        as_lerobot(rb)
    with pytest.raises(InvalidArgumentError, match="no times of frames"):
        as_lerobot(rb, fps=FPS, delta_timestamps={"action": [0.05]})
    with pytest.raises(InvalidArgumentError, match="the features are"):
        as_lerobot(rb, fps=FPS, delta_timestamps={"actions": [0.0]})
    with pytest.raises(SchemaMismatchError, match="no text"):
        as_lerobot(rb, fps=FPS, task_key="action")


def test_windows_that_are_set_later_are_those_of_the_items(rb: TrajectoryReplayBuffer) -> None:
    dataset, expected = as_lerobot(rb, fps=FPS), as_lerobot(rb, fps=FPS, delta_timestamps=WINDOWS)
    assert dataset.delta_timestamps is None
    assert dataset.delta_indices is None
    dataset.delta_timestamps = WINDOWS
    assert dataset.delta_indices == {
        "observation.state": [-1, 0],
        "observation.images.top": [-1, 0],
        "action": list(range(8)),
        "next.reward": [0, 1],
    }
    assert_equal_items(dataset, expected, frames=10)
    with pytest.raises(InvalidArgumentError, match="no times of frames"):
        dataset.delta_timestamps = {"action": [0.05]}
    assert dataset.delta_timestamps == WINDOWS
    with pytest.raises(AttributeError, match="export"):
        _ = dataset.hf_dataset


def test_names_map_both_ways() -> None:
    rb = make_buffer()
    done = torch.zeros(5, 1, dtype=torch.bool)
    done[-1] = True
    observation = torch.randn(6, 3)
    data = {"observation": observation[:-1], "action": torch.randn(5, 2), "done": torch.zeros_like(done)}
    following = {"observation": observation[1:], "reward": torch.randn(5, 1), "done": done}
    rb.extend(TensorDict({**data, "next": following}, [5]))
    item = as_lerobot(rb, fps=FPS)[0]
    assert {name for name in item if name.startswith(("observation", "next", "action", "done"))} == {
        "observation.state",
        "action",
        "next.reward",
        "next.done",
    }
    named = as_lerobot(rb, fps=FPS, names={"observation": "observation.environment_state"})
    assert torch.equal(named[4]["observation.environment_state"], observation[4])


# ---------------------------------------------------------------------------------------------------- training from it


@pytest.mark.slow
def test_acts_own_class_trains_from_a_live_buffer() -> None:
    from lerobot.configs.types import FeatureType
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.datasets.utils import dataset_to_policy_features
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    rb = make_buffer()
    done = torch.zeros(20, 1, dtype=torch.bool)
    done[-1] = True
    state = {"state": torch.randn(20, 3), "environment_state": torch.randn(20, 4)}
    rb.extend(TensorDict({"observation": state, "action": torch.randn(20, 2), "next": {"done": done}}, [20]))
    meta = as_lerobot(rb, fps=FPS).meta
    features = dataset_to_policy_features(meta.features)
    actions = {name: feature for name, feature in features.items() if feature.type is FeatureType.ACTION}
    config = ACTConfig(
        input_features={name: feature for name, feature in features.items() if name not in actions},
        output_features=actions,
        chunk_size=4,
        n_action_steps=4,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        use_vae=False,
        device="cpu",
    )
    policy = ACTPolicy(config)
    preprocessor, _ = make_pre_post_processors(config, dataset_stats=meta.stats)
    dataset = as_lerobot(rb, delta_timestamps=resolve_delta_timestamps(config, meta), fps=FPS)
    batch = preprocessor(next(iter(DataLoader(dataset, batch_size=8, shuffle=True))))
    loss, _ = policy.forward(batch)
    loss.backward()
    assert loss.isfinite()
    assert sum(p.grad.abs().sum() for p in policy.parameters() if p.grad is not None) > 0


# --------------------------------------------------------------------------------------------------- load and export


def test_a_recorded_dataset_is_loaded_and_exported_unchanged(recorded: Path, tmp_path: Path) -> None:
    rb = make_buffer()
    assert load(recorded, into=rb, progress=False) == len(LENGTHS)
    assert rb.storage.trajectory_lengths(torch.arange(4)).tolist() == list(LENGTHS)
    assert_equal_items(as_lerobot(rb), opened(recorded), frames=30)
    export(rb, tmp_path / "exported", cameras="image", progress=False)
    assert_equal_items(opened(tmp_path / "exported"), opened(recorded), frames=30)


@pytest.mark.parametrize("first", ["LeRobot", "here"])
def test_a_dataset_that_was_begun_by_the_other_grows(first: str, recorded: Path, tmp_path: Path) -> None:
    root = tmp_path / "dataset"

    def add(who: str, numbers: range) -> None:
        if who == "here":
            rb = make_buffer()
            for number in numbers:
                rb.extend(trajectory(number, LENGTHS[number]))
            export(rb, root, fps=FPS, cameras="image", progress=False)
        elif root.exists():
            record_with_lerobot(opened(root), numbers)
        else:
            options: dict[str, Any] = {"fps": FPS, "features": FEATURES, "use_videos": False}
            record_with_lerobot(LeRobotDataset.create("test/begun", root=root, **options), numbers)

    second = "here" if first == "LeRobot" else "LeRobot"
    for who, number in ((first, 0), (first, 1), (second, 2), (first, 3)):
        add(who, range(number, number + 1))
    ours, theirs = opened(root), opened(recorded)
    assert len(ours) == len(theirs)
    assert_equal_items(ours, theirs, frames=len(theirs))
    for name, values in theirs.meta.stats.items():
        assert {kind: value.shape for kind, value in ours.meta.stats[name].items()} == {
            kind: value.shape for kind, value in values.items()
        }, name


def test_videos_are_decoded_once_as_lerobot_decodes_them(rb: TrajectoryReplayBuffer, tmp_path: Path) -> None:
    export(rb, tmp_path / "videos", fps=FPS, progress=False)
    loaded = make_buffer()
    load(opened(tmp_path / "videos", episodes=[0, 2]), into=loaded, progress=False)
    ours, theirs = as_lerobot(loaded), opened(tmp_path / "videos")
    assert len(ours) == LENGTHS[0] + LENGTHS[2]
    for position, frame in ((3, 3), (LENGTHS[0] + 5, LENGTHS[0] + LENGTHS[1] + 5)):
        for name in ("observation.images.top", "observation.state", "next.reward"):
            assert torch.equal(ours[position][name], theirs[frame][name]), name


def test_a_dataset_of_version_2_1_is_loaded(recorded: Path, tmp_path: Path) -> None:
    old = as_version_2_1(recorded, tmp_path / "old")
    rb = make_buffer()
    load(old, into=rb, progress=False)
    assert_equal_items(as_lerobot(rb), opened(recorded), frames=30)


def as_version_2_1(recorded: Path, root: Path) -> Path:
    """Write the files that LeRobot 0.3 wrote: one for each episode, and lines of JSON."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    info = json.loads((recorded / "meta/info.json").read_text())
    info["codebase_version"] = "v2.1"
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    table = pq.read_table(recorded / "data/chunk-000/file-000.parquet")
    episodes, tasks = [], [{"task_index": number, "task": task} for number, task in enumerate(TASKS)]
    for number, length in enumerate(LENGTHS):
        own = table.filter(pc.equal(table["episode_index"], number))
        pq.write_table(own, root / f"data/chunk-000/episode_{number:06d}.parquet")
        episodes.append({"episode_index": number, "tasks": [TASKS[number % 2]], "length": length})
    for name, lines in (("episodes", episodes), ("tasks", tasks)):
        (root / f"meta/{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def test_episodes_join_a_live_stream_with_its_own_keys(tmp_path: Path) -> None:
    rb = make_buffer()
    done = torch.zeros(5, 1, dtype=torch.bool)
    done[-1] = True
    data = TensorDict({"observation": torch.randn(5, 3), "done": torch.zeros_like(done), "next": {"done": done}}, [5])
    data["next", "terminated"], data["next", "truncated"] = torch.zeros_like(done), done.clone()
    rb.extend(data)
    export(rb, tmp_path / "stream", fps=FPS, progress=False)
    load(tmp_path / "stream", into=rb, progress=False)
    for key in data.keys(True, True):
        assert torch.equal(rb[0][key], rb[1][key]), key


def test_what_is_no_lerobot_dataset_is_refused(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetReadError, match="there is no LeRobot dataset"):
        load(tmp_path, into=make_buffer())
    with pytest.raises(DatasetReadError, match="episodes"):
        load(recorded, into=make_buffer(), episodes=[0, 9])
    (tmp_path / "notes.txt").write_text("mine")
    rb = make_buffer()
    rb.extend(trajectory(0, 5))
    with pytest.raises(DatasetWriteError, match="no LeRobot dataset"):
        export(rb, tmp_path, fps=FPS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# --------------------------------------------------------------------------------------------------------- recording


@pytest.mark.slow
def test_a_recorder_keeps_every_episode_that_is_published_and_goes_on_after_it_was_killed(tmp_path: Path) -> None:
    rb = make_buffer(max_trajectories=10)
    root = tmp_path / "recording"
    with LeRobotRecorder(rb, root, fps=FPS, cameras="image", keys=RECORDED) as recorder:
        for number in range(50):  # five times what the buffer holds
            rb.extend(trajectory(number, 6 + number % 3))
    assert recorder.num_episodes == 50
    assert recorder.stats()["recording"] is False
    assert rows_and_frames(root) == (50, recorder.num_frames, recorder.num_frames)
    check_states(root, 50)
    again = LeRobotRecorder(rb, root, fps=FPS, cameras="image", keys=RECORDED, filter=lambda data: len(data) % 2 == 0)
    again.start()
    for number in range(50, 56):
        rb.extend(trajectory(number, 6 + number % 3))
    wait_until(lambda: again.num_episodes == 4)
    os.kill(again.pid, signal.SIGKILL)
    with pytest.raises(DatasetWriteError, match="SIGKILL"):
        again.stop()
    for number in range(56, 70):  # nobody waits for the dead
        rb.extend(trajectory(number, 6 + number % 3))
    assert rows_and_frames(root)[0] == 54


@pytest.mark.slow
def test_a_recorder_records_images_that_are_kept_encoded(tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs", reason="imagecodecs is not installed: pip install 'embodichain-rl[images]'")
    encoded = make_buffer(compress={("observation", "images", "top"): "png"}, compact=True)
    with LeRobotRecorder(encoded, tmp_path / "recording", fps=FPS, cameras="image") as recorder:
        for number in range(3):
            encoded.extend(trajectory(number, 5))
    assert recorder.num_episodes == 3
    recorded = opened(tmp_path / "recording")
    for frame in range(15):
        image = recorded[frame]["observation.images.top"].permute(1, 2, 0).numpy()
        expected = episode(frame // 5, 5)["observation.images.top"][frame % 5]
        np.testing.assert_array_equal(np.rint(image * 255), expected)


RECORDED = ["observation.state", "action", "note"]


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def check_states(root: Path, episodes: int) -> None:
    table = opened(root).hf_dataset.with_format("numpy")
    first = 0
    for number in range(episodes):
        length = 6 + number % 3
        own = table[first : first + length]
        assert np.array_equal(np.stack(own["observation.state"]), episode(number, length)["observation.state"])
        assert list(own["note"]) == episode(number, length)["note"]
        assert (own["episode_index"] == number).all()
        first += length


def write_for_ever(root: Path, begun: Any) -> None:
    from embodichain_rl.interop.lerobot.episodes import Episode
    from embodichain_rl.interop.lerobot.writing import DatasetWriter

    features = {"observation.state": FEATURES["observation.state"], "note": FEATURES["note"], **NUMBERS}
    writer = DatasetWriter(root, fps=FPS, features=features)
    begun.set()
    while True:
        number = writer.total_episodes
        length = 6 + number % 3
        values = {name: episode(number, length)[name] for name in ("observation.state", "note")}
        times = (np.arange(length) / FPS).astype(np.float32)
        writer.append([Episode(values, [TASKS[number % 2]] * length, times)])


NUMBERS = {
    name: {"dtype": "float32" if name == "timestamp" else "int64", "shape": (1,), "names": None}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index")
}


@pytest.mark.slow
def test_lerobot_opens_a_recording_whose_writer_was_killed_at_any_moment(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    root = tmp_path / "killed"
    context = multiprocessing.get_context("fork")
    episodes = 0
    for round_ in range(12):
        begun = context.Event()
        process = context.Process(target=write_for_ever, args=(root, begun))
        process.start()
        assert begun.wait(PATIENCE)
        wait_until(lambda: (root / "meta/info.json").exists())
        time.sleep(random.Random(round_).uniform(0.0, 0.05))  # the moment of the kill
        os.kill(process.pid, signal.SIGKILL)
        process.join(PATIENCE)
        info = json.loads((root / "meta/info.json").read_text())
        rows = sum(pq.read_metadata(path).num_rows for path in root.glob("data/*/*.parquet"))
        assert rows == info["total_frames"]
        assert info["total_episodes"] >= episodes
        episodes = info["total_episodes"]
    assert episodes > 0
    rows_and_frames(root)
    check_states(root, episodes)
    shutil.rmtree(root)
