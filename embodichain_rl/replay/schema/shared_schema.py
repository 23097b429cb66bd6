"""The schema of a storage, in memory that all processes share: the first writer sets it."""

from __future__ import annotations

from typing import Any

import numpy as np

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.schema.formats import Formats
from embodichain_rl.replay.schema.schema import Schema
from embodichain_rl.shared import BlockSource

__all__ = ["SharedSchema"]

SCHEMA_BYTES = 1 << 20
"""Bytes for the schema as JSON, enough for some 10,000 keys."""


class SharedSchema:
    """A schema that one of the processes that share it sets once, for all of them.

    Args:
        blocks: where its memory comes from; by default nameless memory.
        formats: has the codecs of the user's own, of which the memory only says that there are some.

    Example:
        >>> shared = SharedSchema()
        >>> shared.get() is None
        True
    """

    def __init__(self, blocks: BlockSource | None = None, formats: Formats | None = None) -> None:
        blocks = blocks or BlockSource()
        self._formats = formats or Formats()
        self.block = blocks.block("schema", SCHEMA_BYTES)
        if blocks.fresh:
            self.block.back(0, SCHEMA_BYTES)
        self._map()

    def _map(self) -> None:
        self._size = self.block.array(np.int64, (1,))
        self._schema: Schema | None = None

    @property
    def is_set(self) -> bool:
        """Whether the schema is set, by any of the processes."""
        return bool(self._size[0])

    def get(self) -> Schema | None:
        """Return the schema, in one process always the same object; None before it is set."""
        if self._schema is None and self.is_set:
            text = self.block.array(np.uint8, (int(self._size[0]),), 8).tobytes().decode()
            self._schema = self._formats.bound(Schema.from_json(text))
        return self._schema

    def set(self, schema: Schema) -> None:
        """Set the schema. The caller holds the lock of the ledger, since before it asked :attr:`is_set`."""
        text = _encoded(schema)
        self.block.array(np.uint8, (len(text),), 8)[:] = np.frombuffer(text, dtype=np.uint8)
        self._size[0] = len(text)

    def is_readable(self) -> bool:
        """Return whether the schema is set and its memory is undamaged."""
        try:
            return self.get() is not None
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
            return False

    def forget(self) -> None:
        """Take the schema back. No other process may use it."""
        self._size[0], self._schema = 0, None

    def check(self, schema: Schema) -> None:
        """Refuse a schema that is too large.

        Raises:
            InvalidArgumentError: when its names take more than a MiB.
        """
        text = _encoded(schema)
        if len(text) > SCHEMA_BYTES - 8:
            raise InvalidArgumentError(
                f"Got {len(schema.fields):,} keys; the {len(text):,} bytes of their names exceed {SCHEMA_BYTES:,}."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"block": self.block, "formats": self._formats}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.block, self._formats = state["block"], state["formats"]
        self._map()


def _encoded(schema: Schema) -> bytes:
    return schema.to_json().encode()
