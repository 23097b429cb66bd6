# What lazy_loader reads: each name, and the module that it is loaded from.

from .gymnasium_collector import (
    GymnasiumCollector as GymnasiumCollector,
)

__all__ = [
    "GymnasiumCollector",
]
