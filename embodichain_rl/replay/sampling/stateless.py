"""What TorchRL expects of every sampler, for one that has nothing to save."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torchrl.data.replay_buffers.samplers import Sampler

from embodichain_rl._checks import keywords_of, refuse_other_keywords

__all__ = ["StatelessSampler"]


class _TakesReplacement(type(Sampler)):  # type: ignore[misc]
    """Passes ``replacement`` to the constructor, which its metaclass in TorchRL consumes; refuses unknown keywords."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        constructor = cls.__init__  # type: ignore[misc]
        parameters = inspect.signature(constructor).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            refuse_other_keywords(cls.__name__, kwargs, keywords_of(constructor))
        return type.__call__(cls, *args, **kwargs)


class StatelessSampler(Sampler, metaclass=_TakesReplacement):
    """A TorchRL sampler whose draws depend only on the generator and on what the buffer holds."""

    def _empty(self) -> None:
        """Do nothing: what can be drawn is in the ledger."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: draws depend only on the generator and on what the buffer holds."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: see :meth:`state_dict`."""

    def dumps(self, path: str | Path) -> None:
        """Do nothing: see :meth:`state_dict`."""

    def loads(self, path: str | Path) -> None:
        """Do nothing: see :meth:`state_dict`."""
