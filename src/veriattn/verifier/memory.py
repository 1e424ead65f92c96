"""Memory of keys and values in the TEE: what a step will need, and a refusal before a limit would be passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veriattn.errors import ConfigError
from veriattn.spec.kv import PagedCache


@dataclass(frozen=True)
class Need:
    """What a step adds to caches of several layers, which grow alike: new keys (seq_id, count).

    extra_bytes: what those who own the caches hold beside them, once the step has run.
    """

    caches: Sequence[PagedCache]
    runs: Sequence[tuple[int, int]]
    extra_bytes: int = 0


def reserve(needs: Sequence[Need], max_bytes: int) -> None:
    """Grow the caches for a step: doubling where that fits under the limit, otherwise by just what is needed.

    Bounds: from then on, until the next step, the caches take at most `max_bytes`. (While one array of one layer moves to its
    new place it exists twice.) Raises: ConfigError before anything has changed.
    """
    short = [n.caches[0].pages_short(n.runs) if n.caches else 0 for n in needs]
    total = sum(n.extra_bytes + sum(c.nbytes for c in n.caches) for n in needs)
    total += sum(pages * sum(c.page_bytes for c in n.caches) for n, pages in zip(needs, short, strict=True))
    if total > max_bytes:
        raise ConfigError(
            f"keys and values in the TEE would take {total} bytes, the limit is {max_bytes}",
            hint="raise --tee-memory, or run fewer or shorter sequences at a time",
        )
    left = max_bytes - total
    for need, pages in zip(needs, short, strict=True):
        if pages == 0:
            continue
        page_bytes = sum(c.page_bytes for c in need.caches)
        spare = min(max(need.caches[0].pages - pages, 0), left // page_bytes)
        left -= spare * page_bytes
        for cache in need.caches:
            cache.grow(pages + spare)
