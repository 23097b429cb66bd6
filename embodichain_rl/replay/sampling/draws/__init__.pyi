# What lazy_loader reads: each name, and the module that it is loaded from.

from .group_draws import (
    GroupDraws as GroupDraws,
)
from .label_draws import (
    LabelDraws as LabelDraws,
)
from .trajectory_draws import (
    REJECTION_ROUNDS as REJECTION_ROUNDS,
)
from .trajectory_draws import (
    SCANS as SCANS,
)
from .trajectory_draws import (
    ChunkQuery as ChunkQuery,
)
from .trajectory_draws import (
    Draw as Draw,
)
from .trajectory_draws import (
    DrawQuery as DrawQuery,
)
from .trajectory_draws import (
    Limits as Limits,
)
from .trajectory_draws import (
    RememberingDraws as RememberingDraws,
)
from .trajectory_draws import (
    TrajectoryDraws as TrajectoryDraws,
)
from .weighted_draws import (
    PriorityDraws as PriorityDraws,
)
from .weighted_draws import (
    RecencyDraws as RecencyDraws,
)
from .weighted_draws import (
    StepDraws as StepDraws,
)

__all__ = [
    "REJECTION_ROUNDS",
    "SCANS",
    "ChunkQuery",
    "Draw",
    "DrawQuery",
    "GroupDraws",
    "LabelDraws",
    "Limits",
    "PriorityDraws",
    "RecencyDraws",
    "RememberingDraws",
    "StepDraws",
    "TrajectoryDraws",
]
