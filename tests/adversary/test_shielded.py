"""Lies under a KV shield: the same lies where the verifier asks for operations, the same errors, the same honest twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.adversary.conftest import SHAPE
from tests.helpers import tiny_config

from veriattn.redteam.attack import Attack
from veriattn.redteam.catalogue import FREIVALDS, SCRIPT_STEPS, SETUPS, TIMEOUT, Case, mediated_cases
from veriattn.redteam.launcher import LiarPool
from veriattn.redteam.trial import Script, run_trial
from veriattn.shield.permutation import ShieldMode
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow

SHIELDS: dict[str, tuple[ShieldMode, int]] = {
    "static": ("static", 0),
    "session": ("session", 0),
    "session+1": ("session", 1),
}
SHIELDED = {name: how for name, how in SETUPS.items() if how.flow in (Flow.VERIATTN, Flow.TSDP)}
CASES = [c for c in mediated_cases(tiny_config(**SHAPE)) if c.flow is not Flow.RUN_AHEAD and TIMEOUT not in c.codes]


def outside_the_tee(case: Case, own_layers: int) -> Attack:
    """The same lie in a claim that still exists where the first layers' attention stays with the verifier."""
    first = own_layers > 0 and case.attack.claim == "layers.0.o"
    return replace(case.attack, claim="layers.0.gate_up") if first else case.attack


# `session` without layers in the TEE differs from `session+1` in the first layer only: single bits there.
PAIRS = [(case, shield) for case in CASES for shield in SHIELDS if shield != "session" or "/bit/" in case.name]


@pytest.mark.parametrize(("case", "shield"), PAIRS, ids=[f"{case.name}-{shield}" for case, shield in PAIRS])
def test_attack_meets_its_error(case: Case, shield: str, model: VerifierModel, pool: LiarPool, script: Script) -> None:
    mode, own = SHIELDS[shield]
    attack = outside_the_tee(case, own)
    outcome = run_trial(
        model, pool, script, attack, case.check, flow=case.flow, limit=case.limit, shield=mode, own_layers=own
    )
    assert outcome.code in case.codes, outcome
    assert case.steps is None or outcome.steps == case.steps, outcome
    assert not outcome.problems
    assert outcome.applied, outcome


@pytest.mark.parametrize("shield", SHIELDS)
@pytest.mark.parametrize("setup", SHIELDED)
def test_honest_twins(setup: str, shield: str, model: VerifierModel, pool: LiarPool, script: Script) -> None:
    how, (mode, own) = SHIELDED[setup], SHIELDS[shield]
    twin = run_trial(
        model, pool, script, Attack(), how.check, flow=how.flow, limit=how.limit, runs=2, shield=mode, own_layers=own
    )
    assert (twin.code, twin.steps, twin.problems, twin.applied) == ("ok", 2 * SCRIPT_STEPS, [], None)


@pytest.mark.parametrize("setup", SHIELDED)
def test_a_prover_that_ignores_the_permuted_rows(
    setup: str, model: VerifierModel, pool: LiarPool, script: Script
) -> None:
    how = SHIELDED[setup]
    outcome = run_trial(
        model, pool, script, Attack("ignore_load"), how.check, flow=how.flow, limit=how.limit, shield="static"
    )
    assert (outcome.code, outcome.steps, outcome.applied, outcome.problems) == (FREIVALDS, 0, True, [])


def test_all_ways_are_here() -> None:
    assert set(SHIELDED) == {"veriattn-replay", "veriattn-transfer", "tsdp", "veriattn-split", "tsdp-split"}
    assert len(CASES) > 90
