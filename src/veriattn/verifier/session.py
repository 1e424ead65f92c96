"""One session: a prover's lifetime, one key set, and the replay of the forward pass over checked claims."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np

from veriattn.errors import (
    ConfigError,
    InternalError,
    ProverUnavailable,
    UsageError,
    VeriattnError,
    VerificationError,
)
from veriattn.native import kernels
from veriattn.shield.permutation import Shield, ShieldMode
from veriattn.spec.constants import SPEC_VERSION
from veriattn.spec.forward import Batch, BatchEntry, Operations, check_batch, forward
from veriattn.spec.modelfile import ModelDirectory
from veriattn.spec.reference import F32, I8
from veriattn.trace import NO_TRACE, Trace
from veriattn.verifier.checks import CheckCounts, ClaimChecker, RunAheadOperations
from veriattn.verifier.choice import AutoCheck
from veriattn.verifier.keys import SOUNDNESS_BITS, KeySet
from veriattn.verifier.launch import ChildProver, Launcher, Prover, quote_output
from veriattn.verifier.mediated import QueuedSender, TsdpOperations, VeriattnOperations
from veriattn.verifier.memory import Need, reserve
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.own import OwnLayers, read_matrices
from veriattn.verifier.split import SplitAttention
from veriattn.verifier.steps import AutoSwitch, Begun, Steps
from veriattn.verifier.tiling import Tiling
from veriattn.wire.messages import (
    READY_BYTES,
    AttentionCheck,
    Hello,
    Kind,
    Limits,
    Mode,
    Ready,
    decode_ready,
    encode_free,
    encode_hello,
)
from veriattn.wire.operations import LOAD_BYTES, LoadRequest, encode_load

__all__ = ["ChildProver", "Flow", "Launcher", "Prover", "Session", "SessionConfig", "SessionStats"]


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
    """What a session may use. Times in seconds. tiling: None for the paper's defaults by length (`veriattn` only).

    attention_check: `auto` chooses for prefill and for decode from measured times (verifier/choice.py).
    prover_kv_tokens, prover_kv_total: keys that the prover keeps, of one sequence and of all; None for no limit.
    offload_ratio: share of the other keys that is streamed to it in each step, None to adapt it to measured times.
    tee_memory_bytes: most that keys, values and what is kept per key for the checks may take here.
    kv_shield, shield_first_layers: see shield/permutation.py and verifier/own.py; only where the TEE asks for operations."""

    max_tokens_per_step: int = 512
    max_sequences: int = 64
    kv_tokens: int = 1 << 20
    attention_check: AttentionCheck | Literal["auto"] = AttentionCheck.REPLAY
    tiling: Tiling | Literal["auto"] | None = None
    prover_kv_tokens: int | None = None
    prover_kv_total: int | None = None
    offload_ratio: float | None = None
    tee_memory_bytes: int | None = None
    kv_shield: ShieldMode = "off"
    shield_first_layers: int = 0
    start_timeout_s: float = 600.0
    step_timeout_s: float = 300.0
    trace: Trace = NO_TRACE

    def __post_init__(self) -> None:
        if self.offload_ratio is not None and not 0.0 <= self.offload_ratio <= 1.0:
            raise ConfigError(f"an offload ratio of {self.offload_ratio} is not from 0 to 1")
        for name in ("prover_kv_tokens", "prover_kv_total", "tee_memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} = {value} is negative")


def check_flow(config: SessionConfig, flow: Flow) -> None:
    """Needs no model, so that nobody waits for one in vain. Raises: UsageError for settings that the flow has no use for."""
    shielded = config.kv_shield != "off" or config.shield_first_layers
    if shielded and flow.mode is not Mode.OPERATIONS:
        raise UsageError(
            f"a KV shield does not work with strategy {flow.value}, where the prover applies the rotary step",
            hint="use --strategy veriattn or tsdp",
        )
    if flow is Flow.UNVERIFIED and (config.prover_kv_tokens, config.prover_kv_total) != (None, None):
        raise UsageError(
            f"strategy {flow.value} has no keys outside of the prover", hint="leave the prover's capacity out"
        )


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
        check_flow(self.config, flow)
        self.model = model
        self.stats = SessionStats()
        self._lengths: dict[int, int] = {}
        self._closed: str | None = None
        self._limits = Limits(
            max_tokens_per_step=self.config.max_tokens_per_step,
            max_sequences=self.config.max_sequences,
            max_positions=model.tensors.config.max_positions,
            kv_tokens=self._prover_tokens(),
            vocab_size=model.tensors.config.vocab_size,
        )
        self.flow = flow
        self._keys = None if flow is Flow.UNVERIFIED else model.take_keys()
        self._checker: ClaimChecker | None = None
        self._ops: Operations | None = None
        self._sender: QueuedSender | None = None
        self._split: SplitAttention | None = None
        self._shield: Shield | None = None
        self._own: OwnLayers | None = None
        #: A batch that the prover works on already, while the one before it is being checked.
        self._ahead: Begun | None = None
        try:
            self._prover = launch(model)
        except BaseException:
            self._destroy_secrets()
            raise
        self.channel = self._prover.channel
        self.channel.set_trace(self.config.trace)
        self._steps = Steps(self.channel, flow.mode, self.config.attention_check)
        try:
            self.ready = self._greet(flow.mode)
            if self._keys is not None:
                self._set_up_shield()
                self._checker, self._ops = self._operations(self._keys)
        except BaseException as e:
            self._end(e)
            raise

    def _set_up_shield(self) -> None:
        """Draw the permutations, keep the first layers' weights here, send the permuted projections to the prover.

        The weights are hashed again on the way; those that the prover gets need no trust, its products are checked.
        Raises: ModelError; ProverFault and below.
        """
        config, c = self.config, self.model.tensors.config
        own = min(config.shield_first_layers, c.num_layers)
        if config.kv_shield == "off" and own == 0:
            return
        kept = {f"layers.{i}.{part}" for i in range(own) for part in ("qkv", "o")}
        sent = {f"layers.{i}.qkv" for i in range(own, c.num_layers)} if config.kv_shield != "off" else set()
        directory = ModelDirectory(self.model.path, expected_digest=self.model.digest)
        matrices = read_matrices(directory, kept | sent)
        if own:
            self._own = OwnLayers(c, own, {name: matrices[name] for name in kept})
        if config.kv_shield == "off":
            return
        self._shield = Shield(c, config.kv_shield)
        index = {name: i for i, name in enumerate(c.linear_shapes())}
        for i in range(own, c.num_layers):
            name = f"layers.{i}.qkv"
            permuted = matrices[name][self._shield.row_order(i)]
            rows = max(1, LOAD_BYTES // permuted.shape[1])
            for first in range(0, permuted.shape[0], rows):
                part = np.ascontiguousarray(permuted[first : first + rows])
                self.channel.send(Kind.LOAD, *encode_load(LoadRequest(index[name], first, part)))

    def _prover_tokens(self) -> int:
        """The most keys that the prover is ever told to keep, over all sequences; at least 1, as the wire has it."""
        c = self.config
        most = c.kv_tokens
        if c.prover_kv_tokens is not None:
            most = min(most, c.prover_kv_tokens * c.max_sequences)
        if c.prover_kv_total is not None:
            most = min(most, c.prover_kv_total)
        return max(most, 1)

    def _operations(self, keys: KeySet) -> tuple[ClaimChecker, Operations]:
        config, channel = self.config, self.channel
        limited = config.prover_kv_tokens is not None or config.prover_kv_total is not None
        auto = config.attention_check == "auto"
        check = AttentionCheck.REPLAY if config.attention_check == "auto" else config.attention_check
        track_scores = auto or check is AttentionCheck.TRANSFER or self.flow is Flow.TSDP or limited
        checker = ClaimChecker(self.model.tensors.config, keys, track_scores, self.stats.checks, self.config.trace)
        if self.flow is Flow.VERIATTN or limited:
            self._sender = QueuedSender(channel)
        if limited and self._sender is not None:
            self._split = SplitAttention(
                checker,
                channel,
                self._sender,
                config.offload_ratio,
                first_layer=0 if self._own is None else self._own.count,
                by_weights=self.flow is Flow.TSDP,
                shield=self._shield,
            )
        if self.flow is Flow.TSDP:
            return checker, TsdpOperations(checker, channel, self._split, self._shield, self._own)
        if self.flow is Flow.VERIATTN and self._sender is not None:
            veriattn = VeriattnOperations(
                checker, channel, self._sender, check, config.tiling, self._split, self._shield, self._own
            )
            self._steps.auto = AutoSwitch(AutoCheck(self.model.tensors.config), veriattn) if auto else None
            return checker, veriattn
        run_ahead = RunAheadOperations(checker, channel, check, self._split)
        self._steps.auto = AutoSwitch(AutoCheck(self.model.tensors.config), run_ahead) if auto else None
        return checker, run_ahead

    @property
    def split(self) -> SplitAttention | None:
        """The shared part of attention, where the prover's capacity is limited."""
        return self._split

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
        # Elsewhere our paths mean nothing, and are nobody's business: the digest names the model.
        path = "" if self._prover.pid is None else str(self.model.path.resolve())
        hello = Hello(SPEC_VERSION, self.channel.session, path, self.model.digest, mode, self._limits)
        self.channel.send(Kind.HELLO, encode_hello(hello))
        payload = self.channel.recv(Kind.READY, READY_BYTES, timeout_s=self.config.start_timeout_s)
        return decode_ready(payload.tobytes(), SPEC_VERSION)

    def length(self, seq_id: int) -> int:
        """Tokens of a sequence that have been run."""
        return self._lengths.get(seq_id, 0)

    def run(self, batch: Batch, following: Batch | None = None) -> F32:
        """One step. Returns checked logits for `batch.logit_rows()`, (rows, vocab).

        following: the batch of the next call, if it is certain by now. Where the prover runs ahead, it is told at once, and
        computes it while the claims of this one are checked; nothing of it is looked at before the next call.

        Raises: VerificationError and below for a wrong claim; ProverFault and below; NumericsError. All end the session.
        """
        self._check_open()
        begun, self._ahead = self._ahead, None
        if begun is not None and begun.batch != batch:
            raise self._misused("another batch than the one that was to follow")
        if begun is None:
            self._check_batch(batch)
            self._make_room(batch)
        cpu = time.process_time()
        try:
            self.channel.timeout_s = self.config.step_timeout_s
            begun = begun or self._steps.begin(batch, self._kv_limits)
            if following is not None and self._may_begin(following, begun):
                self._ahead = self._steps.begin(following, self._kv_limits)
            with self.config.trace.span("step", f"step {self.stats.steps}"):
                logits = self._run_parts(begun)
            # Closed by another thread in the meantime: what was checked last may have been checked with overwritten keys.
            self._check_open()
        except BaseException as e:
            self._end(e)
            raise
        for entry in batch.entries:
            self._lengths[entry.seq_id] = entry.start + entry.num_tokens
        cpu = time.process_time() - cpu
        self.stats.verify_cpu_s += cpu
        if self.verified:
            c = self.model.tensors.config
            # Per token and layer: two norms, q/k/v, attention output, MLP, two residuals; per row of logits: norm, logits.
            self.stats.checks.elementwise_replayed += 7 * c.num_layers * batch.num_tokens + 2 * len(batch.logit_rows())
        return logits

    def _misused(self, what: str) -> InternalError:
        """A caller's mistake after which the two sides no longer agree on what comes next."""
        error = InternalError(what)
        self._end(error)
        return error

    def _check_batch(self, batch: Batch, before: Batch | None = None) -> None:
        """Whether the batch may run next, or after `before`. Raises: InternalError, UsageError, with nothing changed."""
        if batch.num_tokens > self.config.max_tokens_per_step or len(batch.entries) > self.config.max_sequences:
            raise InternalError("a batch beyond the session's limits")
        lengths = dict(self._lengths)
        if before is not None:
            lengths.update({e.seq_id: e.start + e.num_tokens for e in before.entries})
        check_batch(self.model.tensors, batch, [lengths.get(e.seq_id, 0) for e in batch.entries])
        if len(set(lengths) | {e.seq_id for e in batch.entries}) > self.config.max_sequences:
            raise UsageError(f"more than {self.config.max_sequences} sequences at a time")

    @property
    def _kv_limits(self) -> Mapping[int, int]:
        """How many keys of each sequence the prover keeps; none where it keeps all."""
        return {} if self._split is None else self._split.limits

    def _may_begin(self, following: Batch, begun: Begun) -> bool:
        """Whether the prover may be told of the next batch by now; makes room for it. Raises: InternalError, UsageError."""
        if not self._steps.may_precede(begun, following):
            return False
        self._check_batch(following, begun.batch)
        try:
            self._make_room(following, begun.batch)
        except ConfigError:
            return False  # said when its turn comes
        return True

    def _make_room(self, batch: Batch, before: Batch | None = None) -> None:
        """First come, first served: a new sequence gets what is left of the prover's capacity. Where keys and values may take
        only so much memory here, make sure of it, with `before` still to be run. Raises: ConfigError, with nothing changed."""
        new: dict[int, int] = {}
        if self._split is not None:
            per, total = self.config.prover_kv_tokens, self.config.prover_kv_total
            given = sum(self._split.limits.values())
            for e in batch.entries:
                if e.seq_id not in self._split.limits:
                    left = None if total is None else max(0, total - given)
                    # No sequence has more, and the wire has no room for more.
                    new[e.seq_id] = min(v for v in (per, left, self._limits.max_positions) if v is not None)
                    given += new[e.seq_id]
        if self.config.tee_memory_bytes is not None and self._checker is not None:
            limits = {} if self._split is None else {**self._split.limits, **new}
            self._reserve(batch if before is None else before.then(batch), limits, self.config.tee_memory_bytes)
        if self._split is not None:
            self._split.limits.update(new)

    def _reserve(self, batch: Batch, limits: Mapping[int, int], max_bytes: int) -> None:
        """Room for a step's keys and values in all caches of this side. Raises: ConfigError."""
        if self._checker is None:
            return
        here, beyond = [], []
        for e in batch.entries:
            end = e.start + e.num_tokens
            cut = min(max(limits.get(e.seq_id, end), e.start), end)
            here.append((e.seq_id, cut - e.start))
            beyond.append((e.seq_id, end - cut))
        first = 0 if self._own is None else self._own.count
        resident = self._checker.cache
        needs = [Need(resident.layers[first:], here, resident.sum_bytes([s for s, n in here if n]))]
        if self._split is not None:
            needs.append(Need(self._split.cache.layers[first:], beyond))
        if self._own is not None:
            needs.append(Need(self._own.caches, [(e.seq_id, e.num_tokens) for e in batch.entries]))
        reserve(needs, max_bytes)

    @property
    def kv_bytes(self) -> int:
        """Memory of keys, values and what is kept per key for the checks, on this side. Caches never shrink."""
        caches = [] if self._checker is None else [self._checker.cache.nbytes]
        if self._split is not None:
            caches.append(self._split.cache.nbytes)
        if self._own is not None:
            caches += [c.nbytes for c in self._own.caches]
        return sum(caches)

    def _run_parts(self, begun: Begun) -> F32:
        """The batch, with runs that cross their sequence's limit in two parts, one after the other."""
        rows: dict[int, list[F32]] = {e.seq_id: [] for e in begun.batch.entries}
        for index, step in enumerate(begun.parts):
            part = step.batch
            self._steps.reach(begun, index, self._kv_limits)
            if self._steps.auto is not None:
                self._steps.auto.begin(step.check)
            logits = self._replay(part) if self._ops is not None else self._take_logits(part)
            if self._steps.auto is not None:
                self._steps.auto.end(part)
            self.stats.steps += 1
            if self._split is not None:
                self._split.end_step()
            at = 0
            for e in part.entries:
                count = {"none": 0, "last": 1, "all": e.num_tokens}[e.logits]
                rows[e.seq_id].append(logits[at : at + count])
                at += count
        return np.concatenate([piece for pieces in rows.values() for piece in pieces])

    def _replay(self, batch: Batch) -> F32:
        if self._ops is None:
            raise InternalError("no keys to check with")
        try:
            return forward(self.model.tensors, batch, self._ops, kernels)
        except VerificationError as e:
            if e.rows:
                e.sequences = batch.owners(e.rows, of_logits=e.operation == "lm_head")
            raise

    def _take_logits(self, batch: Batch) -> F32:
        rows, vocab = len(batch.logit_rows()), self.model.tensors.config.vocab_size
        logits = np.empty((rows, vocab), np.float32)
        if rows:
            t = time.monotonic()
            self.channel.recv(Kind.LOGITS, logits.nbytes, logits)
            self.stats.checks.receive_s += time.monotonic() - t
        # Unchecked, but whoever samples from them must not meet NaN.
        return np.nan_to_num(logits, copy=False, nan=-1e30, posinf=1e30, neginf=-1e30)

    def observe(self, wrap: Callable[[Operations], Operations]) -> None:
        """Put something around the two operations of the forward pass, for measuring. It must return what they return."""
        if self._ops is not None:
            self._ops = wrap(self._ops)

    def assume(self, seq_id: int, layers: Sequence[tuple[I8, F32, I8]]) -> None:
        """Append keys (tokens, kv_heads, d), their scales and values to a sequence at or beyond the prover's capacity,
        without running the model: long contexts for measuring what a step costs there. The prover has no part in it.

        Raises: InternalError where the prover would have to keep some of them; ConfigError beyond the memory limit.
        """
        split, start = self._split, self.length(seq_id)
        if split is None or len(layers) != self.model.tensors.config.num_layers:
            raise InternalError("keys can only be assumed beyond the prover's capacity, for every layer")
        entry = BatchEntry(seq_id, start, (0,) * layers[0][0].shape[0], "none")
        self._make_room(Batch((entry,)))
        limit = split.limits[seq_id]
        if start < limit:
            raise InternalError("the prover keeps these positions: run them")
        for layer, (k_i8, k_scale, v_i8) in enumerate(layers):
            split.cache.append(layer, entry, limit, k_i8, k_scale, v_i8)
        self._lengths[seq_id] = start + entry.num_tokens

    def free(self, seq_id: int) -> None:
        """Forget a sequence on both sides. Raises: InternalError while the prover works on a batch ahead; ProverFault and
        below."""
        if self._ahead is not None and not self.closed:
            raise self._misused("a sequence freed between a batch and the one to follow it")
        if self._lengths.pop(seq_id, None) is None or self.closed:
            return
        if self._checker is not None:
            self._checker.cache.free(seq_id)
        if self._split is not None:
            self._split.free(seq_id)
        if self._shield is not None:
            self._shield.free(seq_id)
        if self._own is not None:
            self._own.free(seq_id)
        try:
            if self._sender is not None:
                self._sender.flush()  # the link has one sender at a time
            self.channel.wipe()  # every request was answered, so what it left is ours to overwrite
            self.channel.send(Kind.FREE, encode_free([seq_id]))
        except BaseException as e:
            self._end(e)
            raise

    def _check_open(self) -> None:
        if self._closed is not None:
            raise ProverUnavailable(f"the session is closed ({self._closed})", hint="open a new session")

    def _end(self, error: BaseException) -> None:
        """Close after an error. An interrupt in the middle of a message leaves the streams out of step, a bug anything."""
        self.close(error.code if isinstance(error, VeriattnError) else f"interrupted by {type(error).__name__}")
        quote_output(error, self._prover.output_tail())  # complete now that it has ended

    def close(self, reason: str = "closed") -> None:
        """End the prover and destroy the secrets. May be called twice."""
        if self._closed is None:
            self._closed = reason
            try:
                self._destroy_secrets()
                if reason == "closed":
                    # A courtesy: a prover that cannot take it is ended all the same.
                    with suppress(VeriattnError):
                        self.channel.send(Kind.SHUTDOWN, timeout_s=1.0)
                # The sending thread, if there is one, must let go of the channel before it is closed.
                self.channel.abort()
                if self._sender is not None:
                    self._sender.close()
            finally:
                self._prover.terminate()

    def _destroy_secrets(self) -> None:
        """Overwrite keys and what was computed from them."""
        if self._shield is not None:
            self._shield.destroy()
        if self._keys is not None:
            self._keys.destroy()
        if self._checker is not None:
            self._checker.close()
        if self._split is not None:
            self._split.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
