"""The engine that owns the simulators: workers as supervised processes, environments, demonstrations.

Imports ``datasets``, ``collectors`` and ``replay``; loads no simulator before a worker needs one. Begin with
``data.py``: start, sample, stop.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
