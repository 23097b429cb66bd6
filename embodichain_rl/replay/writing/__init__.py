"""How steps become whole trajectories: they are cut into runs, kept until their end comes, judged and stored.

Imports ``storage`` and the rooms below it, not ``sampling``. Begin with ``writer.py``; ``pending_writer.py`` is what
of it belongs to one process. ``cutting.py`` brings together what the cutting depends on: ``runs.py`` (end flags,
trajectory ids, padding), ``boundaries.py`` (resets without an end flag, and rows that are no trajectory), ``origin.py``
(samples of another buffer), ``pending.py`` (what is unfinished) and ``continuing.py`` (how new steps go on with it).
``truncation.py`` marks trajectories that are broken off. ``device_data.py`` does the same for steps that lie on a
device.
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
