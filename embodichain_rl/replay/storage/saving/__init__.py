"""The state of a storage, as ``state_dict`` returns it and as a checkpoint keeps it in a directory.

Imports ``reads``, ``policy_versions.py`` and what is below ``storage``. Begin with ``checkpoint.py``; what is written,
and how it is checked before it is loaded, is in ``state.py``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
