"""The messages by which trajectories travel: a dict of NumPy arrays with several whole trajectories of one schema."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import Blobs, Schema, TextTable, numpy_dtype
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["MessageBuilder", "MessageFormat", "Received", "payload_bytes", "trajectories"]


@dataclass(frozen=True)
class MessageFormat:
    """How trajectories of one schema travel.

    Args:
        schema: the fields of a step and of a trajectory.
        shifted: the numbers of the fields of which only the last step of a trajectory is stored, and sent.
    """

    schema: Schema
    shifted: Collection[int]

    @classmethod
    def of(cls, storage: TrajectoryStorage) -> MessageFormat:
        """Return how the trajectories of a storage travel, which is allocated."""
        schema = storage.schema
        assert schema is not None, "it is allocated"
        return cls(schema, storage.shifted_in(schema))

    @property
    def hash(self) -> str:
        """A hash of the schema. Both ends must have the same."""
        described = f"{self.schema.to_json()} {sorted(self.shifted)}"
        return hashlib.sha256(described.encode()).hexdigest()[:16]


class Received(NamedTuple):
    """One trajectory of a message, as ``TrajectoryStorage.write`` takes it."""

    piece: list[np.ndarray]
    """One array ``[T, *shape]`` per field of a step, of blobs ``[T]``. Of shifted fields all steps are the last one."""
    of_trajectory: list[np.ndarray]
    """One array ``[*shape]`` per field of a trajectory."""
    policy_version: int
    steps: int
    age: float
    """Seconds from its end until the message was sent."""


class MessageBuilder:
    """Copies whole trajectories into the arrays of one message.

    Args:
        format: how they travel.
        texts: the table of the ids in the fields of text. What leaves it after :meth:`add` is in the message all the
            same.
        message_bytes: the size for which memory is taken at first.
    """

    def __init__(self, format: MessageFormat, texts: TextTable, message_bytes: int) -> None:
        self._format, self._texts = format, texts
        self._strings: dict[int, str] = {}
        schema, shifted = format.schema, format.shifted
        sent = sum(field.nbytes for number, field in enumerate(schema.fields) if number not in shifted)
        expected = schema.blobs.expected if schema.blobs is not None else 0
        self._first_steps = max(1, message_bytes // max(1, sent + expected))
        self._arrays: list[np.ndarray] = []
        self._last_steps: list[list[np.ndarray]] = [[] for _ in schema.fields]
        self._values: list[list[np.ndarray]] = [[] for _ in schema.trajectory_fields]
        self._blobs: dict[bytes, int] = {}  # in the order in which they are sent
        self._capacity = 0
        self._steps = 0
        self.lengths: list[int] = []
        """The steps of each trajectory."""
        self._versions: list[int] = []
        self._ended_at: list[float] = []
        self.nbytes = 0
        """Bytes of the trajectories."""

    def add(
        self,
        pieces: Sequence[Sequence[np.ndarray]],
        of_trajectory: Sequence[np.ndarray],
        policy_version: int,
        now: float,
    ) -> None:
        """Copy a trajectory, given in the pieces that ``TrajectoryStorage.write`` takes.

        The writer holds its texts only until this returns.
        """
        steps = sum([len(piece[0]) for piece in pieces])
        self._make_room(self._steps + steps)
        self._look_up(pieces, of_trajectory)
        for number, (field, array) in enumerate(zip(self._format.schema.fields, self._arrays, strict=True)):
            of_field = [piece[number] for piece in pieces]
            if number in self._format.shifted:
                of_field = [of_field[-1][-1:]]
            if field.is_blob:
                of_field = [self._positions_of(blobs) for blobs in of_field]
            if number in self._format.shifted:
                self._last_steps[number].append(np.array(of_field[0][0]))
                self.nbytes += self._last_steps[number][-1].nbytes
                continue
            end = self._steps
            for values in of_field:
                array[end : end + len(values)] = values
                end += len(values)
            self.nbytes += array[self._steps : end].nbytes
        for kept, value in zip(self._values, of_trajectory, strict=True):
            kept.append(np.array(value))
            self.nbytes += kept[-1].nbytes
        self._steps += steps
        self.lengths.append(steps)
        self._versions.append(policy_version)
        self._ended_at.append(now)

    def _make_room(self, steps: int) -> None:
        if steps <= self._capacity:
            return
        # The memory of pages that are not written is never taken.
        capacity = max(self._first_steps + steps, 2 * self._capacity)
        arrays = []
        for number, field in enumerate(self._format.schema.fields):
            rows = 0 if number in self._format.shifted else capacity
            shape, dtype = ((), np.dtype(np.int32)) if field.is_blob else (field.shape, numpy_dtype(field.dtype))
            array = np.empty((rows, *shape), dtype)
            if self._arrays and rows:
                array[: self._steps] = self._arrays[number][: self._steps]
            arrays.append(array)
        self._arrays, self._capacity = arrays, capacity

    def _positions_of(self, blobs: np.ndarray) -> np.ndarray:
        """Return where blobs ``[n]`` are in the message, ``int32`` ``[n]``; each is sent once."""
        known = self._blobs
        for blob in blobs.tolist():
            if blob not in known:
                known[blob] = len(known)
                self.nbytes += len(blob)
        return np.fromiter(map(known.__getitem__, blobs.tolist()), np.int32, len(blobs))

    def _look_up(self, pieces: Sequence[Sequence[np.ndarray]], of_trajectory: Sequence[np.ndarray]) -> None:
        """Note the strings of a trajectory."""
        schema = self._format.schema
        arrays = [piece[number] for number, field in enumerate(schema.fields) if field.is_text for piece in pieces]
        arrays += [value for field, value in zip(schema.trajectory_fields, of_trajectory, strict=True) if field.is_text]
        for number in {number for array in arrays for number in np.unique(array).tolist()} - self._strings.keys():
            self._strings[number] = self._texts.resolve(number)

    def build(self, now: float) -> dict[str, Any]:
        """Return the message.

        Args:
            now: the time of ``add``'s clock.
        """
        schema = self._format.schema
        fields = [
            np.stack(self._last_steps[number]) if number in self._format.shifted else array[: self._steps]
            for number, array in enumerate(self._arrays)
        ]
        values = [np.stack(kept) for kept in self._values]
        strings = _as_positions(schema, fields, values, self._strings)
        return {
            "schema": self._format.hash,
            "lengths": np.array(self.lengths),
            "policy_versions": np.array(self._versions),
            "ages": now - np.array(self._ended_at),
            "fields": fields,
            "values": values,
            "texts": strings,
            "blobs": np.frombuffer(b"".join(self._blobs), np.uint8),
            "sizes": np.fromiter(map(len, self._blobs), np.int64, len(self._blobs)),
        }


def _as_positions(
    schema: Schema, fields: list[np.ndarray], values: list[np.ndarray], strings: Mapping[int, str]
) -> list[str]:
    """Replace the ids of texts by positions in the list of strings that is returned."""
    of_steps = [number for number, field in enumerate(schema.fields) if field.is_text]
    of_trajectories = [number for number, field in enumerate(schema.trajectory_fields) if field.is_text]
    if not of_steps and not of_trajectories:
        return []
    arrays = [*(fields[number] for number in of_steps), *(values[number] for number in of_trajectories)]
    ids, positions = np.unique(np.concatenate([array.reshape(-1) for array in arrays]), return_inverse=True)
    start = 0
    for into, number in [*((fields, number) for number in of_steps), *((values, n) for n in of_trajectories)]:
        array = into[number]
        into[number] = positions[start : start + array.size].astype(np.int32).reshape(array.shape)
        start += array.size
    return [strings[number] for number in ids.tolist()]


def payload_bytes(message: dict[str, Any]) -> int:
    """Return the bytes of the arrays and texts of a message."""
    others = ("lengths", "policy_versions", "ages", "blobs", "sizes")
    arrays = (*message["fields"], *message["values"], *(message[name] for name in others))
    return sum(array.nbytes for array in arrays) + sum(len(text) for text in message["texts"])


def trajectories(message: dict[str, Any], format: MessageFormat, texts: TextTable) -> Iterator[Received]:
    """Return the trajectories of a message one after the other. Their arrays are those of the message.

    Args:
        message: the message.
        format: how trajectories travel.
        texts: the table that gets the texts of the message. They stay in it as long as the caller has a hold, and as a
            live trajectory has them.

    Raises:
        SchemaMismatchError: the message has another schema.
    """
    if message["schema"] != format.hash:
        raise SchemaMismatchError(
            f"Got a message of schema {message['schema']}, but the buffer has {format.hash}: the library or the "
            "environment of a machine differs from that of the learner. Use the same versions on all machines."
        )
    schema = format.schema
    fields, values = list(message["fields"]), list(message["values"])
    if message["texts"]:
        ids = texts.ids_of(np.array(message["texts"], dtype=object), for_good=False)
        for number, field in enumerate(schema.fields):
            if field.is_text:
                fields[number] = ids[fields[number]]
        for number, field in enumerate(schema.trajectory_fields):
            if field.is_text:
                values[number] = ids[values[number]]
    if schema.blob_numbers:
        blobs = Blobs.unpacked(message["blobs"], torch.from_numpy(message["sizes"].copy())).array
        for number in schema.blob_numbers:
            fields[number] = blobs[fields[number]]
    return _split(message, format, fields, values)


def _split(
    message: dict[str, Any], format: MessageFormat, fields: list[np.ndarray], values: list[np.ndarray]
) -> Iterator[Received]:
    start = 0
    versions, ages = message["policy_versions"].tolist(), message["ages"].tolist()
    for k, steps in enumerate(message["lengths"].tolist()):
        piece = [
            np.broadcast_to(array[k : k + 1], (steps, *array.shape[1:]))
            if number in format.shifted
            else array[start : start + steps]
            for number, array in enumerate(fields)
        ]
        yield Received(piece, [value[k] for value in values], versions[k], steps, ages[k])
        start += steps
