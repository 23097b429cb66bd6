"""Reads of what a storage holds: whole trajectories, single steps, columns; each as it was written, or not at all.

Imports what is below ``storage``. Begin with ``whole_reads.py``; the rest says what an index of a user stands for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
