"""Looking for known bytes in a dump of a process's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_PIECE_WORDS = 1 << 20
_BLOOM_BITS = 24


def pairs_of(values: npt.NDArray[Any]) -> Words:
    """Every two neighbouring 8-byte words of an array, (pairs, 2), without those of few different bytes."""
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    words = raw[: len(raw) // 8 * 8].view(np.uint64)
    pairs: Words = np.unique(np.stack([words[:-1], words[1:]], axis=1), axis=0)
    ordered = np.sort(pairs.view(np.uint8), axis=1)
    telling: Words = pairs[np.count_nonzero(np.diff(ordered, axis=1), axis=1) >= 6]
    return telling


def found(path: Path, pairs: Words) -> npt.NDArray[np.bool_]:
    """Which pairs of words stand in a dump at a multiple of 8, as rows of arrays do.

    Two words: the last bytes of a block in use, behind what its owner asked for, may keep one of its previous owner's.
    """

    def keys(first: Words, second: Words) -> Words:
        mixed: Words = first * np.uint64(0x9E3779B97F4A7C15) + second
        return mixed

    wanted, words, hits = keys(pairs[:, 0], pairs[:, 1]), np.fromfile(path, np.uint64), []
    mask = np.uint64((1 << _BLOOM_BITS) - 1)
    may_be = np.zeros(1 << _BLOOM_BITS, np.bool_)
    may_be[wanted & mask] = True
    for start in range(0, len(words) - 1, _PIECE_WORDS):
        piece = words[start : start + _PIECE_WORDS + 1]
        have = keys(piece[:-1], piece[1:])
        hits.append(np.unique(have[may_be[have & mask]]))
    return np.isin(wanted, np.concatenate(hits))
