"""Quality of a canonical model beside its float reference: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import groupby
from operator import itemgetter
from types import ModuleType
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from veriattn.convert.float_reference import FloatReference
from veriattn.convert.sources import Source
from veriattn.errors import UsageError
from veriattn.spec.forward import Batch, BatchEntry, StepContext, run_layer
from veriattn.spec.local import LocalOperations
from veriattn.spec.model import LayerTensors, ModelTensors
from veriattn.spec.modelfile import ModelDirectory
from veriattn.spec.reference import F32, I8

#: `convert` warns beyond these.
PPL_RATIO_LIMIT = 1.02
KL_LIMIT = 0.02

SAMPLE_TOKENS = 512
SAMPLE_WINDOW = 256
_CHUNK_TOKENS = 512
_HELD_REFERENCE_BYTES = 2 << 30
_LINEARS = ("qkv", "o", "gate_up", "down")

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quality:
    """Figures over all predicted tokens. `kl` is the mean of KL(reference || canonical) in nats, `top1` the share of
    positions where both pick the same token."""

    tokens: int
    ppl: float
    ppl_reference: float
    kl: float
    top1: float

    @property
    def ppl_ratio(self) -> float:
        return self.ppl / self.ppl_reference

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ppl_ratio": self.ppl_ratio}


def windows_of(ids: Sequence[int], window: int) -> list[list[int]]:
    """Cut ids into windows; a last one of a single token predicts nothing and is dropped.

    Raises: UsageError when nothing is left.
    """
    out = [list(ids[i : i + window]) for i in range(0, len(ids), window)]
    out = [w for w in out if len(w) > 1]
    if not out:
        raise UsageError("the text is too short to evaluate", hint="give a text of at least two tokens")
    return out


class _CanonicalModel:
    """Hidden states of a canonical model, one layer in memory at a time; then logits, window by window."""

    def __init__(self, directory: ModelDirectory, kernels: ModuleType) -> None:
        self._directory = directory
        self._config = directory.config
        self._kernels = kernels
        self._eps = np.float32(directory.config.rms_eps)
        self._head: list[I8] = []
        self._head_scale = np.empty(0, np.float32)

    def hidden(self, windows: Sequence[Sequence[int]], layer_done: Callable[[], None]) -> list[F32]:
        """Residual stream behind the last layer, (tokens, hidden) per window."""
        states: list[F32] = []
        held: dict[str, Array] = {}
        for name, chunks in groupby(self._directory.stream(), key=itemgetter(0)):
            if name == "embed":
                states = _gather(((first, chunk) for _, first, chunk in chunks), windows)
                continue
            parts = [chunk for _, _, chunk in chunks]
            if name == "lm_head.weight":
                self._head = parts
                continue
            held[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if name.endswith(".down.scale"):
                i = int(name.split(".")[1])
                self._run_layer(i, held, windows, states)
                held = {key: value for key, value in held.items() if key.startswith("rope.")}
                layer_done()
        self._head_scale = held["lm_head.scale"]
        return states

    def _run_layer(self, i: int, held: dict[str, Array], windows: Sequence[Sequence[int]], states: list[F32]) -> None:
        at, kernels = f"layers.{i}.", self._kernels
        packed = {f"{at}{name}": kernels.pack(held.pop(f"{at}{name}.weight")) for name in _LINEARS}
        layer = LayerTensors(
            qkv_scale=held[at + "qkv.scale"],
            o_scale=held[at + "o.scale"],
            gate_up_scale=held[at + "gate_up.scale"],
            down_scale=held[at + "down.scale"],
            v_scale=held[at + "v_scale"],
            qkv_bias=held.get(at + "qkv.bias"),
            k_center=held.get(at + "k_center"),
            q_norm=held.get(at + "q_norm"),
            k_norm=held.get(at + "k_norm"),
        )
        cos, sin = held["rope.cos"], held["rope.sin"]
        public = ModelTensors(self._config, np.empty((0, 0), np.float16), cos, sin, (), np.empty(0, np.float32))
        ops = LocalOperations(self._config, packed.__getitem__, kernels)
        for k, window in enumerate(windows):
            parts = []
            for start in range(0, len(window), _CHUNK_TOKENS):
                batch = Batch((BatchEntry(0, start, tuple(window[start : start + _CHUNK_TOKENS]), "none"),))
                rows = batch.positions()
                ctx = StepContext(public, batch, cos[rows], sin[rows], ops, kernels)
                parts.append(run_layer(ctx, i, layer, states[k][rows]))
            states[k] = np.concatenate(parts)
            ops.free(0)

    def logits(self, state: F32) -> F32:
        """Logits (tokens, vocab) of one window's residual stream."""
        a, a_scale = self._kernels.norm_quantise(state, self._eps)
        out = np.empty((state.shape[0], self._config.vocab_size), np.float32)
        at = 0
        for rows in self._head:
            columns = slice(at, at + rows.shape[0])
            out[:, columns] = self._kernels.logits(self._kernels.gemm_i8(a, rows), a_scale, self._head_scale[columns])
            at += rows.shape[0]
        return out


