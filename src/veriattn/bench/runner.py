"""What a benchmark drives: something that runs steps of the forward pass and says what they took and moved.

`Runner` is the seam: the strategies of the exact engine are one implementation (`StrategyRunner`), another kind of numerics
brings its own. A runner times its steps inside; whoever drives it chooses sequences, lengths and order.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from veriattn.bench.traffic import Bytes, Part, attention_bytes, batch_bytes
from veriattn.engine.strategies import FullTeeExecutor, SessionExecutor, Strategy, TeeWeights
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry, Operations, StepContext
from veriattn.spec.model import LayerTensors, ModelConfig
from veriattn.spec.reference import F32, I8, I32, I64
from veriattn.trace import TRACE_VARIABLE, ProverFile, Span, Trace, summary
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig
from veriattn.verifier.steps import cut_at_limits
from veriattn.wire.emulate import Throttle
from veriattn.wire.messages import AttentionCheck

_FILL = 1024
#: Where Triton keeps compiled kernels.
KERNELS_VARIABLE = "TRITON_CACHE_DIR"


@dataclass(frozen=True)
class StepTime:
    """Wall seconds of one step; of its layers' attention (from operands to checked outputs), and of the product with the
    vocabulary. The last two are None where nobody on this side sees them."""

    total_s: float
    attention_s: float | None
    head_s: float | None


@dataclass(frozen=True)
class Counters:
    """Since the runner began. moved and paper: bytes measured, and computed from shapes."""

    moved: Bytes
    paper: Bytes
    tee_cpu_s: float
    prover_wait_s: float


class Runner(Protocol):
    """Runs steps under one strategy. Not thread-safe."""

    @property
    def strategy(self) -> str:
        """Its name, for tables."""
        ...

    def step(self, batch: Batch, following: Batch | None = None) -> StepTime:
        """One step, checked as the strategy checks it. following: the next one, where it is certain by now."""
        ...

    def fill(self, seq_id: int, tokens: int) -> None:
        """Bring a sequence to so many cached tokens: by running the model as far as the prover keeps keys, beyond that (and
        where there is no prover) with given ones."""
        ...

    def free(self, seq_id: int) -> None:
        """Forget a sequence."""
        ...

    def counters(self) -> Counters: ...

    def shares(self, trace: bool) -> dict[str, Any] | None:
        """Switch the trace on (None), or off: shares of the time that the sides spent in what, since it was switched on."""
        ...

    def peaks(self) -> tuple[int, int | None]:
        """Most resident memory since the runner began: of this process, and of the prover's."""
        ...

    def device_bytes(self) -> int | None:
        """Memory that the prover holds on a GPU. None without one."""
        ...

    def close(self) -> None: ...


def token_ids(count: int, vocab_size: int, salt: int = 0) -> tuple[int, ...]:
    """Token ids spread over the vocabulary; what they mean does not change the work."""
    return tuple((i * 7919 + salt * 104729) % vocab_size for i in range(count))


def synthetic_keys(c: ModelConfig, tokens: int, seed: int) -> tuple[I8, F32, I8]:
    """Keys, scales and values such as random weights give: no row attends to one key alone."""
    rng = np.random.default_rng(seed)
    shape = (tokens, c.num_kv_heads, c.head_dim)
    k, v = (rng.integers(-127, 128, shape, dtype=np.int8) for _ in range(2))
    return k, np.full(shape[:2], 1e-3, np.float32), v


class _Timed:
    """Operations with their times: how long attention took, and when the product with the vocabulary began.

    Layers that are done in one call stay so, and then nobody sees their attention; unless `apart` is set.
    """

    def __init__(self, inner: Operations) -> None:
        self._inner = inner
        self._fused = getattr(inner, "fused_layer", None)
        self.apart = False
        self.attention_s: float | None = 0.0
        self.head_began: float | None = None

    def reset(self) -> None:
        self.attention_s, self.head_began = 0.0, None

    def fused_layer(self, ctx: StepContext, i: int, layer: LayerTensors, x: F32) -> F32 | None:
        """See `FusedOperations`."""
        whole: F32 | None = None if self._fused is None or self.apart else self._fused(ctx, i, layer, x)
        if whole is not None:
            self.attention_s = None
        return whole

    def linear(self, name: str, a_i8: I8) -> I32:
        if name == "lm_head":
            self.head_began = time.perf_counter()
        return self._inner.linear(name, a_i8)

    def attention(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        began = time.perf_counter()
        result = self._inner.attention(layer, batch, x)
        if self.attention_s is not None:
            self.attention_s += time.perf_counter() - began
        return result


class SwitchedTrace(Trace):
    """A trace that can be off for the steps that are timed and on for the others."""

    enabled = False

    def add(self, kind: str, start: float, stop: float, label: str | None = None, track: str | None = None) -> None:
        """See `Trace.add`."""
        if self.enabled:
            super().add(kind, start, stop, label, track)


class PeakMemory:
    """Most resident memory of this process, looked at twenty times a second from a thread; the prover's from the kernel."""

    def __init__(self) -> None:
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="veriattn-memory", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, memory_bytes("self", "VmRSS") or 0)
            if self._stop.wait(0.05):
                return

    @property
    def bytes(self) -> int:
        """So far."""
        self._peak = max(self._peak, memory_bytes("self", "VmRSS") or 0)
        return self._peak

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def memory_bytes(process: int | str, field: str) -> int | None:
    """A field of /proc/PID/status in bytes; None where it cannot be read."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


@contextmanager
def compiled_kernels() -> Iterator[Path]:
    """A directory where provers of any user may keep compiled kernels: the one that is set, or a temporary one.

    A prover with a user of its own has no home, and each would compile all kernels anew.
    """
    if KERNELS_VARIABLE in os.environ:
        yield Path(os.environ[KERNELS_VARIABLE])
        return
    with tempfile.TemporaryDirectory(prefix="veriattn-kernels-") as temporary:
        Path(temporary).chmod(0o1777)
        yield Path(temporary)


def gpu_memory_bytes() -> int | None:
    """Memory in use on the first GPU, by whomever: torch gives none back, so what a prover holds is the most it had.

    None where nvidia-smi is missing or does not know.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = done.stdout.split()
    return int(words[0]) << 20 if done.returncode == 0 and words and words[0].isdigit() else None


