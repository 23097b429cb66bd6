"""Figures that are written to one of TorchRL's loggers every so many seconds, on a thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from embodichain_rl._checks import checked_float
from embodichain_rl.errors import InvalidArgumentError

__all__ = ["StatsLog", "scalars"]

LOGGER = logging.getLogger("embodichain_rl.replay")

NO_SCALARS = ("histograms", "draws_by_place_and_age", "processes")
"""What is left out: loggers take numbers, and processes come and go."""


def scalars(stats: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in ``stats()``, those of nested dicts and of workers with a path such as ``workers/0/steps``.

    Args:
        stats: of a buffer or an engine.
        prefix: what the names begin with.

    Example:
        >>> dict(scalars({"fill": 0.5, "sampled": {"age_max": None, "age_mean": 2.0}}, "buffer/"))
        {'buffer/fill': 0.5, 'buffer/sampled/age_mean': 2.0}
    """
    for name, value in stats.items():
        if name in NO_SCALARS:
            continue
        if isinstance(value, Mapping):
            yield from scalars({str(key): nested for key, nested in value.items()}, f"{prefix}{name}/")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield from scalars({str(index): nested for index, nested in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


class StatsLog:
    """A thread that writes figures to a logger, until :meth:`close`, or until what is read has ended.

    Args:
        read: returns the figures; None: there are no more, and the thread ends.
        logger: a logger of TorchRL, such as ``CSVLogger`` or ``TensorboardLogger``: has ``log_scalar``.
        every: seconds between two times.
        prefix: what the names begin with.
    """

    def __init__(
        self, read: Callable[[], Mapping[str, Any] | None], logger: Any, every: float, prefix: str = ""
    ) -> None:
        if not callable(getattr(logger, "log_scalar", None)):
            raise InvalidArgumentError(
                f"Got logger={logger!r}; it must be one of torchrl.record.loggers, or have their log_scalar(name, "
                "value, step=...)."
            )
        self._every = checked_float("every", every, minimum=0.01)
        self._read, self._logger, self._prefix = read, logger, prefix
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="embodichain-rl-log", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._closing.wait(self._every):
                if not self.log():
                    return
        except Exception:
            LOGGER.exception("The figures could not be logged, and are not any more")

    def log(self) -> bool:
        """Write the figures of this moment; return whether there were any."""
        stats = self._read()
        if stats is None:
            return False
        step = int(stats.get("inserted_steps", 0))
        for name, value in scalars(stats, self._prefix):
            self._logger.log_scalar(name, value, step=step)
        return True

    def close(self) -> None:
        """Write the figures once more, and end the thread."""
        if self._closing.is_set():
            return
        self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self.log()

    def __enter__(self) -> StatsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
