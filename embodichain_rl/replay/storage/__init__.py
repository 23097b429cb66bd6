"""The storage of whole trajectories for TorchRL: memory and ledger together, items, whole reads, checkpoints.

Imports ``host`` and ``device`` and the rooms below them; knows nothing of samplers and writers. Begin with
``storage.py``. What it holds is read by the room ``reads``, and kept in checkpoints by the room ``saving``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
