"""Sessions of every flow with a given prover: what it claims is checked, and the logits are those of the canonical function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tests.helpers import LocalModel

from veriattn.bench.runner import KERNELS_VARIABLE, compiled_kernels
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig
from veriattn.wire.messages import AttentionCheck

PROMPTS = ((5, 9, 2, 77, 30) * 6, (11, 4))

#: Every flow, both checks, and keys that the prover cannot hold, streamed to it in part.
CASES: tuple[tuple[Flow, SessionConfig], ...] = (
    (Flow.RUN_AHEAD, SessionConfig()),
    (Flow.RUN_AHEAD, SessionConfig(attention_check=AttentionCheck.TRANSFER)),
    (Flow.VERIATTN, SessionConfig()),
    (Flow.VERIATTN, SessionConfig(attention_check=AttentionCheck.TRANSFER)),
    (Flow.TSDP, SessionConfig()),
    (Flow.UNVERIFIED, SessionConfig()),
    (Flow.RUN_AHEAD, SessionConfig(prover_kv_tokens=24, offload_ratio=0.5)),
    (Flow.VERIATTN, SessionConfig(prover_kv_tokens=24, offload_ratio=1.0)),
    (Flow.TSDP, SessionConfig(prover_kv_tokens=24, offload_ratio=0.5)),
)


def check_flows(
    path: Path,
    command: Sequence[str],
    cases: Sequence[tuple[Flow, SessionConfig]] = CASES,
    look: Callable[[Session], None] = lambda session: None,
) -> None:
    """Prefill of two sequences in one step, then two tokens of each, greedy."""
    model = VerifierModel(path)
    local = LocalModel.open(path)
    batches = _batches(local)
    with compiled_kernels() as compiled:
        environment = {KERNELS_VARIABLE: str(compiled)}

        def launch(m: VerifierModel) -> ChildProver:
            return ChildProver(m, command, timeout_s=300.0, environment=environment)

        for flow, config in cases:
            with Session(model, launch, config, flow) as session:
                look(session)
                for batch, expected in batches:
                    assert session.run(batch).tobytes() == expected.tobytes(), flow
                session.free(0)
                session.free(1)


def check_prompt(path: Path, command: Sequence[str], length: int, chunk: int) -> None:
    """A prompt in chunks, each known to the prover while the one before is checked; the logits are the canonical ones."""
    model, local = VerifierModel(path), LocalModel.open(path)
    ids = tuple((7919 * i) % model.tensors.config.vocab_size for i in range(length))
    steps = [
        Batch((BatchEntry(0, at, ids[at : at + chunk], "last" if at + chunk >= length else "none"),))
        for at in range(0, length, chunk)
    ]
    config = SessionConfig(max_tokens_per_step=chunk)
    with Session(model, lambda m: ChildProver(m, command, timeout_s=300.0), config) as session:
        for batch, following in zip(steps, [*steps[1:], None], strict=True):
            expected = local.step(*batch.entries)
            assert session.run(batch, following).tobytes() == expected.tobytes()


def _batches(local: LocalModel) -> list[tuple[Batch, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
    tokens, at, found = list(PROMPTS), [0, 0], []
    for _ in range(3):
        batch = Batch(tuple(BatchEntry(i, at[i], tokens[i]) for i in (0, 1)))
        logits = local.step(*batch.entries)
        found.append((batch, logits))
        for i in (0, 1):
            at[i] += len(tokens[i])
            tokens[i] = (int(np.argmax(logits[i])),)
    return found
