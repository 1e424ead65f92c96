"""`python -m veriattn.redteam.leaky DIR`: an honest prover whose memory leaks into DIR, for the attacks in kv_leak.py.

Per sequence, when it ends: `kv-SEQ.npz` (keys, scales and values of every layer as the cache holds them), `seen-SEQ.npz` (the
activations that the prover was given for the linears of the first layers, and the qkv matrices it works with) and
`after-SEQ.json` (how many bytes of the cache are not zero once the sequence has been freed).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from veriattn.errors import VeriattnError
from veriattn.native import set_threads
from veriattn.prover.backend import Backend, ClaimSink
from veriattn.prover.cpu import CpuBackend
from veriattn.prover.serve import serve
from veriattn.spec.reference import I8
from veriattn.wire.channel import inherited_channel
from veriattn.wire.messages import Hello
from veriattn.wire.operations import LinearRequest, LoadRequest

#: Layers whose linear inputs are written down.
WATCHED_LAYERS = 3


class LeakyBackend(CpuBackend):
    """`CpuBackend` that writes down what its memory holds."""

    def __init__(self, directory: Path, out: Path, **settings: Any) -> None:
        super().__init__(directory, **settings)
        self._out = out
        self._inputs: dict[str, list[I8]] = {}
        self._loaded: dict[str, list[I8]] = {}

    def load_rows(self, request: LoadRequest) -> None:
        name = self._linear_names[request.index]
        self._loaded.setdefault(name, []).append(request.w_i8)
        super().load_rows(request)

    def linear(self, request: LinearRequest, sink: ClaimSink) -> None:
        name = self._linear_names[request.index]
        if any(name.startswith(f"layers.{i}.") for i in range(WATCHED_LAYERS)):
            self._inputs.setdefault(name, []).append(request.a_i8)
        super().linear(request, sink)

    def free(self, seq_id: int) -> None:
        held: dict[str, np.ndarray[Any, Any]] = {}
        for layer in range(self.config.num_layers):
            if self.operations.layer_length(layer, seq_id):
                for name in ("k", "k_scale", "v"):
                    held[f"{layer}.{name}"] = self.operations.gather(layer, seq_id, name)
        np.savez(self._out / f"kv-{seq_id}.npz", **held)  # type: ignore[arg-type]
        seen = {f"input.{name}": np.concatenate(parts) for name, parts in self._inputs.items()}
        seen |= {f"weight.{name}": np.concatenate(parts) for name, parts in self._loaded.items()}
        np.savez(self._out / f"seen-{seq_id}.npz", **seen)  # type: ignore[arg-type]
        self._inputs.clear()
        super().free(seq_id)
        left = self.operations.nonzero_cache_bytes()
        part = self._out / f"after-{seq_id}.part"
        part.write_text(json.dumps({"nonzero_cache_bytes": left}))
        part.rename(self._out / f"after-{seq_id}.json")


def main() -> int:
    """Serve like `python -m veriattn.prover`, writing into the directory that is the last argument."""
    out = Path(sys.argv[-1])
    set_threads(1)

    def make(hello: Hello) -> Backend:
        return LeakyBackend(
            Path(hello.model_path),
            out,
            expected_digest=hello.model_digest,
            kv_tokens=hello.limits.kv_tokens,
            max_sequences=hello.limits.max_sequences,
        )

    try:
        with inherited_channel() as channel:
            serve(channel, make)
    except VeriattnError as e:
        print(f"leaky prover: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
