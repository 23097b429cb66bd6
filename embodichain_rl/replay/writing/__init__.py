"""How steps become whole trajectories: cut into runs, kept until their end comes, judged, stored.

Imports ``storage`` and what lies below it; knows nothing of sampling. Begin with ``writer.py``; ``runs.py`` is the
cutting, as pure functions.
"""

from embodichain_rl.replay.writing.acceptance import Accept, AcceptFilter, Admission, accept_all, accept_success
from embodichain_rl.replay.writing.writer import TrajectoryWriter

__all__ = [
    "Accept",
    "AcceptFilter",
    "Admission",
    "TrajectoryWriter",
    "accept_all",
    "accept_success",
]
