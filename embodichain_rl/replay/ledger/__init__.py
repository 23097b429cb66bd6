"""The shared table of trajectories: which ones are live, where they lie in the arena, and their sampling weights.

This room uses NumPy only. It knows neither torch nor the schema, and never touches the bytes of a step. It imports
``shared``. Begin with ``ledger.py``, which explains the protocol and holds the writers' methods. ``table.py`` holds the
memory layout and the lock-free reads, ``priorities.py`` the sum tree of the weights, and ``invariants.py`` a check of
everything that must always hold.
"""

from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger, Reservation
from embodichain_rl.replay.ledger.live_ids import Lists, LiveIds
from embodichain_rl.replay.ledger.metrics import AGE_EDGES, HEAT_SHAPE, LAG_EDGES, Meter, Metrics, MetricWord
from embodichain_rl.replay.ledger.priorities import PriorityTree
from embodichain_rl.replay.ledger.restoring import (
    NO_ROOMS,
    LedgerState,
    ledger_layout,
    reclaim_all,
    restore_ledger,
    state_of_ledger,
)
from embodichain_rl.replay.ledger.table import JOURNAL_BYTES
from embodichain_rl.replay.ledger.words import (
    COMMIT_COPIES,
    COMMITTED,
    COPY_WORDS,
    END,
    FLOOR,
    GONE,
    NO_VERSION,
    TICKET,
    UPCOMING_END,
    Counters,
    Rows,
)

__all__ = [
    "AGE_EDGES",
    "COMMITTED",
    "COMMIT_COPIES",
    "COPY_WORDS",
    "END",
    "FLOOR",
    "GONE",
    "HEAT_SHAPE",
    "JOURNAL_BYTES",
    "LAG_EDGES",
    "NO_ROOMS",
    "NO_VERSION",
    "TICKET",
    "UPCOMING_END",
    "Counters",
    "Ledger",
    "LedgerState",
    "Lists",
    "LiveIds",
    "Meter",
    "MetricWord",
    "Metrics",
    "PriorityTree",
    "Reservation",
    "Rows",
    "check_ledger",
    "ledger_layout",
    "reclaim_all",
    "restore_ledger",
    "state_of_ledger",
]
