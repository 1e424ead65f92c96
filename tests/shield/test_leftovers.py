"""What is left in an honest prover's memory once a sequence has ended: nothing of it, anywhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers import LocalModel, make_model

from veriattn.native import kernels
from veriattn.redteam.search import Words, found, pairs_of
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry, forward
from veriattn.spec.reference import I8, I32, I64
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig
from veriattn.wire.messages import AttentionCheck

ENDED = (5, 9, 2, 77, 30, 4, 41, 8, 8, 100, 17, 3)
LIVE = (6, 2, 2, 9, 13, 1)
DECODED = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 bytes and more."""
    path = tmp_path_factory.mktemp("leftovers") / "tiny"
    make_model(path, hidden_size=128, head_dim=64, rotary_dim=32, intermediate_size=192)
    return path


class Traces:
    """Operations that note everything that a prover sees or makes."""

    def __init__(self, model: LocalModel) -> None:
        self._ops = model.ops
        self.seen: dict[str, list[np.ndarray[Any, Any]]] = {
            k: [] for k in ("key", "value", "query", "activation", "claim", "sum")
        }

    def linear(self, name: str, a_i8: I8) -> I32:
        y = self._ops.linear(name, a_i8)
        self.seen["activation"].append(a_i8)
        self.seen["claim"].append(y)
        return y

    def attention(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        o, row_sum = self._ops.attention(layer, batch, x)
        for name, values in {"key": x.k_i8, "value": x.v_i8, "query": x.q_i8, "sum": o}.items():
            self.seen[name].append(values)
        return o, row_sum

    def pairs(self) -> dict[str, Words]:
        return {
            name: np.unique(np.concatenate([pairs_of(a) for a in arrays]), axis=0) for name, arrays in self.seen.items()
        }


def traces_of(model: Path, tokens: tuple[int, ...]) -> dict[str, Words]:
    """All that a prover handles of a prompt and three steps of decoding, as pairs of words."""
    local = LocalModel.open(model, kernels)
    traces = Traces(local)
    for start, ids in [(0, tokens[:-DECODED]), *((len(tokens) - i, tokens[-i:][:1]) for i in range(DECODED, 0, -1))]:
        forward(local.tensors, Batch((BatchEntry(0, start, ids),)), traces, kernels)
    return traces.pairs()


def dumps(model: Path, out: Path, flow: Flow, keep: bool = False, **settings: object) -> list[Path]:
    """Run two sequences, end one, run a step of the other, end that; the prover's memory after each end."""
    out.chmod(0o777)
    command = (sys.executable, "-m", "veriattn.redteam.leftovers", *(["--keep"] if keep else []), str(out))
    config = SessionConfig(**settings)  # type: ignore[arg-type]
    with Session(VerifierModel(model), lambda m: ChildProver(m, command), config, flow) as session:
        at = len(ENDED) - DECODED
        session.run(Batch((BatchEntry(0, 0, ENDED[:at]), BatchEntry(1, 0, LIVE[:2]))))
        for i in range(DECODED):
            session.run(
                Batch((BatchEntry(0, at + i, ENDED[at + i : at + i + 1]), BatchEntry(1, 2 + i, LIVE[2 + i : 3 + i])))
            )
        session.free(0)
        session.run(Batch((BatchEntry(1, 2 + DECODED, LIVE[2 + DECODED :]),)))
        session.free(1)
        files = [out / "memory-0.bin", out / "memory-1.bin"]
        deadline = time.monotonic() + 120
        while not files[1].exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    return files


WAYS = {
    "run-ahead": (Flow.RUN_AHEAD, {}),
    "run-ahead-transfer": (Flow.RUN_AHEAD, {"attention_check": AttentionCheck.TRANSFER}),
    "veriattn": (Flow.VERIATTN, {}),
    "veriattn-split": (Flow.VERIATTN, {"prover_kv_tokens": 4, "offload_ratio": 1.0}),
    "tsdp": (Flow.TSDP, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_a_sequence_is_left_when_it_has_ended(way: str, tiny: Path, tmp_path: Path) -> None:
    """Not in pages, rings, arrays that were freed, stacks; the other sequence goes on with what is its own."""
    flow, settings = WAYS[way]
    ended, live = traces_of(tiny, ENDED), traces_of(tiny, LIVE)
    first, second = dumps(tiny, tmp_path, flow, **settings)
    assert found(first, live["key"]).any() and found(first, live["value"]).any()
    for name in ended:
        shared = np.isin(ended[name][:, 0], live[name][:, 0])
        assert np.count_nonzero(~shared) > 300
        assert not found(first, ended[name][~shared]).any(), name
        assert not found(second, np.concatenate([ended[name], live[name]])).any(), name


@pytest.mark.parametrize(
    ("way", "sorts"), [("run-ahead", ("claim", "sum")), ("veriattn", ("key", "value", "claim", "sum"))]
)
def test_a_prover_that_forgets_to_overwrite_would_be_seen(
    way: str, sorts: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    ended = traces_of(tiny, ENDED)
    flow, settings = WAYS[way]
    first, _ = dumps(tiny, tmp_path, flow, keep=True, **settings)
    for name in sorts:
        assert found(first, ended[name]).any(), name
    assert found(first, ended["claim"]).mean() > 0.5
