"""EmbodiChain's layout of keys, in both directions."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs.transforms import Transform

from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.schema import MASK, Key

__all__ = ["EmbodiChainLayout"]

ENDS = ("terminated", "truncated")

SEGMENTS = ("segment_id", "segment_step", "segment_start", "segment_end", "segment_accepted", "segment_attempt_id")

PER_STEP = ("actions", "rewards", "valid", "episode_step", *SEGMENTS, "continuity_id", *ENDS)
"""The keys of EmbodiChain's layout beside ``obs``."""

NOT_OBSERVED = frozenset(
    [
        *("next", "collector", "trajectory", "index", "priority_weight"),
        *("done", *ENDS, "success", "step_count", "is_init", "reward"),
        *("segment_id", "segment_step", "segment_name", "instruction", "target_uid"),
    ]
)
"""The keys of this library's layout that are no observations."""

PROVENANCE = {"ods_run_id": "run_id", "ods_episode_id": "episode", "ods_generation": "generation"}
"""The keys of EmbodiChain's provenance, and the name of each under ``"trajectory"``."""


class EmbodiChainLayout(Transform):
    """Transform from this library's keys to those of EmbodiChain's Online Data Streaming, and back.

    Forwards, for a chunk ``[L]``, a batch ``[B, L]`` or padded trajectories ``[N, T]``:

    * ``obs`` (a TensorDict) are the observations, ``actions`` the action, ``rewards`` the reward ``[B, L]``;
    * ``valid`` marks real steps; ``terminated`` and ``truncated`` are flags ``[B, L]``;
    * ``episode_step``, ``segment_id``, ``segment_step``, ``segment_start``, ``segment_end``, ``segment_accepted``,
      ``segment_attempt_id`` and ``continuity_id`` ``[B, L]`` annotate each step, with -1 or False where it is padding.
      Without segments, the whole episode is segment 0. ``segment_end`` of the last step of a chunk is only known where
      the episode ends, and is False elsewhere;
    * ``subtask_index`` are the ids of ``"instruction"``, where there is one (``engine.texts.resolve`` returns the
      text); ``ods_run_id``, ``ods_episode_id`` and ``ods_generation`` are there with ``provenance=True``.

    The next observations are left out, as in EmbodiChain. Other keys, such as ``"index"``, stay.

    Backwards (``inv``, which a buffer calls when it is extended), rows ``[N, T]`` or ``[T]`` become the valid steps one
    after the other. A trajectory ends at the last valid step of a row, and where ``continuity_id`` changes; an end that
    is not ``terminated`` is ``truncated``.

    Args:
        action_key: the key of the action.

    Raises:
        InvalidArgumentError: a batch has no ``("next", "done")``; or backwards, no ``obs`` or ``actions``.

    Example:
        >>> from embodichain_rl.transforms import EmbodiChainLayout
        >>> rb = TrajectoryReplayBuffer(max_trajectories=9, max_total_steps=90, chunk_size=2, batch_size=4)
        >>> done = torch.tensor([[0], [0], [1]]).bool()
        >>> steps = {"observation": torch.randn(3, 4), "action": torch.randn(3, 1)}
        >>> _ = rb.extend(TensorDict({**steps, "next": {"done": done, "reward": torch.ones(3, 1)}}, [3]))
        >>> batch = EmbodiChainLayout()(rb.sample())
        >>> batch["obs", "observation"].shape, batch["rewards"].shape, batch["valid"].all().item()
        (torch.Size([4, 2, 4]), torch.Size([4, 2]), True)
    """

    def __init__(self, action_key: str = "action") -> None:
        super().__init__()
        self.action_key = action_key

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        following = tensordict.get("next", None)
        if following is None or "done" not in following:
            raise InvalidArgumentError(
                f"Got a batch with the keys {sorted(map(str, tensordict.keys()))}; EmbodiChain's layout needs chunks "
                "with ('next', 'done')."
            )
        shape = tensordict.shape
        valid = tensordict.get(MASK, None)
        if valid is None:
            valid = torch.ones(shape, dtype=torch.bool, device=following["done"].device)
        flags = {name: _flag(following, name, shape) for name in ("done", *ENDS)}
        flags["terminated"] = flags["terminated"] if "terminated" in following else flags["done"] & ~flags["truncated"]
        others = [key for key in list(tensordict.keys()) if key not in NOT_OBSERVED and key != self.action_key]
        # Without next observations, what is no annotation is an observation.
        observed = [key for key in others if key in following] or others
        result = TensorDict({"obs": tensordict.select(*observed)}, shape)
        if self.action_key in tensordict:
            result["actions"] = tensordict[self.action_key]
        if "reward" in following:
            result["rewards"] = following["reward"].reshape(shape)
        result["valid"] = valid
        for name in ENDS:
            result[name] = flags[name] & valid
        self._annotate(result, tensordict, flags["done"], valid)
        dropped = {"next", self.action_key, "collector", "done", *ENDS, "success", *observed, *result.keys()}
        for key in list(tensordict.keys()):
            if key not in dropped:
                result[key] = tensordict.get(key)
        return result

    @staticmethod
    def _annotate(result: TensorDict, batch: TensorDictBase, done: torch.Tensor, valid: torch.Tensor) -> None:
        step = batch.get(("trajectory", "step"), None)
        if step is None:
            step = torch.arange(batch.shape[-1], device=valid.device).expand(batch.shape)
        segment_id = batch.get("segment_id", torch.zeros_like(step))
        segment_step = batch.get("segment_step", step)
        end = done.clone()
        end[..., :-1] |= (segment_id[..., 1:] != segment_id[..., :-1]) | ~valid[..., 1:]
        numbers = {"episode_step": step, "segment_id": segment_id, "segment_step": segment_step}
        for name in ("segment_attempt_id", "continuity_id"):
            numbers[name] = torch.zeros_like(step)
        for name, value in numbers.items():
            result[name] = torch.where(valid, value, -1)
        result["segment_start"] = (segment_step == 0) & valid
        result["segment_end"] = end & valid
        result["segment_accepted"] = valid.clone()
        if isinstance(batch.get("instruction", None), torch.Tensor):
            result["subtask_index"] = torch.where(valid, batch["instruction"].long(), -1)
        for name, key in PROVENANCE.items():
            value = batch.get(("trajectory", key), None)
            if value is not None:
                result[name] = torch.where(valid, value, -1)

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        missing = [key for key in ("obs", "actions") if key not in tensordict]
        if missing or not tensordict.ndim:
            raise InvalidArgumentError(
                f"Got data of shape {list(tensordict.shape)} without {missing}; needed are rows [N, T] or [T] in "
                "EmbodiChain's layout."
            )
        rows = tensordict if tensordict.ndim == 2 else tensordict.unsqueeze(0)
        valid = rows["valid"] if "valid" in rows else torch.ones(rows.shape, dtype=torch.bool)
        if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
            raise SchemaMismatchError("Got rows whose valid steps are not at their beginning; they would be stitched.")
        last = valid.clone()
        last[:, :-1] &= ~valid[:, 1:]
        continuity = rows.get("continuity_id", None)
        if continuity is not None:
            last[:, :-1] |= valid[:, :-1] & (continuity[:, 1:] != continuity[:, :-1])
        flags: dict[str, Any] = {name: rows.get(name, torch.zeros_like(valid)) for name in ENDS}
        flags["truncated"] = flags["truncated"] | (last & ~flags["terminated"])
        flags["done"] = flags["terminated"] | flags["truncated"]
        following = {name: flag.unsqueeze(-1)[valid] for name, flag in flags.items()}
        if "rewards" in rows:
            following["reward"] = rows["rewards"].unsqueeze(-1)[valid]
        steps = {key: rows["obs"].get(key)[valid] for key in list(rows["obs"].keys())}
        steps[self.action_key] = rows["actions"][valid]
        ours = (*PER_STEP, "obs", "subtask_index", "task_index", *PROVENANCE, "trajectory", "index")
        kept = [key for key in list(rows.keys()) if key not in ours and not str(key).startswith("ods_")]
        for key in ("segment_id", "segment_step", *kept):
            if key in rows:
                steps[key] = rows.get(key)[valid]
        return TensorDict({**steps, "next": TensorDict(following, [int(valid.sum())])}, [int(valid.sum())])


def _flag(following: TensorDictBase, name: Key | str, shape: torch.Size) -> torch.Tensor:
    """Return a flag of each step, without its last dimension of size 1; False where there is none."""
    value = following.get(name, None)
    return torch.zeros(shape, dtype=torch.bool) if value is None else value.reshape(shape)
