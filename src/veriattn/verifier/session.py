"""One session: a prover's lifetime, one key set, and the replay of the forward pass over checked claims."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np

from veriattn.errors import InternalError, ProverFault, ProverUnavailable, UsageError, VeriattnError
from veriattn.native import kernels
from veriattn.spec.constants import SPEC_VERSION
from veriattn.spec.forward import Batch, Operations, check_batch, forward
from veriattn.spec.reference import F32
from veriattn.verifier.checks import CheckCounts, ClaimChecker, RunAheadOperations
from veriattn.verifier.isolation import Isolation, ProverProcess, spawn_prover
from veriattn.verifier.keys import SOUNDNESS_BITS, KeySet
from veriattn.verifier.mediated import Tiling, TsdpOperations, VeriattnOperations
from veriattn.verifier.model import VerifierModel
from veriattn.wire.channel import Channel, RingChannel
from veriattn.wire.emulate import Throttle
from veriattn.wire.messages import (
    READY_BYTES,
    AttentionCheck,
    Hello,
    Kind,
    Limits,
    LogitRows,
    Mode,
    Ready,
    Step,
    StepEntry,
    decode_ready,
    encode_free,
    encode_hello,
    encode_step,
)

_LOGIT_ROWS = {"none": LogitRows.NONE, "last": LogitRows.LAST, "all": LogitRows.ALL}


class Flow(Enum):
    """How work and claims move between the two sides; docs/architecture.md."""

    RUN_AHEAD = "run-ahead"
    VERIATTN = "veriattn"
    TSDP = "tsdp"
    UNVERIFIED = "dangerous-unverified"

    @property
    def mode(self) -> Mode:
        """The session's mode on the wire."""
        if self is Flow.UNVERIFIED:
            return Mode.LOGITS
        return Mode.CLAIMS if self is Flow.RUN_AHEAD else Mode.OPERATIONS


@dataclass(frozen=True)
class SessionConfig:
    """What a session may use. Times in seconds. tiling: None for the paper's defaults by length (`veriattn` only)."""

    max_tokens_per_step: int = 512
    max_sequences: int = 64
    kv_tokens: int = 1 << 20
    attention_check: AttentionCheck = AttentionCheck.REPLAY
    tiling: Tiling | None = None
    start_timeout_s: float = 600.0
    step_timeout_s: float = 300.0


class Prover(Protocol):
    """A running prover as a session sees it: a link, and something that can be ended."""

    channel: Channel
    pid: int | None
    isolation: Isolation | None

    def output_tail(self) -> str:
        """The last that it printed, for people."""
        ...

    def terminate(self) -> None:
        """End it; nothing of it is left."""
        ...


Launcher = Callable[[VerifierModel], Prover]


class ChildProver:
    """A prover started as a child process, linked by rings in a sealed memfd."""

    def __init__(
        self,
        model: VerifierModel,
        command: Sequence[str] | None = None,
        threads: int | None = None,
        timeout_s: float = 300.0,
        throttle: Throttle | None = None,
    ) -> None:
        """Raises: ProverUnavailable."""
        command = command or (sys.executable, "-m", "veriattn.prover")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        extra = {} if threads is None else {"VERIATTN_THREADS": str(threads)}
        try:
            self._process: ProverProcess = spawn_prover(
                command, theirs.fileno(), readable=[model.path], extra_environment=extra
            )
        except VeriattnError:
            ours.close()
            raise
        finally:
            theirs.close()
        self.isolation: Isolation | None = self._process.isolation
        self.pid: int | None = self._process.pid
        try:
            self.channel: Channel = RingChannel.offer(ours, timeout_s=timeout_s, throttle=throttle)
        except VeriattnError:
            ours.close()
            self._process.terminate(0.0)
            raise

    def output_tail(self) -> str:
        return self._process.output_tail()

    def terminate(self) -> None:
        self.channel.close()
        self._process.terminate()


