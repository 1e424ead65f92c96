"""Queries, keys and values of a real forward pass, head by head, and the claims that an honest prover makes for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from veriattn.convert.checkpoint import F32
from veriattn.floatmode.arithmetic import NumpyArithmetic
from veriattn.floatmode.checks import generator
from veriattn.floatmode.engine import FloatModel, LocalOps
from veriattn.floatmode.formats import decode, rounded
from veriattn.floatmode.params import Format
from veriattn.floatmode.requests import Shift, tile_mask
from veriattn.floatmode.trusted import TileClaim


@dataclass(frozen=True)
class Head:
    """One KV head with its group of query heads. q (tokens * group, d), k and v (tokens, d)."""

    layer: int
    q: F32
    k: F32
    v: F32

    @property
    def tokens(self) -> int:
        return int(self.k.shape[0])

    @property
    def group(self) -> int:
        return int(self.q.shape[0] // self.k.shape[0])

    def in_format(self, fmt: Format) -> Head:
        """With values that the format has, as both sides of a half-precision model do."""
        return Head(self.layer, rounded(self.q, fmt), rounded(self.k, fmt), rounded(self.v, fmt))


class _Recorder(LocalOps):
    def __init__(self, model: FloatModel) -> None:
        super().__init__(model.source, model.kept)
        self.heads: list[Head] = []

    def attention(self, layer: int, q: F32, k: F32, v: F32) -> F32:
        tokens, d, group = q.shape[0], q.shape[2], q.shape[1] // k.shape[1]
        for h in range(k.shape[1]):
            rows = np.ascontiguousarray(q[:, h * group : (h + 1) * group]).reshape(tokens * group, d)
            self.heads.append(Head(layer, rows, np.ascontiguousarray(k[:, h]), np.ascontiguousarray(v[:, h])))
        return super().attention(layer, q, k, v)


def capture(model: FloatModel, ids: Sequence[int]) -> list[Head]:
    """Every head of a prefill of the tokens."""
    recorder = _Recorder(model)
    model.forward(recorder, ids)
    return recorder.heads


def synthetic(tokens: int, d: int, group: int, seed: int = 0) -> Head:
    """Gaussian queries, keys and values: for timing at sizes of models that are not here."""
    rng = generator(seed)
    q, k, v = (rng.standard_normal((n, d), np.float32) for n in (tokens * group, tokens, tokens))
    return Head(0, q, k, v)


@dataclass
class Claims:
    """Claims for the tokens [lo, hi) of a head: E with its shifts, and U."""

    tile: TileClaim
    u: F32


def claims(head: Head, lo: int, hi: int, fmt: Format, exp_format: Format, shift: Shift = "max") -> Claims:
    """What `FloatProver.attend` answers for one tile, in NumPy."""
    a, rows = NumpyArithmetic(fmt), slice(lo * head.group, hi * head.group)
    k, q, v = a.put(head.k[:hi]), a.put(head.q[rows]), a.put(head.v[:hi])
    mask = tile_mask(0, lo, hi, hi, head.group) if hi - lo > 1 else None
    top, e = a.exponentials(a.scores(k[None], q[None], head.k.shape[1] ** -0.5), mask, shift == "max")
    sent = decode(a.claim(e[0], exp_format), exp_format)
    u = a.product(a.transposed(a.round_to(e[0], exp_format)), v)
    visible = np.repeat(np.arange(lo + 1, hi + 1, dtype=np.int32), head.group)
    return Claims(TileClaim(np.array(sent), top[0], head.q[rows], visible), u)
