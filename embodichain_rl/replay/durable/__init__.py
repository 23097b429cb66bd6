"""Buffers that outlive their processes, or are reached from outside: directories, commit records, handles.

Imports ``host`` and the rooms below it; knows nothing of TorchRL. Begin with ``directory.py``, then ``commits.py``,
which explains what is there after a power cut, ``syncing.py`` and ``recovery.py``. ``handles.py`` finds the nameless
memory of another process.
"""

from embodichain_rl.replay.durable.commits import Piece
from embodichain_rl.replay.durable.directory import BufferDirectory, Mode
from embodichain_rl.replay.durable.handles import (
    AttachedBlocks,
    Manifest,
    NamelessBlocks,
    find_buffers,
    find_manifests,
    open_block,
    parsed_handle,
)
from embodichain_rl.replay.durable.parts import BufferFiles

__all__ = [
    "AttachedBlocks",
    "BufferDirectory",
    "BufferFiles",
    "Manifest",
    "Mode",
    "NamelessBlocks",
    "Piece",
    "find_buffers",
    "find_manifests",
    "open_block",
    "parsed_handle",
]
