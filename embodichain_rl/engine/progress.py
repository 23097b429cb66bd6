"""The progress of a start: a bar in place on a terminal, a widget in a notebook, a line every ten seconds in a log."""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import TracebackType
from typing import Any

from embodichain_rl._progress import LOG_EVERY, is_in_place, progress_bar
from embodichain_rl._start_method import keeping_start_method
from embodichain_rl.engine.state import DOING, EngineChannel

__all__ = ["StartProgress"]

TITLE = "Filling the buffer"


class StartProgress:
    """Shows how many trajectories there are, and what the workers do meanwhile.

    Args:
        channel: the shared state of the engine.
        total: the number of trajectories that are waited for.
        shown: whether anything is shown.
    """

    def __init__(self, channel: EngineChannel, total: int, *, shown: bool) -> None:
        self._channel, self._total = channel, total
        self._began = self._logged_at = time.monotonic()
        self._bar: Any = None
        self._logs = False
        if not shown or sys.stderr is None:  # it is None if the stream is closed
            return
        self._logs = not is_in_place()
        if not self._logs:
            with keeping_start_method():  # the first bar makes a lock of multiprocessing, which chooses one
                self._bar = progress_bar(total=total, desc=TITLE, unit=" trajectories", dynamic_ncols=True)

    def show(self, filled: int, doing: str | None = None) -> None:
        """Show the state of this moment.

        Args:
            filled: the number of trajectories.
            doing: what is done; None: what the workers do.
        """
        if self._bar is not None:
            text = self.doing() if doing is None else doing
            if text != self._bar.postfix:
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.n = min(filled, self._total)
                self._bar.refresh()
            self._bar.update(min(filled, self._total) - self._bar.n)
        elif self._logs and time.monotonic() - self._logged_at >= LOG_EVERY:
            self._logged_at = time.monotonic()
            self._log(filled, self.doing() if doing is None else doing)

    def doing(self) -> str:
        """Return what the workers do, such as ``"1 importing, 3 building the environment"``."""
        phases = [self._channel.worker(index).phase for index in range(self._channel.num_workers)]
        counts = Counter(phases)
        return ", ".join(f"{counts[phase]} {DOING[phase]}" for phase in sorted(counts))

    def _log(self, filled: int, doing: str) -> None:
        seconds = time.monotonic() - self._began
        print(
            f"{TITLE}: {filled:,} of {self._total:,} trajectories after {seconds:.0f} s; {doing}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> StartProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._logs and error is None:
            self._log(self._total, "filled")
