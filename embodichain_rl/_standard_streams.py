"""Opens ``/dev/null`` in the place of a standard stream that is closed (``2>&-``).

Otherwise the next file that this process opens has the number of that stream, and it may be the memory of a buffer:
what a library in C then prints is written into it.
"""

from __future__ import annotations

import os

__all__: list[str] = []


def _fill() -> None:
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == number:  # the lowest number that is free
                os.set_inheritable(number, True)


_fill()
