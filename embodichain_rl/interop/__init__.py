"""Data in and out of other libraries: LeRobot, Minari, EmbodiChain.

Each library is optional, and is imported by the function that needs it. So ``import embodichain_rl.interop`` loads none
of them. This room is above ``engine`` and imports whatever it needs below; no other room imports it. Each library has
a module or a package of its own, and these do not import each other: ``from embodichain_rl.interop import lerobot``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
