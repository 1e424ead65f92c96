"""Permutations stay in the TEE: in nothing that is sent but what they permute, in no log, error or repr."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from tests.helpers import make_model

from veriattn.errors import VeriattnError
from veriattn.shield.permutation import LayerShield, Shield, ShieldMode
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig
from veriattn.wire.channel import Channel
from veriattn.wire.messages import Kind

DTYPES = (np.uint8, np.uint16, np.int32, np.int64)
STEP = Batch((BatchEntry(0, 0, (5, 9, 2, 77, 30), "last"), BatchEntry(1, 0, (8, 8, 100), "last")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VerifierModel:
    path = tmp_path_factory.mktemp("secrecy") / "tiny"
    make_model(path, head_dim=32)
    return VerifierModel(path)


def layers_of(shield: Shield) -> list[LayerShield]:
    return [*shield._static, *(layer for layers in shield._sequences.values() for layer in layers)]


def orders_of(shield: Shield) -> list[np.ndarray[Any, Any]]:
    """Every head's permutation and its inverse, and the whole order of rows."""
    rows = [row for layer in layers_of(shield) for p in (layer.qk, layer.v) for row in p.order]
    flat = [shield.row_order(i) for i in range(len(shield._static))]
    return [a for order in (*rows, *flat) for a in (order, np.argsort(order))]


@pytest.mark.parametrize("mode", ["static", "session"])
def test_no_permutation_crosses_or_is_printed(
    mode: ShieldMode, model: VerifierModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sent: list[bytes] = []
    send = Channel.send

    def record(self: Channel, kind: Kind, *payload: Any, **kwargs: Any) -> None:
        sent.extend(bytes(memoryview(p).cast("B")) for p in payload if memoryview(p).nbytes)
        send(self, kind, *payload, **kwargs)

    monkeypatch.setattr(Channel, "send", record)
    session = Session(model, ChildProver, SessionConfig(kv_shield=mode), Flow.VERIATTN)
    session.run(STEP)
    shield = session._shield
    assert shield is not None
    orders = orders_of(shield)
    signs = [row for layer in layers_of(shield) for p in (layer.qk, layer.v) if p.sign is not None for row in p.sign]
    assert len(orders) >= 2 * (2 * 2 * 2 + 2) and (mode == "static" or len(signs) == 2 * 2 * 2 * 2)
    crossed = b"".join(sent)
    assert (5).to_bytes(4, "little") in crossed and len(crossed) > 10_000
    for order in orders:
        # Half a permutation would be as bad.
        assert not any(order[:16].astype(dtype).tobytes() in crossed for dtype in DTYPES)
    assert not any(sign.tobytes() in crossed or np.packbits(sign > 0).tobytes() in crossed for sign in signs)
    with pytest.raises(VeriattnError) as caught:
        session.run(Batch((BatchEntry(0, 1, (1,)),)))  # does not continue its sequence
    said = f"{caught.value!r} {caught.value} {caught.value.hint} {caplog.text} {session!r} {shield!r}"
    said += " ".join(f"{layer!r} {layer.qk!r} {layer.v!r} {vars(layer)!r}" for layer in layers_of(shield))
    for order in orders:
        assert str(order[:8].tolist())[1:-1] not in said and " ".join(map(str, order[:8])) not in said
    session.close()
    assert not any(p.order.any() for layer in shield._static for p in (layer.qk, layer.v))
    assert not any(a.any() for a in shield._inverse_rows)


def test_sessions_and_sequences_never_share_permutations(model: VerifierModel) -> None:
    config = model.tensors.config
    seen: set[bytes] = set()
    for _ in range(3):
        shield = Shield(config, "session")
        for seq_id in range(3):
            shield.layer(0, seq_id)
        for layer in layers_of(shield):
            for p in (layer.qk, layer.v):
                for row in p.order:
                    assert row.tobytes() not in seen  # 32! of them
                    seen.add(row.tobytes())
    assert len(seen) == 3 * (1 + 3) * 2 * 2 * 2
