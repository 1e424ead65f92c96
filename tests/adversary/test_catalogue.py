"""Every named attack meets its error, and no more steps than it may; its untampered twin passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.adversary.conftest import SHAPE
from tests.helpers import tiny_config

from veriattn.redteam.attack import Attack
from veriattn.redteam.catalogue import SCRIPT_STEPS, TIMEOUT, Case, catalogue
from veriattn.redteam.launcher import LiarPool
from veriattn.redteam.trial import Script, run_trial
from veriattn.verifier.model import VerifierModel
from veriattn.wire.messages import AttentionCheck

OTHER = "the other model's path"
CASES = catalogue(tiny_config(**SHAPE), OTHER)


def patience_s(case: Case) -> float:
    return 1.5 if TIMEOUT in case.codes else 60.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attack_meets_its_error_and_its_twin_passes(
    case: Case, model: VerifierModel, pool: LiarPool, script: Script, other_path: Path
) -> None:
    attack = case.attack
    if attack.text == OTHER:
        attack = Attack(attack.kind, text=str(other_path))
    outcome = run_trial(model, pool, script, attack, case.check, patience_s(case), case.flow)
    assert outcome.code in case.codes, outcome
    assert case.steps is None or outcome.steps == case.steps, outcome
    assert not outcome.problems
    assert bool(outcome.applied) == case.applied, outcome
    twin = run_trial(model, pool, script, Attack(), case.check, flow=case.flow)
    assert (twin.code, twin.steps, twin.problems, twin.applied) == ("ok", SCRIPT_STEPS, [], None)


def test_names_are_distinct() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 300


@pytest.mark.parametrize("check", AttentionCheck)
def test_position_off_by_one_is_no_lie_where_there_is_one_key(
    check: AttentionCheck, model: VerifierModel, pool: LiarPool
) -> None:
    """A softmax over one key is 1 whatever the position; the liar finds that its claim is the honest one."""
    script = Script.make(model, 2, prompt=1)
    attack = Attack("wrong_position", step=0, claim="layers.0.attention")
    outcome = run_trial(model, pool, script, attack, check)
    assert (outcome.code, outcome.applied, outcome.problems) == ("ok", False, [])


def test_hostile_text_is_made_harmless(model: VerifierModel, pool: LiarPool, script: Script) -> None:
    case = next(c for c in CASES if c.name == "error/READY")
    message = run_trial(model, pool, script, case.attack, case.check).message
    assert "veriattn: verified" in message
    assert all(ch.isprintable() or ch == "\n" for ch in message)


@pytest.mark.parametrize("kind", ["resize", "read_parent"])
def test_the_system_refuses_what_the_boundary_forbids(
    kind: str, model: VerifierModel, pool: LiarPool, script: Script
) -> None:
    (report,) = run_trial(model, pool, script, Attack(kind), AttentionCheck.REPLAY).reports
    tried = {k: v for k, v in report.items() if k not in ("lie", "step", "claim", "applied")}
    assert len(tried) >= 3
    assert set(tried.values()) <= {"EPERM", "EACCES"}
