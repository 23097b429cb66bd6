"""The gather of a CUDA device: one Triton kernel that copies the chunks of all columns in one launch.

Each operation of torch costs the host as much as the copy of a small batch takes, so that one for each kind of entries
takes several times as long as this one for all of them (``benchmarks/cuda_gathers.py``).

Triton comes with torch for CUDA. It compiles the kernel at its first use, for which it needs a C compiler.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from embodichain_rl.replay.device.gathering import IDS, OFFSETS, STEPS, VALUES, GatherPlan

__all__ = ["TritonGather"]

ENTRY = 6
"""Numbers that describe an output in the table of a plan."""

BLOCK = 1024
"""Words that a program copies at once."""

SLICE = 32 << 10
"""Bytes of a chunk that a program copies, if it is large."""

MOST_SLICES = 64


@triton.jit
def _copy(source, target, words, period, WORD: tl.constexpr, REPEAT: tl.constexpr, SIZE: tl.constexpr):
    """Copy words between two addresses, or repeat the first ``period`` words."""
    if WORD == 16:
        # Two words of 8 bytes at a time; that the addresses are whole multiples lets Triton load both at once.
        source = tl.multiple_of(source, 16)
        target = tl.multiple_of(target, 16)
        words = words * 2
        period = period * 2
    if WORD >= 8:
        source_words = source.to(tl.pointer_type(tl.int64))
        target_words = target.to(tl.pointer_type(tl.int64))
    elif WORD == 4:
        source_words = source.to(tl.pointer_type(tl.int32))
        target_words = target.to(tl.pointer_type(tl.int32))
    elif WORD == 2:
        source_words = source.to(tl.pointer_type(tl.int16))
        target_words = target.to(tl.pointer_type(tl.int16))
    else:
        source_words = source.to(tl.pointer_type(tl.int8))
        target_words = target.to(tl.pointer_type(tl.int8))
    for begin in range(tl.program_id(2) * SIZE, words, tl.num_programs(2) * SIZE):
        at = begin + tl.arange(0, SIZE)
        inside = at < words
        of_source = at
        if REPEAT:
            of_source = at % period
        tl.store(target_words + at, tl.load(source_words + of_source, mask=inside), mask=inside)


@triton.jit
def _copy_as(word, source, target, nbytes, period, REPEAT: tl.constexpr, SIZE: tl.constexpr):
    if word == 16:
        _copy(source, target, nbytes // 16, period // 16, 16, REPEAT, SIZE)
    elif word == 8:
        _copy(source, target, nbytes // 8, period // 8, 8, REPEAT, SIZE)
    elif word == 4:
        _copy(source, target, nbytes // 4, period // 4, 4, REPEAT, SIZE)
    elif word == 2:
        _copy(source, target, nbytes // 2, period // 2, 2, REPEAT, SIZE)
    else:
        _copy(source, target, nbytes, period, 1, REPEAT, SIZE)


@triton.jit(do_not_specialize=["count", "length", "addresses"])
def _gather(
    table,
    packet,
    count,
    length,
    addresses,
    ENTRY: tl.constexpr,
    STEPS: tl.constexpr,
    VALUES: tl.constexpr,
    IDS: tl.constexpr,
    OFFSETS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Copy one chunk of one output: ``[count, outputs, slices]`` programs."""
    chunk = tl.program_id(0)
    number = tl.program_id(1)
    entry = table + number * ENTRY
    kind = tl.load(entry)
    step_bytes = tl.load(entry + 2)
    nbytes = tl.load(entry + 3)
    target = tl.load(packet + addresses + number) + chunk.to(tl.int64) * nbytes
    trajectory = tl.load(packet + chunk)
    start = tl.load(packet + count + chunk)
    offset = tl.load(packet + 5 * count + chunk)
    if kind == STEPS:
        source = tl.load(entry + 1) + (start + offset) * step_bytes
        _copy_as(tl.load(entry + 4), source, target, nbytes, nbytes, False, SIZE)
    elif kind == VALUES:
        source = packet.to(tl.int64, bitcast=True) + tl.load(entry + 1) + chunk.to(tl.int64) * step_bytes
        _copy_as(tl.load(entry + 4), source, target, nbytes, step_bytes, True, SIZE)
    else:
        target_words = target.to(tl.pointer_type(tl.int64))
        for begin in range(tl.program_id(2) * SIZE, length, tl.num_programs(2) * SIZE):
            at = begin + tl.arange(0, SIZE)
            if kind == IDS:
                tl.store(target_words + at, tl.zeros_like(at).to(tl.int64) + trajectory, mask=at < length)
            else:
                tl.store(target_words + at, at.to(tl.int64) + offset, mask=at < length)


class TritonGather:
    """A plan, prepared for one CUDA device.

    Args:
        plan: what is copied.
        device: where it lies.
        stream: the current stream.
    """

    def __init__(self, plan: GatherPlan, device: torch.device, stream: torch.cuda.Stream) -> None:
        table = np.zeros((len(plan.outputs), ENTRY), dtype=np.int64)
        for entry, output in zip(table, plan.outputs, strict=True):
            address = output.packet_offset if output.source is None else output.source.data_ptr()
            entry[:5] = output.kind, address, output.step_bytes, output.chunk_bytes, output.word
        # Once for each plan, this waits: another stream may use the table next.
        self._table = torch.from_numpy(table).to(device)
        self._stream = stream
        self._count, self._length, self._addresses = plan.count, plan.length, plan.packet_words
        slices = min(max(1, plan.largest // SLICE), MOST_SLICES)
        self._launch = _gather[(plan.count, len(plan.outputs), slices)]

    def __call__(self, packet: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Enqueue the copies on the current stream.

        Args:
            packet: on the device, ``int64`` ``[n]``: what :class:`GatherPlan` says, and then the addresses of the
                outputs. Its memory must not be used again on another stream before the copies are done.
            stream: the current stream.
        """
        if stream != self._stream:  # so that the memory of the table is not used again before this has read it
            self._table.record_stream(stream)
        self._launch(
            self._table,
            packet,
            self._count,
            self._length,
            self._addresses,
            ENTRY=ENTRY,
            STEPS=STEPS,
            VALUES=VALUES,
            IDS=IDS,
            OFFSETS=OFFSETS,
            SIZE=BLOCK,
        )
