"""``embodichain.agents.engine``."""

from embodichain_rl.engine import OnlineDataEngine, OnlineDataEngineCfg, OnlineDataEngineState
from embodichain_rl.errors import RemoteError as OnlineDataWorkerError

__all__ = ["OnlineDataEngine", "OnlineDataEngineCfg", "OnlineDataEngineState", "OnlineDataWorkerError"]
