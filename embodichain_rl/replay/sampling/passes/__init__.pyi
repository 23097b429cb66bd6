# What lazy_loader reads: each name, and the module that it is loaded from.

from .dealing import (
    Deal as Deal,
)
from .dealing import (
    PassEndedError as PassEndedError,
)
from .dealing import (
    PassPosition as PassPosition,
)
from .one_pass import (
    DealtDraws as DealtDraws,
)
from .one_pass import (
    OnePassDraws as OnePassDraws,
)
from .one_pass import (
    PassToItsEnd as PassToItsEnd,
)
from .one_pass import (
    Turn as Turn,
)
from .one_pass import (
    without_lost as without_lost,
)
from .saved_passes import (
    parse_passes as parse_passes,
)

__all__ = [
    "Deal",
    "DealtDraws",
    "OnePassDraws",
    "PassEndedError",
    "PassPosition",
    "PassToItsEnd",
    "Turn",
    "parse_passes",
    "without_lost",
]
