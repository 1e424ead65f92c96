"""Every named attack meets its error, and no more steps than it may; its untampered twin passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.adversary.conftest import SHAPE
from tests.helpers import tiny_config

from veriattn.redteam.attack import Attack
from veriattn.redteam.catalogue import SCRIPT_STEPS, SETUPS, TIMEOUT, Case, catalogue
from veriattn.redteam.launcher import LiarPool
from veriattn.redteam.trial import Script, run_trial
from veriattn.verifier import tiling
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
    outcome = run_trial(model, pool, script, attack, case.check, patience_s(case), case.flow, limit=case.limit)
    assert outcome.code in case.codes, outcome
    assert case.steps is None or outcome.steps == case.steps, outcome
    assert not outcome.problems
    assert bool(outcome.applied) == case.applied, outcome
    twin = run_trial(model, pool, script, Attack(), case.check, flow=case.flow, limit=case.limit)
    assert (twin.code, twin.steps, twin.problems, twin.applied) == ("ok", SCRIPT_STEPS, [], None)


@pytest.mark.parametrize("setup", ["run-ahead-split", "veriattn-split", "tsdp-split"])
@pytest.mark.parametrize("kind", ["scores", "attention"])
def test_lies_about_keys_that_were_streamed(setup: str, kind: str, model: VerifierModel, pool: LiarPool) -> None:
    """Long enough that whole blocks of keys cross the link; the last key of the share is lied about."""
    how, script = SETUPS[setup], Script.make(model, 3, prompt=270)
    arguments = {"check": how.check, "flow": how.flow, "limit": how.limit}
    twin = run_trial(model, pool, script, Attack(), **arguments)
    assert (twin.code, twin.steps, twin.problems) == ("ok", SCRIPT_STEPS, [])
    attack = Attack("fault", step=how.sends_step(1), claim=f"layers.1.{kind}.1", fault="bit", index=-1, value=2)
    outcome = run_trial(model, pool, script, attack, **arguments)
    assert (outcome.code, outcome.steps, outcome.applied, outcome.problems) == ("attention_mismatch", 1, True, [])


@pytest.mark.parametrize("kind", ["scores", "attention"])
@pytest.mark.parametrize("nth", range(3))
def test_lies_about_each_piece_of_a_run_whose_scores_cross_in_pieces(
    nth: int, kind: str, model: VerifierModel, pool: LiarPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `tsdp`, with room for the scores of two rows: prompts of six tokens take three requests each."""
    monkeypatch.setattr(tiling, "SCORE_BYTES", 2 * 4 * model.tensors.config.num_heads * 6)
    how, script = SETUPS["tsdp"], Script.make(model, 3, prompt=6)
    arguments = {"check": how.check, "flow": how.flow}
    twin = run_trial(model, pool, script, Attack(), **arguments)
    assert (twin.code, twin.steps, twin.problems) == ("ok", SCRIPT_STEPS, [])
    claim = f"layers.1.{kind}.1"
    attack = Attack("fault", step=how.sends_step(0), claim=claim, nth=nth, fault="bit", index=-1, value=2)
    outcome = run_trial(model, pool, script, attack, **arguments)
    assert (outcome.code, outcome.steps, outcome.applied, outcome.problems) == ("attention_mismatch", 0, True, [])
    assert f"sequence 1, position {2 * nth + 1}," in outcome.message


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
