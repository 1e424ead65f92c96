"""The honest prover: what it answers, what it refuses, how it reports its own failures, when it ends."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.helpers import LocalModel

import veriattn
from veriattn.errors import FreivaldsMismatch, ProverFault, ProverUnavailable
from veriattn.spec.constants import SPEC_VERSION
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.spec.modelfile import WEIGHTS_FILE, safetensors_header
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig
from veriattn.wire.channel import Channel
from veriattn.wire.messages import (
    READY_BYTES,
    AttentionCheck,
    Hello,
    Kind,
    Limits,
    LogitRows,
    Mode,
    Step,
    StepEntry,
    decode_ready,
    encode_free,
    encode_hello,
    encode_step,
)

PROMPT = (5, 9, 2, 77, 30)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> VerifierModel:
    return VerifierModel(tiny_model)


@pytest.fixture
def prover(model: VerifierModel) -> Iterator[ChildProver]:
    prover = ChildProver(model, timeout_s=60.0)
    yield prover
    prover.terminate()


def hello(model: VerifierModel, channel: Channel, **changes: object) -> bytes:
    c = model.tensors.config
    fields: dict[str, object] = {
        "spec": SPEC_VERSION,
        "session": channel.session,
        "model_path": str(model.path),
        "model_digest": model.digest,
        "mode": Mode.CLAIMS,
        "limits": Limits(64, 4, c.max_positions, 1024, c.vocab_size),
    }
    return encode_hello(Hello(**{**fields, **changes}))  # type: ignore[arg-type]


def step(number: int, *entries: StepEntry, tokens: tuple[int, ...], mode: Mode = Mode.CLAIMS) -> bytes:
    return encode_step(Step(number, mode, AttentionCheck.REPLAY, entries, np.array(tokens, np.int32)))


def greeted(prover: ChildProver, model: VerifierModel, **changes: object) -> Channel:
    channel = prover.channel
    channel.send(Kind.HELLO, hello(model, channel, **changes))
    ready = decode_ready(channel.recv(Kind.READY, READY_BYTES).tobytes(), SPEC_VERSION)
    assert ready.pid == prover.pid and ready.device == "cpu"
    return channel


def claims(model: VerifierModel, channel: Channel, tokens: int, logit_rows: int) -> None:
    """Take a step's claims, sizes as in docs/wire.md section 6."""
    c = model.tensors.config
    sizes = [4 * c.qkv_size, 8 * c.attention_size, 4 * c.hidden_size, 8 * c.intermediate_size, 4 * c.hidden_size]
    for size in sizes * c.num_layers:
        channel.recv(Kind.CLAIM, size * tokens)
    if logit_rows:
        channel.recv(Kind.CLAIM, 4 * c.vocab_size * logit_rows)


@pytest.mark.parametrize("logits", LogitRows)
def test_sends_the_claims_of_a_step_and_no_more(logits: LogitRows, prover: ChildProver, model: VerifierModel) -> None:
    channel = greeted(prover, model)
    rows = {LogitRows.NONE: 0, LogitRows.LAST: 1, LogitRows.ALL: 5}[logits]
    for number in range(2):
        channel.send(Kind.STEP, step(number, StepEntry(3, 5 * number, 5, logits), tokens=PROMPT))
        claims(model, channel, 5, rows)
    channel.send(Kind.SHUTDOWN)
    with pytest.raises(ProverUnavailable):
        channel.recv(Kind.CLAIM, 4)


def test_unverified_mode_sends_logits_alone(model: VerifierModel, tiny_model: Path) -> None:
    batch = Batch((BatchEntry(0, 0, PROMPT, "all"), BatchEntry(1, 0, (1, 2), "none")))
    with Session(model, ChildProver, SessionConfig(), Flow.UNVERIFIED) as session:
        got = session.run(batch)
        assert session.channel.bytes_received == 32 + READY_BYTES + 32 + got.nbytes
    assert got.tobytes() == LocalModel.open(tiny_model).step(*batch.entries).tobytes()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"spec": SPEC_VERSION + 1}, "spec version"),
        ({"model_digest": "0" * 64}, "digest"),
        ({"model_path": "/nowhere"}, "no model"),
        ({"mode": Mode.LOGITS, "model_digest": "f" * 64}, "digest"),
    ],
)
def test_refuses_in_words(changes: dict[str, object], text: str, prover: ChildProver, model: VerifierModel) -> None:
    prover.channel.send(Kind.HELLO, hello(model, prover.channel, **changes))
    with pytest.raises(ProverFault, match=text):
        prover.channel.recv(Kind.READY, READY_BYTES)


