"""The storage of whole trajectories for TorchRL: memory and ledger together, items, whole reads, checkpoints.

Imports ``host`` and ``device`` and the rooms below them; knows nothing of samplers and writers. Begin with
``storage.py``.
"""

from embodichain_rl.replay.storage.checkpoint import TrajectoryCheckpointer, writing_to
from embodichain_rl.replay.storage.generations import checked_name, new_folder
from embodichain_rl.replay.storage.handed_over import HandedOver
from embodichain_rl.replay.storage.index import chunk_index, is_step_index
from embodichain_rl.replay.storage.item_samplers import refuse_samplers_of_steps
from embodichain_rl.replay.storage.parts import earlier_at, going_on_from
from embodichain_rl.replay.storage.places import PathWithOptions
from embodichain_rl.replay.storage.policy_versions import POLICY_VERSION_KEY, version_field, version_of
from embodichain_rl.replay.storage.relabelling import Relabel, relabel
from embodichain_rl.replay.storage.sources import storage_of
from embodichain_rl.replay.storage.storage import TrajectoryStorage
from embodichain_rl.replay.storage.whole_reads import ReadView, read_each, read_existing

__all__ = [
    "POLICY_VERSION_KEY",
    "HandedOver",
    "PathWithOptions",
    "ReadView",
    "Relabel",
    "TrajectoryCheckpointer",
    "TrajectoryStorage",
    "checked_name",
    "chunk_index",
    "earlier_at",
    "going_on_from",
    "is_step_index",
    "new_folder",
    "read_each",
    "read_existing",
    "refuse_samplers_of_steps",
    "relabel",
    "storage_of",
    "version_field",
    "version_of",
    "writing_to",
]
