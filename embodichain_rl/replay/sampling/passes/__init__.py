"""Draws without replacement: every chunk once, in random order, shared by several processes, saved and resumed.

Imports ``draws`` and ``requests``. Begin with ``one_pass.py``; how a pass is ordered and dealt out to processes is in
``dealing.py``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
