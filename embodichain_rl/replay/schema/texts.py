"""Text in memory that all processes share: each string is stored once, and a step holds its id.

A :class:`TextTable` is append-only. Strings below its count never change, so reading takes no lock, and each process
caches what it has read. A new string is written beyond the count, which is raised last: a process that is killed in
between has added nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, NonTensorData, NonTensorStack, TensorDictBase

from embodichain_rl.errors import InvalidArgumentError, TextTableFullError, UnknownTextError
from embodichain_rl.shared import ALIGNMENT, CrossProcessLock, SharedBlock

__all__ = ["TextTable", "as_non_tensor", "resolve_texts", "text_array"]

MAX_TEXTS = 1 << 22
"""Most different strings in a table."""

MAX_BYTES = 1 << 30
"""Most bytes of all strings, in UTF-8. It is address space: pages without text take no memory."""

HOLDER, COUNT = range(2)


class TextTable:
    """An append-only table of strings that the processes of one program share.

    A string has one id, ``int32``, the same in every process; ids are never reused. The empty string has the id 0, so
    that zeros are padding.

    It is shared like a :class:`~embodichain_rl.TrajectoryStorage`: a child process that is given it at its start has
    the same table. Pickled or copied otherwise it becomes a separate table with the same ids.

    Args:
        max_texts: most different strings.
        max_bytes: most bytes of all strings, in UTF-8.

    Raises:
        TextTableFullError: by :meth:`intern` and :meth:`ids_of`, when there is no room for a new string.

    Example:
        >>> texts = TextTable()
        >>> ids = texts.ids_of(np.array(["open the drawer", "lift the cube", "open the drawer"], dtype=object))
        >>> ids
        array([1, 2, 1], dtype=int32)
        >>> texts.resolve(ids[:2])
        ['open the drawer', 'lift the cube']
        >>> texts.resolve(0)
        ''
    """

    def __init__(self, *, max_texts: int = MAX_TEXTS, max_bytes: int = MAX_BYTES) -> None:
        self._max_texts, self._max_bytes = max_texts, max_bytes
        self._block = SharedBlock(ALIGNMENT + 8 * (max_texts + 1) + max_bytes)
        self._map()
        self._words[COUNT] = 1  # the empty string

    def _map(self) -> None:
        self._words = self._block.array(np.int64, (2,))
        self._ends = self._block.array(np.int64, (self._max_texts,), ALIGNMENT)
        self._bytes = self._block.array(np.uint8, (self._max_bytes,), ALIGNMENT + 8 * self._max_texts)
        self._lock = CrossProcessLock(self._block, self._words[HOLDER:COUNT])
        # The cache of this process. Threads that fill it at the same time write the same.
        self._texts: dict[int, str] = {0: ""}
        self._ids: dict[str, int] = {"": 0}

    def __len__(self) -> int:
        """Return how many different strings there are; ids are below it."""
        return int(self._words[COUNT])

    @property
    def nbytes_used(self) -> int:
        """Bytes of the pages that were written so far."""
        return self._block.nbytes_used

    def intern(self, text: str) -> int:
        """Return the id of a string, which is added if it is new.

        Raises:
            TextTableFullError: when there is no room for it.
            InvalidArgumentError: when it is not a string.
        """
        if type(text) is not str:
            if not isinstance(text, str):
                raise InvalidArgumentError(f"Got {text!r}; a table of texts takes strings.")
            text = str.__str__(text)  # of a member of an enumeration, its value
        known = self._ids.get(text)
        if known is None:
            self._catch_up()
            known = self._ids.get(text)
        return self._add(text) if known is None else known

    def ids_of(self, texts: np.ndarray) -> np.ndarray:
        """Return the ids of an array of strings, ``int32`` of the same shape; new strings are added."""
        flat: list[str] = texts.reshape(-1).tolist()
        ids = {text: self.intern(text) for text in dict.fromkeys(flat)}
        return np.fromiter(map(ids.__getitem__, flat), np.int32, len(flat)).reshape(texts.shape)

    def _add(self, text: str) -> int:
        encoded = text.encode("utf-8", "surrogatepass")
        with self._lock:
            self._catch_up()  # another process may have been faster
            if text in self._ids:
                return self._ids[text]
            number = len(self)
            begin = int(self._ends[number - 1])
            end = begin + len(encoded)
            if number == self._max_texts or end > self._max_bytes:
                raise TextTableFullError(
                    f"Got a new string of {len(encoded):,} bytes, but the table of texts holds {number:,} of at most "
                    f"{self._max_texts:,} strings, and {begin:,} of at most {self._max_bytes:,} bytes. Each string is "
                    "stored once and for good: write strings that come again, such as instructions, and what is "
                    "different every time as numbers."
                )
            self._bytes[begin:end] = np.frombuffer(encoded, dtype=np.uint8)
            self._ends[number] = end
            self._words[COUNT] = number + 1
        self._remember(number, text)
        return number

    def _catch_up(self) -> None:
        for number in range(len(self._texts), len(self)):
            begin, end = self._ends[number - 1 : number + 1].tolist()
            self._remember(number, self._bytes[begin:end].tobytes().decode("utf-8", "surrogatepass"))

    def _remember(self, number: int, text: str) -> None:
        self._ids[text] = number
        self._texts[number] = text

    def resolve(self, ids: int | torch.Tensor | np.ndarray | Sequence[Any]) -> Any:
        """Return the strings of ids: a ``str`` for one id, nested lists of ``str`` for several.

        Args:
            ids: an integer, or integers of any shape, such as ``batch["instruction"][:, 0]``.

        Raises:
            UnknownTextError: when an id has no string.
            InvalidArgumentError: when they are not integers.
        """
        array = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
        if array.dtype.kind not in "iu":
            if array.size:
                raise InvalidArgumentError(f"Got ids of {array.dtype}; the ids of texts are integers.")
            array = array.astype(np.int32)
        return self._nested(array.tolist())

    def _nested(self, ids: Any) -> Any:
        if isinstance(ids, list):
            return [self._nested(part) for part in ids]
        text = self._texts.get(ids)
        if text is None:
            self._catch_up()
            text = self._texts.get(ids)
        if text is None:
            raise UnknownTextError(
                f"Got the id {ids}, but the table holds {len(self):,} texts, 0 to {len(self) - 1:,}. Ids are those of "
                "one table: resolve them with that of the buffer they were sampled from (rb.texts)."
            )
        return text

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {"max_texts": self._max_texts, "max_bytes": self._max_bytes}
        if get_spawning_popen() is None:
            return {**state, "texts": self.resolve(range(len(self)))}
        return {**state, "block": self._block}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "block" in state:
            self._max_texts, self._max_bytes, self._block = state["max_texts"], state["max_bytes"], state["block"]
            self._map()
        else:
            texts = state.pop("texts")
            self.__init__(**state)  # type: ignore[misc]
            for text in texts:
                self.intern(text)

    def __repr__(self) -> str:
        return f"TextTable({len(self):,} texts, {int(self._ends[len(self) - 1]):,} bytes)"


# --------------------------------------------------------------------------------------------------- in TensorDicts


def text_array(value: Any) -> np.ndarray | None:
    """Return the strings of a ``NonTensorData`` or ``NonTensorStack``, an array of objects of its batch size.

    Return None when it holds something other than strings.
    """
    if isinstance(value, NonTensorStack):
        parts = [text_array(part) for part in value.tensordicts]
        if any(part is None for part in parts):
            return None
        return np.stack(parts, axis=value.stack_dim) if parts else None  # type: ignore[arg-type]
    text = getattr(value, "data", None)
    if not isinstance(text, str):
        return None
    return np.full(tuple(value.batch_size), str.__str__(text), dtype=object)


def as_non_tensor(texts: Any) -> NonTensorData | NonTensorStack:
    """Return a string, or nested lists of strings, as an entry of a TensorDict.

    Example:
        >>> as_non_tensor([["lift", "lift"], ["push", "lift"]]).tolist()
        [['lift', 'lift'], ['push', 'lift']]
    """
    made: dict[str, NonTensorData] = {}

    def entry(part: Any) -> NonTensorData | NonTensorStack:
        if isinstance(part, list):
            return NonTensorStack(*map(entry, part))
        # One object per string, wherever it occurs: creating the objects is most of the work.
        if part not in made:
            made[part] = NonTensorData(part)
        return made[part]

    return entry(texts)


def resolve_texts(data: TensorDictBase, keys: Iterable[NestedKey], texts: TextTable) -> TensorDictBase:
    """Replace the ids at ``keys`` by their strings, in place; return the data."""
    for key in keys:
        data.set(key, as_non_tensor(texts.resolve(data.get(key))))
    return data
