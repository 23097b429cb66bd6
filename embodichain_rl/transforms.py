"""Transforms of what a buffer hands out, for code that expects another layout.

Not imported by :mod:`embodichain_rl` itself, since TorchRL's transforms bring its environments along.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torchrl.envs.transforms import Transform

from embodichain_rl.errors import InvalidArgumentError

__all__ = ["FlatChunks"]

DONE, TRUNCATED = ("next", "done"), ("next", "truncated")


class FlatChunks(Transform):
    """Turns a batch of chunks ``[B, L]`` into the flat layout of TorchRL's ``SliceSampler``, ``[B * L]``.

    At the end of each chunk ``("next", "truncated")`` and ``("next", "done")`` are True, so that nothing is carried
    over into the next one: a value estimator bootstraps from the value of the next observation there. At the beginning
    of each chunk ``"is_init"`` is True, so that a recurrent module starts anew.

    Raises:
        InvalidArgumentError: by a sample that is not ``[B, L]``, such as one of windows, or without
            ``("next", "done")``.

    Example:
        >>> from embodichain_rl.transforms import FlatChunks
        >>> rb = TrajectoryReplayBuffer(
        ...     max_trajectories=100, max_total_steps=30_000, chunk_size=2, batch_size=8, transform=FlatChunks()
        ... )
        >>> done = torch.tensor([[0], [0], [1]]).bool()
        >>> _ = rb.extend(TensorDict({"observation": torch.randn(3, 4), "next": {"done": done}}, [3]))
        >>> batch = rb.sample()
        >>> batch.shape, batch["next", "truncated"][:4, 0]
        (torch.Size([16]), tensor([False,  True, False,  True]))
    """

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        done = tensordict.get(DONE, None)
        if tensordict.ndim != 2 or done is None:
            raise InvalidArgumentError(
                f"Got a batch of shape {list(tensordict.shape)} with the keys {sorted(map(str, tensordict.keys()))}; "
                "FlatChunks needs chunks [B, L] with ('next', 'done')."
            )
        at_the_end = torch.zeros_like(done)
        at_the_end[:, -1] = True
        at_the_start = torch.zeros_like(done)
        at_the_start[:, 0] = True
        tensordict.set(DONE, done | at_the_end)
        tensordict.set(TRUNCATED, tensordict.get(TRUNCATED, torch.zeros_like(done)) | at_the_end)
        tensordict.set("is_init", at_the_start)
        return tensordict.reshape(-1)
