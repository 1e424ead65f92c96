"""One trial: a fresh session with fresh keys against one lying prover, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from veriattn.engine.strategies import FullTeeExecutor, TeeWeights
from veriattn.errors import InternalError, ProverUnavailable, VeriattnError
from veriattn.redteam.attack import Attack
from veriattn.redteam.launcher import GEOMETRY, LiarPool
from veriattn.shield.permutation import ShieldMode
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.spec.reference import F32
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig
from veriattn.wire.messages import AttentionCheck
from veriattn.wire.ring import RingGeometry

PROMPT = 6


@dataclass(frozen=True)
class Script:
    """The steps that every trial runs, and the logits that they must give: prefill of two sequences, two steps of decoding,
    then one sequence freed, the other decoded beside the prefill of a third."""

    batches: tuple[Batch, ...]
    expected: tuple[F32, ...]
    left: tuple[int, ...] = (0, 2)  # sequences that are still there at the end

    @classmethod
    def make(cls, model: VerifierModel, seed: int, prompt: int = PROMPT) -> Script:
        """Random tokens, prompts of `prompt` tokens; the expected logits are computed here, without a prover."""
        vocab = model.tensors.config.vocab_size
        ids = np.random.default_rng(seed).integers(0, vocab, (3, prompt + 3))

        def entry(seq: int, start: int, count: int, logits: Any = "last") -> BatchEntry:
            return BatchEntry(seq, start, tuple(int(t) for t in ids[seq, start : start + count]), logits)

        batches = (
            Batch((entry(0, 0, prompt, "all"), entry(1, 0, prompt))),
            Batch((entry(0, prompt, 1), entry(1, prompt, 1))),
            Batch((entry(0, prompt + 1, 1), entry(1, prompt + 1, 1))),
            Batch((entry(0, prompt + 2, 1), entry(2, 0, 3))),
        )
        tee = FullTeeExecutor(TeeWeights(model.path, expected_digest=model.digest), 1 << 16, 8)
        expected = []
        for number, batch in enumerate(batches):
            if number == FREE_BEFORE:
                tee.free(FREED)
            expected.append(tee.run(batch))
        return cls(batches, tuple(expected))


FREE_BEFORE, FREED = 3, 1


@dataclass
class Outcome:
    """code: "ok" or the error's. steps: how many completed, all with the right logits. applied: what the liar reported, None
    if it reported nothing. problems: everything that must not happen."""

    code: str
    steps: int
    applied: bool | None
    checks: int
    message: str = ""
    output: str = ""
    reports: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run_trial(
    model: VerifierModel,
    pool: LiarPool,
    script: Script,
    attack: Attack,
    check: AttentionCheck,
    timeout_s: float = 60.0,
    flow: Flow = Flow.RUN_AHEAD,
    geometry: RingGeometry | None = GEOMETRY,
    limit: int | None = None,
    runs: int = 1,
    shield: ShieldMode = "off",
    own_layers: int = 0,
) -> Outcome:
    """Run the script, `runs` times, until it ends or the session does. geometry: None for a link over TCP.

    Problems: wrong logits, or a session that lives after an error.
    """
    config = SessionConfig(
        max_tokens_per_step=1024,
        attention_check=check,
        prover_kv_tokens=limit,
        offload_ratio=None if limit is None else 1.0,
        kv_shield=shield,
        shield_first_layers=own_layers,
        step_timeout_s=timeout_s,
        start_timeout_s=timeout_s,
    )
    released: list[F32] = []
    code, message, session = "ok", "", None
    pool.last = None
    problems: list[str] = []
    try:
        session = Session(model, pool.launcher(attack, geometry, timeout_s), config, flow)
        for _ in range(runs):
            for number, batch in enumerate(script.batches):
                if number == FREE_BEFORE:
                    session.free(FREED)
                released.append(session.run(batch))
            for seq_id in script.left:
                session.free(seq_id)
    except VeriattnError as e:
        code, message = e.code, f"{e} {e.hint or ''}"
        if session is not None:
            problems += _still_alive(session, script.batches[0])
    finally:
        if session is not None:
            session.close()
    prover = pool.last
    if prover is None:
        raise InternalError("no prover was started")
    reports = prover.reports()
    problems += _wrong(released, script.expected * runs)
    counts = session.stats.checks if session is not None else None
    return Outcome(
        code,
        len(released),
        any(r["applied"] for r in reports) if reports else None,
        counts.linear_rows + counts.attention_rows if counts else 0,
        message,
        prover.output_tail(),
        reports,
        problems,
    )


def _wrong(released: Sequence[F32], expected: Sequence[F32]) -> list[str]:
    return [
        f"step {i} released wrong logits"
        for i, (got, right) in enumerate(zip(released, expected, strict=False))
        if got.tobytes() != right.tobytes()
    ]


def _still_alive(session: Session, batch: Batch) -> list[str]:
    problems = [] if session.closed else ["the session is open after an error"]
    try:
        session.run(batch)
    except ProverUnavailable:
        return problems
    return [*problems, "the session runs after an error"]
