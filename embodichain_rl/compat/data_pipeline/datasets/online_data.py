"""``embodichain.data_pipeline.datasets.online_data``."""

from embodichain_rl.datasets import OnlineDataset

__all__ = ["OnlineDataset"]
