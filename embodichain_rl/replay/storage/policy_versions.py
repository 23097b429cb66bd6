"""The policy version of a step: where it is stored, and its value. Pure functions."""

from __future__ import annotations

import numpy as np
import torch

from embodichain_rl.replay.ledger import NO_VERSION
from embodichain_rl.replay.schema import Schema

__all__ = ["POLICY_VERSION_KEY", "version_field", "version_of"]

POLICY_VERSION_KEY = ("policy_version",)
"""Where TorchRL's collectors write how often the policy was updated."""


def version_field(schema: Schema) -> int | None:
    """Return the number of the field that holds the policy version of a step; None without a numeric one."""
    number = schema.number_of(POLICY_VERSION_KEY)
    if number is None:
        return None
    field = schema.fields[number]
    is_number = not field.is_text and not field.dtype.is_complex and field.dtype not in (torch.bool, torch.bfloat16)
    return number if is_number and torch.Size(field.shape).numel() else None


def version_of(value: np.ndarray) -> int:
    """Return the policy version in the value of a step; ``NO_VERSION`` for one that is negative or not finite."""
    version = value.reshape(-1)[0].item()
    return int(version) if 0 <= version < 2**62 else NO_VERSION
