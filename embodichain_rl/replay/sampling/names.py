"""Names that are columns of the user, and that a sampler, or TorchRL, would write something else to."""

from __future__ import annotations

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import INDEX
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["refuse_index_column", "refuse_stored"]


def refuse_stored(storage: TrajectoryReader, name: str) -> None:
    """Refuse to write to the key ``name`` of a batch if it is a column of the data.

    Raises:
        SchemaMismatchError: when it is stored.
    """
    if (name,) in (storage.schema or ()):
        raise SchemaMismatchError(
            f"The data has a column {name!r}, but the sampler writes something else there. Rename the column before it "
            "is written (a TorchRL transform does)."
        )


def refuse_index_column(storage: TrajectoryReader) -> None:
    """Refuse to draw for a plain buffer of TorchRL, or an ensemble, if ``"index"`` is a column of the data.

    Raises:
        SchemaMismatchError: when it is stored.
    """
    schema = storage.schema
    if schema is not None and schema.index_key != INDEX:
        raise SchemaMismatchError(
            "The data has a column 'index' of its own, but TorchRL's plain buffers and ensembles write their positions "
            "there. Use a TrajectoryReplayBuffer, or rename the column before it is written (a TorchRL transform does)."
        )