@dataclass
class SessionStats:
    """Counters of a session; times in seconds, sizes in bytes."""

    checks: CheckCounts = field(default_factory=CheckCounts)
    steps: int = 0
    verify_cpu_s: float = 0.0

    @property
    def prover_wait_s(self) -> float:
        """Wall time spent in receiving: waiting for the prover, and copying in."""
        return self.checks.receive_s


class Session:
    """Drives one prover and releases only what has been checked.

    Any fault - a wrong claim, a malformed message, silence, death - closes the session: the prover is ended, the secrets
    are destroyed, and every later call raises. A new session takes a new key set.

    Trust: the prover is adversarial. Sizes, shapes, the order of claims and every operand come from this side.
    Soundness: docs/soundness.md; `SOUNDNESS_BITS`.
    """

    def __init__(
        self, model: VerifierModel, launch: Launcher, config: SessionConfig | None = None, flow: Flow = Flow.RUN_AHEAD
    ) -> None:
        """Start a prover. With `Flow.UNVERIFIED` it answers with logits that nobody checks.

        Raises: ProverFault and below; ModelError when fresh keys need the weights and they have changed.
        """
        self.config = config or SessionConfig()
        self.model = model
        self.stats = SessionStats()
        self._lengths: dict[int, int] = {}
        self._closed: str | None = None
        self._limits = Limits(
            max_tokens_per_step=self.config.max_tokens_per_step,
            max_sequences=self.config.max_sequences,
            max_positions=model.tensors.config.max_positions,
            kv_tokens=self.config.kv_tokens,
            vocab_size=model.tensors.config.vocab_size,
        )
        self.flow = flow
        self._keys = None if flow is Flow.UNVERIFIED else model.take_keys()
        self._checker: ClaimChecker | None = None
        self._ops: Operations | None = None
        self._end_operations: Callable[[], None] = lambda: None
        try:
            self._prover = launch(model)
        except VeriattnError:
            self._destroy_keys()
            raise
        self.channel = self._prover.channel
        try:
            self.ready = self._greet(flow.mode)
        except VeriattnError as e:
            self._fail(e)
            raise
        if self._keys is not None:
            self._checker, self._ops = self._operations(self._keys)

    def _operations(self, keys: KeySet) -> tuple[ClaimChecker, Operations]:
        check = self.config.attention_check
        track_scores = check is AttentionCheck.TRANSFER or self.flow is Flow.TSDP
        checker = ClaimChecker(self.model.tensors.config, keys, track_scores, self.stats.checks)
        if self.flow is Flow.TSDP:
            return checker, TsdpOperations(checker, self.channel)
        if self.flow is Flow.VERIATTN:
            mediated = VeriattnOperations(checker, self.channel, check, self.config.tiling)
            self._end_operations = mediated.close
            return checker, mediated
        return checker, RunAheadOperations(checker, self.channel, check)

    @property
    def verified(self) -> bool:
        return self._keys is not None

    @property
    def soundness_bits(self) -> int | None:
        return SOUNDNESS_BITS if self.verified else None

    @property
    def prover(self) -> Prover:
        return self._prover

    @property
    def closed(self) -> bool:
        return self._closed is not None

    def _greet(self, mode: Mode) -> Ready:
        if self.channel.session is None:
            raise InternalError("a channel without a session id")
        hello = Hello(
            SPEC_VERSION, self.channel.session, str(self.model.path.resolve()), self.model.digest, mode, self._limits
        )
        self.channel.send(Kind.HELLO, encode_hello(hello))
        payload = self.channel.recv(Kind.READY, READY_BYTES, timeout_s=self.config.start_timeout_s)
        return decode_ready(payload.tobytes(), SPEC_VERSION)

    def length(self, seq_id: int) -> int:
        """Tokens of a sequence that have been run."""
        return self._lengths.get(seq_id, 0)

    def run(self, batch: Batch) -> F32:
        """One step. Returns checked logits for `batch.logit_rows()`, (rows, vocab).

        Raises: VerificationError and below for a wrong claim; ProverFault and below; NumericsError. All end the session.
        """
        self._check_open()
        if batch.num_tokens > self.config.max_tokens_per_step or len(batch.entries) > self.config.max_sequences:
            raise InternalError("a batch beyond the session's limits")
        lengths = [self.length(e.seq_id) for e in batch.entries]
        check_batch(self.model.tensors, batch, lengths)
        live = set(self._lengths) | {e.seq_id for e in batch.entries}
        if len(live) > self.config.max_sequences:
            raise UsageError(f"more than {self.config.max_sequences} sequences at a time")
        cpu = time.process_time()
        try:
            self.channel.timeout_s = self.config.step_timeout_s
            if self.flow.mode is not Mode.OPERATIONS:
                self._send_step(batch)
            logits = self._replay(batch) if self._ops is not None else self._take_logits(batch)
        except VeriattnError as e:
            self._fail(e)
            raise
        except BaseException as e:
            # An interrupt in the middle of a message leaves the streams out of step; a bug leaves anything.
            self.close(f"interrupted by {type(e).__name__}")
            raise
        for entry in batch.entries:
            self._lengths[entry.seq_id] = entry.start + entry.num_tokens
        cpu = time.process_time() - cpu
        self.stats.steps += 1
        self.stats.verify_cpu_s += cpu
        if self.verified:
            c = self.model.tensors.config
            # Per token and layer: two norms, q/k/v, attention output, MLP, two residuals; per row of logits: norm, logits.
            self.stats.checks.elementwise_replayed += 7 * c.num_layers * batch.num_tokens + 2 * len(batch.logit_rows())
        return logits

    def _send_step(self, batch: Batch) -> None:
        step = Step(
            step=self.stats.steps,
            mode=self.flow.mode,
            attention_check=self.config.attention_check,
            entries=tuple(StepEntry(e.seq_id, e.start, e.num_tokens, _LOGIT_ROWS[e.logits]) for e in batch.entries),
            token_ids_i32=batch.token_ids(),
        )
        self.channel.send(Kind.STEP, encode_step(step))

    def _replay(self, batch: Batch) -> F32:
        if self._ops is None:
            raise InternalError("no keys to check with")
        return forward(self.model.tensors, batch, self._ops, kernels)

    def _take_logits(self, batch: Batch) -> F32:
        rows, vocab = len(batch.logit_rows()), self.model.tensors.config.vocab_size
        logits = np.empty((rows, vocab), np.float32)
        if rows:
            t = time.monotonic()
            self.channel.recv(Kind.LOGITS, logits.nbytes, logits)
            self.stats.checks.receive_s += time.monotonic() - t
        # Unchecked, but whoever samples from them must not meet NaN.
        return np.nan_to_num(logits, copy=False, nan=-1e30, posinf=1e30, neginf=-1e30)

    def free(self, seq_id: int) -> None:
        """Forget a sequence on both sides. Raises: ProverFault and below."""
        if self._lengths.pop(seq_id, None) is None or self.closed:
            return
        if self._checker is not None:
            self._checker.cache.free(seq_id)
        try:
            self.channel.send(Kind.FREE, encode_free([seq_id]))
        except VeriattnError as e:
            self._fail(e)
            raise

    def _check_open(self) -> None:
        if self._closed is not None:
            raise ProverUnavailable(f"the session is closed ({self._closed})", hint="open a new session")

    def _fail(self, error: VeriattnError) -> None:
        if isinstance(error, ProverFault) and error.hint is None:
            tail = self._prover.output_tail()
            error.hint = f"the prover's last output: {tail[-400:]}" if tail else None
        self.close(error.code)

    def close(self, reason: str = "closed") -> None:
        """End the prover and destroy the secrets. May be called twice."""
        if self._closed is None:
            self._closed = reason
            self._destroy_keys()
            if self._checker is not None:
                self._checker.close()
            if reason == "closed":
                # A courtesy: a prover that cannot take it is ended all the same.
                with suppress(VeriattnError):
                    self.channel.send(Kind.SHUTDOWN, timeout_s=1.0)
            # The sending thread, if there is one, must let go of the channel before it is closed.
            self.channel.abort()
            self._end_operations()
            self._prover.terminate()

    def _destroy_keys(self) -> None:
        if self._keys is not None:
            self._keys.destroy()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
