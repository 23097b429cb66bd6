"""The hot path of sampling: draw, look up rows, copy chunks, build the index, check the ids again, in one call.

There are two versions of equal results: one compiled from ``kernels.c``, and one in NumPy (``twin.py``). They are pure
functions of arrays, of which ``plans.py`` describes the layout. This room imports ``ledger`` and ``schema``. Begin with
``kernels.c``, which explains why what it reads is never torn.
"""

from embodichain_rl.replay.kernels.blocks import BlockLayout, Spec
from embodichain_rl.replay.kernels.first_numbers import FIRST_NUMBERS
from embodichain_rl.replay.kernels.native import TWIN, Kernels, compiled, kernels
from embodichain_rl.replay.kernels.plans import EMPTY, Column, Draws, PlainChunks, SamplePlan, Targets, keep

__all__ = [
    "EMPTY",
    "FIRST_NUMBERS",
    "TWIN",
    "BlockLayout",
    "Column",
    "Draws",
    "Kernels",
    "PlainChunks",
    "SamplePlan",
    "Spec",
    "Targets",
    "compiled",
    "keep",
    "kernels",
]
