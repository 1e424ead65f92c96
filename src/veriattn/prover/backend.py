"""What a prover's compute backend must do, and the order in which its claims leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

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


#: Begins to write a claim's bytes: (which claim, from which byte on, where to); the result waits until they are there.
StartPiece = Callable[[int, int, memoryview], Callable[[], None]]


@runtime_checkable
class GroupSink(ClaimSink, Protocol):
    """Takes the claims of a layer together, in their order; `name` is the layer's."""

    @property
    def memory(self) -> memoryview | None:
        """Shared memory that claims are written to, where there is such a thing: a device may write there by itself."""
        ...

    def claim_group(self, name: str, claims: Sequence[Array]) -> None:
        """Send claims; they may be overwritten afterwards."""
        ...

    def claim_pieces(self, name: str, sizes: Sequence[int], start: StartPiece) -> None:
        """Send claims of so many bytes each, which `start` writes to `memory` piece by piece. Only where there is memory."""
        ...


class Backend(Protocol):
    """Runs the canonical forward pass, or single operations of it, and owns the weights and the KV cache."""

    device: str
    config: ModelConfig

    def step(
        self, batch: Batch, check: AttentionCheck, sink: ClaimSink | None, split: SplitStep | None = None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One step. With a sink, every claim goes there when it is known, some only with `finish`. Attention of the sequences
        in `split` is shared with the verifier; their keys are not kept. Without a sink, returns logits for the rows asked
        for; with one they are the verifier's to compute, and nobody uses the result."""
        ...

    def finish(self) -> None:
        """Send what is left of the answers to earlier requests: nothing else is to be done meanwhile."""
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
