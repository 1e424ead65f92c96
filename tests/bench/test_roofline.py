"""Rooflines are pure functions: exact values from round rates, and what must hold for any."""

from __future__ import annotations

import dataclasses
import math

import pytest

from veriattn.bench.rates import device_link, device_side, with_link
from veriattn.bench.roofline import (
    Floor,
    LinkRates,
    Operation,
    Rates,
    ScoreRates,
    SideRates,
    attention_operations,
    check_seconds,
    head_floor,
    in_turns,
    layer_floor,
    linear_operations,
    linear_seconds,
    overlapped,
    visible_scores,
)
from veriattn.bench.shapes import shape
from veriattn.bench.traffic import Bytes, Part, attention_bytes
from veriattn.verifier.session import Flow
from veriattn.wire.emulate import Throttle

SCORES = ScoreRates(attend=4.0, replay=2.0, transfer=1.0, softmax=0.5, qk=1.5, pv=2.5)
#: Memory without limit, so that every second below comes from an operation.
SIDE = SideRates(
    macs=8.0, read=math.inf, copy=math.inf, check=0.25, token=3.0, token_one=5.0, many=SCORES, one=SCORES
)  # fmt: skip
RATES = Rates(SIDE, SIDE)
TINY = shape("tiny")  # hidden 64, 4 heads, 2 KV heads of 16, 96 wide, vocabulary of 320
#: Multiply-adds and claimed integers of one layer's linears, for one row.
MACS, CLAIMS = 64 * 128 + 64 * 64 + 192 * 64 + 64 * 96, 128 + 64 + 192 + 64


def test_a_product_is_bound_by_operations_or_by_reading_its_weights() -> None:
    side = dataclasses.replace(SIDE, macs=100.0, read=10.0)
    assert linear_seconds(side, 20, 30, 50) == 300.0
    assert linear_seconds(side, 20, 30, 5) == 60.0


def test_a_check_is_bound_by_claims_or_by_challenges() -> None:
    side = dataclasses.replace(SIDE, check=0.25, read=16.0)
    assert check_seconds(side, 100, 10, 40) == 4 * 40 * 100 / 16 + 100 + 10
    assert check_seconds(dataclasses.replace(side, check=1.0), 100, 10, 40) == 4000.0


def test_visible_scores_are_causal() -> None:
    assert visible_scores(TINY, Part(0, 3)) == 4 * (1 + 2 + 3)
    assert visible_scores(TINY, Part(10, 2)) == 4 * (11 + 12)


def test_overlapped_is_the_longest_and_in_turns_the_sum() -> None:
    op = Operation(Bytes(30, 40), prover=5.0, during=2.0, after=3.0)
    r = dataclasses.replace(RATES, link=LinkRates(10.0, 5.0, 0.5))
    assert overlapped(op, r) == Floor(8.0 + 1.0, prover=5.0, link=8.0, tee=5.0)
    assert in_turns(op, r, replay=True).seconds == 3.0 + 5.0 + 8.0 + 3.0 + 1.0
    assert in_turns(op, r, replay=False).seconds == 3.0 + 7.0 + 8.0 + 3.0 + 1.0
    assert overlapped(op, r).limit == "link"


def test_copies_and_crowded_cores_count() -> None:
    op = Operation(Bytes(30, 40), prover=5.0, during=2.0, after=3.0)
    slow = dataclasses.replace(SIDE, copy=10.0)
    r = Rates(slow, slow, tee_threads=2, prover_threads=2, cores=2)
    assert r.crowding == 2.0
    assert overlapped(op, r) == Floor(24.0, prover=24.0, link=0.0, tee=24.0)
    assert Rates(slow, slow, tee_threads=16, prover_threads=None, cores=2).crowding == 1.0


@pytest.mark.parametrize(("flow", "seconds"), [
    # full-tee and the unverified prover: products, 10 scores a head, elementwise
    (None, 4 * MACS / 8 + 40 * 4.0 + 4 * 5.0),
    (Flow.UNVERIFIED, 4 * MACS / 8 + 40 * 4.0 + 4 * 5.0),
    # run-ahead: the prover is slower than its checks
    (Flow.RUN_AHEAD, 4 * MACS / 8 + 40 * 4.0 + 4 * 5.0),
    # a few rows go in one piece: product, then its check; attention beside its replay
    (Flow.VERIATTN, 4 * MACS / 8 + 4 * CLAIMS * 0.25 + 40 * 4.0 + 4 * 5.0),
    # scores of all rows and keys, sent, checked and made into weights; then products with the values
    (Flow.TSDP, 4 * MACS / 8 + 4 * CLAIMS * 0.25 + 64 * (1.5 + 1.0 + 0.5 + 2.5) + 4 * 5.0),
])  # fmt: skip
def test_a_layer_of_four_rows(flow: Flow | None, seconds: float) -> None:
    floor, _ = layer_floor(TINY, flow, [Part(0, 4)], RATES)
    assert floor.seconds == pytest.approx(seconds, rel=1e-12)


