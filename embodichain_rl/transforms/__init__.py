"""Transforms of what a buffer hands out: other layouts, text instead of ids, goals in hindsight, normalization, image
augmentation.

Not imported by :mod:`embodichain_rl` itself, since TorchRL's transforms bring its environments along.
"""

from embodichain_rl.transforms.color_jitter import RandomColorJitter
from embodichain_rl.transforms.embodichain_layout import EmbodiChainLayout
from embodichain_rl.transforms.hindsight import HindsightRelabel
from embodichain_rl.transforms.jagged import JaggedBatches, jagged
from embodichain_rl.transforms.layouts import FlatChunks, ResolveText
from embodichain_rl.transforms.normalize import Normalize
from embodichain_rl.transforms.random_shift import RandomShift

__all__ = [
    "EmbodiChainLayout",
    "FlatChunks",
    "HindsightRelabel",
    "JaggedBatches",
    "Normalize",
    "RandomColorJitter",
    "RandomShift",
    "ResolveText",
    "jagged",
]
