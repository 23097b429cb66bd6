# What lazy_loader reads: each name, and the module that it is loaded from.

from .figures import (
    contact_sheet as contact_sheet,
)
from .figures import (
    film as film,
)
from .figures import (
    plot_buffer as plot_buffer,
)
from .figures import (
    plot_trajectory as plot_trajectory,
)
from .metrics import (
    METRICS as METRICS,
)
from .metrics import (
    PROCESS_METRICS as PROCESS_METRICS,
)
from .metrics import (
    WORKER_METRICS as WORKER_METRICS,
)
from .metrics import (
    Metric as Metric,
)
from .notebook import (
    show as show,
)
from .prometheus import (
    serve_prometheus as serve_prometheus,
)
from .rerun import (
    log_to_rerun as log_to_rerun,
)
from .source import (
    Source as Source,
)
from .source import (
    running as running,
)
from .tracing import (
    trace as trace,
)
from .web import (
    serve_web as serve_web,
)

__all__ = [
    "METRICS",
    "PROCESS_METRICS",
    "WORKER_METRICS",
    "Metric",
    "Source",
    "contact_sheet",
    "film",
    "log_to_rerun",
    "plot_buffer",
    "plot_trajectory",
    "running",
    "serve_prometheus",
    "serve_web",
    "show",
    "trace",
]