def _gather(blocks: Iterator[tuple[int, Array]], windows: Sequence[Sequence[int]]) -> list[F32]:
    """Embedding rows of every window, float32, from blocks (first row, rows) of the table."""
    ids = [np.asarray(window, dtype=np.int64) for window in windows]
    states: list[F32] = []
    for first, block in blocks:
        if not states:
            states = [np.zeros((i.size, block.shape[1]), np.float32) for i in ids]
        for state, i in zip(states, ids, strict=True):
            here = (i >= first) & (i < first + block.shape[0])
            state[here] = block[i[here] - first]
    return states


def _log_softmax(logits: F32) -> F32:
    z: F32 = logits - logits.max(axis=1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=1, dtype=np.float64)).astype(np.float32)[:, None]
    return z


def evaluate(
    directory: ModelDirectory,
    source: Source,
    windows: Sequence[Sequence[int]],
    kernels: ModuleType,
    progress: Progress | None = None,
) -> Quality:
    """Run both models over the windows. Informational: ordinary float arithmetic on canonical logits.

    Reads every byte of the model against its manifest. Memory: one layer and lm_head of either model, the residual
    streams of all windows and the logits of one; the float weights stay in memory only where they are small.

    progress: called with steps done and in all. Raises: ModelError (damaged files), NumericsError, UsageError (windows
    that do not fit the model).
    """
    steps, done = directory.config.num_layers + len(windows) + 1, 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    _check_windows(directory, windows)
    elements = sum(math.prod(shape) for shape in source.config.tensor_shapes().values())
    # Asked for all windows at once, the reference reads each layer once either way.
    reference = FloatReference(source, stream=4 * elements > _HELD_REFERENCE_BYTES)
    model = _CanonicalModel(directory, kernels)
    states = model.hidden(windows, step)
    nll = nll_reference = kl = 0.0
    agree = predicted = 0
    for i, (window, expected) in enumerate(zip(windows, reference.window_logits(windows), strict=True)):
        if i == 0:
            step()
        p = _log_softmax(expected[:-1])
        q = _log_softmax(model.logits(states[i])[:-1])
        rows, targets = np.arange(len(window) - 1), np.asarray(window[1:])
        nll_reference -= float(p[rows, targets].sum(dtype=np.float64))
        nll -= float(q[rows, targets].sum(dtype=np.float64))
        agree += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        kl += _kl_sum(p, q)
        predicted += len(rows)
        step()
    return Quality(
        tokens=sum(len(w) for w in windows),
        ppl=float(np.exp(nll / predicted)),
        ppl_reference=float(np.exp(nll_reference / predicted)),
        kl=kl / predicted,
        top1=agree / predicted,
    )


def measure(
    directory: ModelDirectory,
    source: Source,
    kernels: ModuleType,
    *,
    tokens: int = SAMPLE_TOKENS,
    progress: Progress | None = None,
) -> Quality:
    """`evaluate` on the first `tokens` tokens of a sample that calibration does not use, in windows of 256.

    A smoke test, not a benchmark: over so few tokens the perplexity ratio of a good model varies by about 0.01.
    """
    manifest = directory.manifest
    prefix = [manifest.bos_id] if manifest.add_bos and manifest.bos_id is not None else []
    ids = Tokenizer.from_str(directory.tokenizer_json()).encode(quality_text(), add_special_tokens=False).ids[:tokens]
    size = max(1, min(SAMPLE_WINDOW, directory.config.max_positions) - len(prefix))
    return evaluate(directory, source, [prefix + part for part in windows_of(ids, size)], kernels, progress)


def quality_text() -> str:
    """The public-domain sample that `measure` reads; calibration has its own."""
    return resources.files("veriattn.convert").joinpath("quality.txt").read_text(encoding="utf-8")


def _check_windows(directory: ModelDirectory, windows: Sequence[Sequence[int]]) -> None:
    config = directory.config
    if not windows or any(len(window) < 2 for window in windows):
        raise UsageError("there is nothing to predict", hint="give windows of at least two tokens")
    for window in windows:
        if len(window) > config.max_positions:
            raise UsageError(f"a window of {len(window)} tokens, the model's context holds {config.max_positions}")
        if min(window) < 0 or max(window) >= config.vocab_size:
            raise UsageError(f"token ids lie outside the vocabulary of {config.vocab_size}")


def _kl_sum(p: F32, q: F32) -> float:
    """Sum over rows of KL(p || q) from log-probabilities; a few rows at a time, to spare memory."""
    total = 0.0
    for row in range(0, p.shape[0], 64):
        part = p[row : row + 64]
        total += float((np.exp(part) * (part - q[row : row + 64])).sum(dtype=np.float64))
    return total
