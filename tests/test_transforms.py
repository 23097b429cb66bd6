"""The flat layout is what TorchRL's recurrent modules and value estimators take it for."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch.utils.data import default_collate
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.modules import LSTMModule, ValueOperator, set_recurrent_mode
from torchrl.objectives.value import GAE

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError
from embodichain_rl.transforms import FlatChunks, ResolveText

B, L = 6, 5


def trajectory(number: int, steps: int) -> TensorDict:
    generator = torch.Generator().manual_seed(number)
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    observation = torch.randn(steps + 1, 3, generator=generator)
    return TensorDict(
        {
            "observation": observation[:-1],
            "done": torch.zeros(steps, 1, dtype=torch.bool),
            "terminated": torch.zeros(steps, 1, dtype=torch.bool),
            "truncated": torch.zeros(steps, 1, dtype=torch.bool),
            "next": {
                "observation": observation[1:],
                "reward": torch.randn(steps, 1, generator=generator),
                "done": done,
                "terminated": done if number % 2 else torch.zeros_like(done),
                "truncated": torch.zeros_like(done) if number % 2 else done,
            },
        },
        [steps],
    )


def buffer(**kwargs: Any) -> TrajectoryReplayBuffer:
    rb = TrajectoryReplayBuffer(max_trajectories=8, max_total_steps=100, batch_size=B, **{"chunk_size": L, **kwargs})
    for number in range(8):
        rb.extend(trajectory(number, 5 + number))
    return rb


@pytest.fixture
def both() -> tuple[TensorDict, TensorDict]:
    """The same chunks, ``[B, L]`` and flat."""
    chunks, flat = (
        buffer(transform=transform, generator=torch.Generator().manual_seed(0)).sample()
        for transform in (None, FlatChunks())
    )
    assert chunks.shape == (B, L)
    assert flat.shape == (B * L,)
    assert torch.equal(chunks["index"].reshape(-1, 2), flat["index"])
    return chunks, flat


def test_has_the_keys_and_marks_of_a_slice_sampler(both: tuple[TensorDict, TensorDict]) -> None:
    chunks, flat = both
    peer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(100), sampler=SliceSampler(slice_len=L, end_key=("next", "done")), batch_size=B * L
    )
    for number in range(8):
        peer.extend(trajectory(number, 5 + number))
    slices = peer.sample()
    ours = flat.exclude("index", "trajectory", "is_init")
    assert {*ours.keys(True, True)} == {*slices.exclude("index").keys(True, True)}
    for key in ours.keys(True, True):
        assert ours[key].shape == slices[key].shape, key
    for key in (("next", "done"), ("next", "truncated")):
        assert ours[key].reshape(B, L)[:, -1].all()
        assert slices[key].reshape(B, L)[:, -1].all()
        assert torch.equal(ours[key].reshape(B, L)[:, :-1], chunks[key][:, :-1, 0])
    assert torch.equal(ours["next", "terminated"], chunks["next", "terminated"].reshape(-1, 1))
    assert flat["is_init"].reshape(B, L).tolist() == [[True, *[False] * (L - 1)]] * B


def test_gae_is_the_same_on_both_layouts(both: tuple[TensorDict, TensorDict]) -> None:
    torch.manual_seed(0)
    value = ValueOperator(torch.nn.Linear(3, 1), in_keys=["observation"])
    chunks, flat = (GAE(gamma=0.9, lmbda=0.8, value_network=value)(data) for data in both)
    for key in ("advantage", "value_target"):
        torch.testing.assert_close(chunks[key].reshape(-1, 1), flat[key])
    assert chunks["advantage"].abs().sum() > 0


def test_an_lstm_starts_anew_with_every_chunk(both: tuple[TensorDict, TensorDict]) -> None:
    torch.manual_seed(0)
    lstm = LSTMModule(input_size=3, hidden_size=4, in_key="observation", out_key="features")
    head = TensorDictModule(torch.nn.Linear(4, 2), ["features"], ["action"])
    chunks, flat = both
    chunks["is_init"] = flat["is_init"].reshape(B, L, 1)
    with set_recurrent_mode(True):
        actions = head(lstm(chunks))["action"]
        flat_actions = head(lstm(flat.unsqueeze(0)))["action"].squeeze(0)
    torch.testing.assert_close(actions.reshape(-1, 2), flat_actions)
    by_hand, _ = lstm.lstm(chunks["observation"])
    torch.testing.assert_close(actions, head.module(by_hand))


@pytest.mark.parametrize(
    "rb",
    [
        pytest.param(
            lambda: buffer(chunk_size=None, sampler=ChunkSampler(windows={"observation": (0, 1)})), id="windows"
        ),
        pytest.param(lambda: buffer(transform=lambda data: data.exclude(("next", "done"))), id="without done"),
    ],
)
def test_other_batches_are_refused(rb: Any) -> None:
    rb = rb()
    rb.append_transform(FlatChunks())
    with pytest.raises(InvalidArgumentError, match="FlatChunks needs chunks"):
        rb.sample()


class TestResolveText:
    KEYS: ClassVar = ["say", ("trajectory", "task")]

    def speaking(self, **kwargs: Any) -> TrajectoryReplayBuffer:
        rb = TrajectoryReplayBuffer(
            max_trajectories=8, max_total_steps=100, **{"chunk_size": 3, "batch_size": 4, **kwargs}
        )
        for number in range(3):
            data = trajectory(number, 4 + number)
            data["number"] = torch.full((4 + number,), number)
            data["say"] = [f"{number} says {step}" for step in range(4 + number)]
            data["trajectory", "task"] = [f"task {number}"] * (4 + number)
            rb.extend(data)
        return rb

    def check(self, batch: Any) -> None:
        numbers, steps = batch["number"].tolist(), batch["trajectory", "step"].tolist()
        assert batch["trajectory", "task"] == [[f"task {n}" for n in row] for row in numbers]
        assert batch["say"] == [
            [f"{n} says {step}" for n, step in zip(*row, strict=True)] for row in zip(numbers, steps, strict=True)
        ]

    def test_of_a_buffer(self) -> None:
        rb = self.speaking()
        assert rb.append_transform(ResolveText(rb, self.KEYS)) is rb
        self.check(rb.sample())
        assert rb[0]["say"] == [f"0 says {step}" for step in range(4)]
        assert [found.data["trajectory", "task"][0] for found in rb.query()] == ["task 0", "task 1", "task 2"]

    def test_of_a_copied_buffer_resolves_what_is_written_to_the_copy(self) -> None:
        rb = self.speaking()
        rb.append_transform(ResolveText(rb, self.KEYS))
        own = copy.deepcopy(rb)
        rb.texts.intern("only in the first")
        more = trajectory(0, 4)
        more["number"], more["say"], more["trajectory", "task"] = torch.zeros(4).long(), ["new"] * 4, ["newer"] * 4
        own.extend(more)
        assert own[3]["say"] == ["new"] * 4
        self.check(rb.sample())

    # tensordict copies the objects of an entry that is set on another device, which takes ten times as long.
    def check_one_object_per_string(self, batch: Any) -> None:
        for key in self.KEYS:
            entry = batch.get(key)
            assert entry.device == batch.device == torch.device("cpu")
            objects = {id(of_step) for of_chunk in entry.tensordicts for of_step in of_chunk.tensordicts}
            assert len(objects) == len({text for row in batch[key] for text in row})

    def test_a_string_is_one_object_wherever_it_occurs_in_a_batch(self) -> None:
        rb = self.speaking()
        self.check_one_object_per_string(ResolveText(rb, self.KEYS)(rb.sample(32)))

    def test_also_in_a_mixture(self) -> None:
        sources = [self.speaking(), self.speaking()]
        for rb in sources:
            rb.append_transform(ResolveText(rb, self.KEYS))
        self.check_one_object_per_string(next(iter(OnlineDataset(sources, 3, 32))))

    @pytest.mark.filterwarnings("ignore:Padded a batch")
    def test_also_where_chunks_are_padded(self) -> None:
        resolve = ResolveText(rb := self.speaking(), self.KEYS)
        items = [next(iter(OnlineDataset(rb, length, transform=resolve))) for length in (2, 3)]
        self.check_one_object_per_string(default_collate(items))

    def test_of_windows_and_single_items(self) -> None:
        rb = self.speaking()
        windows = {"say": (0, 1), "number": (0, 0)}
        item = next(iter(OnlineDataset(rb, None, windows=windows, transform=ResolveText(rb.texts, self.KEYS))))
        number, step = item["number"].item(), item["trajectory", "step"].item()
        assert item["say"] == [f"{number} says {step}", f"{number} says {step + 1}"]
        assert item["trajectory", "task"] == f"task {number}"

    def test_before_flat_chunks(self) -> None:
        rb = self.speaking()
        rb.append_transform(ResolveText(rb.storage, "say"))
        rb.append_transform(FlatChunks())
        batch = rb.sample()
        assert batch["say"] == [
            f"{n} says {step}"
            for n, step in zip(batch["number"].tolist(), batch["trajectory", "step"].tolist(), strict=True)
        ]

    def test_refuses_what_is_no_table_and_what_are_no_ids(self) -> None:
        rb = self.speaking()
        with pytest.raises(InvalidArgumentError, match="ResolveText needs a TextTable"):
            ResolveText(TensorDictReplayBuffer(storage=LazyTensorStorage(3)), "say")
        with pytest.raises(InvalidArgumentError, match="no keys"):
            ResolveText(rb, [])
        with pytest.raises(SchemaMismatchError, match=r"torch\.int64 at 'number'"):
            ResolveText(rb, "number")(rb.sample())
        with pytest.raises(SchemaMismatchError, match=r"nothing at \('trajectory', 'mission'\)"):
            ResolveText(rb, [("trajectory", "mission")])(rb.sample())
