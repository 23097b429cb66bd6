# What lazy_loader reads: each name, and the module that it is loaded from.

from .config import (
    RayCluster as RayCluster,
)

__all__ = ["RayCluster"]
