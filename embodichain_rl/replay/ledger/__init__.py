"""The shared table of trajectories: which are live, where they lie, and how likely each is drawn.

NumPy only: no torch, no schema, no bytes of any step. Imports ``shared``. Begin with ``ledger.py``, which explains the
protocol; ``table.py`` is what readers see of it, ``invariants.py`` what always holds.
"""

from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger, Reservation
from embodichain_rl.replay.ledger.priorities import PriorityTree
from embodichain_rl.replay.ledger.table import GONE, NO_VERSION, TICKET, Counters, Rows

__all__ = [
    "GONE",
    "NO_VERSION",
    "TICKET",
    "Counters",
    "Ledger",
    "PriorityTree",
    "Reservation",
    "Rows",
    "check_ledger",
]
