"""The paths below ``embodichain.data_pipeline``."""
