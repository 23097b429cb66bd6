"""A drop-in replacement for TorchRL's one-process collector that steps Gymnasium environments faster.

This package imports ``replay`` and does not depend on engines or datasets. Read ``gymnasium_collector.py`` first.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
