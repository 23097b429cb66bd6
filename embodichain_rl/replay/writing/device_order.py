"""Whether next observations on a device are the observations that follow, so that they can be stored once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from embodichain_rl.replay.device import Batch
from embodichain_rl.replay.schema import Schema, Shifted, unshifted_error

__all__ = ["refuse_unshifted_on_device"]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def refuse_unshifted_on_device(
    schema: Schema,
    shifted: Shifted,
    values: Sequence[torch.Tensor],
    inside: np.ndarray,
    before: Sequence[tuple[Batch, np.ndarray, np.ndarray, np.ndarray]],
) -> None:
    """Refuse steps whose shifted fields are not bitwise equal to the fields of the step after.

    The values are compared on the device; one number comes to the host.

    Args:
        schema: the fields.
        shifted: which of them are shifted.
        values: one tensor ``[B, T, *shape]`` per field.
        inside: ``bool`` ``[B, T - 1]``: whether a step and the one behind it are of one trajectory.
        before: earlier steps that some of these go on with: a batch, the rows in it of the last steps, and the row and
            the step of ``values`` that follows each, ``int64`` ``[n]``.

    Raises:
        SchemaMismatchError: names the key.
    """
    if not shifted:
        return
    device = values[0].device
    judged = torch.from_numpy(inside).to(device)
    differing = []
    for number, of in shifted.items():
        after, root = values[number], values[of]
        differing.append((_differ(after[:, :-1], root[:, 1:], dims=2) & judged).any())
        for batch, last, rows, steps in before:
            at = [torch.from_numpy(places).to(device) for places in (last, rows, steps)]
            earlier = batch.values[number].index_select(0, at[0])
            differing.append(_differ(earlier, root[at[1], at[2]], dims=1).any())
    found = torch.stack(differing).cpu().numpy().reshape(len(shifted), 1 + len(before))
    for (number, of), somewhere in zip(shifted.items(), found, strict=True):
        if somewhere[0]:
            rows_and_steps = (_differ(values[number][:, :-1], values[of][:, 1:], dims=2) & judged).nonzero()
            row, step = rows_and_steps[0].tolist()
            raise unshifted_error(schema, number, of, f"step {step} of row {row}", f"step {step + 1}")
        if somewhere.any():
            raise unshifted_error(
                schema, number, of, "the last step of an earlier call", "the step that goes on with it"
            )


def _differ(a: torch.Tensor, b: torch.Tensor, *, dims: int) -> torch.Tensor:
    """Return where any byte differs, of the first ``dims`` dimensions. Compared as bytes, a NaN equals itself."""
    if a.dtype.is_complex:
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    integer = INTEGERS[a.dtype.itemsize]
    different = a.view(integer) != b.view(integer)
    return different.reshape(*different.shape[:dims], math.prod(different.shape[dims:])).any(-1)
