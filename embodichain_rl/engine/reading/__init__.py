"""What every process can do with an engine: draw chunks, check its health, read statistics, attach from outside.

Imports ``state``. The names are loaded when they are used, so that a ``DataLoader`` worker, which needs ``chunks.py``
alone, loads no TorchRL. Begin with ``reader.py``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
