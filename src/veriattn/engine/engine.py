"""The engine: requests in, checked tokens out, over any strategy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from veriattn.engine.scheduler import FinishReason, Scheduler, Sequence
from veriattn.engine.strategies import GUARANTEES, Executor, ExecutorReport, LoadedModel, Strategy, load
from veriattn.engine.text import IncrementalDecoder, StopMatcher, TextCodec
from veriattn.errors import ConfigError, ProverTimeout, ProverUnavailable, UsageError, VeriattnError
from veriattn.shield.permutation import ShieldMode
from veriattn.spec.forward import Batch
from veriattn.spec.sampler import SamplingParams, logprobs, sample
from veriattn.trace import NO_TRACE, TRACE_VARIABLE, ProverFile, Trace, summary, to_chrome
from veriattn.verifier.launch import ChildProver, Launcher, Prover, RemoteProver, builtin_prover
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import SessionConfig
from veriattn.verifier.tiling import Tiling
from veriattn.wire.emulate import Throttle
from veriattn.wire.messages import AttentionCheck
from veriattn.wire.stream import parse_address


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine. Lengths in tokens, times in seconds.

    device: where the prover that is started here runs, `cpu` or `cuda`; another program or address decides for itself.
    prover_address: of a prover that listens (tcp://, vsock://, unix://); default: one is started here.
    prefill_chunk: most tokens of one step. retries: how often a prover that died or fell silent is replaced before the
    error is raised; a prover that was caught lying is never retried here. trace: where `close` writes a Chrome trace.
    """

    strategy: Strategy = "run-ahead"
    prefill_chunk: int = 512
    max_sequences: int = 64
    kv_tokens: int = 1 << 18
    attention_check: AttentionCheck | Literal["auto"] = AttentionCheck.REPLAY
    tiling: Tiling | Literal["auto"] | None = None
    emulate_link: Throttle | None = None
    prover_kv_tokens: int | None = None
    prover_kv_total: int | None = None
    offload_ratio: float | None = None
    tee_memory_bytes: int | None = None
    kv_shield: ShieldMode = "off"
    shield_first_layers: int = 0
    device: str = "cpu"
    prover_command: tuple[str, ...] | None = None
    prover_address: str | None = None
    prover_threads: int | None = None
    start_timeout_s: float = 600.0
    step_timeout_s: float = 300.0
    retries: int = 1
    expected_digest: str | None = None
    trace: Path | None = None


