"""Reproductions and attacks on the tiny checkpoint: what they find must be what the arithmetic says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veriattn.floatmode.calibrate import calibration_prompts
from veriattn.floatmode.checks import generator
from veriattn.floatmode.engine import FloatConfig, FloatModel
from veriattn.floatmode.params import CheckParams
from veriattn.floatmode.prover import FloatProver
from veriattn.floatmode.reproduce import lemmas, published, steering, table1, underflow
from veriattn.floatmode.reproduce.attacks import Target, largest, learn, one_weight, pair, small_row
from veriattn.floatmode.reproduce.heads import Head, capture, claims
from veriattn.floatmode.reproduce.local_link import calibrated, hello_of
from veriattn.floatmode.reproduce.report import write

PARAMS = CheckParams(n_a=4)


@pytest.fixture(scope="module")
def heads(model: FloatModel) -> list[Head]:
    return capture(model, [int(t) for t in np.random.default_rng(3).integers(3, 260, 48)])


def target(head: Head, **limits: float) -> Target:
    return Target(head, ("float32", "float32"), {"exp": 1e-3, "values": 1e-3, **limits}, PARAMS)


def test_captured_heads_are_those_of_the_forward_pass(model: FloatModel, heads: list[Head]) -> None:
    c = model.config
    assert len(heads) == c.num_layers * c.num_kv_heads
    assert {(h.tokens, h.group, h.k.shape[1]) for h in heads} == {(48, c.num_heads // c.num_kv_heads, c.head_dim)}


def test_claims_of_tiles_are_softmax_attention(heads: list[Head]) -> None:
    head = heads[0]
    c = claims(head, 40, 48, "float32", "float32")
    s = head.q[40 * head.group :].astype(np.float64) @ head.k.T.astype(np.float64) * head.k.shape[1] ** -0.5
    e = np.exp(s)
    e[np.arange(48)[None, :] >= c.tile.visible[:, None]] = 0
    wanted = e @ head.v / e.sum(axis=1, keepdims=True)
    c.tile.clear_masked()
    assert np.abs(c.u / c.tile.e.sum(axis=0)[:, None] - wanted).max() < 1e-5


def test_faults_of_the_paper_are_found_in_float32(heads: list[Head]) -> None:
    out = table1.trials(heads[:2], ("float32", "float32"), 40)
    assert set(out) == set(table1.CELLS)
    for cell in out.values():
        assert cell["detected"] == cell["faulty"] == 40
        assert cell["unusable_in_calibration"] == 0


def test_measured_false_accepts_stay_at_the_bounds() -> None:
    data = lemmas.measure(60)
    assert max(data["worst_excess_in_standard_errors"].values()) < 6
    loose = [
        r for r in data["lemma2"] if r["errors"] == 2 and r["format"] == "float32" and r["tau_a"] == 1 and r["n_a"] == 2
    ]
    assert all(r["accepted"] > 0.2 for r in loose)


def test_an_excess_would_be_seen() -> None:
    assert lemmas.excess([{"bound": 0.1, "accepted": 0.5}], 100) > 6


def test_half_precision_rejects_wide_rows(model: FloatModel) -> None:
    rows = {r["range"]: r for r in underflow.sweep(20)}
    assert rows[8]["float16"] == {"max": 0.0, "none": 0.0}
    assert rows[60]["float16"]["max"] == rows[60]["float16"]["none"] == 1.0
    assert rows[60]["float32"] == {"max": 0.0, "none": 0.0}


def test_a_small_change_of_a_weight_passes_and_a_large_one_does_not(heads: list[Head]) -> None:
    t = target(heads[0])
    assert t.rate(t.e, draws=20) == 1.0
    found = one_weight(t)
    assert 1e-6 < found["change"] < 0.1
    e = t.e
    e[int(np.argmax(e))] *= 2
    assert t.rate(e, draws=20) == 0.0


def test_a_coordinated_pair_passes_once_in_n_a(heads: list[Head]) -> None:
    found = pair(target(heads[1]))
    assert abs(found["rate_at_e5"] - 1 / PARAMS.n_a) < 6 * (0.25 * 0.75 / 500) ** 0.5


def test_a_vector_that_is_kept_is_learnt_and_a_fresh_one_is_not(heads: list[Head]) -> None:
    found = learn(target(heads[0]))
    assert found["classes_right"] == found["classes"] <= PARAMS.n_a
    assert found["accepted_reused"] == found["forgeries"]
    assert 0.1 < found["accepted_fresh"] / found["forgeries"] < 0.4


def test_small_rows_move_more_without_the_shift(heads: list[Head]) -> None:
    found = small_row([Head(0, 6 * h.q, h.k, h.v) for h in heads], ("float32", "float32"), PARAMS)
    assert found["shift none"]["output"] > found["shift max"]["output"] > 0
    assert found["shift none"]["z"] < found["shift max"]["z"]


def test_bisection() -> None:
    assert largest(lambda x: x <= 0.5, 1e-3, 10.0, 30) == pytest.approx(0.5, rel=1e-3)
    assert largest(lambda _x: False, 1e-3, 10.0) == 0.0


def test_steering_turns_tokens_only_within_the_tolerance(model: FloatModel) -> None:
    rng = np.random.default_rng(1)
    ids = [int(t) for t in rng.integers(3, 260, 60)]
    config = FloatConfig(params=CheckParams(calibration_runs=4, factor=32.0))
    prover = FloatProver(model.source, hello_of(model, config))
    limits, hopeless = calibrated(model, config, calibration_prompts(ids, 30), 3, prover)
    assert hopeless == 0
    tight = steering.measure(model, config, prover, limits, ids[:20], 8)
    assert tight["honest_rejected"] == 0.0
    wide = steering.measure(model, config, prover, {k: 1e5 * v for k, v in limits.items()}, ids[:20], 8)
    assert wide["head"]["flipped"] == 1.0
    assert wide["head"]["median_margin_moved"] > tight["head"]["median_margin_moved"] > 0
    assert steering.measure(model, config, prover, dict.fromkeys(limits, 0.0), ids[:20], 4)["all"]["rejected"] == 1.0


def test_results_are_written_with_their_machine(tmp_path: Path) -> None:
    drawn: list[Any] = []
    written = write(tmp_path / "out", "published", published.measure(1), lambda _data, figure: drawn.append(figure))
    data = json.loads(Path(written["file"]).read_text())
    assert data["machine"]["cpu"] and all(row["source"] for row in data["figures"])
    assert (data["plot"] is not None) == bool(drawn)


def test_seeds_are_for_experiments() -> None:
    assert generator(5).random() == generator(5).random()
