"""Which trajectories are drawn, and how likely each is: uniformly, by weights, by group, by a label of their steps.

Imports ``requests``, ``weights.py`` and what is below them. Begin with ``trajectory_draws.py``: it has the uniform
draws and what all draws share.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
