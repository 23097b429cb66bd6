"""What ``sample()`` of a buffer returns: batches that are drawn without a lock, transformed, and prepared ahead.

Imports ``metrics``, ``sampling`` and the rooms below them; knows nothing of writing. Begin with ``drawing.py``; the
queue of batches that are prepared ahead is in ``prefetching.py``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