@dataclass(frozen=True)
class Setup:
    """What all strategies of a run share. gpu: whether the prover computes on one. kernels: where it keeps what it compiles."""

    prefill_chunk: int | None = None
    batch: int = 1
    attention_check: AttentionCheck = AttentionCheck.REPLAY
    prover_kv_tokens: int | None = None
    offload_ratio: float | None = None
    emulate_link: Throttle | None = None
    prover_command: tuple[str, ...] | None = None
    prover_threads: int | None = None
    gpu: bool = False
    kernels: Path | None = None


class Models:
    """A model directory as the strategies need it, read when it is first needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._verifier: VerifierModel | None = None

    def verifier(self) -> VerifierModel:
        """Keys and public tensors; kept, since a pass over the weights makes keys for two sessions."""
        if self._verifier is None:
            self._verifier = VerifierModel(self._path)
        return self._verifier

    def tee(self) -> TeeWeights:
        """All the weights; not kept, so that they burden nobody else's memory."""
        return TeeWeights(self._path)


class StrategyRunner:
    """A strategy of the engine over a model directory: real loaders, a real prover process, every check.

    Raises: ModelError; ProverFault and below.
    """

    def __init__(self, strategy: Strategy, models: Models, setup: Setup) -> None:
        self._strategy, self._setup = strategy, setup
        self._chunk = setup.prefill_chunk or _FILL
        self._memory = PeakMemory()
        self._trace = SwitchedTrace()
        self._file: ProverFile | None = None
        self._timed: _Timed | None = None
        self._paper = Bytes(0, 0)
        self.session: Session | None = None
        self._flow: Flow | None = None
        if strategy == "full-tee":
            weights = models.tee()
            self.config = weights.tensors.config
            tee = FullTeeExecutor(weights, 1 << 20, 64)
            tee.observe(self._observe)
            self._executor: FullTeeExecutor | SessionExecutor = tee
            self._assume: Callable[[int, Sequence[tuple[I8, F32, I8]]], None] = tee.assume
            return
        self._flow = Flow(strategy)
        model = models.verifier()
        self.config = model.tensors.config
        self._file = ProverFile()
        session = Session(model, self._launch, self._session_config(), self._flow)
        session.observe(self._observe)
        self.session, self._executor, self._assume = session, SessionExecutor(session), session.assume

    @property
    def strategy(self) -> str:
        return self._strategy

    @property
    def flow(self) -> Flow | None:
        """None for `full-tee`."""
        return self._flow

    def _session_config(self) -> SessionConfig:
        s = self._setup
        limited = self._flow is not Flow.UNVERIFIED
        return SessionConfig(
            max_tokens_per_step=max(self._chunk, s.batch),
            attention_check=s.attention_check,
            prover_kv_tokens=s.prover_kv_tokens if limited else None,
            offload_ratio=s.offload_ratio,
            trace=self._trace,
        )

    def _launch(self, model: VerifierModel) -> ChildProver:
        s = self._setup
        environment = {} if self._file is None else {TRACE_VARIABLE: self._file.path}
        if s.kernels is not None:
            environment[KERNELS_VARIABLE] = str(s.kernels)
        return ChildProver(model, s.prover_command, s.prover_threads, 300.0, s.emulate_link, environment)

    def _observe(self, operations: Operations) -> Operations:
        self._timed = _Timed(operations)
        return self._timed

    # -- Runner ------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, following: Batch | None = None) -> StepTime:
        """See `Runner.step`."""
        if self._timed is not None:
            self._timed.reset()
        began = time.perf_counter()
        self._executor.run(batch, following)
        ended = time.perf_counter()
        self._paper += self._expected(batch)
        if self._timed is None:
            return StepTime(ended - began, None, None)
        head = self._timed.head_began
        return StepTime(ended - began, self._timed.attention_s, 0.0 if head is None else ended - head)

    def parts(self, batch: Batch) -> list[list[Part]]:
        """The step as the session cuts it: sequences that cross the prover's limit in two steps."""
        split = None if self.session is None else self.session.split
        limits = {} if split is None else split.limits
        ratios = [] if split is None else split.stats.ratios
        ratio = ratios[-1] if ratios else 0.0
        return [
            [Part(e.start, e.num_tokens, limits.get(e.seq_id), ratio) for e in piece.entries]
            for piece in cut_at_limits(batch, limits)
        ]

    def _expected(self, batch: Batch) -> Bytes:
        if self._flow is None:
            return Bytes(0, 0)
        transfer = self._setup.attention_check is AttentionCheck.TRANSFER
        split = None if self.session is None else self.session.split
        total, pieces = Bytes(0, 0), self.parts(batch)
        used = [] if split is None else list(split.stats.used)[-sum(any(p.split for p in piece) for piece in pieces) :]
        for piece in pieces:
            rows = len(batch.logit_rows()) if piece is pieces[-1] else 0
            total += batch_bytes(self.config, self._flow, piece, rows, transfer=transfer)
            shared = [p for p in piece if p.split]
            # Layers may differ: the controller tries other ratios now and then.
            for ratio in used.pop(0) if shared else ():
                tried = [replace(p, ratio=ratio) for p in shared]
                total += attention_bytes(self.config, self._flow, tried) - attention_bytes(
                    self.config, self._flow, shared
                )
        return total

    def fill(self, seq_id: int, tokens: int) -> None:
        """See `Runner.fill`."""
        length = self._length(seq_id)
        limit = self._setup.prover_kv_tokens
        if self._flow is Flow.UNVERIFIED:
            limit = None
        run_to = 0 if self._flow is None else tokens if limit is None else min(tokens, limit)
        chunk = self._chunk
        while length < run_to:
            count = min(chunk, run_to - length)
            ids = token_ids(count, self.config.vocab_size, length)
            # Where nothing is checked, asking for logits is what waits for the prover.
            last = self._flow is Flow.UNVERIFIED and length + count == run_to
            self.step(Batch((BatchEntry(seq_id, length, ids, "last" if last else "none"),)))
            length += count
        while length < tokens:
            count = min(_FILL, tokens - length)
            keys = [synthetic_keys(self.config, count, length + i) for i in range(self.config.num_layers)]
            self._assume(seq_id, keys)
            length += count

    def _length(self, seq_id: int) -> int:
        if self.session is not None:
            return self.session.length(seq_id)
        return 0 if isinstance(self._executor, SessionExecutor) else self._executor.length(seq_id)

    def free(self, seq_id: int) -> None:
        self._executor.free(seq_id)

    def counters(self) -> Counters:
        """See `Runner.counters`."""
        r = self._executor.report()
        moved = Bytes(0, 0)
        if self.session is not None:
            moved = Bytes(self.session.channel.bytes_sent, self.session.channel.bytes_received)
        return Counters(moved, self._paper, r.verify_cpu_s, r.prover_wait_s)

    def shares(self, trace: bool) -> dict[str, Any] | None:
        """See `Runner.shares`."""
        if self._file is None:
            return None
        if trace:
            self._trace.spans.clear()
            self._trace.enabled = True
            return None
        self._trace.enabled = False
        time.sleep(0.02)  # the prover writes its spans down when it waits for the next message
        steps = [s for s in self._trace.spans if s.kind == "step"]
        since = min((s.start for s in steps), default=0.0)
        prover: list[Span] = [s for s in self._file.spans() if s.stop >= since]
        return summary(self._trace.spans + prover)

    def restart_controller(self) -> None:
        """Forget what was learnt about offload ratios, where there are any."""
        if self.session is not None and self.session.split is not None:
            self.session.split.restart_controller()

    def peaks(self) -> tuple[int, int | None]:
        """See `Runner.peaks`."""
        pid = None if self.session is None else self.session.prover.pid
        return self._memory.bytes, None if pid is None else memory_bytes(pid, "VmHWM")

    def device_bytes(self) -> int | None:
        """See `Runner.device_bytes`."""
        return gpu_memory_bytes() if self._setup.gpu and self._flow is not None else None

    @property
    def compiles(self) -> bool:
        """Whether the first run of a shape takes longer than the second: kernels are compiled, chosen and captured."""
        return self._setup.gpu and self._flow is not None

    def apart(self, on: bool) -> None:
        """Do layers operation by operation from now on, so that the time of attention is seen, or as it is done otherwise."""
        if self._timed is not None:
            self._timed.apart = on

    def close(self) -> None:
        """End the session and the prover."""
        self._executor.close()
        self._memory.close()
        if self._file is not None:
            self._file.close()
