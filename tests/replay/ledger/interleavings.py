"""Run a reader in every interleaving of its loads with the stores of writers.

The stores of the writers are recorded word by word while they run. The reader then runs over this record. Each of its
loads may see the memory as it was at any moment since its previous load. If a load would see the same value at several
moments, only the first is tried, because it leaves every later choice open.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from instructions import at_every_instruction

from embodichain_rl.replay.kernels import Column, Draws, PlainChunks, SamplePlan, Targets, compiled
from embodichain_rl.replay.ledger.ledger import Ledger
from embodichain_rl.replay.ledger.live_ids import Lists
from embodichain_rl.replay.ledger.words import (
    ID,
)


class Killed(BaseException):
    """Interrupts an action. It is a BaseException, so that the action does not catch it."""


class _Covered(Exception):
    """Ends an execution that continues in the same way as another one."""


class History:
    """The words of a ledger and of an arena, with every change of a word, in order.

    Args:
        ledger: the ledger to record.
        arena: the arena to record, ``int64`` ``[steps]``.
    """

    def __init__(self, ledger: Ledger, arena: np.ndarray) -> None:
        self._memory = [_words_of(ledger), arena]
        self._now = np.concatenate(self._memory)
        self.moments = 0
        self._changes: list[tuple[list[int], list[int]]] = [([0], [value]) for value in self._now.tolist()]

    def record(self, action: Callable[[], Any], killed_at: int | None = None) -> None:
        """Run ``action`` and record each of its stores.

        Raises:
            Killed: before instruction number ``killed_at``, if the action has that many. The lock is then released, as
                the kernel does for a killed process.
        """

        def visit(instruction: int) -> None:
            self._record_changes()
            if instruction == killed_at:
                raise Killed

        try:
            at_every_instruction(action, visit)
        finally:
            self._record_changes()

    def _record_changes(self) -> None:
        now = np.concatenate(self._memory)
        for word in np.flatnonzero(now != self._now).tolist():
            self.moments += 1
            moments, values = self._changes[word]
            moments.append(self.moments)
            values.append(int(now[word]))
        self._now = now

    def moments_of(self, word: int, since: int) -> Iterator[tuple[int, int]]:
        """Yield the value of a word at the moment ``since`` and each later value, with the moment of the change."""
        moments, values = self._changes[word]
        first = bisect_right(moments, since) - 1
        yield since, values[first]
        yield from zip(moments[first + 1 :], values[first + 1 :], strict=True)


class Reader:
    """A ledger and an arena as a reader sees them, load by load.

    Args:
        ledger: the ledger that was recorded.
        history: its record.
        upwards: whether the words of a row are loaded in ascending order; else in descending order.
    """

    def __init__(self, ledger: Ledger, history: History, *, upwards: bool = True) -> None:
        self._history = history
        self._choices: list[int] = []
        self._numbers: list[int] = []
        self._at = self._moment = 0
        self._begun = 0
        memory = _words_of(ledger)
        begin = memory.ctypes.data
        self.ledger = object.__new__(Ledger)
        self.ledger.__dict__.update(num_rows=ledger.num_rows)
        for name in ("_active", "_counters", "_rows", "_unusual", "_pinned", "_holes", "_stragglers"):
            array = getattr(ledger, name)
            setattr(self.ledger, name, _Words(self, (array.ctypes.data - begin) // 8, array.shape, upwards))
        self.ledger._active.load = self.load_active
        self.ledger._row_ids = _Words(
            self, self.ledger._rows.first + ID, (ledger.num_rows,), upwards, stride=ledger._rows.shape[1]
        )
        self._nothing = np.empty(0, dtype=np.int64)
        self._forget()
        self.arena_begins = len(memory)

    def _forget(self) -> None:
        """Forget what a ledger remembers from read to read."""
        self.ledger._lists = 0, Lists(self._nothing, self._nothing, self._nothing)

    def executions_of(self, read: Callable[[Reader], Any]) -> Iterator[Any]:
        """Run ``read`` in every possible interleaving, and yield the results."""
        while True:
            self._numbers.clear()
            self._at = self._moment = 0
            self._begun = 0
            self._forget()
            with suppress(_Covered):
                yield read(self)
            del self._choices[len(self._numbers) :]
            while self._choices and self._choices[-1] + 1 == self._numbers[len(self._choices) - 1]:
                self._choices.pop()
            if not self._choices:
                return
            self._choices[-1] += 1

    def choose(self, options: list[Any]) -> Any:
        """Return one of the options; each execution takes another combination of options."""
        if self._at == len(self._choices):
            self._choices.append(0)
        self._numbers.append(len(options))
        self._at += 1
        return options[self._choices[self._at - 1]]

    def load(self, word: int) -> int:
        """Return the value of a word now or at a later moment, and advance to that moment."""
        self._moment, value = self.choose(list(self._history.moments_of(word, self._moment)))
        return value

    def load_active(self, word: int) -> int:
        """Return the value of ``active``, which is loaded before and after the counters.

        A reader that must read the counters again has kept nothing. This is the same as a reader that begins later,
        which is another execution.
        """
        self._begun += 1
        if self._begun > 2:
            raise _Covered
        return self.load(word)

    def copy(self, start: int, length: int) -> list[int]:
        """Load steps of the arena."""
        return [self.load(self.arena_begins + step) for step in range(start, start + length)]


class CompiledReader:
    """Runs compiled kernels load by load: each of their loads of shared memory is one of a :class:`Reader`.

    Args:
        library: the kernels, compiled with ``-DEVERY_LOAD``.
        ledger: the ledger that was recorded.
        arena: the arena that was recorded, ``int64`` ``[steps]``; a step is one word.
    """

    def __init__(self, library: Path, ledger: Ledger, arena: np.ndarray) -> None:
        self.kernels = compiled(library)
        column = Column(arena[:, None].view(np.uint8), 1)
        self._plan = SamplePlan(ledger, [column], PlainChunks(1, 1, 0, 0))
        self.draws = Draws(1)
        self._output = np.zeros(3, dtype=np.int64)
        self._targets = Targets([0, 8, 16])
        self._ledger_at = _words_of(ledger).ctypes.data
        self._arena_at, self._arena_bytes = arena.ctypes.data, arena.nbytes
        self._active_at = ledger._active.ctypes.data
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(self._load)
        hook = ctypes.c_void_p.in_dll(ctypes.CDLL(str(library)), "ec_every_load")
        hook.value = ctypes.cast(self._callback, ctypes.c_void_p).value
        self._reader: Reader | None = None
        self._loads_left = 0
        self._error: BaseException | None = None

    def _load(self, address: int) -> int:
        if self._loads_left and self._error is None and self._reader is not None:
            self._loads_left -= 1
            in_arena = 0 <= address - self._arena_at < self._arena_bytes
            begin, first = (self._arena_at, self._reader.arena_begins) if in_arena else (self._ledger_at, 0)
            word = first + (address - begin) // 8
            try:
                return self._reader.load_active(word) if address == self._active_at else self._reader.load(word)
            except BaseException as error:  # can't pass through the kernels: they end with what is in memory now
                self._error = error
        return ctypes.c_int64.from_address(address).value

    def _run(self, reader: Reader, loads: int, call: Callable[[], Any]) -> Any:
        """Run kernels whose first loads are those of ``reader``, and later ones of the memory as it is now."""
        self._reader, self._loads_left, self._error = reader, loads, None
        result = call()
        if self._error is not None:
            raise self._error
        return result

    def draw(self, reader: Reader, number: float) -> int:
        numbers = np.array([number])
        at = numbers.ctypes.data
        return self._run(reader, 1 << 30, lambda: self.kernels.draw(self._plan, at, 0, self.draws))

    def gather(self, reader: Reader) -> int:
        """Return the copied step."""
        output = self._output.ctypes.data
        self._run(reader, 1 << 30, lambda: self.kernels.gather(self._plan, self.draws, output, self._targets, 1))
        return int(self._output[0])

    def check(self, reader: Reader) -> int:
        # The first load is that of the id. What follows is only for the ages.
        return self._run(reader, 1, lambda: self.kernels.check(self._plan, self.draws))


class _Words:
    """The part of the NumPy array interface that the ledger's reads use, with one load per word."""

    def __init__(self, reader: Reader, first: int, shape: tuple[int, ...], upwards: bool, stride: int = 1) -> None:
        self.reader, self.first, self.shape, self.upwards, self.stride = reader, first, shape, upwards, stride
        self.load = reader.load

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple) and isinstance(index[0], np.ndarray):  # one column of some rows
            return np.array([self[number][index[1]] for number in index[0].tolist()])
        if isinstance(index, tuple):
            part = self
            for each in index:
                part = part[each]
            return part
        if isinstance(index, slice):
            return np.array([self[number] for number in range(index.stop)], dtype=np.int64)
        if isinstance(index, np.ndarray):
            return self.take(index)
        if len(self.shape) == 1:
            return self.load(self.first + index * self.stride)
        return _Words(self.reader, self.first + index * self.shape[1], self.shape[1:], self.upwards)

    def item(self, index: int) -> int:
        return int(self[index])

    def take(self, index: np.ndarray, axis: int = 0) -> np.ndarray:
        return np.array([self[number]._all() if len(self.shape) == 2 else self[number] for number in index.tolist()])

    def _all(self) -> list[int]:
        words = list(range(self.shape[0]))
        values = {word: self[word] for word in (words if self.upwards else reversed(words))}
        return [values[word] for word in words]


def _words_of(ledger: Ledger) -> np.ndarray:
    """Return the whole memory of a ledger as one array."""
    arrays = [getattr(ledger, name) for name in ledger._shapes]
    begin, end = arrays[0].ctypes.data, arrays[-1].ctypes.data + arrays[-1].nbytes
    return ledger._block.array(np.int64, ((end - begin) // 8,))
