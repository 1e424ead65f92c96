"""The offload controller: finds the cheapest ratio from anywhere, stays there, follows a change."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from veriattn.verifier.offload import GAIN, RUNGS, Controller, Measurement

KEYS = 10_000
EXACT = settings(deadline=None, max_examples=60, derandomize=True)
Cost = Callable[[float], float]


def two_sides(exchange: float, link: float, check: float, own: float = 1.0) -> Cost:
    """Cost per key where both sides work at a time: own work on what stays, transfer and the prover's work on what is
    streamed, its check, and the exchange itself, which only p = 0 saves."""

    def cost(p: float) -> float:
        return own if p == 0 else exchange + check * p + max(own * (1 - p), link * p)

    return cost


def run(controller: Controller, steps: int, cost: Cost) -> tuple[Controller, list[float]]:
    used = []
    for _ in range(steps):
        used.append(controller.ratio)
        controller = controller.update(Measurement(KEYS, KEYS * cost(controller.ratio) * 1e-6))
    return controller, used


def best_of(cost: Cost) -> float:
    return min(cost(i / 1000) for i in range(1001))


PARTS = st.tuples(st.floats(0, 1), st.floats(0.01, 10), st.floats(0, 1.5))
LADDER = 60  # measurements in which a ladder is climbed, whatever the costs


@EXACT
@example(start=0.0, parts=(0.271, 1.507, 0.0))
@given(start=st.floats(0, 1), parts=PARTS)
def test_converges_from_any_start(start: float, parts: tuple[float, float, float]) -> None:
    cost = two_sides(*parts)
    controller, _ = run(Controller.start(start), LADDER, cost)
    assert cost(controller.best_ratio) <= 1.1 * best_of(cost)


def test_the_best_lies_between_rungs_that_lose_to_nothing() -> None:
    """p = 0 beats 1/4 and 1/2, but not 0.4."""
    cost = two_sides(0.27, 1.5, 0.0)
    assert cost(0) < min(cost(0.25), cost(0.5))
    for start in (0.0, 0.4, 1.0):
        controller, _ = run(Controller.start(start), LADDER, cost)
        assert abs(controller.best_ratio - 0.4) <= 1 / RUNGS


@EXACT
@given(start=st.floats(0, 1), parts=PARTS)
def test_stays_and_tries_others_rarely(start: float, parts: tuple[float, float, float]) -> None:
    cost = two_sides(*parts)
    controller, _ = run(Controller.start(start), LADDER, cost)
    best = controller.best_ratio
    total = 0.0
    for _ in range(800):
        total += cost(controller.ratio)
        controller, _ = run(controller, 1, cost)
        assert controller.best_ratio == best
    assert total / 800 <= cost(best) * 1.05


@EXACT
@given(before=PARTS, after=PARTS)
def test_follows_a_change(before: tuple[float, float, float], after: tuple[float, float, float]) -> None:
    controller, _ = run(Controller(), 200, two_sides(*before))
    cost = two_sides(*after)
    controller, _ = run(controller, 2500, cost)
    assert cost(controller.best_ratio) <= 1.1 * best_of(cost)


def test_a_slower_link_is_noticed_at_once() -> None:
    fast, slow = two_sides(0.05, 0.5, 0.1), two_sides(0.05, 4.0, 0.1)
    controller, _ = run(Controller(), 100, fast)
    assert controller.best_ratio == pytest.approx(0.67, abs=1 / RUNGS)
    controller, _ = run(controller, LADDER, slow)
    assert slow(controller.best_ratio) <= 1.1 * best_of(slow)


@EXACT
@given(noise=st.lists(st.floats(0.87, 1.15), min_size=400, max_size=400))
def test_noise_costs_little(noise: list[float]) -> None:
    cost = two_sides(0.05, 1.0, 0.1)
    controller, total = Controller(), 0.0
    for i, n in enumerate(noise):
        if i >= LADDER:
            total += cost(controller.ratio)
        controller = controller.update(Measurement(KEYS, KEYS * cost(controller.ratio) * n * 1e-6))
    assert total / (400 - LADDER) <= 1.3 * best_of(cost)


def interrupted(rng: random.Random) -> Callable[[], float]:
    """Factors of measurements on a shared machine: one in seven much too long, none too short."""
    return lambda: 1.0 + abs(rng.gauss(0, 0.08)) + (rng.expovariate(1 / 0.8) if rng.random() < 0.15 else 0.0)


def scattered(rng: random.Random) -> Callable[[], float]:
    """Every measurement is off by a sixth, either way."""
    return lambda: math.exp(rng.gauss(0, 0.15))


def crowded(rng: random.Random) -> Callable[[], float]:
    """Now and then everything is slow for a while."""
    state = [0, 1.0]

    def factor() -> float:
        if state[0] <= 0 and rng.random() < 0.01:
            state[:] = [rng.randrange(5, 35), 1.0 + rng.expovariate(1 / 0.6)]
        state[0] -= 1
        return (state[1] if state[0] > 0 else 1.0) + abs(rng.gauss(0, 0.05))

    return factor


@pytest.mark.parametrize("noise", [interrupted, scattered, crowded], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "cost",
    [lambda p: 1.0 if p == 0 else 1.35 + 0.6 * p, lambda p: 1.0 + 0.5 * abs(p - 0.4), lambda p: 2.0 - p],
    ids=["nothing", "some", "all"],
)
def test_a_shared_machine_costs_little(cost: Cost, noise: Callable[[random.Random], Callable[[], float]]) -> None:
    """What the chosen ratios really cost, over many runs of a thousand measurements, trials included."""
    total = 0.0
    for seed in range(40):
        factor, controller = noise(random.Random(seed)), Controller()
        for _ in range(1000):
            total += cost(controller.ratio)
            controller = controller.update(Measurement(KEYS, KEYS * cost(controller.ratio) * factor() * 1e-6))
    assert total / 40_000 <= 1.07 * best_of(cost)


@EXACT
@example([(10, s) for s in (5e-324, 1.0, 1.0, 1.0, 1.0)])  # no time at all, on the best rung and in a trial
@example([(10, s) for s in (1.0, 1.0, 5e-324, 1.0, 1.0)])
@example([(1, s) for s in (1e308, 1e308, 5e-324, 5e-324, 1e308, 1e308, 1e308, 1e308)])
@given(st.lists(st.tuples(st.integers(-5, 10**9), st.floats(allow_nan=True, allow_infinity=True)), max_size=80))
def test_no_measurement_leads_out_of_range(measured: list[tuple[int, float]]) -> None:
    """Whoever delays answers, in whatever pattern, gets another ratio in [0, 1] and nothing else."""
    controller = Controller()
    for keys, seconds in measured:
        controller = controller.update(Measurement(keys, seconds))
        assert 0 <= controller.ratio <= 1 and 0 <= controller.best_ratio <= 1
        assert all(r is None or math.isfinite(r) for r in controller.ratios)


def test_a_prover_that_is_slow_on_purpose_is_given_nothing() -> None:
    """It can only make streaming not worth it; a verifier that computes everything is as fast as without it."""
    honest = two_sides(0.0, 0.2, 0.05)
    controller, _ = run(Controller(), 100, honest)
    assert controller.best_ratio > 0.7

    def delayed(p: float) -> float:
        return honest(p) + (50.0 if p else 0.0)

    controller, _ = run(controller, 100, delayed)
    assert controller.best_ratio == 0
    # As long as it stays slow, trials cost it, and us, less and less often.
    _, used = run(controller, 2000, delayed)
    assert sum(1 for p in used if p) <= 30
    controller, _ = run(controller, 2500, honest)
    assert controller.best_ratio > 0.7


@pytest.mark.parametrize("measurement", [(0, 0.1), (-1, 0.1), (10, 0.0), (10, -1.0), (10, math.inf), (10, math.nan)])
def test_what_is_no_measurement_changes_nothing(measurement: tuple[int, float]) -> None:
    controller = Controller.start(0.7)
    assert controller.update(Measurement(*measurement)) is controller


@pytest.mark.parametrize(("ratio", "rung"), [(0, 0), (1, RUNGS), (-3, 0), (7, RUNGS), (0.5, 8), (0.52, 8)])
def test_the_start_is_a_rung(ratio: float, rung: int) -> None:
    assert Controller.start(ratio).ratio == rung / RUNGS


def test_differences_below_the_margin_are_noise() -> None:
    """Costs that differ by less than the margin never move it, in whatever order they come."""
    controller, used = run(Controller(), 500, lambda p: 1.0 + GAIN * 0.9 * (p - 0.5))
    assert controller.best_ratio == 0.5 and used.count(0.5) > 400
