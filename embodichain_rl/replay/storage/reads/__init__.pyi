# What lazy_loader reads: each name, and the module that it is loaded from.

from .index import (
    chunk_index as chunk_index,
)
from .index import (
    is_step_index as is_step_index,
)
from .readable import (
    ReadableTrajectories as ReadableTrajectories,
)
from .whole_reads import (
    OPTIMISTIC_READS as OPTIMISTIC_READS,
)
from .whole_reads import (
    ReadView as ReadView,
)
from .whole_reads import (
    WholeTrajectories as WholeTrajectories,
)
from .whole_reads import (
    read_each as read_each,
)
from .whole_reads import (
    read_existing as read_existing,
)
from .whole_reads import (
    read_live as read_live,
)

__all__ = [
    "OPTIMISTIC_READS",
    "ReadView",
    "ReadableTrajectories",
    "WholeTrajectories",
    "chunk_index",
    "is_step_index",
    "read_each",
    "read_existing",
    "read_live",
]
