"""The paths below ``embodichain.agents``."""
