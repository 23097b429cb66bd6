"""Transforms of what a buffer hands out: other layouts, text instead of ids, goals in hindsight, normalization.

Not imported by :mod:`embodichain_rl` itself, since TorchRL's transforms bring its environments along.
"""

from embodichain_rl.transforms.embodichain_layout import EmbodiChainLayout
from embodichain_rl.transforms.hindsight import HindsightRelabel
from embodichain_rl.transforms.jagged import JaggedBatches, jagged
from embodichain_rl.transforms.layouts import FlatChunks, ResolveText
from embodichain_rl.transforms.normalize import Normalize

__all__ = ["EmbodiChainLayout", "FlatChunks", "HindsightRelabel", "JaggedBatches", "Normalize", "ResolveText", "jagged"]
