"""How a layer's attention is cut for the two-level pipeline, and a choice of it from measured times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

#: Fewer rows than this are not worth cutting: there is nothing to overlap in a decode step.
MIN_ROWS = 16

#: Most memory of the scores of one exchange, on either side, where scores cross the link row by row.
SCORE_BYTES = 32 << 20

_TRIES = 3


def score_tiles(tokens: int, keys: int, heads: int) -> list[tuple[int, int]]:
    """First row and rows of the tiles of a run whose rows have `keys` scores per head: at least one row each."""
    rows = max(1, SCORE_BYTES // (4 * heads * max(keys, 1)))
    return [(at, min(rows, tokens - at)) for at in range(0, tokens, rows)]


def score_groups(runs: Sequence[tuple[int, int]], heads: int) -> list[list[tuple[int, int, int]]]:
    """What goes into one request for scores after another: (run, first row, rows) each, no run twice in a request.

    runs: (start, tokens) each. Whole runs share a request as long as their scores fit; one that does not fit is cut.
    """
    groups: list[list[tuple[int, int, int]]] = []
    room = 0
    for i, (start, tokens) in enumerate(runs):
        for at, n in score_tiles(tokens, start + tokens, heads):
            size = 4 * heads * n * (start + at + n)
            if not groups or size > room or groups[-1][-1][0] == i:
                groups.append([])
                room = SCORE_BYTES
            groups[-1].append((i, at, n))
            room -= size
    return groups


@dataclass(frozen=True)
class Tiling:
    """Level 1: head blocks per layer. Level 2: row tiles per head block. `pipeline` off means one of each, in turn."""

    head_blocks: int
    row_tiles: int
    pipeline: bool = True

    @classmethod
    def default(cls, keys: int, rows: int) -> Tiling:
        """The paper's: (2, 16) to 1k tokens, (4, 32) to 3k, (8, 32) above; a few rows go in one piece."""
        if rows < MIN_ROWS:
            return cls(1, 1)
        if keys <= 1024:
            return cls(2, 16)
        return cls(4, 32) if keys <= 3072 else cls(8, 32)

    def kv_blocks(self, kv_heads: int) -> list[range]:
        """KV heads of each block; as even as they go."""
        blocks = min(self.head_blocks, kv_heads) if self.pipeline else 1
        edges = [kv_heads * i // blocks for i in range(blocks + 1)]
        return [range(a, b) for a, b in pairwise(edges)]

    def tile_rows(self, tokens: int) -> int:
        """Rows of a tile."""
        return -(-tokens // self.row_tiles) if self.pipeline else tokens


def candidates(kv_heads: int, rows: int) -> list[Tiling]:
    """Cuts worth trying, coarse ones first: at most one block per KV head and one row per tile."""
    cuts = [(1, 1), (1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (2, 16), (4, 16), (4, 32), (8, 32)]
    return [Tiling(b, t) for b, t in cuts if b <= kv_heads and t <= rows]


def next_tiling(measured: Mapping[Tiling, Sequence[float]]) -> Tiling:
    """The cut for the next layer, given the seconds that layers have taken with each candidate.

    Each is tried once, then the best three twice more; after that it is the one with the least time (of equals the first).
    Raises: ValueError without candidates.
    """
    for tiling, times in measured.items():
        if not times:
            return tiling
    ranked = sorted(measured, key=lambda t: min(measured[t]))
    for tiling in ranked[:3]:
        if len(measured[tiling]) < _TRIES:
            return tiling
    return min(measured, key=lambda t: min(measured[t]))


class AutoTiling:
    """Cuts the first layers of a long step in different ways, and the others in the best of them.

    Measured anew when a step has more than twice or less than half as many rows or keys as the one measured. Times steer
    the pipeline only: a prover that plays with them makes its own work slower, and no check depends on them.
    """

    def __init__(self) -> None:
        self._shape = (0, 0)
        self._measured: dict[Tiling, list[float]] = {}

    def next(self, keys: int, rows: int, kv_heads: int) -> Tiling:
        """The cut for the next layer."""
        if rows < MIN_ROWS:
            return Tiling(1, 1)
        if not all(a <= 2 * b and b <= 2 * a for a, b in zip(self._shape, (keys, rows), strict=True)):
            self._shape = keys, rows
            self._measured = {tiling: [] for tiling in candidates(kv_heads, rows)}
        return next_tiling(self._measured)

    def took(self, tiling: Tiling, rows: int, seconds: float) -> None:
        """What a layer took with the cut that `next` gave."""
        if rows >= MIN_ROWS and len(self._measured[tiling]) < _TRIES:
            self._measured[tiling].append(seconds)
