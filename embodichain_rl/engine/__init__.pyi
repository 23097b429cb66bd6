# What lazy_loader reads: each name, and the module that it is loaded from.

from .config import (
    OnlineDataEngineCfg as OnlineDataEngineCfg,
)
from .data import (
    OnlineDataEngine as OnlineDataEngine,
)
from .environments import (
    EmbodiChainEnv as EmbodiChainEnv,
)
from .environments import (
    EmbodiChainEnvFactory as EmbodiChainEnvFactory,
)
from .environments import (
    is_embodichain_config as is_embodichain_config,
)
from .state import (
    OnlineDataEngineState as OnlineDataEngineState,
)

__all__ = [
    "EmbodiChainEnv",
    "EmbodiChainEnvFactory",
    "OnlineDataEngine",
    "OnlineDataEngineCfg",
    "OnlineDataEngineState",
    "is_embodichain_config",
]
