"""The catalogue again over TCP: the same lies, the same errors. Left out is what needs a shared segment to attack."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.adversary.conftest import SHAPE
from tests.adversary.test_catalogue import OTHER, patience_s
from tests.helpers import tiny_config

from veriattn.redteam.attack import Attack
from veriattn.redteam.catalogue import SCRIPT_STEPS, Case, boundary_cases, catalogue
from veriattn.redteam.launcher import LiarPool
from veriattn.redteam.trial import Script, run_trial
from veriattn.verifier.model import VerifierModel

BOUNDARY = {case.name for case in boundary_cases()}
CASES = [case for case in catalogue(tiny_config(**SHAPE), OTHER) if case.name not in BOUNDARY]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attack_meets_its_error(
    case: Case, model: VerifierModel, pool: LiarPool, script: Script, other_path: Path
) -> None:
    attack = case.attack if case.attack.text != OTHER else Attack(case.attack.kind, text=str(other_path))
    outcome = run_trial(
        model, pool, script, attack, case.check, patience_s(case), case.flow, geometry=None, limit=case.limit
    )
    assert outcome.code in case.codes, outcome
    assert case.steps is None or outcome.steps == case.steps, outcome
    assert not outcome.problems
    assert bool(outcome.applied) == case.applied, outcome


@pytest.mark.parametrize("case", {(c.check, c.flow, c.limit): c for c in CASES}.values(), ids=lambda case: case.name)
def test_honest_twins(case: Case, model: VerifierModel, pool: LiarPool, script: Script) -> None:
    twin = run_trial(model, pool, script, Attack(), case.check, flow=case.flow, geometry=None, limit=case.limit)
    assert (twin.code, twin.steps, twin.problems, twin.applied) == ("ok", SCRIPT_STEPS, [], None)
