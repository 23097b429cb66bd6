"""Labels of steps that say who acted: an expert, a policy, or chance."""

from __future__ import annotations

from tensordict import NonTensorData, TensorDictBase

__all__ = ["SOURCE_KEY", "with_source"]

SOURCE_KEY = ("collector", "source")
"""The key of the label, a text of each step."""


def with_source(steps: TensorDictBase, source: str) -> TensorDictBase:
    """Return steps that say who acted, unless they say it already.

    Args:
        steps: of any batch size.
        source: such as ``"expert"``.
    """
    if steps.get(SOURCE_KEY, None) is not None:
        return steps
    return steps.copy().set(SOURCE_KEY, NonTensorData(source, batch_size=steps.batch_size))
