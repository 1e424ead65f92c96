"""Sessions at random: every flow, capacity, check and shield together; one wrong claim somewhere, or none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers import LocalModel, make_model
from tests.verifier.shares import FLOWS, VOCABULARY, ThreadProver, settings

from veriattn.errors import VerificationError
from veriattn.native import get_threads, kernels, set_threads
from veriattn.prover.serve import ChannelSink
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.verifier import checks
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session
from veriattn.wire.channel import Channel
from veriattn.wire.messages import AttentionCheck

SHAPES: list[dict[str, Any]] = [
    {"num_heads": 6, "num_kv_heads": 2, "intermediate_size": 72},
    {"num_heads": 3, "num_kv_heads": 3, "qkv_bias": True, "qk_norm": True, "k_center": True, "rotary_dim": 6},
    {"num_heads": 4, "num_kv_heads": 1},
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = get_threads()
    set_threads(1)
    yield
    set_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[VerifierModel, Path]]:
    paths = [tmp_path_factory.mktemp("models") / str(i) for i in range(len(SHAPES))]
    for path, shape in zip(paths, SHAPES, strict=True):
        make_model(path, vocab_size=VOCABULARY, **shape)
    return [(VerifierModel(path), path) for path in paths]


class Lie:
    """Alters one element of the n-th claim that has any; `told` is the claim's name from then on."""

    def __init__(self, rng: np.random.Generator, at: int | None) -> None:
        self._rng, self._left = rng, at
        self.told: str | None = None

    def __call__(self, channel: Channel) -> ChannelSink:
        lie = self

        class Sink(ChannelSink):
            def claim(self, name: str, values: np.ndarray[Any, Any]) -> None:
                super().claim(name, lie.of(name, values))

        return Sink(channel)

    def of(self, name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self._left is None or not values.size:
            return values
        self._left -= 1
        if self._left != -1:
            return values
        # Of scores, the first is one that its row sees.
        at = 0 if "scores" in name else int(self._rng.integers(values.size))
        values, self.told = values.copy(), name
        values.reshape(-1)[at] += values.dtype.type(self._rng.choice([1, -1, 1 << 20]))
        return values


def random_settings(rng: np.random.Generator, flow: Flow) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "attention_check": (AttentionCheck.REPLAY, AttentionCheck.TRANSFER, "auto")[rng.integers(3)]
    }
    capacity = rng.integers(3)
    if capacity:
        name, most = (("prover_kv_tokens", 40), ("prover_kv_total", 400))[capacity - 1]
        chosen |= {name: int(rng.integers(most)), "offload_ratio": (None, 0.0, 0.3, 1.0)[rng.integers(4)]}
    if flow is not Flow.RUN_AHEAD:
        chosen["kv_shield"] = ("off", "static", "session")[rng.integers(3)]
        chosen["shield_first_layers"] = int(rng.random() < 0.3)
    return chosen


def random_step(rng: np.random.Generator, lengths: dict[int, int]) -> list[BatchEntry]:
    entries = []
    for seq_id in rng.permutation(5)[: rng.integers(1, 4)].tolist():
        start = lengths.get(seq_id, 0)
        count = int(rng.integers(250, 600) if start == 0 and rng.random() < 0.2 else rng.integers(1, 50))
        ids = tuple(rng.integers(4, 300, count).tolist())
        entries.append(BatchEntry(seq_id, start, ids, ("none", "last", "all")[rng.integers(3)]))
    return entries


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize("seed", range(16))
def test_right_bits_or_an_error(
    models: list[tuple[VerifierModel, Path]], flow: Flow, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed % 4 < 2:  # claims of any size lie in the same memory, one after the other
        monkeypatch.setattr(checks, "_KEPT_BYTES", 0)
    rng = np.random.default_rng([seed, *flow.value.encode()])
    model, path = models[rng.integers(len(models))]
    local, lengths = LocalModel.open(path, kernels), {}  # type: ignore[var-annotated]
    lie = Lie(rng, int(rng.integers(40)) if seed % 2 else None)
    caught = None
    session = Session(model, lambda m: ThreadProver(m.path, lie), settings(**random_settings(rng, flow)), flow)
    with session:
        for _ in range(4):
            for gone in [s for s in lengths if rng.random() < 0.2]:
                del lengths[gone]
                session.free(gone)
                local.ops.free(gone)
            entries = random_step(rng, lengths)
            right = local.step(*entries)
            try:
                assert np.array_equal(session.run(Batch(tuple(entries))), right)
            except VerificationError as e:
                caught = e
                break
            assert lie.told is None
            lengths |= {e.seq_id: e.start + e.num_tokens for e in entries}
    assert (caught is None) == (lie.told is None), (caught, lie.told)
    if seed % 2 == 0:
        assert caught is None
