"""The TorchRL components: storage, writer, sampler and the replay buffer composed of them.

Knows nothing of engines, datasets, collectors or environments; imports ``shared``. Begin with ``buffer.py``, then
``storage``, ``sampling`` and ``writing``; ``ledger`` is the protocol under all three.
"""

import lazy_loader

import embodichain_rl.replay._former_names  # noqa: F401  # lets pickles of earlier versions load

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
