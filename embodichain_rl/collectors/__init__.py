"""Collectors that stand where TorchRL expects its own.

Imports ``replay``; knows nothing of engines and datasets. Begin with ``gymnasium_collector.py``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
