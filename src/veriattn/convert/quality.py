"""Quality of a canonical model beside its float reference: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np

from veriattn.convert.float_reference import FloatReference
from veriattn.convert.sources import Source
from veriattn.errors import UsageError
from veriattn.spec.forward import Batch, BatchEntry, forward
from veriattn.spec.local import LocalOperations
from veriattn.spec.modelfile import ModelDirectory, TensorCollector
from veriattn.spec.reference import F32

#: `convert` warns beyond these.
PPL_RATIO_LIMIT = 1.02
KL_LIMIT = 0.02


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


class LocalModel:
    """A canonical model run right here, for evaluation. Holds the packed weights of the whole model."""

    def __init__(self, directory: ModelDirectory, kernels: ModuleType) -> None:
        collector = TensorCollector(directory.config)
        specs = directory.config.tensor_specs()
        weights: dict[str, Any] = {}
        for name, first, chunk in directory.stream():
            if not collector.add(name, first, chunk):
                whole = weights.setdefault(name, np.empty(specs[name][1], np.int8))
                whole[first : first + chunk.shape[0]] = chunk
        for name, whole in weights.items():
            weights[name] = kernels.pack(whole)
        self.tensors = collector.tensors()
        self._kernels = kernels
        self._ops = LocalOperations(directory.config, lambda name: weights[f"{name}.weight"], kernels)

    def window_logits(self, window: Sequence[int], chunk: int = 256) -> F32:
        """Logits at every position, shape (tokens, vocab)."""
        parts = []
        for start in range(0, len(window), chunk):
            entry = BatchEntry(0, start, tuple(window[start : start + chunk]), "all")
            parts.append(forward(self.tensors, Batch((entry,)), self._ops, self._kernels))
        self._ops.free(0)
        return np.concatenate(parts)


def _log_softmax(logits: F32) -> F32:
    z: F32 = logits - logits.max(axis=1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=1, dtype=np.float64)).astype(np.float32)[:, None]
    return z


def evaluate(
    directory: ModelDirectory,
    source: Source,
    windows: Sequence[Sequence[int]],
    kernels: ModuleType,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Run both models over the windows. Informational: ordinary float arithmetic on checked logits."""
    model = LocalModel(directory, kernels)
    nll = nll_reference = kl = 0.0
    agree = predicted = 0
    reference_logits = FloatReference(source).window_logits(windows)
    for i, (window, expected) in enumerate(zip(windows, reference_logits, strict=True)):
        p = _log_softmax(expected[:-1])
        q = _log_softmax(model.window_logits(window)[:-1])
        rows, targets = np.arange(len(window) - 1), np.asarray(window[1:])
        nll_reference -= float(p[rows, targets].sum(dtype=np.float64))
        nll -= float(q[rows, targets].sum(dtype=np.float64))
        kl += float((np.exp(p) * (p - q)).sum(dtype=np.float64))
        agree += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        predicted += len(rows)
        if progress is not None:
            progress(i + 1, len(windows))
    return Quality(
        tokens=sum(len(w) for w in windows),
        ppl=float(np.exp(nll / predicted)),
        ppl_reference=float(np.exp(nll_reference / predicted)),
        kl=kl / predicted,
        top1=agree / predicted,
    )
