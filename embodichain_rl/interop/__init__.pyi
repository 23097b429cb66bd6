# What lazy_loader reads: the modules that are loaded when they are first used.

from . import embodichain as embodichain
from . import lerobot as lerobot
from . import minari as minari

__all__ = ["embodichain", "lerobot", "minari"]
