"""Transforms to other layouts: flat chunks, and text instead of ids."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs.transforms import Transform

from embodichain_rl._checks import checked_key
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.sampling import mark_starts
from embodichain_rl.replay.schema import MASK, TextTable, resolve_texts

__all__ = ["FlatChunks", "ResolveText"]

DONE, TRUNCATED = ("next", "done"), ("next", "truncated")


class FlatChunks(Transform):
    """Transform of chunks ``[B, L]`` to the flat layout of TorchRL's ``SliceSampler``, ``[B * L]``.

    ``("next", "truncated")`` and ``("next", "done")`` are True at the end of each chunk, so that a value estimator does
    not carry over into the next one: it bootstraps from the value of the next observation there. ``"is_init"`` is True
    at the beginning of each chunk, besides where it is stored as True, so that a recurrent module resets its state.
    ``batch.reshape(-1)`` does none of this: recurrent modules, returns and advantages then run on from the end of a
    chunk into the next one, which is of another trajectory.

    Args:
        init_key: where the first step of each chunk is marked, as with ``SliceSampler(init_key=...)``; None: nowhere.
        pad_output: False: padded steps (of ``ChunkSampler(strict_length=False)`` or ``pad=``) are left out, and
            ``("collector", "mask")`` with them, as by ``SliceSampler``; the end of a chunk is then its last real step.

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

    def __init__(self, init_key: NestedKey | None = "is_init", *, pad_output: bool = True) -> None:
        super().__init__()
        if not isinstance(pad_output, bool):
            raise InvalidArgumentError(f"Got pad_output={pad_output!r}; it must be True or False.")
        self.pad_output = pad_output
        self.init_key = None if init_key is None else checked_key(init_key)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        done = tensordict.get(DONE, None)
        if tensordict.ndim != 2 or done is None:
            raise InvalidArgumentError(
                f"Got a batch of shape {list(tensordict.shape)} with the keys {sorted(map(str, tensordict.keys()))}; "
                "FlatChunks needs chunks [B, L] with ('next', 'done')."
            )
        mask = None if self.pad_output else tensordict.get(MASK, None)
        at_the_end = torch.zeros_like(done)
        if mask is None:
            at_the_end[:, -1] = True
        else:
            last = mask.shape[1] - 1 - mask.flip(1).long().argmax(dim=1)
            at_the_end[torch.arange(len(last), device=last.device), last] = True
        tensordict.set(DONE, done | at_the_end)
        tensordict.set(TRUNCATED, tensordict.get(TRUNCATED, torch.zeros_like(done)) | at_the_end)
        if self.init_key is not None:
            mark_starts(tensordict, self.init_key, mask)
        return tensordict.reshape(-1) if mask is None else tensordict[mask].exclude(MASK)


class ResolveText(Transform):
    """Transform from the ids of text to the text, a ``NonTensorStack`` (``NonTensorData`` for a single id).

    Use it with ``rb.append_transform(...)`` or ``OnlineDataset(transform=...)``, also in the workers of a
    ``DataLoader``. It makes an object for every step. Where one text per chunk is enough,
    ``rb.texts.resolve(batch[key][:, 0])`` is many times faster.

    Args:
        source: the :class:`~embodichain_rl.replay.schema.TextTable` of the ids, or a buffer or storage with one.
        keys: a key of text, or a list of several.

    Raises:
        InvalidArgumentError: when the source has no table of texts, or there are no keys.
        SchemaMismatchError: when a batch has no ids at one of the keys.

    Example:
        >>> from embodichain_rl.transforms import ResolveText
        >>> rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=30_000, chunk_size=2, batch_size=1)
        >>> rb.append_transform(ResolveText(rb, ("trajectory", "task"))) is rb
        True
        >>> steps = TensorDict({"next": {"done": torch.tensor([[0], [1]]).bool()}}, [2])
        >>> _ = rb.extend(steps.set(("trajectory", "task"), ["lift the cube"] * 2))
        >>> rb.sample().get(("trajectory", "task")).tolist()
        [['lift the cube', 'lift the cube']]
    """

    def __init__(self, source: Any, keys: NestedKey | list[NestedKey]) -> None:
        texts = source if isinstance(source, TextTable) else getattr(source, "texts", None)
        if not isinstance(texts, TextTable):
            raise InvalidArgumentError(
                f"Got {source!r}; ResolveText needs a TextTable, or a buffer or storage with one."
            )
        several = [checked_key(key) for key in (keys if isinstance(keys, list) else [keys])]
        if not several:
            raise InvalidArgumentError("Got no keys; ResolveText needs at least one.")
        super().__init__(in_keys=several, out_keys=several)
        self.texts = texts

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for key in self.in_keys:
            ids = tensordict.get(key, None)
            if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int32:
                got = "nothing" if ids is None else getattr(ids, "dtype", type(ids).__name__)
                raise SchemaMismatchError(
                    f"Got a batch with {got} at {key!r}; ResolveText needs the ids of text, torch.int32."
                )
        return resolve_texts(tensordict, self.in_keys, self.texts)
