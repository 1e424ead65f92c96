"""A prover in this process behind the interface of a link, for experiments: real requests, real claims, no isolation."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from veriattn.errors import TranscriptMismatch
from veriattn.floatmode.checks import generator
from veriattn.floatmode.engine import FloatConfig, FloatModel, linear_secrets
from veriattn.floatmode.formats import Array
from veriattn.floatmode.link import Frame
from veriattn.floatmode.params import kind_of
from veriattn.floatmode.prover import FloatProver, answers
from veriattn.floatmode.requests import Hello
from veriattn.floatmode.trusted import Judge, Outsourced, Setting
from veriattn.verifier.tiling import Tiling


class LocalLink:
    """`FloatLink` without a second process."""

    def __init__(self, prover: FloatProver) -> None:
        self.prover = prover
        self._claims: deque[Array] = deque()
        self.bytes_sent = self.bytes_received = 0

    def send(self, kind: Frame, *payload: bytes | bytearray | Array) -> None:
        """Encode the request and let the prover answer it at once."""
        parts = [bytes(p) if isinstance(p, bytes | bytearray) else np.ascontiguousarray(p).tobytes() for p in payload]
        self._claims.extend(answers(self.prover, kind, b"".join(parts)))
        self.bytes_sent += sum(map(len, parts))

    def claim(self, shape: tuple[int, ...], dtype: np.dtype[Any], kind: Frame = Frame.CLAIM) -> Array:
        """The next claim, a copy."""
        raw = self._claims.popleft()
        if kind is not Frame.CLAIM or raw.nbytes != np.empty(shape, dtype).nbytes:
            raise TranscriptMismatch("a claim has another length")
        self.bytes_received += raw.nbytes
        return np.array(np.ascontiguousarray(raw).view(dtype).reshape(shape))

    def abort(self) -> None:
        self._claims.clear()


def open_local(
    model: FloatModel, config: FloatConfig, judge: Judge, prover: FloatProver | None = None
) -> tuple[Outsourced, FloatProver]:
    """The trusted side over a prover in this process, with fresh secrets."""
    prover = prover or FloatProver(model.source, hello_of(model, config))
    setting = Setting(
        model.config, config.params, config.format, config.sent_exp_format, config.shift, Tiling(1, 1, pipeline=False),
        config.kv_tokens, config.offload_ratio,
    )  # fmt: skip
    linears = linear_secrets(model, config, generator())[0]
    link: Any = LocalLink(prover)
    ops = Outsourced(link, setting, linears, judge, config.strategy)
    ops.reset()
    return ops, prover


def hello_of(model: FloatModel, config: FloatConfig) -> Hello:
    """What the prover is told to be."""
    return Hello(
        str(model.source.path), config.backend, config.device, config.format, config.sent_exp_format, config.shift,
        config.kv_tokens,
    )  # fmt: skip


def calibrated(
    model: FloatModel, config: FloatConfig, prompts: list[list[int]], max_tokens: int, prover: FloatProver
) -> tuple[dict[str, float], int]:
    """Tolerances by kind as `veriattn calibrate` finds them, and how many honest claims no tolerance can accept (underflow)."""
    largest: dict[str, float] = {}
    hopeless = 0

    def judge(key: str, residual: float) -> bool:
        nonlocal hopeless
        if math.isfinite(residual):
            kind = kind_of(key)
            largest[kind] = max(largest.get(kind, 0.0), residual)
        else:
            hopeless += 1
        return True

    ops, _ = open_local(model, config, judge, prover)
    for linears in linear_secrets(model, config, generator(), config.params.calibration_runs):
        ops.linears = linears
        for number, prompt in enumerate(prompts):
            ops.reset()
            ids = list(prompt)
            for _ in range(max_tokens if number < 2 else 1):
                ids = [int(np.argmax(model.forward(ops, ids)))]
    return {key: config.params.factor * value for key, value in largest.items()}, hopeless
