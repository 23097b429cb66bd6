# What lazy_loader reads: each name, and the module that it is loaded from.

from .dataset import (
    LiveDataset as LiveDataset,
)
from .dataset import (
    as_lerobot as as_lerobot,
)
from .features import (
    buffer_key as buffer_key,
)
from .features import (
    feature_name as feature_name,
)
from .meta import (
    LiveMetadata as LiveMetadata,
)
from .recorder import (
    LeRobotRecorder as LeRobotRecorder,
)
from .training import (
    train as train,
)
from .transfer import (
    export as export,
)
from .transfer import (
    load as load,
)

__all__ = [
    "LeRobotRecorder",
    "LiveDataset",
    "LiveMetadata",
    "as_lerobot",
    "buffer_key",
    "export",
    "feature_name",
    "load",
    "train",
]
