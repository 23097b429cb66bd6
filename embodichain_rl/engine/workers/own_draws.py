"""Random numbers of a thread's own, for producers that run in the user's process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

__all__ = ["OwnDraws"]

_DRAWS = frozenset(
    {
        *(torch.rand, torch.randn, torch.randint, torch.randperm),
        *(torch.rand_like, torch.randn_like, torch.randint_like),
        *(torch.normal, torch.bernoulli, torch.multinomial, torch.poisson, torch.binomial),
        *(torch._standard_gamma, torch._sample_dirichlet),
        *(torch.Tensor.bernoulli, torch.Tensor.multinomial),
        *(torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.random_, torch.Tensor.bernoulli_),
        *(torch.Tensor.exponential_, torch.Tensor.geometric_, torch.Tensor.cauchy_, torch.Tensor.log_normal_),
        *(init.uniform_, init.normal_, init.trunc_normal_, init.sparse_, init.orthogonal_),
        *(init.xavier_uniform_, init.xavier_normal_, init.kaiming_uniform_, init.kaiming_normal_),
    }
)
"""The functions of torch that draw random numbers and take a ``generator``."""


class OwnDraws(TorchFunctionMode):
    """Let the random functions of torch that are called in a block, in this thread, draw from a generator of its own.

    torch's global generator belongs to the whole process: seeding it would change the user's draws, and draws of the
    user's would change those of the block. So neither is done. Functions that take no generator, such as ``dropout``
    and ``gumbel_softmax``, still draw from the global one; so do tensors on another device than the CPU.

    Args:
        seed: of the generator.

    Example:
        >>> with OwnDraws(0):
        ...     first = torch.rand(3)
        >>> with OwnDraws(0):
        ...     second = torch.rand(3)
        >>> torch.equal(first, second)
        True
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if kwargs is None:
            kwargs = {}
        if func in _DRAWS and kwargs.get("generator") is None and _is_on_cpu(args, kwargs):
            kwargs = {**kwargs, "generator": self._generator}
        return func(*args, **kwargs)


def _is_on_cpu(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a random function draws on the CPU."""
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type == "cpu"
    if args and isinstance(args[0], torch.Tensor):
        return args[0].device.type == "cpu"
    return torch.get_default_device().type == "cpu"
