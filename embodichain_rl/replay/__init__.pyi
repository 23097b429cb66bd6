# What lazy_loader reads: each name, and the module that it is loaded from.

from .buffer import (
    TrajectoryReplayBuffer as TrajectoryReplayBuffer,
)
from .metrics import (
    buffer_statistics as buffer_statistics,
)
from .rate_limiter import (
    RateLimiter as RateLimiter,
)
from .sampling import (
    ByGroup as ByGroup,
)
from .sampling import (
    ByPriority as ByPriority,
)
from .sampling import (
    ByRecency as ByRecency,
)
from .sampling import (
    ByStep as ByStep,
)
from .sampling import (
    ChunkSampler as ChunkSampler,
)
from .schema import (
    JpegCodec as JpegCodec,
)
from .schema import (
    PngCodec as PngCodec,
)
from .schema import (
    RawCodec as RawCodec,
)
from .storage import (
    TrajectoryStorage as TrajectoryStorage,
)
from .writing import (
    TrajectoryWriter as TrajectoryWriter,
)
from .writing import (
    accept_success as accept_success,
)

__all__ = [
    "ByGroup",
    "ByPriority",
    "ByRecency",
    "ByStep",
    "ChunkSampler",
    "JpegCodec",
    "PngCodec",
    "RateLimiter",
    "RawCodec",
    "TrajectoryReplayBuffer",
    "TrajectoryStorage",
    "TrajectoryWriter",
    "accept_success",
    "buffer_statistics",
]
