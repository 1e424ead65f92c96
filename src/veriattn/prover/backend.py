"""What a prover's compute backend must do, and the order in which its claims leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from veriattn.spec.forward import Batch
from veriattn.spec.model import ModelConfig
from veriattn.wire.messages import AttentionCheck
from veriattn.wire.operations import AttendRequest, LinearRequest, LoadRequest, WeightsRequest
from veriattn.wire.split import SplitRequest

if TYPE_CHECKING:
    from veriattn.prover.split import SplitProver, SplitStep

Array = np.ndarray[Any, Any]


class ClaimSink(Protocol):
    """Takes claims in the order of docs/wire.md section 6. `name` says which one, for traces and tests."""

    def claim(self, name: str, values: Array) -> None:
        """Send one claim; `values` is C-contiguous. Its memory is used again after the call: what is kept must be copied."""
        ...


class Backend(Protocol):
    """Runs the canonical forward pass, or single operations of it, and owns the weights and the KV cache."""

    device: str
    config: ModelConfig

    def step(
        self, batch: Batch, check: AttentionCheck, sink: ClaimSink | None, split: SplitStep | None = None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One step. With a sink, every claim goes there as soon as it is known. Attention of the sequences in `split` is
        shared with the verifier; their keys are not kept. Returns logits for the rows asked for."""
        ...

    def load_rows(self, request: LoadRequest) -> None:
        """Take rows of a weight matrix in place of the model's; in effect when all rows of the matrix have come."""
        ...

    def linear(self, request: LinearRequest, sink: ClaimSink) -> None:
        """One linear of the verifier's activations; claims the int32 product (rows, out)."""
        ...

    def attend(self, request: AttendRequest, sink: ClaimSink) -> None:
        """Append keys and values; per run and tile of rows claim scores i32 (heads, rows, keys so far) and/or outputs
        i64 (rows, heads, d), as the request's reply says."""
        ...

    def weights(self, request: WeightsRequest, sink: ClaimSink) -> None:
        """Claim O = P V, i64 (rows, heads, d), of given attention weights."""
        ...

    def split(self, request: SplitRequest, sink: ClaimSink, shares: SplitProver) -> None:
        """Answer a SPLIT request that brings its queries."""
        ...

    def length(self, seq_id: int) -> int:
        """Cached tokens of a sequence."""
        ...

    def free(self, seq_id: int) -> None:
        """Forget a sequence and zero its memory."""
        ...
