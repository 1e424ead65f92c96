"""The command line; the only part that knows click."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        # Loading the package takes a moment, in which Ctrl-C must not print where it stood.
        from veriattn.cli.app import main as run  # noqa: PLC0415
    except KeyboardInterrupt:
        sys.stderr.write("error[interrupted]: interrupted\n")
        return 130
    return run(arguments)
