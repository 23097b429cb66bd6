"""What all processes of an engine share: its state, its workers' heartbeats and counters, the generations of its data.

It is a few pages of shared memory, which every process of an engine maps. Imports ``processes`` for errors that travel.
Begin with ``channel_memory.py``, then ``lifecycle.py``.
"""

from embodichain_rl.engine.state.channel_memory import OnlineDataEngineState
from embodichain_rl.engine.state.generations import Generations
from embodichain_rl.engine.state.lifecycle import EngineChannel
from embodichain_rl.engine.state.worker_record import DOING, Phase, WorkerRecord

__all__ = [
    "DOING",
    "EngineChannel",
    "Generations",
    "OnlineDataEngineState",
    "Phase",
    "WorkerRecord",
]