def test_the_pipeline_hides_checks_where_there_are_rows_enough() -> None:
    floor, attention = layer_floor(TINY, Flow.VERIATTN, [Part(0, 16)], RATES)
    assert attention.seconds == 136 * 4 * 4.0
    assert floor.seconds == pytest.approx(16 * MACS / 8 + 136 * 4 * 4.0 + 16 * 3.0, rel=1e-12)


def test_shared_attention_is_the_longer_side_then_the_check() -> None:
    # 600 keys, 100 kept by the prover, half of the rest wanted there: one block of 256.
    part = Part(599, 1, limit=100, ratio=0.52)
    (op,) = attention_operations(TINY, Flow.VERIATTN, part, RATES)
    assert op == Operation(attention_bytes(TINY, Flow.VERIATTN, [part]), 4 * 356 * 4.0, 4 * 244 * 4.0, 4 * 356 * 1.0)
    _, attention = layer_floor(TINY, Flow.VERIATTN, [part], RATES)
    assert attention.seconds == 4 * 356 * 4.0 + 4 * 356 * 1.0
    # Under tsdp all of them cross the link.
    first, second = attention_operations(TINY, Flow.TSDP, part, RATES)
    assert first.prover + second.prover == 4 * 600 * 4.0
    assert first.moved + second.moved == attention_bytes(TINY, Flow.TSDP, [part])


def test_run_ahead_meets_the_prover_at_shared_attention_only() -> None:
    whole, _ = layer_floor(TINY, Flow.RUN_AHEAD, [Part(599, 1)], RATES)
    assert whole.seconds == MACS / 8 + 600 * 4 * 4.0 + 5.0
    shared, attention = layer_floor(TINY, Flow.RUN_AHEAD, [Part(599, 1, limit=0, ratio=0.0)], RATES)
    assert attention.seconds == 600 * 4 * 4.0  # all in the TEE
    assert shared.seconds == MACS / 8 + 5.0 + 600 * 4 * 4.0


def test_the_linears_of_a_layer_move_what_is_on_paper() -> None:
    for flow in (Flow.RUN_AHEAD, Flow.TSDP):
        operations = linear_operations(TINY, flow, 5, RATES)
        assert [op.prover for op in operations] == [5 * n / 8 for n in (64 * 128, 64 * 64, 192 * 64, 64 * 96)]
        claims = sum(op.moved.from_prover for op in operations)
        assert 0 <= 4 * 5 * CLAIMS + 4 * 32 - claims < 4  # headers do not divide evenly


def test_the_vocabulary_comes_on_top_of_the_layers() -> None:
    head = head_floor(TINY, None, 2, RATES)
    assert head.seconds == 2 * 320 * 64 / 8
    assert head_floor(TINY, Flow.TSDP, 2, RATES).seconds == 2 * 320 * 64 / 8 + 2 * 320 * 0.25
    assert head_floor(TINY, Flow.RUN_AHEAD, 0, RATES).seconds == 0.0


def test_an_emulated_link_is_no_faster_than_the_real_one() -> None:
    slow = with_link(RATES, Throttle(15, 4))
    assert slow.link == LinkRates(15e9, 15e9, 4e-6)
    bus = dataclasses.replace(RATES, link=LinkRates(1e9, 50e9))
    assert with_link(bus, Throttle(15)).link == LinkRates(1e9, 15e9, 0.0)


def test_a_device_is_four_figures() -> None:
    figures = {
        "macs_per_s": 1e15, "read_bytes_per_s": 4e12, "to_device_bytes_per_s": 5e10, "from_device_bytes_per_s": 4e10,
    }  # fmt: skip
    side = device_side(TINY, figures)
    assert (side.macs, side.read, side.copy) == (1e15, 4e12, math.inf)
    assert side.many.attend == 3 * 16 / 1e15
    assert side.token == (4 * (128 + 128 + 192) + 8 * 64) / 4e12
    assert device_link(figures) == LinkRates(5e10, 4e10)


@pytest.mark.parametrize("name", ["llama-3b", "llama-8b", "qwen-14b", "phi-14b", "smollm2"])
@pytest.mark.parametrize("part", [Part(0, 1024), Part(8191, 1)])
def test_overlap_never_costs(name: str, part: Part) -> None:
    """run-ahead <= veriattn <= tsdp on one and the same machine, whatever the shape."""
    c = shape(name)
    scores = ScoreRates(attend=1e-9, replay=4e-10, transfer=4e-10, softmax=2e-10, qk=4e-10, pv=6e-10)
    side = SideRates(4e11, 3e10, 1e10, 1e-10, 2e-5, 6e-5, scores, scores)
    r = Rates(side, side, LinkRates(15e9, 15e9))
    floors = [layer_floor(c, flow, [part], r)[0].seconds for flow in (Flow.RUN_AHEAD, Flow.VERIATTN, Flow.TSDP)]
    assert floors == sorted(floors) and floors[0] > 0
