# What lazy_loader reads: each name, and the module that it is loaded from.

from .handed_over import (
    HandedOver as HandedOver,
)
from .item_samplers import (
    refuse_samplers_of_steps as refuse_samplers_of_steps,
)
from .places import (
    PathWithOptions as PathWithOptions,
)
from .policy_versions import (
    POLICY_VERSION_KEY as POLICY_VERSION_KEY,
)
from .policy_versions import (
    version_field as version_field,
)
from .policy_versions import (
    version_of as version_of,
)
from .reader import (
    TrajectoryReader as TrajectoryReader,
)
from .reader import (
    reader_of as reader_of,
)
from .reads import (
    ReadView as ReadView,
)
from .reads import (
    chunk_index as chunk_index,
)
from .reads import (
    is_step_index as is_step_index,
)
from .reads import (
    read_each as read_each,
)
from .reads import (
    read_existing as read_existing,
)
from .relabelling import (
    Relabel as Relabel,
)
from .relabelling import (
    relabel as relabel,
)
from .saving import (
    TrajectoryCheckpointer as TrajectoryCheckpointer,
)
from .saving import (
    checked_name as checked_name,
)
from .saving import (
    earlier_at as earlier_at,
)
from .saving import (
    going_on_from as going_on_from,
)
from .saving import (
    new_folder as new_folder,
)
from .saving import (
    writing_to as writing_to,
)
from .sources import (
    storage_of as storage_of,
)
from .storage import (
    TrajectoryStorage as TrajectoryStorage,
)

__all__ = [
    "POLICY_VERSION_KEY",
    "HandedOver",
    "PathWithOptions",
    "ReadView",
    "Relabel",
    "TrajectoryCheckpointer",
    "TrajectoryReader",
    "TrajectoryStorage",
    "checked_name",
    "chunk_index",
    "earlier_at",
    "going_on_from",
    "is_step_index",
    "new_folder",
    "read_each",
    "read_existing",
    "reader_of",
    "refuse_samplers_of_steps",
    "relabel",
    "storage_of",
    "version_field",
    "version_of",
    "writing_to",
]
