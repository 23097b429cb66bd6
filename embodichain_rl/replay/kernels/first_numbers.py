"""The first numbers of seeded Mersenne twisters, without the twisters: the twin of ``ec_first_numbers``, in NumPy.

It takes about a millisecond for a few seeds, and for a thousand.
"""

from __future__ import annotations

import numpy as np

__all__ = ["FIRST_NUMBERS", "first_numbers"]

FIRST_NUMBERS = 8
"""The numbers that are computed of each seed."""

SHIFT = 397
"""Distance of the words of the state that the Mersenne twister combines."""

TWIST, UPPER, LOWER = 0x9908B0DF, 0x80000000, 0x7FFFFFFF


def first_numbers(seeds: np.ndarray) -> np.ndarray:
    """Return the numbers that ``torch.Generator().manual_seed(seed)`` draws first, ``float64`` ``[n, FIRST_NUMBERS]``.

    Args:
        seeds: below 2**32, ``int64`` ``[n]``.
    """
    words = _first_words(seeds.astype(np.uint32))
    # As torch: of each pair of words the first is the upper one, and the lowest 53 bits count.
    pairs = (words[0::2].astype(np.uint64) << np.uint64(32)) | words[1::2]
    return np.ascontiguousarray((pairs & np.uint64((1 << 53) - 1)).T * 2.0**-53)


def _first_words(seeds: np.ndarray) -> np.ndarray:
    """Return the first ``2 * FIRST_NUMBERS`` words of the Mersenne twister for each seed, ``uint32`` ``[words, n]``."""
    count = 2 * FIRST_NUMBERS
    state = np.empty((SHIFT + count, len(seeds)), dtype=np.uint32)
    state[0] = seeds
    scratch = np.empty_like(seeds)
    factor, shift = np.uint32(1812433253), np.uint32(30)
    for number in range(1, len(state)):
        before, word = state[number - 1], state[number]
        np.right_shift(before, shift, out=scratch)
        np.bitwise_xor(before, scratch, out=scratch)
        np.multiply(scratch, factor, out=word)
        word += np.uint32(number)
    low = state[1 : count + 1]
    mixed = (state[:count] & np.uint32(UPPER)) | (low & np.uint32(LOWER))
    words = state[SHIFT:] ^ (mixed >> np.uint32(1)) ^ ((low & np.uint32(1)) * np.uint32(TWIST))
    words ^= words >> np.uint32(11)
    words ^= (words << np.uint32(7)) & np.uint32(0x9D2C5680)
    words ^= (words << np.uint32(15)) & np.uint32(0xEFC60000)
    return words ^ (words >> np.uint32(18))
