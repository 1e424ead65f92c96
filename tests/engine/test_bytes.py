"""What crosses the link is what the shapes say, to the byte: no strategy moves more than docs/strategies.md counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from veriattn.bench.traffic import Bytes, step_bytes
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.verifier import tiling
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig
from veriattn.verifier.tiling import Tiling
from veriattn.wire.messages import AttentionCheck

STEPS = [(0, 100, 0), (100, 160, 1), (260, 1, 1), (261, 7, 0)]
OFF = Tiling(1, 1, pipeline=False)
CASES = [
    (Flow.RUN_AHEAD, None, False), (Flow.RUN_AHEAD, None, True), (Flow.UNVERIFIED, None, False), (Flow.TSDP, None, False),
    (Flow.VERIATTN, None, False), (Flow.VERIATTN, None, True), (Flow.VERIATTN, Tiling(5, 3), True), (Flow.VERIATTN, OFF, True),
]  # fmt: skip


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that scores of one run need several exchanges."""
    monkeypatch.setattr(tiling, "SCORE_BYTES", 300_000)


@pytest.mark.parametrize(("flow", "cut", "transfer"), CASES)
def test_bytes(flow: Flow, cut: Tiling | None, transfer: bool, tiny_model: Path) -> None:
    model = VerifierModel(tiny_model)
    check = AttentionCheck.TRANSFER if transfer else AttentionCheck.REPLAY
    config = SessionConfig(tiling=cut, attention_check=check)
    with Session(model, lambda m: ChildProver(m, threads=1), config, flow) as session:
        channel = session.channel
        for start, tokens, rows in STEPS:
            before = channel.bytes_sent, channel.bytes_received
            session.run(Batch((BatchEntry(0, start, tuple(range(tokens)), "last" if rows else "none"),)))
            measured = Bytes(channel.bytes_sent - before[0], channel.bytes_received - before[1])
            assert measured == step_bytes(model.tensors.config, flow, start, tokens, rows, cut, transfer)
