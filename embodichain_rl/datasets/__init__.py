"""Datasets over live trajectories for PyTorch's ``DataLoader``, and how long their chunks are.

Imports ``replay``; knows nothing of engines and collectors. Begin with ``online_data.py``; ``transport.py`` is how a
batch leaves a ``DataLoader`` worker.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
