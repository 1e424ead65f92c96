"""What a prover's compute backend must do, and the order in which its claims leave."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from veriattn.spec.forward import Batch
from veriattn.wire.messages import AttentionCheck

Array = np.ndarray[Any, Any]


class ClaimSink(Protocol):
    """Takes claims in the order of docs/wire.md section 6. `name` says which one, for traces and tests."""

    def claim(self, name: str, values: Array) -> None:
        """Send one claim; `values` is C-contiguous and not changed afterwards."""
        ...


class Backend(Protocol):
    """Runs the canonical forward pass and owns the weights and the KV cache."""

    device: str

    def step(self, batch: Batch, check: AttentionCheck, sink: ClaimSink | None) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One step. With a sink, every claim goes there as soon as it is known. Returns logits for the rows asked for."""
        ...

    def length(self, seq_id: int) -> int:
        """Cached tokens of a sequence."""
        ...

    def free(self, seq_id: int) -> None:
        """Forget a sequence and zero its memory."""
        ...
