"""The messages by which trajectories travel between machines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.cluster.messages import MessageBuilder, MessageFormat, payload_bytes, trajectories
from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import Schema
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.writing import TrajectoryWriter


class SendingWriter(TrajectoryWriter):
    """Puts whole trajectories into the messages of another machine."""

    def __init__(self, storage: TrajectoryStorage) -> None:
        super().__init__()
        self.register_storage(storage)
        assert storage.schema is not None
        self.format = MessageFormat(storage.schema, storage.shifted_in(storage.schema))
        self.builder = MessageBuilder(self.format, 64)

    def _store(self, pieces: object, of_trajectory: object, version: int) -> int:
        self.builder.add(pieces, of_trajectory, version, now=1.0)  # type: ignore[arg-type]
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
    message = sender.builder.build(there.texts, now=3.0)
    schema = received.storage.schema
    assert schema is not None
    format = MessageFormat(schema, received.storage.shifted_in(schema))
    for trajectory in trajectories(message, format, received.texts):
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
    message = sender.builder.build(there.texts, now=0.0)
    other = MessageFormat(Schema.of(episode(0, 2).exclude("half")), ())
    with pytest.raises(SchemaMismatchError, match="same versions"):
        trajectories(message, other, there.texts)


def test_a_message_grows_with_its_trajectories() -> None:
    schema = Schema.of(TensorDict({"observation": torch.zeros(3, 2), "next": {"done": torch.zeros(3, 1).bool()}}, [3]))
    format = MessageFormat(schema, ())
    builder = MessageBuilder(format, 1)
    sent = [np.arange(2 * steps, dtype=np.float32).reshape(steps, 2) + steps for steps in (1, 50, 3, 200)]
    for array in sent:
        builder.add([[array, np.zeros((len(array), 1), bool)]], [], 7, now=0.0)
    got = list(
        trajectories(builder.build(TrajectoryStorage(1, 1).texts, now=0.0), format, TrajectoryStorage(1, 1).texts)
    )
    assert [trajectory.policy_version for trajectory in got] == [7] * 4
    for trajectory, array in zip(got, sent, strict=True):
        np.testing.assert_array_equal(trajectory.piece[0], array)
