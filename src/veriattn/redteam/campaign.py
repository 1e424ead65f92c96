"""A tampering campaign: many random faults, every named attack, honest twins in between, and the count of each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import numpy as np

from veriattn.errors import InternalError, UsageError
from veriattn.redteam.attack import Attack
from veriattn.redteam.catalogue import (
    SCRIPT_STEPS,
    SETUPS,
    TIMEOUT,
    Case,
    Setup,
    boundary_cases,
    catalogue,
    claim_kinds,
    claim_name,
    code_of,
)
from veriattn.redteam.launcher import GEOMETRY, LiarPool
from veriattn.redteam.trial import Outcome, Script, run_trial
from veriattn.spec.model import ModelConfig
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow
from veriattn.wire.messages import AttentionCheck
from veriattn.wire.ring import RingGeometry

#: How often each way of carrying claims is drawn.
_SETUP_WEIGHTS = {
    "run-ahead-replay": 0.3, "run-ahead-transfer": 0.3, "veriattn-replay": 0.07, "veriattn-transfer": 0.07, "tsdp": 0.07,
    "run-ahead-split": 0.07, "veriattn-split": 0.06, "tsdp-split": 0.06,
}  # fmt: skip
_HONEST_EVERY, _HONEST_RUNS = 10, 10  # an honest session every so many trials, which runs the script so many times
_TCP_SHARE = 0.25
_LINKS = ("memfd", "tcp")
_MAX_REDRAWS = 50
_MAX_PROBLEMS = 20
_PATIENCE_S = 120.0
_LARGE_ROW_BYTES = 64 * 1024

_BOUNDARY = frozenset(case.name for case in boundary_cases())

Progress = Callable[[int, int], None]


@dataclass
class Tally:
    """What became of the trials of one attack. `redrawn`: the lie changed no byte and was not counted."""

    trials: int = 0
    detections: int = 0
    redrawn: int = 0
    codes: dict[str, int] = field(default_factory=dict)


def _sends_scores(setup: Setup) -> bool:
    return setup.check is AttentionCheck.TRANSFER or setup.limit is not None


class RandomFaults:
    """Draws single-bit and single-element faults over every kind of claim, layer, step, sequence and way of carrying claims."""

    def __init__(self, config: ModelConfig, script: Script, rng: np.random.Generator) -> None:
        self._config, self._script, self._rng = config, script, rng

    def _below(self, bound: int) -> int:
        return int(self._rng.integers(bound))

    def draw(self, fault: str | None = None, kind: str | None = None) -> Case:
        """A fault, of the given sort and in the given kind of claim where those are named."""
        names = [n for n, s in SETUPS.items() if kind != "scores" or _sends_scores(s)]
        weights = np.array([_SETUP_WEIGHTS[n] for n in names])
        setup = SETUPS[str(self._rng.choice(names, p=weights / weights.sum()))]
        flow, limited = setup.flow, setup.limit is not None
        kinds = claim_kinds(AttentionCheck.TRANSFER if _sends_scores(setup) else AttentionCheck.REPLAY)
        kind = kind or kinds[self._below(len(kinds))]
        fault = fault or ("bit", "element")[self._below(2)]
        layer, step = self._below(self._config.num_layers), self._below(SCRIPT_STEPS)
        entries = self._script.batches[step].entries
        entry = entries[self._below(len(entries))]
        if limited or (kind == "scores" and flow is not Flow.RUN_AHEAD):
            # Tiles of a prefill hold scores that nobody sees; a row that decodes sees them all. And it is shared.
            step = 1 + self._below(2)
            entry = self._script.batches[step].entries[self._below(2)]
        claim = claim_name(kind, layer, entry.seq_id)
        if kind == "attention" and (limited or flow is not Flow.RUN_AHEAD):
            claim += f".{entry.seq_id}"
        tiled = flow is Flow.VERIATTN and not limited and kind in ("scores", "attention")
        attack = Attack(
            "fault",
            step=setup.sends_step(step),
            claim=claim,
            nth=self._below(min(2, self._config.num_kv_heads)) if tiled else -1,
            index=self._below(1 << 40),
            seed=self._below(1 << 30),
            consistent=flow is Flow.RUN_AHEAD and bool(self._below(2)),
            **self._change(fault, 64 if kind == "attention" else 32),
        )
        if kind == "scores" and flow is Flow.RUN_AHEAD and not limited:
            row, keys = self._below(entry.num_tokens), entry.start + entry.num_tokens
            head, key = self._below(self._config.num_heads), self._below(entry.start + row + 1)
            attack = Attack(**{**vars(attack), "index": (head * entry.num_tokens + row) * keys + key})
        codes = frozenset({code_of(kind)})
        return Case(f"{fault}/{kind}", attack, codes, setup.check, step, flow=flow, limit=setup.limit)

    def _change(self, fault: str, bits: int) -> dict[str, Any]:
        if fault == "bit":
            return {"fault": "bit", "value": self._below(bits)}
        how = self._below(3)
        if how == 0:
            return {"fault": "element"}
        sign = 1 - 2 * self._below(2)
        return {"fault": "add", "value": sign << (self._below(bits) if how == 1 else 0)}


def judge(case: Case, outcome: Outcome) -> str | None:
    """None if the trial went as it must, else what is wrong. A lie that changed nothing is the caller's to redraw."""
    if outcome.problems:
        return "; ".join(outcome.problems)
    if bool(outcome.applied) != case.applied:
        return f"{outcome.code} although the lie was {'' if outcome.applied else 'not '}applied"
    if outcome.code not in case.codes:
        return f"{outcome.code} in place of {' or '.join(sorted(case.codes))}"
    if case.steps is not None and outcome.steps != case.steps:
        return f"{outcome.steps} steps were released in place of {case.steps}"
    return None


