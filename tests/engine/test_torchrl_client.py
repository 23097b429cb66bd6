"""A buffer of this process that is written to through Ray, as TorchRL's collectors do on other machines."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from waiting import PATIENCE

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.cluster import client
from embodichain_rl.errors import InvalidArgumentError, UnsupportedOperationError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray, the extra 'ray'"),
]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray
    from ray._private import ray_constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # or beside other programs, they start after minutes
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # the same, where Ray is imported already: loopback
        start(ray)
        yield ray
        ray.shutdown()


def start(ray: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    options = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}
    while True:
        try:
            ray.init(address="local", _node_ip_address="127.0.0.1", **options)
            return
        except Exception as error:  # of no other type: Ray gives a raylet 30 s, which a busy machine may not have
            ray.shutdown()
            if "timed out during startup" not in str(error) or time.monotonic() > deadline:
                raise


def make_buffer() -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(max_trajectories=8, max_total_steps=80, chunk_size=2, batch_size=4)


def steps(values: list[int], end: bool) -> TensorDict:
    done = torch.zeros(len(values), 1, dtype=torch.bool)
    done[-1] = end
    data = {
        "observation": torch.tensor(values, dtype=torch.bfloat16)[:, None],
        "instruction": NonTensorStack(*[f"task {value % 2}" for value in values]),
        "next": {"done": done},
    }
    return TensorDict(data, [len(values)])


def test_ray_must_be_initialized() -> None:
    with pytest.raises(InvalidArgumentError, match=r"ray\.init"):
        client(make_buffer())


def test_another_buffer_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="TrajectoryReplayBuffer"):
        client([])  # type: ignore[arg-type]


def test_clients_write_to_the_buffer_of_this_process(ray: Any) -> None:
    rb = make_buffer()
    service = client(rb)
    assert service.service_backend == "ray"
    first, second = service.clients(2)
    # Pieces of different collectors are not joined, although both are the first row of their data.
    assert first.extend(steps([1, 2], end=False)).tolist() == [-1, -1]
    assert second.extend(steps([5, 6, 7], end=True)).tolist() == [0, 0, 0]
    assert first.extend(steps([3], end=True)).tolist() == [1]
    assert len(rb) == len(service) == 2
    assert service.write_count == rb.write_count == 6
    assert service.stats()["trajectories"] == 2
    assert rb[1]["observation"].flatten().tolist() == [1, 2, 3]
    assert rb[0]["observation"].dtype == torch.bfloat16
    assert rb.texts.resolve(rb[0]["instruction"]) == ["task 1", "task 0", "task 1"]
    assert rb.sample().shape == (4, 2)
    with pytest.raises(UnsupportedOperationError, match="Sample the buffer itself"):
        first.sample(4)
    service.close()
