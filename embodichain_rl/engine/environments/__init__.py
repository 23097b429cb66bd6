"""TorchRL environments and policies, made from the user's configuration, identically in every process.

Imports no other room of the engine. Begin with ``envs.py``. ``embodichain_env.py`` is for configurations of
EmbodiChain.
"""

from embodichain_rl.engine.environments.embodichain_env import (
    EmbodiChainEnv,
    EmbodiChainEnvFactory,
    embodichain_factory,
    is_embodichain_config,
)
from embodichain_rl.engine.environments.envs import SUCCESS_INFO_KEYS, EnvMaker, GymConfig, Transforms
from embodichain_rl.engine.environments.policies import DEMO, CallablePolicy, Policy, checked_action, make_policy

__all__ = [
    "DEMO",
    "SUCCESS_INFO_KEYS",
    "CallablePolicy",
    "EmbodiChainEnv",
    "EmbodiChainEnvFactory",
    "EnvMaker",
    "GymConfig",
    "Policy",
    "Transforms",
    "checked_action",
    "embodichain_factory",
    "is_embodichain_config",
    "make_policy",
]
