# What lazy_loader reads: each name, and the module that it is loaded from.

from .chunk_sampler import (
    ChunkSampler as ChunkSampler,
)
from .chunk_starts import (
    mark_starts as mark_starts,
)
from .drawer import (
    PRIORITY_WEIGHT as PRIORITY_WEIGHT,
)
from .drawer import (
    ChunkDrawer as ChunkDrawer,
)
from .drawer import (
    drawer_like as drawer_like,
)
from .draws import (
    ChunkQuery as ChunkQuery,
)
from .generators import (
    current_generator as current_generator,
)
from .generators import (
    drawing_with as drawing_with,
)
from .options import (
    MixtureOptions as MixtureOptions,
)
from .options import (
    SamplingOptions as SamplingOptions,
)
from .options import (
    option_name as option_name,
)
from .passes import (
    Deal as Deal,
)
from .passes import (
    PassEndedError as PassEndedError,
)
from .passes import (
    PassPosition as PassPosition,
)
from .passes import (
    Turn as Turn,
)
from .random_streams import (
    RandomSource as RandomSource,
)
from .random_streams import (
    RandomStreams as RandomStreams,
)
from .random_streams import (
    first_numbers as first_numbers,
)
from .random_streams import (
    part_of as part_of,
)
from .random_streams import (
    random_numbers as random_numbers,
)
from .requests import (
    ChunkRequest as ChunkRequest,
)
from .subsets import (
    Subset as Subset,
)
from .weights import (
    ByGroup as ByGroup,
)
from .weights import (
    ByPriority as ByPriority,
)
from .weights import (
    ByRecency as ByRecency,
)
from .weights import (
    ByStep as ByStep,
)
from .weights import (
    Weights as Weights,
)

__all__ = [
    "PRIORITY_WEIGHT",
    "ByGroup",
    "ByPriority",
    "ByRecency",
    "ByStep",
    "ChunkDrawer",
    "ChunkQuery",
    "ChunkRequest",
    "ChunkSampler",
    "Deal",
    "MixtureOptions",
    "PassEndedError",
    "PassPosition",
    "RandomSource",
    "RandomStreams",
    "SamplingOptions",
    "Subset",
    "Turn",
    "Weights",
    "current_generator",
    "drawer_like",
    "drawing_with",
    "first_numbers",
    "mark_starts",
    "option_name",
    "part_of",
    "random_numbers",
]
