"""The available policies. Each maps an observation to a chunk of actions."""

from policies.act import ACTPolicy
from policies.base import STATE_KEYS, ChunkPolicy
from policies.diffusion import DiffusionPolicy
from policies.mlp import MLPPolicy

__all__ = ["POLICIES", "STATE_KEYS", "ACTPolicy", "ChunkPolicy", "DiffusionPolicy", "MLPPolicy"]

POLICIES: dict[str, type[ChunkPolicy]] = {"mlp": MLPPolicy, "act": ACTPolicy, "diffusion": DiffusionPolicy}
