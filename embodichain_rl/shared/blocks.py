"""Where the blocks of shared memory of a buffer come from: nameless memory, files, or another process."""

from __future__ import annotations

from embodichain_rl.shared.memory import SharedBlock
from embodichain_rl.shared.memory_check import check_memory

__all__ = ["BlockSource"]


class BlockSource:
    """Source of named blocks of shared memory. This one provides nameless memory; see :class:`SharedBlock`.

    Attributes:
        read_only (bool): whether the blocks may only be read.
        fresh (bool): whether the blocks are new and filled with zeros. Otherwise others have filled them.

    Example:
        >>> ledger = BlockSource().block("ledger", 4096)
        >>> ledger.mapped().numel()
        4096
    """

    read_only = False
    fresh = True

    def block(self, name: str, nbytes: int | None = None) -> SharedBlock:
        """Return a block: a new one, filled with zeros, or the one that others use already under this name.

        Args:
            name: name of the block, unique in its source.
            nbytes: size, in bytes. With None, one of the processes sets it later with :meth:`SharedBlock.allocate`.
        """
        return SharedBlock(nbytes)

    def check_room(self, nbytes: int, what: str, remedy: str) -> None:
        """Refuse an allocation that does not fit; see :func:`check_memory`.

        Raises:
            BufferMemoryError: if more memory is needed than is available.
            DiskFullError: if the blocks are files, and more room is needed than the disk has left.
        """
        check_memory(nbytes, what, remedy)
