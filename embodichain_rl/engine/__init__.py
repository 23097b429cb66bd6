"""The engine, which owns the simulators: supervised worker processes, environments and demonstrations.

This package imports ``datasets``, ``collectors`` and ``replay``. It loads no simulator before a worker needs one. Read
``data.py`` first: it starts, samples and stops an engine.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
