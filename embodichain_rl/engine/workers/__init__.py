"""The producers of an engine: probed, planned, started, supervised and replaced.

Imports the configuration of the engine and the rooms ``processes``, ``state``, ``environments`` and ``demonstrations``;
knows neither the engine nor how its data is read. Begin with ``planning.py``, which makes everything before the first
worker starts. ``worker.py`` runs inside a producer; ``producers.py`` and ``worker_process.py`` are producers as the
engine sees them, and ``supervision.py`` replaces those that are lost.
"""

from embodichain_rl.engine.workers.own_draws import OwnDraws
from embodichain_rl.engine.workers.planning import Plan, complete_plan, probe_for, weights_of
from embodichain_rl.engine.workers.probe import PROBE_NAME, EnvProbe, probe_env
from embodichain_rl.engine.workers.producers import Loss, Producer, would_recur
from embodichain_rl.engine.workers.source_labels import with_source
from embodichain_rl.engine.workers.supervision import Supervisor
from embodichain_rl.engine.workers.worker import (
    TURN_POLL_INTERVAL,
    WEIGHT_UPDATE_TIMEOUT,
    DemonstrationCollector,
    EnterWorker,
    ProducerStopped,
    ProducerWriter,
    SupervisedCollector,
    WorkerDemonstrations,
    WorkerEnvs,
    reporting,
)

__all__ = [
    "PROBE_NAME",
    "TURN_POLL_INTERVAL",
    "WEIGHT_UPDATE_TIMEOUT",
    "DemonstrationCollector",
    "EnterWorker",
    "EnvProbe",
    "Loss",
    "OwnDraws",
    "Plan",
    "Producer",
    "ProducerStopped",
    "ProducerWriter",
    "SupervisedCollector",
    "Supervisor",
    "WorkerDemonstrations",
    "WorkerEnvs",
    "complete_plan",
    "probe_env",
    "probe_for",
    "reporting",
    "weights_of",
    "with_source",
    "would_recur",
]
