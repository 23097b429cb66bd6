"""Collectors that stand where TorchRL expects its own."""

from embodichain_rl.collectors.gymnasium_collector import GymnasiumCollector

__all__ = ["GymnasiumCollector"]
