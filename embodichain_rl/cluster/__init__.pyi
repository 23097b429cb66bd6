# What lazy_loader reads: each name, and the module that it is loaded from.

from .config import (
    RayCluster as RayCluster,
)
from .torchrl_client import (
    client as client,
)

__all__ = ["RayCluster", "client"]
