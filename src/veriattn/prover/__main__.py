"""`python -m veriattn.prover`: the untrusted side, started by the verifier."""

from __future__ import annotations

import os
import sys

from veriattn.errors import VeriattnError
from veriattn.native import set_threads
from veriattn.prover.serve import serve
from veriattn.wire.channel import inherited_channel


def main() -> int:
    """Serve the verifier on the inherited descriptor until it goes away."""
    threads = os.environ.get("VERIATTN_THREADS", "")
    if threads.isdigit() and int(threads) > 0:
        set_threads(int(threads))
    try:
        with inherited_channel() as channel:
            serve(channel)
    except VeriattnError as e:
        print(f"veriattn prover: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
