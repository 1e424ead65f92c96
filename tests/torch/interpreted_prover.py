"""The prover with the CUDA backend on CPU tensors, through Triton's interpreter: a program for `--prover-command`.

An argument replaces the size from which claims are written straight into the ring.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

from veriattn.prover.cuda import memory
from veriattn.prover.cuda.backend import CudaBackend
from veriattn.prover.serve import serve
from veriattn.wire.channel import inherited_channel
from veriattn.wire.messages import Hello


def backend(hello: Hello) -> CudaBackend:
    limits = hello.limits
    return CudaBackend(
        Path(hello.model_path), expected_digest=hello.model_digest, kv_tokens=limits.kv_tokens,
        max_sequences=limits.max_sequences, device="cpu",
    )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) > 1:
        memory.STAGED_BYTES = int(sys.argv[1])
    with inherited_channel() as channel:
        serve(channel, backend)
    sys.exit(0)
