"""Trajectories in which every value identifies its trajectory and step, checks of them, and child processes."""

from __future__ import annotations

import math
import multiprocessing
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import ReplayBuffer, TensorDictReplayBuffer
from waiting import PATIENCE

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter

START_METHODS = ("fork", "spawn", "forkserver")

LABEL = "label"
"""The key of four numbers: trajectory number, step, length of the trajectory, and the checksum of the three."""

FIELDS: dict[Any, tuple[tuple[int, ...], torch.dtype]] = {
    "observation": ((3,), torch.float32),
    "pixels": ((4, 5, 3), torch.uint8),
    "flags": ((16,), torch.bool),
    "speed": ((), torch.float32),
    "clock": ((1,), torch.float64),
    "action": ((2,), torch.bfloat16),
    ("robot", "arm", "joints"): ((7,), torch.float64),
    ("robot", "mode"): ((), torch.int64),
    ("next", "observation"): ((3,), torch.float32),
    ("next", "reward"): ((1,), torch.float32),
}
"""Every kind of entry: images, scalars, ``[1]`` features, nested keys, and dtypes with and without a NumPy type."""

_BITS = {torch.float64: 53, torch.float32: 24, torch.bfloat16: 8, torch.uint8: 8, torch.bool: 1, torch.int64: 63}
"""How many bits of an integer the dtype represents exactly."""


# ---------------------------------------------------------------------------------------------------- trajectories


def make_trajectory(
    number: int, length: int, *, fields: Iterable[Any] = FIELDS, traj_id: int | None = None, ends: bool = True
) -> TensorDict:
    """Return the steps ``[length]`` of trajectory ``number``.

    Args:
        number: identifies the trajectory; part of every value.
        length: number of steps.
        fields: the keys of ``FIELDS`` that it has, besides the label and the end keys.
        traj_id: the value of ``("collector", "traj_ids")``; None leaves the key out.
        ends: whether the last step is done.
    """
    numbers, steps, lengths = np.full(length, number), np.arange(length), np.full(length, length)
    data = TensorDict({}, [length])
    data[LABEL] = torch.from_numpy(np.stack([numbers, steps, lengths, _checksum(numbers, steps, lengths)], axis=-1))
    for key in fields:
        data[key] = _value_of(key, numbers, steps)
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = ends
    data["next", "done"], data["next", "terminated"] = done, done.clone()
    data["next", "truncated"] = torch.zeros_like(done)
    if traj_id is not None:
        data["collector", "traj_ids"] = torch.full((length,), traj_id)
    return data


def small(number: int, length: int, **kwargs: Any) -> TensorDict:
    """Return such a trajectory with one field only, for tests that are not about the kinds of entries."""
    return make_trajectory(number, length, fields=["observation"], **kwargs)


def _value_of(key: Any, numbers: np.ndarray, steps: np.ndarray) -> torch.Tensor:
    """Return the value of ``key``: a hash of the key, the trajectory number, the step and the element.

    The next observation is the observation of the next step.
    """
    shape, dtype = FIELDS[key]
    if key == ("next", "observation"):
        key, steps = "observation", steps + 1
    elements = int(np.prod(shape, dtype=int))
    words = np.uint64(zlib.crc32(repr(key).encode())) + np.arange(elements, dtype=np.uint64)
    for part in (numbers, steps):
        words = _mixed(words ^ part[..., None].astype(np.uint64))
    kept = torch.from_numpy((words >> np.uint64(64 - _BITS[dtype])).astype(np.int64))
    return kept.to(dtype).reshape(*numbers.shape, *shape)