@dataclass(frozen=True)
class Request:
    """What a caller asks for. `stop` strings end the text and are not part of it. `owner`: who shares room with others."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    choice: int = 0
    owner: str = ""


@dataclass(frozen=True)
class TokenOutput:
    """One released token. `text` is what it adds to the text that is safe to show."""

    request_id: int
    token_id: int | None
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


@dataclass
class Timing:
    """Wall times of a request (monotonic seconds)."""

    submitted: float
    first_token: float | None = None
    last_token: float | None = None

    def to_json(self, prompt_tokens: int, output_tokens: int) -> dict[str, float | None]:
        """ttft_s, tpot_s and rates; None where no token was produced."""
        if self.first_token is None or self.last_token is None:
            return {"ttft_s": None, "tpot_s": None, "prefill_tokens_per_s": None, "decode_tokens_per_s": None}
        ttft = self.first_token - self.submitted
        decode = self.last_token - self.first_token
        tpot = decode / (output_tokens - 1) if output_tokens > 1 else None
        return {
            "ttft_s": ttft,
            "tpot_s": tpot,
            "prefill_tokens_per_s": prompt_tokens / ttft if ttft > 0 else None,
            "decode_tokens_per_s": 1.0 / tpot if tpot else None,
        }


@dataclass
class RequestState:
    """A request in progress or finished."""

    request: Request
    sequence: Sequence
    decoder: IncrementalDecoder
    matcher: StopMatcher
    timing: Timing
    text: str = ""
    finish_reason: FinishReason | None = None

    @property
    def output_ids(self) -> list[int]:
        return self.sequence.output_ids


class Engine:
    """Submit, step, stream, cancel. Not thread-safe: one thread drives it.

    Tokens leave `step` only after everything under them has been checked (strategies with guarantee `exact`).

    Raises: ModelError, UsageError, ProverFault and below. After a fault every unfinished request can still go on:
    `step` opens a fresh session and recomputes from the tokens that were released.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        launch: Launcher | None = None,
        on_bytes: Any = None,
    ) -> None:
        self.config = config or EngineConfig()
        c = self.config
        if c.prover_address is not None and (c.prover_command is not None or c.prover_threads is not None):
            raise ConfigError("a prover at an address is started, and given threads, where it is")
        if c.prover_address is not None:
            parse_address(c.prover_address)
        if c.trace is not None and c.strategy == "full-tee":
            raise ConfigError("a trace shows both sides of a link, full-tee has none", hint="choose another strategy")
        elsewhere = (c.prover_address, c.prover_command, c.emulate_link)
        if c.strategy == "full-tee" and (any(e is not None for e in elsewhere) or c.device != "cpu"):
            raise UsageError(
                "full-tee computes everything here: it has no prover, no device and no link",
                hint="leave those options out, or choose another strategy",
            )
        self._trace: Trace = NO_TRACE if c.trace is None else Trace()
        self._prover_trace = ProverFile() if c.trace is not None and c.prover_address is None else None
        self.trace_summary: dict[str, Any] | None = None
        session_config = SessionConfig(
            max_tokens_per_step=c.prefill_chunk,
            max_sequences=c.max_sequences,
            kv_tokens=c.kv_tokens,
            attention_check=c.attention_check,
            tiling=c.tiling,
            prover_kv_tokens=c.prover_kv_tokens,
            prover_kv_total=c.prover_kv_total,
            offload_ratio=c.offload_ratio,
            tee_memory_bytes=c.tee_memory_bytes,
            kv_shield=c.kv_shield,
            shield_first_layers=c.shield_first_layers,
            start_timeout_s=c.start_timeout_s,
            step_timeout_s=c.step_timeout_s,
            trace=self._trace,
        )
        self.model: LoadedModel = load(
            c.strategy,
            model,
            launch=launch or self._launch,
            config=session_config,
            expected_digest=c.expected_digest,
            on_bytes=on_bytes,
        )
        m = self.model.manifest
        self.codec = TextCodec(
            self.model.tokenizer_json, self.model.chat_template, m.bos_id, m.eos_ids, m.add_bos, m.config.vocab_size
        )
        self.path = Path(model)
        self.states: dict[int, RequestState] = {}
        self._scheduler = Scheduler(c.prefill_chunk, c.max_sequences, c.kv_tokens)
        self._executor: Executor | None = None
        #: The step after the one that ran last, where no sample decides what is in it: the prover may know of it already.
        self._planned: Batch | None = None
        #: Sequences that ended while a step was planned, to be freed after it.
        self._ended: list[int] = []
        self._past = ExecutorReport()
        self._next_id = 0
        self.restarts = 0
        #: Requests in the step that ran last or failed.
        self.step_ids: tuple[int, ...] = ()

    def _launch(self, model: VerifierModel) -> Prover:
        c = self.config
        if c.prover_address is not None:
            return RemoteProver(c.prover_address, c.step_timeout_s, c.emulate_link)
        environment = {} if self._prover_trace is None else {TRACE_VARIABLE: self._prover_trace.path}
        command = c.prover_command or builtin_prover(c.device)
        return ChildProver(model, command, c.prover_threads, c.step_timeout_s, c.emulate_link, environment)

    @property
    def guarantee(self) -> str:
        return GUARANTEES[self.config.strategy]

    # -- requests ----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id. Raises: UsageError where it can never run."""
        limit = self.model.manifest.config.max_positions
        if not request.prompt_ids:
            raise UsageError("the prompt is empty", hint="give at least one token of text")
        if request.max_tokens < 1:
            raise UsageError("max_tokens must be at least 1")
        if len(request.prompt_ids) >= limit:
            raise UsageError(
                f"the prompt has {len(request.prompt_ids)} tokens, the model's context holds {limit}",
                hint="shorten the prompt",
            )
        vocab = self.model.manifest.config.vocab_size
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab:
            raise UsageError(f"a prompt token id is outside the vocabulary of {vocab}")
        seq = Sequence(
            self._next_id,
            request.prompt_ids,
            request.params,
            min(request.max_tokens, limit - len(request.prompt_ids)),
            request.choice,
            request.owner,
        )
        if not self._scheduler.fits(seq):
            raise UsageError(
                f"prompt and answer need up to {seq.reserved_tokens} cache entries, the engine has {self.config.kv_tokens}",
                hint="shorten the prompt or lower max_tokens",
            )
        self._next_id += 1
        self.states[seq.seq_id] = RequestState(
            request, seq, IncrementalDecoder(self.codec), StopMatcher(request.stop), Timing(time.monotonic())
        )
        self._scheduler.add(seq)
        return seq.seq_id

    def cancel(self, request_id: int) -> None:
        """Stop a request where it stands; its released tokens stay."""
        state = self.states[request_id]
        if state.finish_reason is None:
            self._finish(state, "cancelled")

    def forget(self, request_id: int) -> None:
        """Drop a finished request's state."""
        self.cancel(request_id)
        del self.states[request_id]

    @property
    def has_work(self) -> bool:
        return bool(self._planned or self._scheduler.waiting or self._scheduler.running)

    def load(self) -> tuple[int, int, int]:
        """Requests admitted, requests waiting, cache entries that the admitted ones reserve."""
        s = self._scheduler
        return len(s.running), len(s.waiting), sum(seq.reserved_tokens for seq in s.running)

    # -- steps -------------------------------------------------------------------------------------------------

    def step(self) -> list[TokenOutput]:
        """Run one step and return the tokens that it released, at most one per request.

        Raises: VerificationError and other ProverFault, after the configured retries; nothing of the step is released.
        """
        try:
            batch, self._planned = self._planned or self._scheduler.next_batch(), None
            if batch is None:
                return []
            # A step without samples leaves nothing open about the next one.
            following = None if batch.logit_rows() or self._ended else self._scheduler.next_batch()
            self.step_ids = tuple(e.seq_id for e in batch.entries)
            if self._executor is None:
                self._executor = self.model.start()
            logits = self._executor.run(batch, following)
        except (ProverUnavailable, ProverTimeout):
            self.reset()
            if self.restarts >= self.config.retries:
                raise
            self.restarts += 1
            return self.step()
        except BaseException:
            self.reset()
            raise
        self._planned = following
        outputs = self._release(batch, logits)
        while self._ended and self._planned is None:
            self._free(self._ended.pop())
        return outputs

    def _release(self, batch: Batch, logits: Any) -> list[TokenOutput]:
        outputs, row = [], 0
        for entry in batch.entries:
            if entry.logits != "last":
                continue
            state = self.states.get(entry.seq_id)
            if state is not None and state.finish_reason is None:
                outputs.append(self._accept(state, logits[row]))
            row += 1
        return outputs

    def _accept(self, state: RequestState, logits_row: Any) -> TokenOutput:
        seq, request = state.sequence, state.request
        token = sample(logits_row, seq.params, seq.prompt_ids, seq.output_ids, seq.num_tokens, seq.choice)
        logprob, top = (None, ()) if request.logprobs is None else _logprobs(logits_row, token, request.logprobs)
        now = time.monotonic()
        state.timing.first_token = state.timing.first_token or now
        state.timing.last_token = now
        seq.output_ids.append(token)
        reason: FinishReason | None = None
        if token in self.codec.eos_ids and not request.ignore_eos:
            reason, text = "stop", state.matcher.push(state.decoder.finish())
        else:
            text = state.matcher.push(state.decoder.push(token))
        if state.matcher.matched:
            reason = "stop"
        elif reason is None and len(seq.output_ids) >= seq.max_tokens:
            reason = "length"
            text += state.matcher.push(state.decoder.finish())
        if reason is not None:
            text += state.matcher.finish()
            self._finish(state, reason)
        state.text += text
        return TokenOutput(seq.seq_id, token, text, logprob, top, reason)

    def _finish(self, state: RequestState, reason: FinishReason) -> None:
        state.finish_reason = reason
        if not self._scheduler.remove(state.sequence):
            return
        if self._planned is None:
            self._free(state.sequence.seq_id)
        else:
            self._ended.append(state.sequence.seq_id)

    def _free(self, seq_id: int) -> None:
        if self._executor is None:
            return
        try:
            self._executor.free(seq_id)
        except VeriattnError:
            # The token was checked before; the next step meets the dead prover and reports it.
            self.reset()

    def reset(self) -> None:
        """End the session. Unfinished requests recompute from their released tokens in the next step's session."""
        executor, self._executor = self._executor, None
        if executor is not None:
            self._past.add(executor.report())
            executor.close()
        self._planned = None
        self._ended.clear()
        self._scheduler.requeue_all()

    def stream(self, request_id: int) -> Iterator[TokenOutput]:
        """Drive the engine and yield one request's tokens until it ends. Others advance along the way."""
        while self.states[request_id].finish_reason is None:
            for out in self.step():
                if out.request_id == request_id:
                    yield out

    def run_all(self) -> None:
        """Drive the engine until every request has ended."""
        while self.has_work:
            self.step()

    def generate(self, requests: SequenceOf[Request]) -> list[RequestState]:
        """Run requests together and return their final states in order."""
        ids = [self.submit(r) for r in requests]
        self.run_all()
        return [self.states.pop(i) for i in ids]

    # -- reports -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the session now rather than in the first step."""
        if self._executor is None:
            self._executor = self.model.start()

    @property
    def executor(self) -> Executor | None:
        return self._executor

    def report(self) -> ExecutorReport:
        """Counters over all sessions of this engine."""
        total = ExecutorReport()
        total.add(self._past)
        if self._executor is not None:
            total.add(self._executor.report())
        return total

    def close(self) -> None:
        """End the session. Writes the trace, if there is one. Raises: UsageError where that cannot be written."""
        self.reset()
        if self.config.trace is not None and self.trace_summary is None:
            self._write_trace(self.config.trace)

    def _write_trace(self, path: Path) -> None:
        spans = list(self._trace.spans)
        if self._prover_trace is not None:
            spans += self._prover_trace.spans()
            self._prover_trace.close()
        link = self.config.emulate_link
        title = self.config.strategy + ("" if link is None else f", emulated link of {link.gb_per_s:g} GB/s")
        self.trace_summary = summary(spans)
        try:
            path.write_text(to_chrome(spans, title))
        except OSError as e:
            raise UsageError(f"cannot write the trace to {path}: {e.strerror}") from e

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _logprobs(logits_row: Any, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    value, others = logprobs(logits_row, token, top)
    return value, tuple(others)