class Campaign:
    """Trials against one model. Every trial is a new process, session and key set; a reject burns the keys."""

    def __init__(self, model: VerifierModel, pool: LiarPool, seed: int) -> None:
        self.model, self.pool = model, pool
        self.config = model.tensors.config
        self._rng = np.random.default_rng(seed)
        self.script = Script.make(model, seed)
        self.faults = RandomFaults(self.config, self.script, self._rng)
        self.attacks: dict[str, Tally] = {}
        self.strategies: dict[str, Tally] = {}
        self.problems: list[str] = []
        self.links = {link: Tally() for link in _LINKS}
        self.honest_sessions = self.honest_runs = self.honest_checks = self.false_rejects = 0
        row_bytes = 4 * self.config.vocab_size
        self._geometry = GEOMETRY if row_bytes < _LARGE_ROW_BYTES else RingGeometry(65536, 4, 64)
        started = time.monotonic()
        for setup in SETUPS:
            for link in _LINKS:
                self.honest(setup, link, 1)
        if self.problems:
            raise InternalError(f"untampered twins fail: {self.problems[0]}")
        self._timeout_s = 1.5 + (time.monotonic() - started) / len(_LINKS)

    def _draw_link(self) -> str:
        return _LINKS[int(self._rng.random() < _TCP_SHARE)]

    def honest(self, name: str | None = None, link: str | None = None, runs: int = _HONEST_RUNS) -> None:
        """Untampered twins, `runs` in a session: everything must pass."""
        setup = SETUPS[name or str(self._rng.choice(list(SETUPS)))]
        link = link or self._draw_link()
        outcome = self._run(Attack(), setup, _PATIENCE_S, link, runs)
        self.honest_sessions += 1
        self.honest_runs += runs
        self.honest_checks += outcome.checks
        steps = SCRIPT_STEPS * runs
        if outcome.code != "ok" or outcome.steps != steps or outcome.problems or outcome.applied is not None:
            self.false_rejects += 1
            self._note(f"honest {setup} over {link}: {outcome.code} {outcome.message} {outcome.problems}")

    def attack(self, case: Case, redraw: Callable[[], Case] | None = None) -> None:
        """One trial that counts; drawn again where the lie changes no byte."""
        tally = self.attacks.setdefault(case.name, Tally())
        link = "memfd" if case.name in _BOUNDARY else self._draw_link()  # TCP has no segment to attack
        for _ in range(_MAX_REDRAWS):
            patience_s = self._timeout_s if TIMEOUT in case.codes else _PATIENCE_S
            outcome = self._run(case.attack, Setup(case.flow, case.check, case.limit), patience_s, link)
            unchanged = not outcome.applied and case.applied and outcome.code == "ok" and not outcome.problems
            if redraw is None or not unchanged:
                break
            tally.redrawn += 1
            case = redraw()
        wrong = judge(case, outcome)
        for each in (tally, self.links[link], self.strategies.setdefault(case.flow.value, Tally())):
            each.trials += 1
            each.codes[outcome.code] = each.codes.get(outcome.code, 0) + 1
            each.detections += wrong is None and outcome.code != "ok"
        if wrong is not None:
            self._note(f"{case.name}: {wrong} ({case.flow.value}, {link}, {case.attack.to_json()}, {outcome.message})")

    def _run(self, attack: Attack, setup: Setup, timeout_s: float, link: str, runs: int = 1) -> Outcome:
        geometry = self._geometry if link == "memfd" else None
        return run_trial(
            self.model, self.pool, self.script, attack, setup.check, timeout_s, setup.flow, geometry, setup.limit, runs
        )

    def _note(self, problem: str) -> None:
        self.problems.append(problem)

    def result(self) -> dict[str, Any]:
        """For `--json`. Attacks that the verifier must shrug off have the code "ok" and no detections."""
        return {
            "attacks": {name: vars(tally) for name, tally in sorted(self.attacks.items())},
            "strategies": {name: vars(tally) for name, tally in sorted(self.strategies.items())},
            "links": {name: vars(tally) for name, tally in self.links.items()},
            "trials": sum(t.trials for t in self.attacks.values()),
            "detections": sum(t.detections for t in self.attacks.values()),
            "honest": {
                "sessions": self.honest_sessions,
                "runs": self.honest_runs,
                "checks": self.honest_checks,
                "false_rejects": self.false_rejects,
            },
            "failures": len(self.problems),
            "failure_examples": self.problems[:_MAX_PROBLEMS],
            "ok": not self.problems,
        }


