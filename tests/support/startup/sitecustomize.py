"""What each interpreter that the tests start does before anything else, as its ``PYTHONPATH`` has this folder.

Importing torch and TorchRL creates half a million objects that live as long as the process. By default, Python looks
for garbage among them after every 700 new ones, and again several times when it exits: together a third of the
processor time of a process that does little else.
"""

import gc
import sys
from types import FrameType


def keep_what_imports_make(phase: str, _: dict[str, int]) -> None:
    """Take what there is out of the search for garbage, if a module is being imported."""
    if phase == "start":
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
            frame = frame.f_back
        if frame is not None:
            gc.freeze()


gc.set_threshold(50_000)
gc.callbacks.append(keep_what_imports_make)