@pytest.mark.parametrize(
    "payload",
    [
        step(0, StepEntry(0, 1, 5, LogitRows.LAST), tokens=PROMPT),
        step(0, StepEntry(0, 0, 5, LogitRows.LAST), StepEntry(0, 5, 5, LogitRows.LAST), tokens=PROMPT * 2),
        step(0, StepEntry(0, 0, 5, LogitRows.LAST), tokens=(1, 2, 3, 4, 10_000_000)),
        step(0, StepEntry(0, 0, 65, LogitRows.LAST), tokens=(1,) * 65),
        b"",
        bytes(24),
    ],
)
def test_a_step_that_breaks_the_rules_is_answered_by_an_error(
    payload: bytes, prover: ChildProver, model: VerifierModel
) -> None:
    channel = greeted(prover, model)
    channel.send(Kind.STEP, payload)
    with pytest.raises(ProverFault, match="reports error"):
        channel.recv(Kind.CLAIM, 4)


def test_operations_are_refused_in_a_session_of_steps(prover: ChildProver, model: VerifierModel) -> None:
    channel = greeted(prover, model)
    channel.send(Kind.LINEAR, b"")
    with pytest.raises(ProverFault, match="reports error 3"):
        channel.recv(Kind.CLAIM, 4)


def test_a_freed_sequence_starts_over(prover: ChildProver, model: VerifierModel) -> None:
    channel = greeted(prover, model)
    channel.send(Kind.STEP, step(0, StepEntry(3, 0, 5, LogitRows.NONE), tokens=PROMPT))
    claims(model, channel, 5, 0)
    channel.send(Kind.FREE, encode_free([3]))
    channel.send(Kind.STEP, step(1, StepEntry(3, 0, 5, LogitRows.NONE), tokens=PROMPT))
    claims(model, channel, 5, 0)


def test_ends_when_the_verifier_goes_away(prover: ChildProver, model: VerifierModel) -> None:
    greeted(prover, model).close()
    assert prover._process.wait(20) == 0


def test_started_by_hand_it_says_why_not() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "VERIATTN_PROVER_FD"}
    environment["PYTHONPATH"] = str(Path(veriattn.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "veriattn.prover"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "VERIATTN_PROVER_FD" in done.stderr and "Traceback" not in done.stderr


def test_garbage_on_its_socket_ends_it(model: VerifierModel) -> None:
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "VERIATTN_PROVER_FD": str(theirs.fileno())}
    environment["PYTHONPATH"] = str(Path(veriattn.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-m", "veriattn.prover"], env=environment, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
    ) as process:
        theirs.close()
        ours.sendall(b"GET / HTTP/1.1\r\n\r\n" * 4)
        _, said = process.communicate(timeout=60)
    ours.close()
    assert process.returncode != 0
    assert b"greeting" in said and b"Traceback" not in said


def test_weights_damaged_under_a_running_verifier_are_met(tiny_model: Path, tmp_path: Path) -> None:
    """The prover does not hash: whatever it computes from other weights is what the checks are for."""
    path = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    model = VerifierModel(path)
    batch = Batch((BatchEntry(0, 0, PROMPT),))
    with Session(model, ChildProver) as session:
        session.run(batch)
    offset = len(safetensors_header(model.tensors.config)) + model.tensors.embed_f16.nbytes
    offset += model.tensors.rope_cos.nbytes + model.tensors.rope_sin.nbytes
    with (path / WEIGHTS_FILE).open("r+b") as f:  # the first row of layers.0.qkv, all ones
        f.seek(offset)
        f.write(b"\1" * model.tensors.config.hidden_size)
    with pytest.raises(FreivaldsMismatch, match=r"layers\.0\.qkv"):
        Session(model, ChildProver).run(batch)
