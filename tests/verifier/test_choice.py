"""The choice between replay and transfer: tries both, settles on the faster, never bets on an expensive try."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers import LocalModel, tiny_config

from veriattn.spec.forward import Batch, BatchEntry
from veriattn.verifier.choice import MOST_TRIED_BYTES, TRIES, AutoCheck, next_check, score_count
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig
from veriattn.wire.messages import AttentionCheck

REPLAY, TRANSFER = AttentionCheck.REPLAY, AttentionCheck.TRANSFER


def simulate(costs: dict[AttentionCheck, list[float]], steps: int, bytes_: int = 100) -> list[AttentionCheck]:
    """What is chosen, step after step, where the n-th use of a check costs costs[check][n] (the last from there on)."""
    measured: dict[AttentionCheck, list[float]] = {REPLAY: [], TRANSFER: []}
    used = {REPLAY: 0, TRANSFER: 0}
    chosen = []
    for _ in range(steps):
        check = next_check(measured, bytes_)
        cost = costs[check][min(used[check], len(costs[check]) - 1)]
        used[check] += 1
        if len(measured[check]) < TRIES:
            measured[check].append(cost)
        chosen.append(check)
    return chosen


@pytest.mark.parametrize(("replay", "transfer", "best"), [(2.0, 1.0, TRANSFER), (1.0, 2.0, REPLAY), (1.0, 1.0, REPLAY)])
def test_settles_on_the_faster(replay: float, transfer: float, best: AttentionCheck) -> None:
    chosen = simulate({REPLAY: [replay], TRANSFER: [transfer]}, 20)
    assert chosen[: 2 * TRIES].count(REPLAY) == chosen[: 2 * TRIES].count(TRANSFER) == TRIES
    assert set(chosen[2 * TRIES :]) == {best}


def test_a_slow_first_try_decides_nothing() -> None:
    assert simulate({REPLAY: [1.0], TRANSFER: [50.0, 0.5]}, 10)[-1] is TRANSFER


def test_does_not_try_what_would_be_expensive() -> None:
    assert set(simulate({REPLAY: [9.0], TRANSFER: [1.0]}, 20, MOST_TRIED_BYTES + 1)) == {REPLAY}


def test_what_was_measured_on_short_steps_holds_for_long_ones() -> None:
    assert next_check({REPLAY: [2.0] * TRIES, TRANSFER: [1.0] * TRIES}, MOST_TRIED_BYTES * 8) is TRANSFER


def test_prefill_and_decode_are_measured_apart() -> None:
    config = tiny_config()
    auto = AutoCheck(config)
    prefill = Batch((BatchEntry(0, 0, (1,) * 100),))
    decode = Batch((BatchEntry(0, 100, (1,)),))
    for batch, cost in ((prefill, {REPLAY: 1.0, TRANSFER: 2.0}), (decode, {REPLAY: 2.0, TRANSFER: 1.0})):
        for _ in range(2 * TRIES):
            check = auto.next(batch)
            auto.took(batch, check, cost[check])
    assert (auto.next(prefill), auto.next(decode)) == (REPLAY, TRANSFER)
    # A context more than four times as long is measured anew.
    assert auto.next(Batch((BatchEntry(0, 900, (1,)),))) is REPLAY


def test_scores_are_counted_over_layers_and_heads() -> None:
    config = tiny_config()
    batch = Batch((BatchEntry(0, 10, (1, 2)), BatchEntry(1, 0, (3,))))
    assert score_count(config, batch) == config.num_layers * config.num_heads * (2 * 12 + 1)


@pytest.mark.parametrize("flow", [Flow.RUN_AHEAD, Flow.VERIATTN])
def test_a_session_changes_from_step_to_step(tiny_model: Path, flow: Flow) -> None:
    """Both checks in one session, the verifier's sums kept for either; the logits are the canonical ones."""
    local = LocalModel.open(tiny_model)
    config = SessionConfig(attention_check="auto")
    received = []
    with Session(VerifierModel(tiny_model), ChildProver, config, flow) as session:
        for position in range(2 * TRIES + 2):
            entry = BatchEntry(0, position, (5 + position,))
            before = session.channel.bytes_received
            assert session.run(Batch((entry,))).tobytes() == local.step(entry).tobytes()
            received.append(session.channel.bytes_received - before)
    # Steps by transfer bring the scores too.
    assert len({received[0] < r for r in received[1 : 2 * TRIES]}) == 2
