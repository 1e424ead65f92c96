"""Replay or transfer of attention scores, chosen for each phase from measured times.

Replay costs the TEE d multiply-adds per score, transfer costs four bytes per score on the link and a few operations:
which one is faster depends on the CPU, the bus and the model. Both are exact. Times steer speed only: a prover that
plays with them makes its own work slower, and no check depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from veriattn.spec.forward import Batch
from veriattn.spec.model import ModelConfig
from veriattn.verifier.tiling import MIN_ROWS
from veriattn.wire.messages import AttentionCheck

#: How often each is tried before one is settled on.
TRIES = 3
#: Scores of a step above which transfer is not tried: a bad guess would cost seconds.
MOST_TRIED_BYTES = 1 << 28

Measured = Mapping[AttentionCheck, Sequence[float]]


def next_check(measured: Measured, bytes_: int) -> AttentionCheck:
    """The check for a step whose scores would take `bytes_`, given the seconds per score that steps of its kind have taken.

    Each is tried TRIES times in turn (the first try of each also pays for memory and warming up), then it is the one with
    the least time. Replay where transfer has not been tried and would be expensive to try.
    """
    replay, transfer = (len(measured.get(c, ())) for c in (AttentionCheck.REPLAY, AttentionCheck.TRANSFER))
    if transfer < TRIES and bytes_ > MOST_TRIED_BYTES:
        return AttentionCheck.REPLAY
    if replay < TRIES or transfer < TRIES:
        return AttentionCheck.REPLAY if replay <= transfer else AttentionCheck.TRANSFER
    return min(AttentionCheck, key=lambda check: min(measured[check]))


def score_count(config: ModelConfig, batch: Batch) -> int:
    """Scores of a step, over all layers and heads: what replay computes and transfer sends."""
    pairs = sum(e.num_tokens * (e.start + e.num_tokens) for e in batch.entries)
    return config.num_layers * config.num_heads * pairs


@dataclass
class AutoCheck:
    """Chooses for each step of a session. Prefill and decode are measured apart, and anew when contexts have grown fourfold."""

    config: ModelConfig
    _measured: dict[tuple[bool, int], dict[AttentionCheck, list[float]]] = field(default_factory=dict)

    def _kind(self, batch: Batch) -> dict[AttentionCheck, list[float]]:
        rows = max(e.num_tokens for e in batch.entries)
        keys = max(e.start + e.num_tokens for e in batch.entries)
        kind = rows >= MIN_ROWS, keys.bit_length() // 2
        return self._measured.setdefault(kind, {check: [] for check in AttentionCheck})

    def next(self, batch: Batch) -> AttentionCheck:
        """The check for this step."""
        return next_check(self._kind(batch), 4 * score_count(self.config, batch))

    def took(self, batch: Batch, check: AttentionCheck, seconds: float) -> None:
        """What attention took in this step."""
        times = self._kind(batch)[check]
        if len(times) < TRIES:
            times.append(seconds / score_count(self.config, batch))
