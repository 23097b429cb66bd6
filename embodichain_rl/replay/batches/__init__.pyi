# What lazy_loader reads: each name, and the module that it is loaded from.

from .chunks import (
    BufferChunks as BufferChunks,
)
from .drawing import (
    DrawingBuffer as DrawingBuffer,
)
from .prefetching import (
    PrefetchingBuffer as PrefetchingBuffer,
)
from .priorities import (
    priorities_in as priorities_in,
)
from .transformed import (
    Collate as Collate,
)

__all__ = [
    "BufferChunks",
    "Collate",
    "DrawingBuffer",
    "PrefetchingBuffer",
    "priorities_in",
]
