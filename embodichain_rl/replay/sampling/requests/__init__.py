"""What a chunk is: at which offsets of a trajectory it may begin, how long it is, and which keys are copied.

Imports the random numbers of ``sampling``, ``storage`` and the rooms below; knows nothing of draws. Begin with
``chunk_requests.py``; requests of windows, a step and the steps around it, are in ``window_requests.py``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
