"""`python -m veriattn.redteam.leftovers DIR`: an honest prover that writes down all of its memory when sequences end.

After each FREE, once the prover has done what it does then, everything that this process may write to (heap, stacks,
caches, rings) goes to `memory-N.bin`, N counting from 0. With `--keep` it overwrites pages of the cache only, as a control.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veriattn.errors import VeriattnError
from veriattn.native.kernels import wipe_free_memory
from veriattn.prover.serve import serve
from veriattn.wire.channel import Channel, inherited_channel
from veriattn.wire.messages import Kind

_PIECE_BYTES = 1 << 20


def writable_regions() -> Iterator[tuple[int, int]]:
    """First and last address of each mapping of this process that can be written to."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, rights = line.split()[:2]
        if rights.startswith("rw"):
            first, last = (int(part, 16) for part in place.split("-"))
            yield first, last


def dump(path: Path) -> None:
    """Write all writable memory to a file, which appears under its name when it is complete."""
    part = path.with_suffix(".part")
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        with part.open("wb") as out:
            for first, last in writable_regions():
                for at in range(first, last, _PIECE_BYTES):
                    try:
                        out.write(os.pread(memory, min(_PIECE_BYTES, last - at), at))
                    except OSError:  # a guard page, or one that the kernel keeps for itself
                        continue
    finally:
        os.close(memory)
    part.rename(path)


class DumpingChannel:
    """A channel that dumps before it waits for the message after a FREE."""

    def __init__(self, channel: Channel, out: Path, keep: bool) -> None:
        self._channel, self._out, self._keep = channel, out, keep
        self._freed, self._count = False, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def wipe(self) -> None:
        """As the channel's, unless it is to forget."""
        if not self._keep:
            self._channel.wipe()

    def recv_any(self, *args: Any, **kwargs: Any) -> tuple[Kind, memoryview]:
        """As the channel's."""
        if self._freed:
            dump(self._out / f"memory-{self._count}.bin")
            self._count += 1
        kind, payload = self._channel.recv_any(*args, **kwargs)
        self._freed = kind is Kind.FREE
        return kind, payload


def nothing() -> None:
    """In place of overwriting."""


def main() -> int:
    """Serve like `python -m veriattn.prover`, writing into the directory that is the last argument."""
    keep = "--keep" in sys.argv
    try:
        with inherited_channel() as channel:
            dumping: Any = DumpingChannel(channel, Path(sys.argv[-1]), keep)
            serve(dumping, wipe=nothing if keep else wipe_free_memory)
    except VeriattnError as e:
        print(f"leftovers: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
