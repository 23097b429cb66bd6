"""What is drawn, and how likely: requests, weights, draws, and the sampler that combines them.

Imports ``storage`` and the rooms below it; knows nothing of writing. Begin with ``chunk_sampler.py``: a *request*
(room ``requests``) defines which offsets may be drawn, *draws* (room ``draws``; without replacement, ``passes``) choose
the trajectories, the sampler copies and checks.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
