"""Datasets over live trajectories for PyTorch's ``DataLoader``, and samplers of chunk sizes.

This package imports ``replay`` and does not depend on engines or collectors. Read ``online_data.py`` first.
``transport/`` transfers a batch from a ``DataLoader`` worker to the main process.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
