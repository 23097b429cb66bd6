"""Frames as blobs and back, on a pool of threads: codecs release the GIL."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import CodecError
from embodichain_rl.replay.schema.arrays import as_array
from embodichain_rl.replay.schema.blobs import Blobs, padded_values
from embodichain_rl.replay.schema.codecs import UnknownCodec, skew_of, takes_out
from embodichain_rl.replay.schema.schema import StepField

__all__ = ["decoded", "encoded", "resolved"]

MOST_THREADS = 16
"""The largest number of threads that encode or decode at the same time."""

Empty = Callable[[tuple[int, ...], torch.dtype, int], torch.Tensor]
"""Returns an uninitialised tensor of a shape and dtype, which may begin so many bytes behind a cache line."""


def resolved(field: StepField, blobs: Blobs, empty: Empty | None = None) -> torch.Tensor:
    """Return the values of a field as a tensor: decoded frames ``[*batch, *shape]``, or ragged values.

    These are padded with zeros to the longest, ``[*batch, longest, *element]``.

    Args:
        field: the field.
        blobs: its values, ``[*batch]``.
        empty: function that returns the memory of frames; by default new memory.

    Raises:
        CodecError: when a frame can't be decoded.
    """
    if field.codec is None:
        return padded_values(blobs, field.shape[1:], field.dtype)
    return decoded(field.codec, [blobs], field.shape, field.dtype, empty or _new)[0]


def _new(shape: tuple[int, ...], dtype: torch.dtype, skew: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def encoded(codec: Any, frames: np.ndarray, batch_dims: int) -> Blobs:
    """Return frames ``[*batch, *shape]`` as blobs ``[*batch]``.

    Raises:
        CodecError: when the codec fails, or returns something other than bytes.
    """
    shape = frames.shape[:batch_dims]
    flat = frames.reshape(-1, *frames.shape[batch_dims:])
    blobs: list[bytes] = [b""] * len(flat)

    def encode(number: int) -> None:
        frame = flat[number]
        try:
            blob = codec.encode(frame if frame.flags.c_contiguous else np.ascontiguousarray(frame))
            blobs[number] = blob if type(blob) is bytes else bytes(memoryview(blob))
        except CodecError:
            raise
        except Exception as error:
            raise CodecError(f"{codec!r} could not encode a frame of {frame.shape}: {error!r}.") from error

    _for_each(encode, range(len(flat)))
    return Blobs.of(blobs, shape)


def decoded(
    codec: Any, several: Sequence[Blobs], shape: tuple[int, ...], dtype: torch.dtype, empty: Empty
) -> list[torch.Tensor]:
    """Return the frames of several arrays of blobs ``[*batch]``, each ``[*batch, *shape]``.

    Those of empty blobs are zeros. A blob that occurs several times in them, by identity, is decoded once.

    Args:
        codec: what they were encoded with.
        several: the encoded frames.
        shape: the shape of a frame.
        dtype: its dtype.
        empty: function that returns the memory.

    Raises:
        CodecError: when a blob can't be decoded to such a frame.
    """
    if isinstance(codec, UnknownCodec):
        codec.decode(b"", np.empty(0))
    skew = skew_of(codec)
    frames = [empty((blobs.array.size, *shape), dtype, skew) for blobs in several]
    flat = [blob for blobs in several for blob in blobs.array.flat]
    outputs = [output for of_field in frames for output in as_array(of_field)]
    first: dict[int, int] = {}
    repeated: list[tuple[int, int]] = []
    wanted: list[int] = []
    for number, blob in enumerate(flat):
        if not blob:
            outputs[number][...] = 0
            continue
        of = first.setdefault(id(blob), number)
        if of == number:
            wanted.append(number)
        else:
            repeated.append((number, of))
    direct = takes_out(codec)

    def decode(number: int) -> None:
        out = outputs[number]
        try:
            result = codec.decode(flat[number], out) if direct else codec.decode(flat[number])
        except CodecError:
            raise
        except Exception as error:
            raise CodecError(f"{codec!r} could not decode a frame of {shape}: {error!r}.") from error
        if result is not None and result is not out:
            _take(codec, result, out)

    _for_each(decode, wanted)
    for number, of in repeated:
        outputs[number][...] = outputs[of]
    return [of_field.view(*blobs.shape, *shape) for of_field, blobs in zip(frames, several, strict=True)]


def _take(codec: Any, result: Any, out: np.ndarray) -> None:
    frame = np.asarray(result)
    if frame.dtype != out.dtype or frame.shape != out.shape:
        raise CodecError(
            f"{codec!r} decoded a frame of {frame.shape} and {frame.dtype}, but it was {out.shape} of {out.dtype} when "
            "it was encoded. Let decode(data, out) fill out, or return an array of its shape and dtype."
        )
    if not np.may_share_memory(frame, out) or frame.__array_interface__["data"] != out.__array_interface__["data"]:
        out[...] = frame


def _for_each(do: Callable[[int], None], numbers: Sequence[int]) -> None:
    """Call a function for each number: on as many threads as torch uses in this process."""
    threads = min(torch.get_num_threads(), len(numbers), MOST_THREADS)
    if threads < 2:
        for number in numbers:
            do(number)
        return
    left = iter(numbers)
    mutex = threading.Lock()

    def some() -> None:
        while True:
            with mutex:
                number = next(left, None)
            if number is None:
                return
            do(number)

    helpers = [_pool().submit(some) for _ in range(threads - 1)]
    try:
        some()
    finally:
        for helper in helpers:  # nothing is written to the memory after this call, whatever is raised
            helper.exception()
    for helper in helpers:
        helper.result()


_pools: dict[int, ThreadPoolExecutor] = {}


def _pool() -> ThreadPoolExecutor:
    pool = _pools.get(os.getpid())
    if pool is None:  # also in a forked child, which has none of its parent's threads
        pool = _pools.setdefault(os.getpid(), ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="frames"))
    return pool
