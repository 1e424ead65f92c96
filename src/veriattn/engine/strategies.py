"""Where the forward pass runs: one executor per strategy, all with the same bits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from veriattn.errors import UsageError
from veriattn.native import kernels
from veriattn.spec.forward import Batch, Operations, check_batch, forward
from veriattn.spec.local import LocalOperations
from veriattn.spec.modelfile import Manifest, ModelDirectory, TensorCollector
from veriattn.spec.reference import F32, I8
from veriattn.verifier.memory import Need, reserve
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Launcher, Session, SessionConfig, check_flow

Strategy = Literal["run-ahead", "veriattn", "tsdp", "full-tee", "dangerous-unverified"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

GUARANTEES: dict[Strategy, str] = {
    "run-ahead": "exact",
    "veriattn": "exact",
    "tsdp": "exact",
    "full-tee": "trusted-compute",
    "dangerous-unverified": "none",
}


@dataclass
class ExecutorReport:
    """What an executor did, in the terms of the JSON output. Times in seconds, sizes in bytes."""

    prover_pid: int | None = None
    prover_device: str | None = None
    soundness_bits: int | None = None
    linear_rows: int = 0
    attention_rows: int = 0
    elementwise_replayed: int = 0
    bytes_to_prover: int = 0
    bytes_from_prover: int = 0
    verify_cpu_s: float = 0.0
    prover_wait_s: float = 0.0
    kv_prover_tokens: int = 0
    kv_streamed_tokens: int = 0
    kv_tee_tokens: int = 0
    kv_tee_bytes: int = 0
    offload_ratio: float | None = None
    offload_ratios: tuple[float, ...] = ()
    offload_trials: int = 0

    def add(self, other: ExecutorReport) -> None:
        """Accumulate the counters of an earlier or later executor; identity fields become the other's."""
        self.prover_pid, self.prover_device = other.prover_pid, other.prover_device
        self.soundness_bits = other.soundness_bits
        self.offload_ratio = self.offload_ratio if other.offload_ratio is None else other.offload_ratio
        self.kv_tee_bytes = max(self.kv_tee_bytes, other.kv_tee_bytes)
        for name in (
            "linear_rows",
            "attention_rows",
            "elementwise_replayed",
            "bytes_to_prover",
            "bytes_from_prover",
            "verify_cpu_s",
            "prover_wait_s",
            "kv_prover_tokens",
            "kv_streamed_tokens",
            "kv_tee_tokens",
            "offload_ratios",
            "offload_trials",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def checks(self) -> dict[str, int]:
        return {
            "linear_rows": self.linear_rows,
            "attention_rows": self.attention_rows,
            "elementwise_replayed": self.elementwise_replayed,
        }


class Executor(Protocol):
    """Runs steps. Whatever `run` returns may be sampled from; under a verifying strategy it has been checked."""

    def run(self, batch: Batch, following: Batch | None = None) -> F32:
        """One step: logits (rows, vocab) for the rows asked for. following: the next call's batch, if it is certain by now;
        others may then begin with it early. Raises: VeriattnError; the executor is then closed."""
        ...

    def free(self, seq_id: int) -> None:
        """Forget a sequence. Not between a step and the one that followed it in `run`."""
        ...

    def report(self) -> ExecutorReport: ...

    def close(self) -> None: ...


class FullTeeExecutor:
    """Everything in the TEE: native kernels over hashed weights, no prover."""

    def __init__(self, weights: TeeWeights, kv_tokens: int, max_sequences: int, max_bytes: int | None = None) -> None:
        """max_bytes: most that keys and values may take. Raises, from `run`: ConfigError before they would take more."""
        self._weights, self._max_bytes = weights, max_bytes
        max_pages = -(-kv_tokens // 256) + max_sequences
        self._ops = LocalOperations(weights.tensors.config, weights.packed.__getitem__, kernels, max_pages=max_pages)
        self._observed: Operations = self._ops
        self._cpu_s = 0.0

    def run(self, batch: Batch, following: Batch | None = None) -> F32:
        cpu = time.process_time()
        check_batch(self._weights.tensors, batch, [self._ops.length(e.seq_id) for e in batch.entries])
        if self._max_bytes is not None:
            reserve([Need(self._ops.caches, [(e.seq_id, e.num_tokens) for e in batch.entries])], self._max_bytes)
        logits = forward(self._weights.tensors, batch, self._observed, kernels)
        self._cpu_s += time.process_time() - cpu
        return logits

    def observe(self, wrap: Callable[[Operations], Operations]) -> None:
        """As `Session.observe`."""
        self._observed = wrap(self._ops)

    def length(self, seq_id: int) -> int:
        """Cached tokens of a sequence."""
        return self._ops.length(seq_id)

    def assume(self, seq_id: int, layers: Sequence[tuple[I8, F32, I8]]) -> None:
        """As `Session.assume`, at any position."""
        start = self._ops.length(seq_id)
        kv_heads = range(self._weights.tensors.config.num_kv_heads)
        for layer, (k_i8, k_scale, v_i8) in enumerate(layers):
            self._ops.append(layer, seq_id, start, kv_heads, k_i8, k_scale, v_i8)

    def free(self, seq_id: int) -> None:
        self._ops.free(seq_id)

    def report(self) -> ExecutorReport:
        return ExecutorReport(verify_cpu_s=self._cpu_s, kv_tee_bytes=self._ops.cache_bytes)

    def close(self) -> None:
        return


class TeeWeights:
    """Hashed weights packed for the native kernels, for `full-tee`. Raises: ModelError."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        expected_digest: str | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        directory = ModelDirectory(path, expected_digest=expected_digest)
        self.manifest: Manifest = directory.manifest
        self.tokenizer_json = directory.tokenizer_json()
        self.chat_template = directory.chat_template()
        collector = TensorCollector(directory.config)
        specs = directory.config.tensor_specs()
        self.packed: dict[str, Any] = {}
        matrix = np.empty((0, 0), np.int8)
        for name, first, chunk in directory.stream(on_bytes=on_bytes):
            if collector.add(name, first, chunk):
                continue
            if first == 0:
                matrix = np.empty(specs[name][1], np.int8)
            matrix[first : first + chunk.shape[0]] = chunk
            if first + chunk.shape[0] == matrix.shape[0]:
                self.packed[name[: -len(".weight")]] = kernels.pack(matrix)
        self.tensors = collector.tensors()


class SessionExecutor:
    """Every strategy with a prover: a session, whose flow says who asks and who runs ahead."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def run(self, batch: Batch, following: Batch | None = None) -> F32:
        return self.session.run(batch, following)

    def free(self, seq_id: int) -> None:
        self.session.free(seq_id)

    def report(self) -> ExecutorReport:
        s = self.session
        kv: dict[str, Any] = {} if s.split is None else s.split.stats.counters()
        return ExecutorReport(
            prover_pid=s.prover.pid,
            prover_device=s.ready.device,
            soundness_bits=s.soundness_bits,
            linear_rows=s.stats.checks.linear_rows,
            attention_rows=s.stats.checks.attention_rows,
            elementwise_replayed=s.stats.checks.elementwise_replayed,
            bytes_to_prover=s.channel.bytes_sent,
            bytes_from_prover=s.channel.bytes_received,
            verify_cpu_s=s.stats.verify_cpu_s,
            prover_wait_s=s.stats.prover_wait_s,
            kv_tee_bytes=s.kv_bytes,
            **kv,
        )

    def close(self) -> None:
        self.session.close()


@dataclass(frozen=True)
class LoadedModel:
    """A model as one strategy needs it, and how to start an executor over it."""

    strategy: Strategy
    manifest: Manifest
    tokenizer_json: str
    chat_template: str | None
    start: Callable[[], Executor]


def load(
    strategy: Strategy,
    path: str | os.PathLike[str],
    *,
    launch: Launcher,
    config: SessionConfig,
    expected_digest: str | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> LoadedModel:
    """Read and hash a model for a strategy. Raises: ModelError, UsageError."""
    if strategy not in STRATEGIES:
        raise UsageError(f"unknown strategy {strategy!r}", hint=f"one of {', '.join(STRATEGIES)}")
    if strategy == "full-tee" and (config.kv_shield != "off" or config.shield_first_layers):
        raise UsageError("a KV shield has nothing to do where nothing leaves the TEE", hint="leave --kv-shield out")
    if strategy == "full-tee" and (config.prover_kv_tokens, config.prover_kv_total) != (None, None):
        raise UsageError("full-tee has no prover whose capacity could be limited", hint="leave the capacity out")
    if strategy == "full-tee":
        weights = TeeWeights(path, expected_digest=expected_digest, on_bytes=on_bytes)
        return LoadedModel(
            strategy,
            weights.manifest,
            weights.tokenizer_json,
            weights.chat_template,
            lambda: FullTeeExecutor(weights, config.kv_tokens, config.max_sequences, config.tee_memory_bytes),
        )
    flow = Flow(strategy)
    check_flow(config, flow)
    model = VerifierModel(path, expected_digest=expected_digest, on_bytes=on_bytes)
    return LoadedModel(
        strategy,
        model.manifest,
        model.tokenizer_json,
        model.chat_template,
        lambda: SessionExecutor(Session(model, launch, config, flow)),
    )
