# What lazy_loader reads: each name, and the module that it is loaded from.

from .checkpoint import (
    TrajectoryCheckpointer as TrajectoryCheckpointer,
)
from .checkpoint import (
    writing_to as writing_to,
)
from .generations import (
    checked_name as checked_name,
)
from .generations import (
    new_folder as new_folder,
)
from .parts import (
    earlier_at as earlier_at,
)
from .parts import (
    going_on_from as going_on_from,
)
from .state import (
    SavedTrajectories as SavedTrajectories,
)
from .state import (
    state_of as state_of,
)

__all__ = [
    "SavedTrajectories",
    "TrajectoryCheckpointer",
    "checked_name",
    "earlier_at",
    "going_on_from",
    "new_folder",
    "state_of",
    "writing_to",
]
