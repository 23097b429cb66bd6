"""The messages by which trajectories travel between machines."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.cluster.gateway import Gateway
from embodichain_rl.cluster.messages import MessageBuilder, MessageFormat, payload_bytes, trajectories
from embodichain_rl.cluster.outbox import Outbox
from embodichain_rl.cluster.spec import ProducerSpec
from embodichain_rl.cluster.torchrl_client import _packed, _unpacked
from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import Schema, TextTable, texts
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.writing import TrajectoryWriter
from embodichain_rl.shared.by_value import dumps_for_other_machine


class SendingWriter(TrajectoryWriter):
    """Puts whole trajectories into the messages of another machine, or into an outbox."""

    def __init__(self, storage: TrajectoryStorage, outbox: Outbox | None = None) -> None:
        super().__init__()
        self.register_storage(storage)
        self.outbox = outbox
        self.builder = MessageBuilder(MessageFormat.of(storage), storage.texts, 64)

    def _store(self, pieces: Any, of_trajectory: Any, version: int) -> int:
        if self.outbox is None:
            self.builder.add(pieces, of_trajectory, version, now=1.0)
        else:
            self.outbox.put(pieces, of_trajectory, version)
        return 0


def episode(number: int, steps: int) -> TensorDict:
    values = torch.arange(steps + 1, dtype=torch.float32) + 100 * number
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    return TensorDict(
        {
            "next": {"observation": values[1:, None], "done": done},
            "observation": values[:-1, None],
            "half": values[:-1].bfloat16(),
            "instruction": NonTensorStack(*[f"task {(number + step) % 3}" for step in range(steps)]),
            "trajectory": {"task": NonTensorStack(*[f"lift {number}"] * steps)},
            "policy_version": torch.full((steps,), number),
        },
        [steps],
    )


@pytest.mark.parametrize("compact", [False, True])
def test_what_is_sent_is_what_is_written(compact: bool) -> None:
    episodes = [episode(number, steps) for number, steps in enumerate((5, 1, 9, 3))]
    there = TrajectoryStorage(1, 100, compact=compact)
    there.texts.intern("only here")  # so that the ids differ
    there.allocate(episodes[0][:1])
    sender = SendingWriter(there)
    direct = TrajectoryReplayBuffer(max_trajectories=10, max_total_steps=100, chunk_size=1, compact=compact)
    received = TrajectoryReplayBuffer(max_trajectories=10, max_total_steps=100, chunk_size=1, compact=compact)
    received.storage.allocate(episodes[0][:1])
    for data in episodes:
        direct.extend(data)
        sender.extend(data)
    message = sender.builder.build(now=3.0)
    for trajectory in trajectories(message, MessageFormat.of(received.storage), received.texts):
        assert trajectory.age == 2.0
        received.storage.write([trajectory.piece], trajectory.of_trajectory, policy_version=trajectory.policy_version)
    assert len(received) == len(direct) == 4
    for number in range(4):
        got, expected = received[number], direct[number]
        assert received.texts.resolve(got["instruction"]) == direct.texts.resolve(expected["instruction"])
        assert received.texts.resolve(got["trajectory", "task"]) == direct.texts.resolve(expected["trajectory", "task"])
        texts = ("instruction", ("trajectory", "task"))
        assert (got.exclude(*texts) == expected.exclude(*texts)).all()
    versions = received.storage.ledger.live_rows().policy_versions
    assert (versions == direct.storage.ledger.live_rows().policy_versions).all()
    sizes = payload_bytes(message), 18 * direct.storage.nbytes_per_step
    assert sizes[0] < 1.1 * sizes[1] + 4 * 64


def test_another_schema_is_refused() -> None:
    there = TrajectoryStorage(1, 100)
    there.allocate(episode(0, 2)[:1])
    sender = SendingWriter(there)
    sender.extend(episode(0, 2))
    message = sender.builder.build(now=0.0)
    other = MessageFormat(Schema.of(episode(0, 2).exclude("half")), ())
    with pytest.raises(SchemaMismatchError, match="same versions"):
        trajectories(message, other, there.texts)


def test_a_message_grows_with_its_trajectories() -> None:
    schema = Schema.of(TensorDict({"observation": torch.zeros(3, 2), "next": {"done": torch.zeros(3, 1).bool()}}, [3]))
    format = MessageFormat(schema, ())
    builder = MessageBuilder(format, TextTable(), 1)
    sent = [np.arange(2 * steps, dtype=np.float32).reshape(steps, 2) + steps for steps in (1, 50, 3, 200)]
    for array in sent:
        builder.add([[array, np.zeros((len(array), 1), bool)]], [], 7, now=0.0)
    got = list(trajectories(builder.build(now=0.0), format, TextTable()))
    assert [trajectory.policy_version for trajectory in got] == [7] * 4
    for trajectory, array in zip(got, sent, strict=True):
        np.testing.assert_array_equal(trajectory.piece[0], array)


class Inverted:
    """A codec of a user's own."""

    def encode(self, frame: np.ndarray) -> bytes:
        return (~frame).tobytes()

    def decode(self, data: bytes, out: np.ndarray) -> None:
        out.reshape(-1)[...] = ~np.frombuffer(data, dtype=np.uint8)