_RANDOM_NAMES = tuple(
    f"{fault}/{kind}" for kind in claim_kinds(AttentionCheck.TRANSFER) for fault in ("bit", "element")
)


def run(
    model_path: str | os.PathLike[str],
    trials: int,
    seed: int,
    attacks: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`trials` random single-bit and single-element faults, and the named attacks once each (at most `trials` of them).

    attacks: patterns of names (`bit/*`, `element/lm_head`, `header_*`); where no pattern names a random fault, `trials` is the
    number of named attacks, in turn. progress: called with (done, total).

    Returns: attacks {name: {trials, detections, redrawn, codes}}, strategies and links (the same, by flow and by link),
    honest {sessions, runs, checks, false_rejects}, failures, ok.
    A failure is a lie that was not met by its error, an error without a lie, anything released from a bad step, or a
    false reject.
    Raises: ModelError; UsageError (no such attack); ProverUnavailable.
    """
    if trials < 1:
        raise UsageError("a campaign needs at least one trial")
    model = VerifierModel(model_path)

    def wanted(name: str) -> bool:
        return attacks is None or any(fnmatch(name, pattern) for pattern in attacks)

    random_names = [n for n in _RANDOM_NAMES if wanted(n)]
    named = [c for c in catalogue(model.tensors.config) if wanted(c.name)]
    if not random_names and not named:
        raise UsageError(
            f"no attack is named {', '.join(attacks or ())}", hint=f"for instance {', '.join(_RANDOM_NAMES[:4])}"
        )
    with LiarPool(model) as pool:
        campaign = Campaign(model, pool, seed)
        order = np.random.default_rng(seed).permutation(len(named))

        def plan() -> Iterator[tuple[Case, Callable[[], Case] | None]]:
            for i in range(trials if random_names else 0):
                fault, kind = random_names[i % len(random_names)].split("/")

                def draw(fault: str = fault, kind: str = kind) -> Case:
                    return campaign.faults.draw(fault, kind)

                yield draw(), draw
            count = min(trials, len(named)) if random_names else trials * bool(named)
            for i in range(count):
                yield named[order[i % len(named)]], None

        total = (trials if random_names else 0) + (min(trials, len(named)) if random_names else trials)
        for done, (case, redraw) in enumerate(plan()):
            campaign.attack(case, redraw)
            if done % _HONEST_EVERY == 0:
                campaign.honest()
            if progress is not None:
                progress(done + 1, total)
        return campaign.result()
