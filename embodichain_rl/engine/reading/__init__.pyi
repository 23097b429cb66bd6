# What lazy_loader reads: each name, and the module that it is loaded from.

from .attaching import (
    EngineManifest as EngineManifest,
)
from .attaching import (
    find_engines as find_engines,
)
from .attaching import (
    watch_engine as watch_engine,
)
from .chunks import (
    POLL_INTERVAL as POLL_INTERVAL,
)
from .reader import (
    EngineReader as EngineReader,
)
from .reader import (
    condition_of as condition_of,
)

__all__ = [
    "POLL_INTERVAL",
    "EngineManifest",
    "EngineReader",
    "condition_of",
    "find_engines",
    "watch_engine",
]
