"""``embodichain.data_pipeline.datasets.sequence``."""

from embodichain_rl.errors import DataUnavailableError

__all__ = ["DataUnavailableError"]
