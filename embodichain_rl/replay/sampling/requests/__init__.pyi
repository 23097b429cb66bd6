# What lazy_loader reads: each name, and the module that it is loaded from.

from .chunk_requests import (
    ChunkRequest as ChunkRequest,
)
from .chunk_requests import (
    PaddedRequest as PaddedRequest,
)
from .options import (
    RequestOptions as RequestOptions,
)
from .window_requests import (
    WindowRequest as WindowRequest,
)
from .windows import (
    TOLERANCE as TOLERANCE,
)
from .windows import (
    TimedWindows as TimedWindows,
)
from .windows import (
    Windows as Windows,
)
from .windows import (
    checked_delta_timestamps as checked_delta_timestamps,
)
from .windows import (
    checked_windows as checked_windows,
)

__all__ = [
    "TOLERANCE",
    "ChunkRequest",
    "PaddedRequest",
    "RequestOptions",
    "TimedWindows",
    "WindowRequest",
    "Windows",
    "checked_delta_timestamps",
    "checked_windows",
]
