# What lazy_loader reads: each name, and the module that it is loaded from.

from .collectors import (
    GymnasiumCollector as GymnasiumCollector,
)
from .datasets import (
    ChunkSizeSampler as ChunkSizeSampler,
)
from .datasets import (
    GMMChunkSampler as GMMChunkSampler,
)
from .datasets import (
    OnlineDataset as OnlineDataset,
)
from .datasets import (
    UniformChunkSampler as UniformChunkSampler,
)
from .datasets import (
    masked_mean as masked_mean,
)
from .datasets import (
    step_weights as step_weights,
)
from .engine import (
    OnlineDataEngine as OnlineDataEngine,
)
from .engine import (
    OnlineDataEngineCfg as OnlineDataEngineCfg,
)
from .engine import (
    OnlineDataEngineState as OnlineDataEngineState,
)
from .replay import (
    ByGroup as ByGroup,
)
from .replay import (
    ByPriority as ByPriority,
)
from .replay import (
    ByRecency as ByRecency,
)
from .replay import (
    ByStep as ByStep,
)
from .replay import (
    ChunkSampler as ChunkSampler,
)
from .replay import (
    JpegCodec as JpegCodec,
)
from .replay import (
    PngCodec as PngCodec,
)
from .replay import (
    RateLimiter as RateLimiter,
)
from .replay import (
    RawCodec as RawCodec,
)
from .replay import (
    TrajectoryReplayBuffer as TrajectoryReplayBuffer,
)
from .replay import (
    TrajectoryStorage as TrajectoryStorage,
)
from .replay import (
    TrajectoryWriter as TrajectoryWriter,
)
from .replay import (
    accept_success as accept_success,
)
from .replay import (
    buffer_statistics as buffer_statistics,
)
from .transforms import (
    EmbodiChainLayout as EmbodiChainLayout,
)
from .transforms import (
    FlatChunks as FlatChunks,
)
from .transforms import (
    HindsightRelabel as HindsightRelabel,
)
from .transforms import (
    JaggedBatches as JaggedBatches,
)
from .transforms import (
    Normalize as Normalize,
)
from .transforms import (
    RandomColorJitter as RandomColorJitter,
)
from .transforms import (
    RandomShift as RandomShift,
)
from .transforms import (
    ResolveText as ResolveText,
)

__version__: str

__all__ = [
    "ByGroup",
    "ByPriority",
    "ByRecency",
    "ByStep",
    "ChunkSampler",
    "ChunkSizeSampler",
    "EmbodiChainLayout",
    "FlatChunks",
    "GMMChunkSampler",
    "GymnasiumCollector",
    "HindsightRelabel",
    "JaggedBatches",
    "JpegCodec",
    "Normalize",
    "OnlineDataEngine",
    "OnlineDataEngineCfg",
    "OnlineDataEngineState",
    "OnlineDataset",
    "PngCodec",
    "RandomColorJitter",
    "RandomShift",
    "RateLimiter",
    "RawCodec",
    "ResolveText",
    "TrajectoryReplayBuffer",
    "TrajectoryStorage",
    "TrajectoryWriter",
    "UniformChunkSampler",
    "accept_success",
    "buffer_statistics",
    "masked_mean",
    "step_weights",
]
