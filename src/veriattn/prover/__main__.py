"""`python -m veriattn.prover`: the untrusted side, started by the verifier, or listening with `--listen`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from veriattn.errors import VeriattnError
from veriattn.native import set_threads
from veriattn.prover.devices import DEVICES, backend_factory
from veriattn.prover.finder import ModelFinder
from veriattn.prover.listen import Listener
from veriattn.prover.serve import FIRST_MESSAGE_S, serve
from veriattn.wire.channel import inherited_channel


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m veriattn.prover",
        description="The untrusted prover. Without --listen it expects the descriptor that a verifier hands to it.",
        epilog="example: python -m veriattn.prover --listen tcp://127.0.0.1:7707 --model-dir ~/models",
    )
    parser.add_argument("--listen", metavar="ADDRESS", help="tcp://HOST:PORT, vsock://CID:PORT or unix:///PATH")
    parser.add_argument(
        "--model-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a model, or a directory of models, to be found by digest; may be given several times",
    )
    parser.add_argument("--sessions", type=int, default=1, metavar="N", help="serve N verifiers at a time (default: 1)")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where the model runs (default: cpu)")
    options = parser.parse_args(arguments)
    if options.listen is not None and not options.model_dir:
        parser.error("--listen needs --model-dir: models are found by digest")
    if options.sessions < 1:
        parser.error("--sessions must be at least 1")
    return options


def main(arguments: Sequence[str] = ()) -> int:
    """Serve the verifier on the inherited descriptor until it goes away, or verifiers that connect until a signal comes."""
    options = _options(arguments)
    threads = os.environ.get("VERIATTN_THREADS", "")
    if threads.isdigit() and int(threads) > 0:
        set_threads(int(threads))
    try:
        if options.listen is not None:
            listener = Listener(options.listen, options.model_dir, options.sessions, options.device)
            signal.signal(signal.SIGTERM, listener.stop)
            signal.signal(signal.SIGINT, listener.stop)
            print(f"listening at {listener.address}", flush=True)
            listener.run()
            return 0
        finder = ModelFinder(options.model_dir) if options.model_dir else None
        with inherited_channel() as channel:
            factory = backend_factory(options.device, finder)
            serve(channel, factory, first_message_s=FIRST_MESSAGE_S if finder else None)
    except VeriattnError as e:
        print(f"veriattn prover: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
