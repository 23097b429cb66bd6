"""Steps that do not fit."""

from __future__ import annotations

from typing import Any

import torch
from nonsense import (
    Case,
    Place,
    Table,
    assert_refused,
    make_buffer,
)
from steps import small
from tensordict import TensorDict

from embodichain_rl import (
    TrajectoryStorage,
    accept_success,
)
from embodichain_rl.errors import (
    SchemaMismatchError,
    TrajectoryTooLongError,
)

TABLE = Table()
refuse, refuse_values = TABLE.refuse, TABLE.refuse_values


def changed(**changes: Any) -> TensorDict:
    """A trajectory with other values; ``next_done`` stands for ``("next", "done")``."""
    data = small(7, 8)
    for key, value in changes.items():
        data[tuple(key.split("_"))] = value
    return data


refuse(
    SchemaMismatchError,
    "observation",
    lambda p: p.rb.extend(small(7, 8).exclude("observation")),
    lambda p: p.rb.extend(changed(observation=torch.zeros(8, 4))),
    lambda p: p.rb.extend(changed(observation=torch.zeros(8, 3, dtype=torch.float64))),
    lambda p: p.rb.extend(changed(observation=torch.zeros(8))),
)
refuse(
    SchemaMismatchError,
    "dense tensors",
    lambda p: p.rb.extend(small(7, 8).to("meta")),
    lambda p: p.rb.extend(changed(observation=torch.zeros(8, 3).to_sparse())),
)
refuse(
    SchemaMismatchError,
    "must be bool",
    lambda p: p.rb.extend(changed(collector_mask=torch.ones(8))),
)
refuse(
    SchemaMismatchError,
    "TensorDict of steps|without any tensor",
    lambda p: p.rb.storage.allocate(None),
    lambda p: p.rb.storage.allocate({}),
    lambda _: TrajectoryStorage(2, 10).allocate(TensorDict({}, [])),
)
refuse(SchemaMismatchError, "accept_success", lambda _: accept_success(small(0, 8)), lambda _: accept_success(None))
refuse(SchemaMismatchError, "extra", lambda p: p.rb.extend(changed(extra=torch.zeros(8))))
refuse(SchemaMismatchError, "trajectory", lambda p: p.rb.extend(changed(trajectory=torch.zeros(8))))
refuse(
    SchemaMismatchError,
    "done",
    lambda p: p.rb.extend(small(7, 8).exclude(("next", "done"))),
    lambda p: p.rb.extend(changed(next_done=torch.zeros(8, 2, dtype=torch.bool))),
    lambda p: p.rb.extend(changed(next_done=torch.zeros(8, 1))),
)
refuse(
    SchemaMismatchError,
    r"\[T\]",
    lambda p: p.rb.extend(small(7, 8)[0]),
    lambda p: p.rb.extend(small(7, 8).reshape(2, 2, 2)),
)
refuse(
    SchemaMismatchError,
    "TensorDict",
    lambda p: p.rb.extend({"observation": torch.zeros(8, 3)}),
    lambda p: p.rb.extend(torch.zeros(8, 3)),
    lambda p: p.rb.extend(None),
    lambda p: p.rb.extend([small(7, 8)]),
    lambda p: p.rb.extend(3),
)
refuse(
    TrajectoryTooLongError,
    "max_total_steps=40",
    lambda p: p.rb.extend(small(7, 41)),
    lambda _: [rb := make_buffer(), rb.extend(small(7, 30, ends=False)), rb.extend(small(7, 30, ends=False))],
)


@TABLE.each
def test_nonsense_is_refused_and_the_buffer_goes_on(place: Place, case: Case) -> None:
    assert_refused(case, place)