def episode_of_blobs(number: int, steps: int, begin: int = 0, end: int | None = None) -> TensorDict:
    """Return the steps from ``begin`` to ``end`` of an episode."""
    end = steps if end is None else end
    numbers = torch.arange(steps + 1) + 10 * number
    frames = numbers.to(torch.uint8)[:, None, None, None].expand(steps + 1, 4, 5, 3).clone()
    frames[:, 0, 0, 0] = 7
    clouds = [torch.full((int(n) % 4, 3), float(n)) for n in numbers]
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True

    def at(part: slice) -> dict[str, Any]:
        points = torch.nested.nested_tensor(clouds[part], layout=torch.jagged)
        return {"png": frames[part], "own": frames[part], "points": points}

    following = {**at(slice(begin + 1, end + 1)), "done": done[begin:end]}
    return TensorDict({**at(slice(begin, end)), "next": following}, [end - begin])


@pytest.mark.parametrize("compact", [False, True])
def test_encoded_and_ragged_values_are_sent_as_they_are_and_once(compact: bool) -> None:
    settings: dict[str, Any] = {
        "compact": compact,
        "compress": {"png": "png", "own": Inverted()},
        "ragged": ["points"],
    }
    received = TrajectoryReplayBuffer(max_trajectories=10, max_total_steps=100, chunk_size=1, **settings)
    received.storage.allocate(episode_of_blobs(0, 5))
    sender = SendingWriter(producers_storage(received.storage))
    episodes = [episode_of_blobs(number, steps) for number, steps in enumerate((5, 2, 9, 3))]
    for number, data in enumerate(episodes):
        sender.extend(episode_of_blobs(number, len(data), 0, len(data) // 2))  # in two pieces
        sender.extend(episode_of_blobs(number, len(data), len(data) // 2))
    message = sender.builder.build(now=0.0)
    frames = {int(data["png"][step, 1, 0, 0]) for data in episodes for step in range(len(data))}
    frames |= {int(data["next", "png"][-1, 1, 0, 0]) for data in episodes}
    clouds = {n for n in frames if n % 4} | {0}  # all clouds without a point are one blob
    assert len(message["sizes"]) == 2 * len(frames) + len(clouds)
    for trajectory in trajectories(message, MessageFormat.of(received.storage), received.texts):
        received.storage.write([trajectory.piece], trajectory.of_trajectory)
    for number, data in enumerate(episodes):
        got = received[number]
        for prefix in ((), ("next",)):
            for key in ("png", "own"):
                assert torch.equal(got[(*prefix, key)], data[(*prefix, key)])
            points, lengths = got[(*prefix, "points")], got[(*prefix, "points_lengths")]
            for step, cloud in enumerate(data[(*prefix, "points")].unbind()):
                assert torch.equal(points[step, : lengths[step]], cloud)


def producers_storage(storage: TrajectoryStorage) -> TrajectoryStorage:
    """Return the storage of a producer that writes for another one, on another machine."""
    spec: Any = ProducerSpec.__new__(ProducerSpec)
    assert storage.schema is not None
    spec.schema, spec.compact, spec.max_episode_steps = storage.schema.to_json(), storage.compact, 20
    spec.formats = storage.formats.given
    made: TrajectoryStorage = pickle.loads(dumps_for_other_machine(spec)).make_storage()
    return made


def test_texts_leave_the_producer_and_the_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "SWEEP_AFTER", 20)
    learner = TrajectoryReplayBuffer(max_trajectories=4, max_total_steps=100, chunk_size=1)
    learner.storage.allocate(saying(0))
    there = producers_storage(learner.storage)
    outbox = Outbox(MessageFormat.of(there), there.texts, 1 << 20)
    sender = SendingWriter(there, outbox)
    job: Any = SimpleNamespace(storage=learner.storage)
    gateway = Gateway(job)
    for number in range(400):
        sender.extend(saying(number))
        if number % 50 != 49:
            continue  # a message has the texts of its trajectories, also those that have left the producer's table
        message = outbox.take(0.0)
        assert message is not None
        for at, trajectory in enumerate(gateway._received(message, 0.0)):
            learner.storage.write([trajectory.piece], trajectory.of_trajectory)
            last = learner[-1]
            of = number - 49 + at
            assert learner.texts.resolve(last["say"]) == [f"say {of} {step}" for step in range(3)]
            assert {*learner.texts.resolve(last["trajectory", "task"])} == {f"task {of}"}
    assert there.texts.generation > 10
    assert len(there.texts) < 100
    assert learner.texts.generation > 5
    assert len(learner.texts) < 500  # what two messages have at most
    assert (learner.texts._holds[:, 2] == texts.FREE).all()


def saying(number: int) -> TensorDict:
    done = torch.tensor([[False], [False], [True]])
    said = NonTensorStack(*(f"say {number} {step}" for step in range(3)))
    task = NonTensorStack(*[f"task {number}"] * 3)
    return TensorDict({"say": said, "trajectory": {"task": task}, "next": {"done": done}}, [3])


def test_a_client_sends_ragged_values() -> None:
    clouds = [torch.rand(size, 3) for size in (2, 0, 5)]
    rb = TrajectoryReplayBuffer(max_trajectories=8, max_total_steps=80, chunk_size=2)
    for points in (
        torch.nested.nested_tensor(clouds, layout=torch.jagged),
        NonTensorStack(*map(NonTensorData, clouds)),
    ):
        sent = pickle.loads(pickle.dumps(_packed(saying(3).set(("next", "points"), points))))
        rb.extend(_unpacked(sent))
        got = rb[-1]
        assert rb.texts.resolve(got["say"]) == ["say 3 0", "say 3 1", "say 3 2"]
        assert got["next", "points_lengths"].tolist() == [2, 0, 5]
        for step, cloud in enumerate(clouds):
            assert torch.equal(got["next", "points"][step, : len(cloud)], cloud)
    with pytest.raises(SchemaMismatchError, match="neither a tensor, text nor ragged values"):
        _packed(saying(3).set("points", NonTensorData({}, batch_size=[3])))
