# What lazy_loader reads: each name, and the module that it is loaded from.

from .channel_memory import (
    OnlineDataEngineState as OnlineDataEngineState,
)
from .config import (
    OnlineDataEngineCfg as OnlineDataEngineCfg,
)
from .data import (
    OnlineDataEngine as OnlineDataEngine,
)

__all__ = [
    "OnlineDataEngine",
    "OnlineDataEngineCfg",
    "OnlineDataEngineState",
]