def _checksum(numbers: np.ndarray, steps: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    words = _mixed(numbers.astype(np.uint64))
    for part in (steps, lengths):
        words = _mixed(words ^ part.astype(np.uint64))
    return words.astype(np.int64)


def _mixed(words: np.ndarray) -> np.ndarray:
    """Return one round of splitmix64."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def check_chunk(data: TensorDictBase) -> TensorDictBase:
    """Compare all keys of all steps of chunks ``[*B, L]`` with what was written; return the data.

    Also check that each chunk has consecutive steps of one trajectory, and that padding, if there is a mask, is zero.
    """
    mask = data.get(("collector", "mask"), None)
    real = np.ones(tuple(data.shape), dtype=bool) if mask is None else mask.numpy()
    numbers, steps, lengths, sums = np.moveaxis(data[LABEL].numpy(), -1, 0)
    assert (sums == _checksum(numbers, steps, lengths))[real].all(), "a label is torn"
    assert (numbers == numbers[..., :1])[real].all(), "a chunk has steps of several trajectories"
    assert (steps == steps[..., :1] + np.arange(steps.shape[-1]))[real].all(), "steps are not consecutive"
    assert (steps < lengths)[real].all(), "a step is behind the end"
    assert not data[LABEL].numpy()[~real].any(), "padding is not zero"
    for key in [key for key in data.keys(True, True) if key in FIELDS]:
        assert data[key].dtype == FIELDS[key][1], f"{key} changed its dtype"
        assert torch.equal(data[key][real], _value_of(key, numbers, steps)[real]), f"{key} is of another step"
        assert not data[key][~real].any(), f"padding of {key} is not zero"
    done = data["next", "done"].numpy()[..., 0]
    assert (done == (steps == lengths - 1))[real].all(), "the end is not where it was"
    if ("trajectory", "step") in data.keys(True):
        assert (data["trajectory", "step"].numpy() == steps)[real].all(), "the steps are numbered wrongly"
        ids = data["trajectory", "id"].numpy()
        assert (ids == ids[..., :1]).all(), "a trajectory has several ids"
    return data


def check_trajectory(data: TensorDictBase, number: int, length: int) -> None:
    """Check that ``data`` is the whole trajectory ``number``."""
    check_chunk(data)
    assert data[LABEL][:, :3].tolist() == [[number, step, length] for step in range(length)]


def numbers_of(data: TensorDictBase) -> list[int]:
    """Return the trajectory numbers of chunks, or of padded trajectories, ``[B, L]``."""
    return data[LABEL][:, 0, 0].tolist()


def contents(source: ReplayBuffer | TrajectoryStorage) -> list[tuple[int, int]]:
    """Return number and length of each live trajectory, oldest first; check all values, and that none is cut."""
    storage = source.storage if isinstance(source, ReplayBuffer) else source
    if not len(storage):
        return []
    data = check_chunk(storage[:])
    lengths = data["collector", "mask"].sum(-1).tolist()
    assert lengths == data[LABEL][:, 0, 2].tolist(), "a trajectory is not whole"
    assert not data[LABEL][:, 0, 1].any(), "a trajectory does not begin with its first step"
    assert sum(lengths) == storage.num_steps
    return list(zip(numbers_of(data), lengths, strict=True))


# --------------------------------------------------------------------------------------------------------- buffers


def make_buffer(trajectories: Sequence[TensorDictBase] = (), **kwargs: Any) -> TrajectoryReplayBuffer:
    """Return a buffer with these trajectories. Default: 4 trajectories, 100 steps, chunks of 3, batches of 8."""
    defaults: dict[str, Any] = {"batch_size": 8}
    if "storage" not in kwargs:
        defaults |= {"max_trajectories": 4, "max_total_steps": 100}
    if "sampler" not in kwargs:
        defaults |= {"chunk_size": 3}
    return _filled(TrajectoryReplayBuffer(**{**defaults, **kwargs}), trajectories)


def make_plain_buffer(trajectories: Sequence[TensorDictBase] = (), **kwargs: Any) -> TensorDictReplayBuffer:
    """Return TorchRL's buffer with the storage, writer and sampler of this library, and the same defaults."""
    parts = {"storage": TrajectoryStorage(4, 100), "writer": TrajectoryWriter(), "sampler": ChunkSampler(3)}
    return _filled(TensorDictReplayBuffer(**{**parts, "batch_size": 8, **kwargs}), trajectories)


def make_storage(trajectories: Sequence[TensorDictBase] = (), *args: Any, **kwargs: Any) -> TrajectoryStorage:
    """Return a storage that a writer has filled with these trajectories. Default: 4 trajectories, 100 steps."""
    storage = TrajectoryStorage(*(args or (4, 100)), **kwargs)
    writer = make_writer(storage)
    for trajectory in trajectories:
        writer.extend(trajectory)
    return storage


def make_writer(storage: TrajectoryStorage) -> TrajectoryWriter:
    writer = TrajectoryWriter()
    writer.register_storage(storage)
    return writer


def _filled(buffer: Any, trajectories: Sequence[TensorDictBase]) -> Any:
    for trajectory in trajectories:
        buffer.extend(trajectory)
    return buffer


# ------------------------------------------------------------------------------------------------- child processes


class Child:
    """A process that gets objects when it starts, and then calls functions on them.

    Args:
        start_method: how it is started.
        given: the objects; the first argument of every function that it calls.
    """

    def __init__(self, start_method: str, given: Any) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._orders = 0
        self.process = multiprocessing.get_context(start_method).Process(
            target=_serve, args=(theirs, given), daemon=True
        )
        self.process.start()
        theirs.close()

    def begin(self, function: Callable[..., Any], *args: Any) -> None:
        """Let the child call ``function(given, *args)``, without waiting for it."""
        self._orders += 1
        self._pipe.send((self._orders, function, args))

    def result(self) -> Any:
        """Wait for the last call that was begun; return its result, or raise its exception."""
        number = 0
        while number < self._orders:  # results that an earlier test did not wait for are ignored
            assert self._pipe.poll(PATIENCE), "the child hangs"
            number, value = self._pipe.recv()
        if isinstance(value, Exception):
            raise value
        return value

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        self.begin(function, *args)
        return self.result()

    def end(self) -> None:
        self._pipe.send(None)
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, given: Any) -> None:
    torch.set_num_threads(1)
    while (order := pipe.recv()) is not None:
        number, function, args = order
        try:
            result = function(given, *args)
        except Exception as error:
            result = error
        pipe.send((number, result))


def assert_uniform(drawn: Iterable[Any], among: Iterable[Any]) -> None:
    """Check that each of ``among`` was drawn with the same probability; see :func:`assert_chances`."""
    among = list(among)
    assert_chances(drawn, dict.fromkeys(among, 1.0))


def assert_chances(drawn: Iterable[Any], chances: Mapping[Any, float]) -> None:
    """Pearson's chi-square test at a significance of one in a million. The draws are seeded, so it is never flaky.

    Args:
        drawn: the outcomes.
        chances: the possible outcomes and their probabilities, which need not sum to 1.
    """
    counts = Counter(drawn)
    assert set(counts) <= set(chances)
    total = sum(counts.values()) / sum(chances.values())
    expected = {outcome: total * chance for outcome, chance in chances.items()}
    assert min(expected.values()) >= 20, "too few draws to say anything"
    chi_square = sum((counts[outcome] - often) ** 2 / often for outcome, often in expected.items())
    freedom = len(chances) - 1
    # Wilson and Hilferty's approximation of the quantile; 4.75 is that of the normal distribution.
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit, f"chi-square of {chi_square:.0f} with {freedom} degrees of freedom"
