"""Text in memory that all processes share: each string is stored once, and a step holds its id.

Strings are only added, until most of them are no longer used. Then the table is *swept*: those that are still used are
copied to the other half of the memory, and one store makes it the valid one. The memory of the first half is given
back. So a process that is killed at any instruction has changed nothing, or everything. A string keeps its id as long
as it is in the table, and no id is ever used again.

Reading takes no lock. A reader copies what it has not read yet, and looks afterwards whether the table was swept
meanwhile: then it reads again. Each process caches what it has read.

**Which strings are used.** A sweep keeps what live trajectories have (:attr:`TextTable.in_use`). It keeps what was used
since the last sweep, so that the text of a batch can still be looked up. And it keeps what was used since a *hold* was
taken: a writer has one from the moment that it looks up the ids of its texts until the trajectory is published. The
holds of dead processes do not count. What a user adds with :meth:`TextTable.intern` stays for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import InvalidArgumentError, TextTableFullError, TooManyWritersError, UnknownTextError
from embodichain_rl.shared import (
    ALIGNMENT,
    BlockSource,
    CrossProcessLock,
    FileBlock,
    own_process,
    process_is_alive,
    write_barrier,
)

__all__ = ["TextTable"]

MAX_TEXTS = 1 << 22
"""Most different strings in a table."""

MAX_BYTES = 1 << 29
"""Most bytes of all strings, in UTF-8. It is address space: pages without text take no memory."""

SWEEP_AFTER = 4096
"""Number of new strings after which a table is swept, and at least half as many as were left the last time."""

SWEEP_AFTER_BYTES = 1 << 22
"""The same for the bytes of new strings."""

HOLDS = 256
"""Number of holds that there can be at the same time."""

# The words of a table. Its lowest bit of GENERATION, the number of sweeps, says which half is valid. Of each half:
# COUNT: number of strings; KEPT: how many of them the last sweep has left; FIRST: the id of the first one after these.
HOLDER, GENERATION, COUNT, KEPT, FIRST = 0, 1, 2, 4, 6
WORDS = 8

# The columns of a hold: a process, and the generation since which what was used is kept; FREE for none.
PID, PROCESS_START, SINCE = range(3)
FREE = -1

FOR_GOOD = 1 << 62
"""In the place of the generation in which a string was last used: it stays for good."""

UNUSED = -1
"""Likewise: it was not used yet."""


class _Half:
    """One half of the memory of a table."""

    def __init__(self, table: TextTable, number: int) -> None:
        most, self.number = table._max_texts, number
        begin = self.begin = ALIGNMENT + _HOLD_BYTES + number * table._half_bytes
        self.ends = table.block.array(np.int64, (most,), begin)
        self.bytes_begin = begin + 8 * most
        self.bytes = table.block.array(np.uint8, (table._max_bytes,), self.bytes_begin)
        behind = -(-(self.bytes_begin + table._max_bytes) // ALIGNMENT) * ALIGNMENT
        self.ids = table.block.array(np.int64, (most,), behind)  # only of those that a sweep has left
        self.used = table.block.array(np.int64, (most,), behind + 8 * most)


class _Cache:
    """What a process has read of one generation of a table. Threads that fill it at the same time write the same."""

    def __init__(self, generation: int) -> None:
        self.generation, self.read = generation, 0
        self.texts: dict[int, str] = {}
        self.ids: dict[str, int] = {}


class TextTable:
    """A table of strings that the processes of one program share.

    A string has one id, ``int32``, the same in every process; ids are never reused. The empty string has the id 0, so
    that zeros are padding. A string leaves the table some time after the last trajectory that uses it.

    It is shared like a :class:`~embodichain_rl.TrajectoryStorage`: a child process that is given it at its start has
    the same table. Pickled or copied otherwise it becomes a separate table with the same ids.

    Args:
        max_texts: most different strings.
        max_bytes: most bytes of all strings, in UTF-8.
        blocks: where its memory comes from; by default nameless memory.

    Attributes:
        in_use (Callable): returns the ids in all live trajectories, ``int64`` ``[n]``; None where this process does not
            know. Without it, nothing leaves the table.

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

    in_use: Callable[[], np.ndarray | None] | None = None

    def __init__(
        self, *, max_texts: int = MAX_TEXTS, max_bytes: int = MAX_BYTES, blocks: BlockSource | None = None
    ) -> None:
        self._max_texts, self._max_bytes = max_texts, max_bytes
        blocks = blocks or BlockSource()
        self.block = blocks.block("texts", ALIGNMENT + _HOLD_BYTES + 2 * self._half_bytes)
        self._map()
        if blocks.fresh:
            self.block.back(0, ALIGNMENT + _HOLD_BYTES + 8)
            self._words[COUNT] = 1  # the empty string
            self._holds[:, SINCE] = FREE

    @property
    def _half_bytes(self) -> int:
        return -(-(24 * self._max_texts + self._max_bytes + ALIGNMENT) // PAGE) * PAGE

    def _map(self) -> None:
        self._words = self.block.array(np.int64, (WORDS,))
        self._holds = self.block.array(np.int64, (HOLDS, 3), ALIGNMENT)
        self._halves = [_Half(self, number) for number in range(2)]
        self._lock = CrossProcessLock(self.block, self._words[HOLDER : HOLDER + 1])
        # In a file nothing leaves the table: what a record names must stay.
        self._is_swept = not isinstance(self.block, FileBlock) or self.block.in_memory
        self._cache = _Cache(-1)

    def __len__(self) -> int:
        """Return how many different strings there are."""
        return int(self._words[COUNT + (self.generation & 1)])

    @property
    def generation(self) -> int:
        """Number of times that the table was swept."""
        return int(self._words[GENERATION])

    @property
    def nbytes_used(self) -> int:
        """Bytes of the pages that were written so far."""
        return self.block.nbytes_used

    # --------------------------------------------------------------------------------------------------- looking up

    def intern(self, text: str) -> int:
        """Return the id of a string, which is added if it is new, and stays for good.

        Raises:
            TextTableFullError: when there is no room for it.
            InvalidArgumentError: when it is not a string.
        """
        return int(self.ids_of(np.array([_checked(text)], dtype=object))[0])

    def ids_of(self, texts: np.ndarray, *, for_good: bool = True) -> np.ndarray:
        """Return the ids of an array of strings, ``int32`` of the same shape; new strings are added.

        Args:
            texts: strings, of any shape.
            for_good: whether they stay in the table for good. Otherwise the caller must have a hold (:meth:`hold`)
                until a live trajectory has the ids.
        """
        flat: list[str] = texts.reshape(-1).tolist()
        unique = [_checked(text) for text in dict.fromkeys(flat)]
        if self._is_swept:
            with self._lock:
                generation = self.generation
                ids = {text: self._used(text, FOR_GOOD if for_good else generation) for text in unique}
        else:
            ids = {text: self._known(text) for text in unique}
        return np.fromiter(map(ids.__getitem__, flat), np.int32, len(flat)).reshape(texts.shape)

    def _known(self, text: str) -> int:
        """Return the id of a string in a table that is never swept."""
        known = self._cache.ids.get(text)
        if known is None:
            known = self._catch_up().ids.get(text)
        if known is None:
            with self._lock:
                known = self._catch_up().ids.get(text)  # another process may have been faster
                return self._add(text) if known is None else known
        return known

    def _used(self, text: str, used: int) -> int:
        """Return the id of a string that is used now. Inside the lock."""
        cache = self._cache
        if cache.generation != self._words[GENERATION] or cache.read != len(self):
            cache = self._catch_up()
        number = cache.ids.get(text)
        if number is None:
            number = self._add(text)
        stamps = self._halves[self.generation & 1].used
        position = self._position(number)
        if stamps[position] < used:
            stamps[position] = used
        return number

    def _position(self, number: int) -> int:
        """Return where the string with an id is, which is in the table. Inside the lock."""
        half = self._halves[self.generation & 1]
        kept, first = int(self._words[KEPT + half.number]), int(self._words[FIRST + half.number])
        return kept + number - first if number >= first else int(np.searchsorted(half.ids[:kept], number))

    def _add(self, text: str) -> int:
        """Add a new string; return its id. Inside the lock."""
        encoded = text.encode("utf-8", "surrogatepass")
        count, begin = self._end()
        if self._is_due(count, begin) or count == self._max_texts or begin + len(encoded) > self._max_bytes:
            self._sweep()
        count, begin = self._end()
        end = begin + len(encoded)
        if count == self._max_texts or end > self._max_bytes:
            raise TextTableFullError(
                f"Got a new string of {len(encoded):,} bytes, but the table of texts holds {count:,} of at most "
                f"{self._max_texts:,} strings, and {begin:,} of at most {self._max_bytes:,} bytes. Each string is "
                "stored once, as long as a trajectory has it (in a file for good): write strings that come again, such "
                "as instructions, and what is different every time as numbers."
            )
        half = self._halves[self.generation & 1]
        self.block.back(half.begin + 8 * count, 8)
        self.block.back(half.bytes_begin + begin, len(encoded))
        half.bytes[begin:end] = np.frombuffer(encoded, dtype=np.uint8)
        half.ends[count] = end
        if self._is_swept:
            half.used[count] = self.generation
        write_barrier()
        self._words[COUNT + half.number] = count + 1
        return self._catch_up().ids[text]

    def _end(self) -> tuple[int, int]:
        """Return the number of strings, and of their bytes."""
        half = self._halves[self.generation & 1]
        count = int(self._words[COUNT + half.number])
        return count, int(half.ends[count - 1])

    def _catch_up(self) -> _Cache:
        """Return the cache, with everything that is in the table now."""
        while True:
            cache, generation = self._cache, self.generation
            if cache.generation != generation:
                cache = _Cache(generation)
            half, begin = self._halves[generation & 1], cache.read
            count, kept, first = (int(self._words[word + half.number]) for word in (COUNT, KEPT, FIRST))
            if not 0 <= begin <= count <= self._max_texts:
                continue  # it is being swept
            ends = half.ends[max(begin - 1, 0) : count].copy()
            if begin == 0:
                ends = np.append(0, ends)
            ids = np.append(half.ids[begin:kept], np.arange(first + max(begin - kept, 0), first + count - kept))
            encoded = half.bytes[ends[0] : ends[-1]].tobytes() if len(ends) else b""
            if self.generation != generation:
                continue
            starts = (ends - ends[0]).tolist() if len(ends) else []
            for number, start, stop in zip(ids.tolist(), starts, starts[1:], strict=False):
                text = encoded[start:stop].decode("utf-8", "surrogatepass")
                cache.ids[text] = number
                cache.texts[number] = text
            cache.read = max(cache.read, count)
            self._cache = cache
            return cache

    def id_of(self, text: str) -> int | None:
        """Return the id of a string; None if it is not in the table, or no longer."""
        return self._catch_up().ids.get(text)

    def get(self, number: int) -> str | None:
        """Return the string of an id; None if it is not in the table, or no longer."""
        text = self._cache.texts.get(number)
        return self._catch_up().texts.get(number) if text is None else text

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
        text = self.get(ids)
        if text is not None:
            return text
        half = self.generation & 1
        end = int(self._words[FIRST + half] + self._words[COUNT + half] - self._words[KEPT + half])
        if 0 <= ids < end:
            raise UnknownTextError(
                f"Got the id {ids}, whose text has left the table some time after the last trajectory that used it. "
                "Resolve the ids of a batch before thousands of other texts are written, or make the buffer larger."
            )
        raise UnknownTextError(
            f"Got the id {ids}, but the table holds {len(self):,} texts, 0 to {end - 1:,}. Ids are those of "
            "one table: resolve them with that of the buffer they were sampled from (rb.texts)."
        )

    # ------------------------------------------------------------------------------------------------------- sweeping

    def hold(self, since: int | None = None) -> int:
        """Keep all that is used from now on, or since an earlier generation, until :meth:`release`.

        Returns:
            The number of the hold.

        Raises:
            TooManyWritersError: when there are too many holds.
        """
        with self._lock:
            free = np.flatnonzero(self._holds[:, SINCE] == FREE)
            if not len(free):
                holders = self._holds[:, :SINCE].tolist()
                free = np.flatnonzero([not process_is_alive(*holder) for holder in holders])
            if len(free):
                number = int(free[0])
                self._holds[number, SINCE] = FREE
                self._holds[number, :SINCE] = own_process()
                self._holds[number, SINCE] = self.generation if since is None else since
                return number
        raise TooManyWritersError(f"{HOLDS} writers of text are active at the same time, which is the limit.")

    def advance(self, number: int, since: int) -> None:
        """Let a hold of this process keep what was used since a generation."""
        self._holds[number, SINCE] = since

    def release(self, number: int) -> None:
        """End a hold of this process."""
        self._holds[number, SINCE] = FREE

    @contextmanager
    def held(self, *, all_of_it: bool = False) -> Iterator[None]:
        """Have a hold meanwhile.

        Args:
            all_of_it: whether to keep everything, used or not.
        """
        number = self.hold(0 if all_of_it else None) if self._is_swept else None
        try:
            yield
        finally:
            if number is not None:
                self.release(number)

    def _is_due(self, count: int, nbytes: int) -> bool:
        half = self._halves[self.generation & 1]
        kept = int(self._words[KEPT + half.number])
        kept_bytes = int(half.ends[kept - 1]) if kept else 0
        # A sweep leaves what was new, and what is in use. With half, that does not grow from one sweep to the next.
        new, new_bytes = count - kept, nbytes - kept_bytes
        return new >= max(SWEEP_AFTER, kept // 2) or new_bytes >= max(SWEEP_AFTER_BYTES, kept_bytes // 2)

    def _sweep(self) -> None:
        """Let all strings leave that are not used, if this process knows which ones are. Inside the lock."""
        if self.in_use is None or not self._is_swept:
            return
        since = self._held_since()  # first: what was published before a hold ended is found in what is live
        in_use = self.in_use()
        if in_use is None:
            return
        generation = self.generation
        old, new = self._halves[generation & 1], self._halves[(generation + 1) & 1]
        count, kept, first = (int(self._words[word + old.number]) for word in (COUNT, KEPT, FIRST))
        ids = np.append(old.ids[:kept], np.arange(first, first + count - kept))
        used, ends = old.used[:count].copy(), old.ends[:count].copy()
        stays = (used >= min(since, generation)) | np.isin(ids, in_use)
        stays[0] = True  # the empty string
        which = np.flatnonzero(stays)
        starts = np.append(0, ends[:-1])
        self.block.give_back(new.begin, self._half_bytes)
        total = 0
        for position, (begin, end) in enumerate(zip(starts[which].tolist(), ends[which].tolist(), strict=True)):
            new.bytes[total : total + end - begin] = old.bytes[begin:end]
            total += end - begin
            new.ends[position] = total
        new.ids[: len(which)], new.used[: len(which)] = ids[which], used[which]
        self._words[COUNT + new.number] = self._words[KEPT + new.number] = len(which)
        self._words[FIRST + new.number] = first + count - kept
        write_barrier()
        self._words[GENERATION] = generation + 1
        write_barrier()
        self.block.give_back(old.begin, self._half_bytes)

    def _held_since(self) -> int:
        """Return the generation since which everything that was used must stay."""
        since = FOR_GOOD
        for pid, start, held in self._holds[self._holds[:, SINCE] != FREE].tolist():
            if held < since and ((pid, start) == own_process() or process_is_alive(pid, start)):
                since = held
        return since

    # ---------------------------------------------------------------------------------------- restoring, and copies

    def resume_from(self, count: int) -> None:
        """Keep the first ``count`` strings, of a table that was never swept. No other process may use the table."""
        self._words[COUNT] = count
        self._holds[:, SINCE] = FREE
        self._map()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {"max_texts": self._max_texts, "max_bytes": self._max_bytes}
        if get_spawning_popen() is None:
            with self._lock:
                texts = dict(self._catch_up().texts)
                used = self._halves[self.generation & 1].used[: len(texts)]
                for_good = (used == FOR_GOOD).tolist() if self._is_swept else None
            return {**state, "texts": [*texts.values()], "ids": [*texts], "for_good": for_good}
        return {**state, "block": self.block}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "block" in state:
            self._max_texts, self._max_bytes, self.block = state["max_texts"], state["max_bytes"], state["block"]
            self._map()
            return
        texts = state.pop("texts")
        ids, for_good = state.pop("ids", range(len(texts))), state.pop("for_good", None)
        self.__init__(**state)  # type: ignore[misc]
        half, encoded = self._halves[0], [text.encode("utf-8", "surrogatepass") for text in texts]
        half.ends[: len(texts)] = np.cumsum([len(each) for each in encoded])
        joined = b"".join(encoded)
        half.bytes[: len(joined)] = np.frombuffer(joined, dtype=np.uint8)
        half.ids[: len(texts)] = ids
        half.used[: len(texts)] = FOR_GOOD if for_good is None else np.where(for_good, FOR_GOOD, UNUSED)
        self._words[COUNT] = self._words[KEPT] = len(texts)
        self._words[FIRST] = max(ids) + 1

    def __repr__(self) -> str:
        count, nbytes = self._end()
        return f"TextTable({count:,} texts, {nbytes:,} bytes)"


PAGE = 4096

_HOLD_BYTES = HOLDS * 3 * 8


def _checked(text: Any) -> str:
    if type(text) is str:
        return text
    if not isinstance(text, str):
        raise InvalidArgumentError(f"Got {text!r}; a table of texts takes strings.")
    return str.__str__(text)  # of a member of an enumeration, its value
