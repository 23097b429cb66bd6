"""A buffer of this machine for TorchRL's collectors on a Ray cluster: ``RayCollector(replay_buffer=client(rb))``.

Here the user's process is Ray's driver, as TorchRL's ``RayCollector`` needs it. The buffer stays in its shared memory:
an actor on this machine attaches to it and writes what the collectors send, so samples cross no process.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from tensordict import TensorDict, TensorDictBase, is_leaf_nontensor

from embodichain_rl.cluster.config import check_ray
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError, UnsupportedOperationError
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.schema import (
    Blobs,
    as_array,
    as_non_tensor,
    as_tensor,
    items_of,
    padded_values,
    ragged_leaf,
    text_array,
)

__all__ = ["BufferClient", "RemoteWriter", "client"]


def client(replay_buffer: TrajectoryReplayBuffer) -> BufferClient:
    """Return a client of a buffer of this process, for ``torchrl.collectors.distributed.RayCollector``.

    It is what ``RayCollector`` takes as ``replay_buffer``. The collectors send whole trajectories if they are made with
    ``trajs_per_batch=1``. Sample the buffer itself.

    What ``RayCollector`` does not do, an engine with a :class:`~embodichain_rl.cluster.RayCluster` does: here the
    process is Ray's driver, which ends with the cluster; a collector that is killed is not replaced, and ends the
    collection; each write waits for its answer; and nothing paces the collectors.

    Args:
        replay_buffer: a buffer in nameless memory of the CPU. Ray must be initialized, on this machine.

    Raises:
        InvalidArgumentError: it is not such a buffer, or Ray is not initialized.
        MissingPackageError: Ray is not installed, or too old.
        UnsupportedOperationError: the buffer is in a file or on a device.

    Example:
        >>> rb = TrajectoryReplayBuffer(max_trajectories=64, max_total_steps=64 * 200, chunk_size=16, batch_size=32)
        >>> collector = RayCollector(
        ...     [make_env] * 2, policy, frames_per_batch=200, total_frames=10**9, replay_buffer=client(rb),
        ...     trajs_per_batch=1,
        ... )  # doctest: +SKIP
        >>> collector.start()  # doctest: +SKIP
    """
    if not isinstance(replay_buffer, TrajectoryReplayBuffer):
        raise InvalidArgumentError(f"Got a {type(replay_buffer).__name__}; a client needs a TrajectoryReplayBuffer.")
    check_ray()
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        raise InvalidArgumentError(
            "Ray is not initialized in this process. Call ray.init(address='auto') first, or ray.init() for this "
            "machine alone."
        )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote  # its types know no strategy of this kind
    make = remote(num_cpus=0, scheduling_strategy=here)(RemoteWriter)
    actor = make.remote(replay_buffer.handle)
    ray.get(actor.write_count.remote())  # raises if it can't attach
    return BufferClient(actor)


class BufferClient:
    """A client of a buffer of another process, for collectors on other machines. It can be pickled.

    Args:
        actor: the actor that writes to the buffer.
        number: which client it is: unfinished trajectories of different ones are kept apart.
    """

    service_backend = "ray"
    """What TorchRL asks for: how the buffer is reached."""

    dim_extend = 0
    batch_size = None

    def __init__(self, actor: Any, number: int = 0) -> None:
        self._actor = actor
        self._number = number

    def client(self) -> BufferClient:
        """Return another client."""
        return self.clients(1)[0]

    def clients(self, num_clients: int) -> list[BufferClient]:
        """Return clients for so many collectors, one for each."""
        import ray

        first: int = ray.get(self._actor.new_clients.remote(num_clients))
        return [BufferClient(self._actor, first + number) for number in range(num_clients)]

    def extend(self, data: TensorDictBase) -> torch.Tensor:
        """Write steps as :meth:`TrajectoryReplayBuffer.extend` does, and return its index."""
        import ray

        index: torch.Tensor = torch.from_numpy(ray.get(self._actor.extend.remote(self._number, _packed(data))).copy())
        return index

    def add(self, data: TensorDictBase) -> torch.Tensor:
        """Write one step, ``[]``."""
        return self.extend(data.unsqueeze(0))[0]

    @property
    def write_count(self) -> int:
        """The number of steps that were written to the buffer."""
        import ray

        count: int = ray.get(self._actor.write_count.remote())
        return count

    def __len__(self) -> int:
        import ray

        length: int = ray.get(self._actor.length.remote())
        return length

    def stats(self) -> dict[str, Any]:
        """Return the statistics of the buffer."""
        import ray

        stats: dict[str, Any] = ray.get(self._actor.stats.remote())
        return stats

    def sample(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to sample.

        Raises:
            UnsupportedOperationError: always.
        """
        raise UnsupportedOperationError(
            "A client of a buffer only writes, so that no sample crosses the network. Sample the buffer itself, in the "
            "process that made it or in one that attaches to it."
        )

    def close(self) -> None:
        """End the actor. The buffer stays."""
        import ray

        ray.kill(self._actor)

    shutdown = close


