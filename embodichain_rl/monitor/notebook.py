"""How a batch or a trajectory is shown in a notebook: a small table, and a picture of a chunk of it."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.monitor.figures import plot_trajectory
from embodichain_rl.monitor.trajectories import texts_of

__all__ = ["Shown", "show"]


class Shown:
    """What :func:`show` returns: Jupyter displays it with ``_repr_html_``."""

    def __init__(self, td: TensorDictBase) -> None:
        self._td = td

    def _repr_html_(self) -> str:
        td = self._td
        rows = "".join(_row(key, td.get(key)) for key in td.keys(True, True))
        head = "<tr><th>key</th><th>shape</th><th>dtype</th><th>min</th><th>mean</th><th>max</th></tr>"
        table = f"<table style='font-size:12px;text-align:left'>{head}{rows}</table>"
        chunk = td[0] if td.ndim == 2 and len(td) else td
        texts = "".join(f"<div>{html.escape(k)}: {html.escape(v)}</div>" for k, v in texts_of(chunk).items())
        size = " × ".join(map(str, td.batch_size))
        what = "batch, chunks × steps" if td.ndim == 2 else "steps"
        picture = f"<img alt='the first chunk' style='max-width:100%' src='{_png(chunk)}'/>" if chunk.ndim == 1 else ""
        return f"<div><b>{size}</b> ({what}){texts}<div>{picture}</div>{table}</div>"

    def __repr__(self) -> str:
        return repr(self._td)


def show(td: TensorDictBase) -> Shown:
    """Return a batch or a trajectory as something that Jupyter shows well: its first chunk as a picture, and a table.

    Args:
        td: ``[B, T]`` or ``[T]``.

    Raises:
        InvalidArgumentError: if it is no TensorDict.
        MissingPackageError: when it is shown, without matplotlib.

    Example:
        >>> steps = TensorDict({"action": torch.randn(20, 2)}, [20])
        >>> "20" in show(steps)._repr_html_()
        True
    """
    if not isinstance(td, TensorDictBase):
        raise InvalidArgumentError(f"Got a {type(td).__name__}; it must be a TensorDict, such as rb.sample().")
    return Shown(td)


def _row(key: Any, value: Any) -> str:
    name = html.escape(key if isinstance(key, str) else ".".join(key))
    if not isinstance(value, torch.Tensor) or is_tensor_collection(value):
        return f"<tr><td>{name}</td><td colspan='5'>{html.escape(type(value).__name__)}</td></tr>"
    numbers = ("", "", "")
    if value.numel() and not value.dtype.is_complex:
        real = value.double()
        numbers = (f"{real.min():.4g}", f"{real.mean():.4g}", f"{real.max():.4g}")
    cells = (name, str(list(value.shape)), str(value.dtype).removeprefix("torch."), *numbers)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _png(td: TensorDictBase) -> str:
    target = io.BytesIO()
    plot_trajectory(td).savefig(target, format="png")
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()
