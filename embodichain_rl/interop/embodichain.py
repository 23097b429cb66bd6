"""EmbodiChain: its environments and configurations as those of an engine, and its layout of keys.

An engine takes a configuration of EmbodiChain as ``gym_config``, and makes these by itself::

    engine = OnlineDataEngine(OnlineDataEngineCfg(gym_config="simple_task_ur10.json"))

``EmbodiChainEnv`` wraps an environment that you make yourself, for ``env_factory``. ``EmbodiChainLayout`` transforms
batches to EmbodiChain's keys and back. ``embodichain_rl.compat`` has its import paths.
"""

from embodichain_rl.engine import EmbodiChainEnv, EmbodiChainEnvFactory, is_embodichain_config
from embodichain_rl.transforms import EmbodiChainLayout

__all__ = ["EmbodiChainEnv", "EmbodiChainEnvFactory", "EmbodiChainLayout", "is_embodichain_config"]
