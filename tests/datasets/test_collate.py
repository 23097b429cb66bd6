"""How chunks become batches, and what torch's own loader does with TensorDicts once the library is imported."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from loading import loading
from tensordict import LazyStackedTensorDict, TensorDict
from torch.utils.data import DataLoader, IterableDataset, default_collate, default_convert
from torch.utils.data._utils import collate as torch_collate

from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.datasets.collate import _torch_default_convert, collate_chunks
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError


def chunk(length: int, value: float = 1.0) -> TensorDict:
    return TensorDict(
        {"action": torch.full((length, 2), value), "next": {"done": torch.ones(length, 1, dtype=torch.bool)}}, [length]
    )


def test_equal_lengths_are_stacked() -> None:
    batch = collate_chunks([chunk(4, 1), chunk(4, 2)])
    assert batch.shape == (2, 4)
    assert batch["next"].shape == (2, 4)
    assert batch["action"][:, 0, 0].tolist() == [1, 2]
    assert set(batch.keys(True, True)) == {"action", ("next", "done")}


def test_unequal_lengths_are_padded_with_zeros_behind_a_mask() -> None:
    batch = collate_chunks([chunk(2), chunk(5), chunk(3)])
    assert batch.shape == (3, 5)
    assert batch["next", "done"].shape == (3, 5, 1)
    mask = batch["collector", "mask"]
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[step < length for step in range(5)] for length in (2, 5, 3)]
    for key in ("action", ("next", "done")):
        assert (batch[key][mask] == 1).all()
        assert not batch[key][~mask].any()


def test_padding_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embodichain_rl.datasets.collate._warned_of_padding", False)
    with pytest.warns(UserWarning, match="Padded a batch of 2 chunks of 2 to 5 steps") as caught:
        batches = [collate_chunks([chunk(length), chunk(5)]) for length in (5, 2, 3, 5)]
    assert len(caught) == 1
    assert all(batch.shape == (2, 5) for batch in batches)


def test_a_mask_that_the_chunks_have_is_padded_with_false() -> None:
    chunks = [chunk(2), chunk(4)]
    chunks[0]["collector", "mask"] = torch.tensor([True, False])
    chunks[1]["collector", "mask"] = torch.tensor([True, True, True, False])
    assert collate_chunks(chunks)["collector", "mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]


def speaking(length: int, text: str) -> TensorDict:
    data = chunk(length)
    data["say"] = [f"{text} {step}" for step in range(length)]
    return data.set_non_tensor(("next", "task"), text)


def test_text_is_stacked() -> None:
    batch = collate_chunks([speaking(2, "lift"), speaking(2, "push")])
    assert batch["say"] == [["lift 0", "lift 1"], ["push 0", "push 1"]]
    assert batch["next", "task"] == [["lift"] * 2, ["push"] * 2]
    assert batch["next", "done"].shape == (2, 2, 1)


def test_text_is_padded_with_the_empty_one() -> None:
    batch = collate_chunks([speaking(1, "lift"), speaking(3, "push")])
    assert batch["say"] == [["lift 0", "", ""], ["push 0", "push 1", "push 2"]]
    assert batch["next", "task"] == [["lift", "", ""], ["push"] * 3]
    assert batch["collector", "mask"].sum(-1).tolist() == [1, 3]


def test_what_is_neither_tensor_nor_text_is_not_padded() -> None:
    items = [chunk(length).set_non_tensor("plan", object) for length in (2, 3)]
    assert collate_chunks([items[0], items[0]])["plan"] == [[object] * 2] * 2
    with pytest.raises(SchemaMismatchError, match="'plan', which is neither a tensor nor text"):
        collate_chunks(items)


def test_text_that_only_some_have_is_refused() -> None:
    with pytest.raises(SchemaMismatchError, match="only some have"):
        collate_chunks([speaking(2, "lift"), chunk(2)])


def test_lazy_stacks_are_items_too() -> None:
    lazy = LazyStackedTensorDict(*[chunk(1, value)[0] for value in (1, 2, 3)])
    assert collate_chunks([lazy, lazy])["action"][..., 0].tolist() == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([], InvalidArgumentError, "no items"),
        ([chunk(2), torch.zeros(2)], InvalidArgumentError, "type Tensor; items must be TensorDicts"),
        ([chunk(2), chunk(2).exclude("action")], SchemaMismatchError, r"only some have \['action'\]"),
        ([chunk(2), chunk(3).set("extra", torch.zeros(3))], SchemaMismatchError, r"only some have \['extra'\]"),
        ([chunk(6).view(2, 3), chunk(4).view(2, 2)], InvalidArgumentError, r"\[\[2, 2\], \[2, 3\]\].*batch_size=None"),
    ],
)
def test_what_can_not_be_put_together_is_refused(items: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OnlineDataset.collate_fn(items)


# ----------------------------------------------------------------------------------------------------- torch's own way


class Chunks(IterableDataset[Any]):
    """A dataset that knows nothing of this library."""

    def __iter__(self) -> Iterator[Any]:
        yield from (chunk(3, value) for value in range(4))


class Pairs(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ((chunk(3, value), np.full(2, value)) for value in range(4))


class Arrays(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ({"a": np.full(2, value), "b": [value, "text"]} for value in range(4))


def test_torchs_function_still_needs_to_be_wrapped() -> None:
    """When this fails, torch handles TensorDicts itself: remove the wrapper in datasets/collate.py."""
    with pytest.raises(Exception):  # noqa: B017, PT011 - it fails by accident, so not in a way to rely on
        _torch_default_convert(chunk(3))


def test_torchs_loader_still_looks_its_functions_up_where_they_are_wrapped() -> None:
    """When this fails, DataLoader takes its functions from elsewhere: so must datasets/collate.py."""
    assert DataLoader(Chunks(), batch_size=None).collate_fn is torch_collate.default_convert
    assert torch_collate.default_convert.__wrapped__ is _torch_default_convert
    assert default_collate([chunk(3), chunk(3)]).shape == (2, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_tensordicts_of_any_dataset_go_through_a_loader(workers: int) -> None:
    with loading(Chunks(), workers, batch_size=2) as loader:
        assert [batch["action"][:, 0, 0].tolist() for batch in loader] == [[0, 1], [2, 3]]
    with loading(Chunks(), workers) as loader:
        assert [(type(item), item["action"][0, 0].item()) for item in loader] == [(TensorDict, v) for v in range(4)]
    with loading(Pairs(), workers) as loader:
        assert [(item["action"][0, 0].item(), array.tolist()) for item, array in loader] == [
            (value, [value, value]) for value in range(4)
        ]


@pytest.mark.parametrize(
    ("method", "convert"),
    [("fork", None), ("forkserver", None), ("forkserver", default_convert), ("spawn", _torch_default_convert)],
)
def test_other_datasets_are_handled_as_ever(method: str, convert: Callable[[Any], Any] | None) -> None:
    with loading(Arrays(), 1, method, collate_fn=convert) as loader:
        assert [(item["a"].tolist(), item["b"]) for item in loader] == [
            ([value, value], [value, "text"]) for value in range(4)
        ]


def test_torchs_function_is_pickled_whenever_it_was_imported() -> None:
    for function in (default_convert, _torch_default_convert):
        assert pickle.loads(pickle.dumps(function)) is function
