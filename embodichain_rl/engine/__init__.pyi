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
from .embodichain_env import (
    EmbodiChainEnv as EmbodiChainEnv,
)
from .embodichain_env import (
    EmbodiChainEnvFactory as EmbodiChainEnvFactory,
)
from .embodichain_env import (
    is_embodichain_config as is_embodichain_config,
)

__all__ = [
    "EmbodiChainEnv",
    "EmbodiChainEnvFactory",
    "OnlineDataEngine",
    "OnlineDataEngineCfg",
    "OnlineDataEngineState",
    "is_embodichain_config",
]
