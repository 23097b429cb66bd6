# What lazy_loader reads: each name, and the module that it is loaded from.

from .aggregation import (
    buffer_metrics as buffer_metrics,
)
from .counting import (
    Count as Count,
)
from .counting import (
    GateWatch as GateWatch,
)
from .counting import (
    checked_count as checked_count,
)
from .metering import (
    note_draws as note_draws,
)
from .metering import (
    note_sampled as note_sampled,
)
from .statistics import (
    buffer_statistics as buffer_statistics,
)
from .stats_log import (
    StatsLog as StatsLog,
)

__all__ = [
    "Count",
    "GateWatch",
    "StatsLog",
    "buffer_metrics",
    "buffer_statistics",
    "checked_count",
    "note_draws",
    "note_sampled",
]