class RemoteWriter:
    """The actor that writes to a buffer of another process on its machine.

    Args:
        handle: the handle of the buffer.
    """

    def __init__(self, handle: str) -> None:
        self._handle = handle
        self._buffers: dict[int, TrajectoryReplayBuffer] = {0: TrajectoryReplayBuffer.attach(handle)}
        self._clients = 1

    def new_clients(self, count: int) -> int:
        """Return the first of so many new numbers of clients."""
        first, self._clients = self._clients, self._clients + count
        return first

    def extend(self, number: int, packed: dict[str, Any]) -> Any:
        """Write the steps of a client, and return the index as an array."""
        if number not in self._buffers:  # its own writer, which holds what is unfinished
            self._buffers[number] = TrajectoryReplayBuffer.attach(self._handle)
        return as_array(self._buffers[number].extend(_unpacked(packed)))

    def write_count(self) -> int:
        """Return the number of steps that were written to the buffer."""
        return self._buffers[0].write_count

    def length(self) -> int:
        """Return what ``len`` of the buffer does."""
        return len(self._buffers[0])

    def stats(self) -> dict[str, Any]:
        """Return the statistics of the buffer."""
        return self._buffers[0].stats()


def _packed(data: TensorDictBase) -> dict[str, Any]:
    """Return steps as arrays, strings and bytes: Ray copies a TensorDict, and sends arrays without a copy."""
    arrays, texts, ragged = {}, {}, {}
    shape = tuple(data.batch_size)
    for key, value in data.items(True, True, is_leaf_nontensor):
        if isinstance(value, torch.Tensor) and not value.is_nested:
            arrays[key] = as_array(value.detach().cpu().contiguous()), value.dtype
            continue
        strings = None if isinstance(value, torch.Tensor) else text_array(value)
        if strings is not None:
            texts[key] = strings.tolist()
            continue
        values = value if isinstance(value, torch.Tensor) else items_of(value)
        if values is None:
            raise SchemaMismatchError(
                f"Got {key!r}, which is neither a tensor, text nor ragged values. Exclude it with a transform."
            )
        leaf = ragged_leaf(key if isinstance(key, tuple) else (key,), values, shape)
        ragged[key] = leaf.blobs.array.tolist(), leaf.element, leaf.dtype
    return {"shape": shape, "arrays": arrays, "texts": texts, "ragged": ragged}


def _unpacked(packed: dict[str, Any]) -> TensorDict:
    data = TensorDict(batch_size=packed["shape"])
    for key, (array, dtype) in packed["arrays"].items():
        # A copy: torch would write through to the object in Ray's store, which others may read.
        data.set(key, as_tensor(array.copy(), dtype))
    for key, strings in packed["texts"].items():
        data.set(key, as_non_tensor(strings))
    for key, (blobs, element, dtype) in packed["ragged"].items():
        data.set_non_tensor(key, _tensors(blobs, element, dtype))
    return data


def _tensors(blobs: Any, element: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Return the values of ragged steps, tensors in as many lists as their bytes are in."""
    if isinstance(blobs, list):
        return [_tensors(part, element, dtype) for part in blobs]
    return padded_values(Blobs.of([blobs]), element, dtype)[0]
