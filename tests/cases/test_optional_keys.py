"""Sources with and without some of the keys, such as a wrist camera, in one buffer."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_device import SimulatedDevice
from steps import make_trajectory
from tensordict import TensorDict, lazy_stack

from embodichain_rl import (
    ByGroup,
    ChunkSampler,
    TrajectoryReplayBuffer,
    TrajectoryStorage,
    buffer_statistics,
)
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import EmptyBufferError, InvalidArgumentError, SchemaMismatchError, TrajectoryValueError

HAS = ("trajectory", "has", "wrist")


def episode(number: int, length: int = 9, *, wrist: bool = True) -> TensorDict:
    """A trajectory, with the images of a wrist camera or without."""
    data = make_trajectory(number, length, fields=["observation", "action", ("next", "observation")])
    if wrist:
        pixels = (100 * number + torch.arange(length + 1))[:, None].expand(-1, 4)
        data["wrist"], data["next", "wrist"] = pixels[:-1].clone(), pixels[1:].clone()
    return data


def buffer(**kwargs: Any) -> TrajectoryReplayBuffer:
    settings: dict[str, Any] = {"max_trajectories": 20, "max_total_steps": 500, "batch_size": 64, **kwargs}
    if "storage" not in settings:
        settings.setdefault("optional_keys", ["wrist"])
    if "sampler" not in settings:
        settings["chunk_size"] = 3
    return TrajectoryReplayBuffer(**settings)


def filled(**kwargs: Any) -> TrajectoryReplayBuffer:
    rb = buffer(**kwargs)
    for number in range(4):
        rb.extend(episode(number, wrist=number % 2 == 0))
    return rb


def check(batch: TensorDict) -> TensorDict:
    """Holds the images of a batch against those that were written."""
    numbers, steps = batch["label"][..., 0], batch["label"][..., 1]
    has = batch[HAS]
    assert has.shape == batch.shape
    assert torch.equal(has, numbers % 2 == 0)
    images = (100 * numbers + steps)[..., None].expand(*batch.shape, 4)
    assert torch.equal(batch["wrist"], torch.where(has[..., None], images, 0))
    assert torch.equal(batch["next", "wrist"], torch.where(has[..., None], images + 1, 0))
    return batch


@pytest.mark.parametrize("compact", [False, True, "views"])
def test_samples_have_the_key_and_say_whether_it_is_there(compact: Any) -> None:
    rb = filled(compact=compact)
    batch = check(rb.sample())
    assert {*batch[HAS][:, 0].tolist()} == {True, False}
    for number in range(4):
        check(rb[number])


def test_steps_of_many_calls() -> None:
    rb = buffer()
    for number in range(4):
        for piece in episode(number, wrist=number % 2 == 0).split(4):
            rb.extend(piece)
    for number in range(4):
        for step in episode(number, wrist=number % 2 == 0):
            rb.add(step)
    assert len(rb) == 8
    check(rb.sample())


def test_a_trajectory_has_it_at_all_steps_or_at_none() -> None:
    rb = buffer()
    first, second = episode(0).split(5)
    rb.extend(first)
    with pytest.raises(TrajectoryValueError, match="'has', 'wrist'"):
        rb.extend(second.exclude("wrist", ("next", "wrist")))
    rb.extend(second)
    check(rb.sample())


def test_a_part_of_it_is_refused_by_name() -> None:
    rb = filled()
    with pytest.raises(SchemaMismatchError, match=r"without \('next', 'wrist'\)"):
        rb.extend(episode(0).exclude(("next", "wrist")))
    with pytest.raises(SchemaMismatchError, match="without 'action'"):
        rb.extend(episode(0).exclude("action"))


def test_lazy_stacks_whose_elements_differ() -> None:
    for lengths in ([9, 9, 9, 9], [9, 5, 7, 3]):
        rb = buffer()
        rb.extend(lazy_stack([episode(n, length, wrist=n % 2 == 0) for n, length in enumerate(lengths)]))
        assert [len(rb[n]) for n in range(4)] == lengths
        check(rb.sample())
    with pytest.raises(SchemaMismatchError, match=r"only some elements have .*optional_keys="):
        buffer(optional_keys=[]).extend(lazy_stack([episode(0), episode(1, wrist=False)]))


def test_that_are_not_declared_are_refused_by_name() -> None:
    rb = buffer(optional_keys=[])
    rb.extend(episode(0))
    with pytest.raises(SchemaMismatchError, match=r"without .*'wrist'.*optional_keys="):
        rb.extend(episode(1, wrist=False))


class TestTheFirstDataLacksIt:
    def test_the_shape_must_be_known(self) -> None:
        rb = buffer()
        with pytest.raises(SchemaMismatchError, match="'wrist', whose shape is not known yet"):
            rb.extend(episode(1, wrist=False))
        assert not rb.storage.initialized
        rb.storage.allocate(episode(0)[0])
        rb.extend(episode(1, wrist=False))
        rb.extend(episode(2))
        check(rb.sample())

    def test_an_example_of_a_step(self) -> None:
        image = torch.zeros(4, dtype=torch.int64)
        rb = buffer(optional_keys={"wrist": image, ("next", "wrist"): image})
        rb.extend(episode(1, wrist=False))
        rb.extend(episode(2))
        check(rb.sample())
        with pytest.raises(SchemaMismatchError, match="'wrist' with"):
            rb.extend(episode(2).set("wrist", torch.zeros(9, 5)))


def test_nested_keys_and_text() -> None:
    def data(wrist: bool) -> TensorDict:
        steps = make_trajectory(0, 4, fields=["observation"])
        if wrist:
            steps["cameras", "wrist"] = TensorDict({"rgb": torch.ones(4, 2, 2), "depth": torch.ones(4)}, [4])
            steps["note"] = ["a"] * 4
        return steps

    rb = buffer(optional_keys=[("cameras", "wrist"), "note"])
    rb.extend(data(wrist=True))
    rb.extend(data(wrist=False))
    one, other = rb[0], rb[1]
    assert one["trajectory", "has", "cameras", "wrist"].all()
    assert not other["trajectory", "has", "cameras", "wrist"].any()
    assert rb.texts.resolve(one["note"][:1]) == ["a"]
    assert rb.texts.resolve(other["note"][:1]) == [""]
    assert not other["cameras", "wrist", "rgb"].any()


def test_in_windows_padded_chunks_and_datasets() -> None:
    rb = filled(sampler=ChunkSampler(5, pad="both"))
    check(rb.sample())
    rb.set_sampler(ChunkSampler(windows={"wrist": (-1, 1), "label": [0]}, pad="both"))
    batch = rb.sample()
    has = batch["label"][:, 0, 0] % 2 == 0
    assert torch.equal(batch[HAS], has)
    assert torch.equal(batch["wrist"].any(-1).any(-1), has)
    check(next(iter(OnlineDataset(rb, 3, 8, seed=0))))
    rb.set_sampler(ChunkSampler(3, weights=ByGroup(HAS, mixture={1: 1.0})))
    assert check(rb.sample())[HAS].all()


def test_on_a_device() -> None:
    for direct in (False, True):
        device: Any = SimulatedDevice(direct=direct)
        storage = TrajectoryStorage(20, 500, device=device, optional_keys=["wrist"])
        rb = filled(storage=storage, max_trajectories=None, max_total_steps=None)
        storage.flush()
        check(rb.sample())
        storage.close()


def test_in_checkpoints_and_copies(tmp_path: Path) -> None:
    rb = filled()
    rb.dumps(tmp_path)
    loaded = buffer()
    loaded.loads(tmp_path)
    other = buffer()
    other.load_state_dict(rb.state_dict())
    for copy in (loaded, other, pickle.loads(pickle.dumps(rb))):
        check(copy.sample())
        copy.extend(episode(5, wrist=False))
        copy.extend(episode(6))
        check(copy.sample())


def test_written_by_another_process() -> None:
    rb = buffer()
    rb.extend(episode(0))
    child = multiprocessing.get_context("fork").Process(target=rb.extend, args=(episode(1, wrist=False),))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert not rb[1][HAS].any()
    check(rb.sample())


def test_samples_written_to_another_buffer() -> None:
    rb, other = filled(), buffer()
    other.extend(rb.sample())
    check(other.sample())


def test_statistics_are_of_the_trajectories_that_have_it() -> None:
    rb = filled()
    found = buffer_statistics(rb, ["wrist", "action", ("next", "wrist")])
    images = torch.cat([episode(n)["wrist"] for n in (0, 2)]).float()
    assert torch.allclose(found["wrist"]["mean"], images.mean(0))
    assert found["wrist"]["count"].tolist() == [18]
    assert found["action"]["count"].tolist() == [36]
    assert torch.allclose(found["next", "wrist"]["min"], images.amin(0) + 1)
    rb = buffer()
    rb.storage.allocate(episode(0))
    rb.extend(episode(1, wrist=False))
    with pytest.raises(EmptyBufferError, match="No trajectory has the optional key 'wrist'"):
        buffer_statistics(rb, ["wrist"])


@pytest.mark.parametrize("keys", ["wrist", 3, [3], [("trajectory", "task")], {"wrist": 3}], ids=str)
def test_nonsense(keys: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        TrajectoryStorage(4, 100, optional_keys=keys)


def test_beside_a_storage() -> None:
    with pytest.raises(InvalidArgumentError, match="optional_keys: the storage has its own"):
        TrajectoryReplayBuffer(storage=TrajectoryStorage(4, 100), chunk_size=2, optional_keys=["wrist"])
