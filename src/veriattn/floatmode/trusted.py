"""The trusted side of floating-point attention and linears: asks, checks, combines. float32 NumPy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from veriattn.convert.checkpoint import F32, F64, SourceConfig
from veriattn.convert.float_reference import FloatKVCache
from veriattn.errors import AttentionMismatch, FreivaldsMismatch, InternalError, VeriattnError
from veriattn.floatmode.checks import (
    I32,
    coefficients,
    gaussian,
    generator,
    gvfa_residual,
    lp_residuals,
    lp_worst,
)
from veriattn.floatmode.formats import WIRE, decode, rounded
from veriattn.floatmode.link import FloatLink, Frame
from veriattn.floatmode.params import CheckParams, Format, kind_of
from veriattn.floatmode.requests import Attend, Linear, Shift, Values, tile_mask
from veriattn.verifier.tiling import Tiling

HINT = "the prover is faulty or lying, or its rounding is larger than at calibration; nothing of this step was released"


class Judge(Protocol):
    """What becomes of a residual: compared with a tolerance, or recorded."""

    def __call__(self, key: str, residual: float) -> bool:
        """Whether the check named `key` passes."""
        ...


@dataclass
class Counts:
    """Rows checked, and where the trusted side's time went."""

    linear_rows: int = 0
    attention_rows: int = 0
    check_s: float = 0.0
    streamed_keys: int = 0
    tee_keys: int = 0
    prover_keys: int = 0
    attention_s: float = 0.0

    @contextmanager
    def checking(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.check_s += time.perf_counter() - start


@dataclass
class _Running:
    """Secrets of one layer and KV head for a sequence, with projections that grow with the cache."""

    a: I32
    w: F32
    sums: F64  # sum_i a_i k_i over the keys so far, (tau_a, d)
    counts: F64  # sum_i a_i over them, (tau_a,)
    projected: F32  # V w and a column of ones, (capacity, repetitions + 1)
    length: int = 0


@dataclass
class AttentionSecrets:
    """Challenges of one KV head's keys 0 .. n-1, for rows whose last key is `start` or a later one.

    a (tau_a, n); prefix[:, i] and prefix_a[:, i]: sums of a k and of a over the keys 0 .. start + i; w (d, repetitions);
    projected (n, repetitions + 1): V w, and ones, so that one product of E gives E V w and the row sums Z.
    """

    a: I32
    start: int
    prefix: F64
    prefix_a: F64
    w: F32
    projected: F32

    @classmethod
    def draw(cls, rng: np.random.Generator, k: F32, v: F32, start: int, params: CheckParams) -> AttentionSecrets:
        """Fresh challenges for k, v (n, d)."""
        w = gaussian(rng, v.shape[1], params.repetitions)
        return cls.of(coefficients(rng, k.shape[0], params), w, k, with_ones(project(v, w)), start)

    @classmethod
    def of(cls, a: I32, w: F32, k: F32, projected: F32, start: int) -> AttentionSecrets:
        """Of given challenges."""
        a_f64 = a.astype(np.float64)
        prefix = a_f64[:, start:, None] * k[None, start:].astype(np.float64)
        prefix[:, 0] += weighted_sum(a[:, :start], k[:start])
        return cls(a, start, np.cumsum(prefix, axis=1), np.cumsum(a_f64, axis=1)[:, start:], w, projected)

    def residuals(self, tile: TileClaim, scale: float) -> list[F64]:
        """LPVeriExp of a tile for each coefficient vector: scores, mask, shift and exp together."""
        last, keys = tile.visible - 1 - self.start, tile.e.shape[0]
        out = []
        for a, prefix, prefix_a in zip(self.a, self.prefix, self.prefix_a, strict=True):
            dots = np.einsum("rd,rd->r", tile.q.astype(np.float64), prefix[last]) * scale
            expected = dots - tile.shift.astype(np.float64) * prefix_a[last]
            out.append(lp_residuals(tile.e, a[:keys], tile.visible, expected))
        return out

    def outputs(self, tile: TileClaim) -> F32:
        """E V w and Z of a tile, (rows, repetitions + 1); entries of E that are masked are set to 0 first."""
        tile.clear_masked()
        return np.asarray(tile.e.T @ self.projected[: tile.e.shape[0]], np.float32)


_SUM_BLOCK = 256


def weighted_sum(a: I32, k: F32) -> F64:
    """sum_i a_i k_i, (tau_a, d): float32 within blocks of keys, float64 across them. Shapes: a (tau_a, n), k (n, d)."""
    n = k.shape[0] // _SUM_BLOCK * _SUM_BLOCK
    blocks = a[:, :n].astype(np.float32).reshape(a.shape[0], -1, 1, _SUM_BLOCK) @ k[:n].reshape(
        -1, _SUM_BLOCK, k.shape[1]
    )
    rest = a[:, n:].astype(np.float64) @ k[n:].astype(np.float64)
    return np.asarray(blocks.sum(axis=(1, 2), dtype=np.float64) + rest, np.float64)


def project(v: F32, w: F32) -> F32:
    """V w, one column after the other: for a few columns a library's product of matrices is several times slower."""
    return np.stack([v @ w[:, i] for i in range(w.shape[1])], axis=1)


def with_ones(projected: F32) -> F32:
    """One more column, of ones."""
    return np.concatenate([projected, np.ones((projected.shape[0], 1), np.float32)], axis=1)


@dataclass
class TileClaim:
    """A tile of E for one KV head, in private memory, with what the trusted side needs to judge it."""

    e: F32  # (keys, rows)
    shift: F32  # (rows,)
    q: F32  # (rows, d)
    visible: I32  # (rows,): keys that a row sees

    def clear_masked(self) -> None:
        """Make what no row may see 0."""
        lowest, keys = int(self.visible.min()), self.e.shape[0]
        if lowest < keys:
            self.e[lowest:][np.arange(lowest, keys)[:, None] >= self.visible] = 0.0


@dataclass
class LinearSecrets:
    """w and W.T w of one matrix, drawn before the first claim."""

    w: F32
    u: F32

    @classmethod
    def draw(cls, rng: np.random.Generator, weight: F32, repetitions: int) -> LinearSecrets:
        w = gaussian(rng, weight.shape[0], repetitions)
        return cls(w, weight.T @ w)


@dataclass
class Setting:
    """How attention is outsourced."""

    config: SourceConfig
    params: CheckParams
    format: Format
    exp_format: Format
    shift: Shift = "max"
    tiling: Tiling | None = None
    kv_tokens: int = 1 << 30
    offload_ratio: float = 1.0


@dataclass
class Outsourced:
    """`FloatOps` over a prover: every claim is checked before it is used. One sequence at a time.

    `veriattn`: LPVeriExp and GVFAVeriMM, two-level pipeline, split decode. `tsdp`: scores and products by GVFAVeriMM with
    the softmax here, one after the other.
    Trust: claims are adversarial within the tolerance of `judge`, and what passes there is used.
    Raises: FreivaldsMismatch, AttentionMismatch; the session must close.
    """

    link: FloatLink
    setting: Setting
    linears: dict[tuple[int, str], LinearSecrets]
    judge: Judge
    strategy: str
    counts: Counts = field(default_factory=Counts)
    rng: np.random.Generator = field(default_factory=generator)
    layer: int = 0

    def __post_init__(self) -> None:
        self._cache = FloatKVCache(self.setting.config)
        self._running: dict[tuple[int, int], _Running] = {}

    # -- a sequence --------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Begin a new sequence with new secrets of attention."""
        self._cache = FloatKVCache(self.setting.config)
        self._running.clear()
        self.link.send(Frame.RESET)

    @property
    def length(self) -> int:
        return self._cache.length

    def advance(self, tokens: int) -> None:
        """All layers have taken the tokens."""
        self._cache.length += tokens

    def rewind(self, tokens: int) -> None:
        """Forget the last tokens; what comes next takes their places. Only with fresh challenges."""
        self._cache.length -= tokens

    # -- linears -----------------------------------------------------------------------------------------------

    def linear(self, name: str, x: F32) -> F32:
        """See `FloatOps.linear`: asked of the prover, checked by GVFAVeriMM."""
        x = rounded(x, self.setting.format)
        secrets = self.linears[self.layer, name]
        self.link.send(Frame.LINEAR, *Linear(self.layer, name, x).parts())
        fmt = self.setting.format
        y = decode(self.link.claim((x.shape[0], secrets.w.shape[0]), WIRE[fmt]), fmt)
        with self.counts.checking():
            residual = gvfa_residual(y, secrets.w, x @ secrets.u)
        if not self.judge(f"{self.layer}.{name}", residual):
            raise FreivaldsMismatch(
                f"layers.{self.layer}.{name}: the claim is off by more than its tolerance", hint=HINT
            )
        self.counts.linear_rows += x.shape[0]
        return y

    # -- attention ---------------------------------------------------------------------------------------------

    def attention(self, layer: int, q: F32, k: F32, v: F32) -> F32:
        """See `FloatOps.attention`."""
        start = time.perf_counter()
        # Both sides start from the same values, which the format has.
        q, k, v = (rounded(x, self.setting.format) for x in (q, k, v))
        keys, values = self._cache.append(layer, k, v)
        if self.strategy == "tsdp":
            out = self._by_scores(layer, q, k, v, keys, values)
        elif q.shape[0] == 1 and keys.shape[1] > self.setting.kv_tokens:
            out = self._split(layer, q, k, v, keys, values)
        else:
            out = self._pipelined(layer, q, k, v, keys, values)
        self.counts.attention_rows += q.shape[0] * q.shape[1]
        self.counts.attention_s += time.perf_counter() - start
        return out

    def _request(self, layer: int, heads: range, q: F32, k: F32, v: F32, tile: int, far_k: F32, far_v: F32) -> Attend:
        tokens, d, group = q.shape[0], q.shape[2], q.shape[1] // k.shape[1]
        block = q.reshape(tokens, -1, group, d)[:, heads.start : heads.stop]
        rows = np.ascontiguousarray(block.transpose(1, 0, 2, 3), np.float32).reshape(len(heads), tokens * group, d)
        pick = slice(heads.start, heads.stop)
        new_k, new_v = (np.ascontiguousarray(x[:, pick].swapaxes(0, 1), np.float32) for x in (k, v))
        return Attend(
            layer, heads.start, len(heads), self._cache.length, tokens, tile, far_k.shape[1], rows, new_k, new_v,
            np.ascontiguousarray(far_k[pick]), np.ascontiguousarray(far_v[pick]),
        )  # fmt: skip

    def _secrets(self, layer: int, head: int, k: F32, v: F32, start: int) -> AttentionSecrets:
        """Challenges for all keys so far, k, v (n, d), and rows from position `start` on."""
        params, n = self.setting.params, k.shape[0]
        with self.counts.checking():
            if params.challenges == "fresh":
                return AttentionSecrets.draw(self.rng, k, v, start, params)
            run = self._extend(layer, head, k, v)
            if start == n - 1:
                return AttentionSecrets(
                    run.a[:, :n], start, run.sums[:, None], run.counts[:, None], run.w, run.projected[:n]
                )
            return AttentionSecrets.of(run.a[:, :n], run.w, k, run.projected[:n], start)

    def _extend(self, layer: int, head: int, k: F32, v: F32) -> _Running:
        """The sequence's secrets of this head, with projections of the new keys and values added: O(d) each."""
        params, n, d = self.setting.params, k.shape[0], k.shape[1]
        run = self._running.get((layer, head))
        if run is None:
            limit = self.setting.config.max_positions
            a = coefficients(self.rng, limit, params)
            w = gaussian(self.rng, d, params.repetitions)
            projected = np.ones((limit, params.repetitions + 1), np.float32)
            run = _Running(a, w, np.zeros((params.tau_a, d)), np.zeros(params.tau_a), projected)
            self._running[layer, head] = run
        if run.length < n:
            new = run.a[:, run.length : n].astype(np.float64)
            run.sums += new @ k[run.length :].astype(np.float64)
            run.counts += new.sum(axis=1)
            run.projected[run.length : n, :-1] = v[run.length :] @ run.w
            run.length = n
        return run

    def _check_tile(self, layer: int, tile: TileClaim, secrets: AttentionSecrets) -> F32:
        """Judge E of a tile; gives E V w and Z (rows, repetitions + 1). Raises: AttentionMismatch."""
        scale = self.setting.config.head_dim**-0.5
        with self.counts.checking():
            worst = max(lp_worst(r, self.rng, self.setting.params.tau_g) for r in secrets.residuals(tile, scale))
        if not self.judge(f"{layer}.exp", worst):
            raise AttentionMismatch(
                f"layers.{layer}.attention: claimed weights are off by more than their tolerance", hint=HINT
            )
        with self.counts.checking():
            return secrets.outputs(tile)

    def _check_outputs(self, layer: int, u: F32, expected: F32, w: F32) -> None:
        with self.counts.checking():
            residual = gvfa_residual(u, w, expected)
        if not self.judge(f"{layer}.values", residual):
            raise AttentionMismatch(
                f"layers.{layer}.attention: claimed outputs are off by more than their tolerance", hint=HINT
            )

    def _pipelined(self, layer: int, q: F32, k: F32, v: F32, keys: F32, values: F32) -> F32:
        """Requests of all head blocks leave from a thread of their own; tiles are checked while later ones are computed."""
        s, tokens, heads, d = self.setting, q.shape[0], q.shape[1], q.shape[2]
        kv_heads = k.shape[1]
        tiling = s.tiling or Tiling.default(keys.shape[1], tokens)
        tile = tiling.tile_rows(tokens)
        near = min(keys.shape[1], s.kv_tokens)
        blocks = tiling.kv_blocks(kv_heads)
        requests = [self._request(layer, b, q, k, v, tile, keys[:, near:], values[:, near:]) for b in blocks]
        self.counts.streamed_keys += keys.shape[1] - near
        self.counts.prover_keys += near
        out = np.empty((kv_heads, tokens, heads // kv_heads, d), np.float32)
        with _sender(self.link, requests, tiling.pipeline and len(requests) > 1) as send:
            for block, request in zip(blocks, requests, strict=True):
                send(request)
                out[block.start : block.stop] = self._take_block(request, keys, values, tile)
        return np.ascontiguousarray(out.transpose(1, 0, 2, 3)).reshape(tokens, heads, d)

    def _take_block(self, request: Attend, keys: F32, values: F32, tile: int) -> F32:
        """Claims of one head block, checked: outputs (kv, tokens, group, d)."""
        s, start, tokens = self.setting, request.start, request.tokens
        group, d = s.config.num_heads // s.config.num_kv_heads, s.config.head_dim
        heads = range(request.first, request.first + request.kv)
        secrets = [self._secrets(request.layer, h, keys[h], values[h], start) for h in heads]
        rows = tokens * group
        products = np.empty((request.kv, rows, s.params.repetitions + 1), np.float32)
        for lo in range(0, tokens, tile):
            hi = min(lo + tile, tokens)
            part, seen = slice(lo * group, hi * group), start + hi
            shift = self.link.claim((request.kv, part.stop - part.start), np.dtype(np.float32))
            raw = self.link.claim((request.kv, seen, part.stop - part.start), WIRE[s.exp_format])
            e = decode(raw, s.exp_format)
            visible = np.repeat(np.arange(start + lo + 1, seen + 1, dtype=np.int32), group)
            for i in range(request.kv):
                claim = TileClaim(e[i], shift[i], request.q[i, part], visible)
                products[i, part] = self._check_tile(request.layer, claim, secrets[i])
        u = decode(self.link.claim((request.kv, rows, d), WIRE[s.format]), s.format)
        for i in range(request.kv):
            self._check_outputs(request.layer, u[i], products[i, :, :-1], secrets[i].w)
        return np.asarray((u / products[:, :, -1:]).reshape(request.kv, tokens, group, d), np.float32)

    # -- decode beyond the prover's memory -----------------------------------------------------------------------

    def _split(self, layer: int, q: F32, k: F32, v: F32, keys: F32, values: F32) -> F32:
        """Resident and streamed keys on the prover, the others here; merged by log-sum-exp of the parts."""
        s, n, capacity = self.setting, keys.shape[1], self.setting.kv_tokens
        heads, kv_heads, d = q.shape[1], k.shape[1], q.shape[2]
        streamed = int(s.offload_ratio * (n - capacity))
        share = capacity + streamed
        far = slice(capacity, share)
        request = self._request(layer, range(kv_heads), q, k, v, 1, keys[:, far], values[:, far])
        self.counts.streamed_keys += streamed
        self.counts.prover_keys += capacity
        self.counts.tee_keys += n - share
        rows = heads // kv_heads
        own = _OwnShare(request.q, keys[:, share:], values[:, share:])
        if share == 0:
            out = own.sums_and_outputs()
            return np.ascontiguousarray((out.u / out.z[:, :, None]).reshape(1, heads, d))
        self.link.send(Frame.ATTEND, *request.parts())
        mine = own.sums_and_outputs()
        shift = self.link.claim((kv_heads, rows), np.dtype(np.float32))
        e = decode(self.link.claim((kv_heads, share, rows), WIRE[s.exp_format]), s.exp_format)
        u = decode(self.link.claim((kv_heads, rows, d), WIRE[s.format]), s.format)
        visible = np.full(rows, share, np.int32)
        z = np.empty((kv_heads, rows), np.float32)
        for h in range(kv_heads):
            secrets = self._secrets(layer, h, keys[h, :share], values[h, :share], share - 1)
            products = self._check_tile(layer, TileClaim(e[h], shift[h], request.q[h], visible), secrets)
            self._check_outputs(layer, u[h], products[:, :-1], secrets.w)
            z[h] = products[:, -1]
        return np.ascontiguousarray(merge(Part(shift, z, u), mine).reshape(1, heads, d))

    # -- the baseline ------------------------------------------------------------------------------------------

    def _by_scores(self, layer: int, q: F32, k: F32, v: F32, keys: F32, values: F32) -> F32:
        """Q K.T there, softmax here, P V there: each step waits for the one before."""
        s, tokens, heads, d, n = self.setting, q.shape[0], q.shape[1], q.shape[2], keys.shape[1]
        kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
        near = min(n, s.kv_tokens)
        self.counts.streamed_keys += n - near
        self.counts.prover_keys += near
        request = self._request(layer, range(kv_heads), q, k, v, tokens, keys[:, near:], values[:, near:])
        self.link.send(Frame.SCORES, *request.parts())
        scores = decode(self.link.claim((kv_heads, n, tokens * group), WIRE[s.format]), s.format)
        scale = np.float32(d**-0.5)
        with self.counts.checking():
            w = gaussian(self.rng, n, s.params.repetitions)
            residual = max(
                gvfa_residual(scores[h].T, w, (request.q[h] @ (keys[h].T @ w)) * scale) for h in range(kv_heads)
            )
        if not self.judge(f"{layer}.scores", residual):
            raise AttentionMismatch(f"layers.{layer}.attention: claimed scores are off by more than their tolerance",
                                    hint=HINT)  # fmt: skip
        p = np.where(tile_mask(request.start, 0, tokens, n, group), scores, np.float32(-np.inf))
        p -= p.max(axis=1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=1, keepdims=True)
        p = rounded(p, s.format)
        self.link.send(Frame.VALUES, *Values(layer, tokens, p).parts())
        o = decode(self.link.claim((kv_heads, tokens * group, d), WIRE[s.format]), s.format)
        wd = gaussian(self.rng, d, s.params.repetitions)
        for h in range(kv_heads):
            self._check_outputs(layer, o[h], p[h].T @ (values[h] @ wd), wd)
        out = o.reshape(kv_heads, tokens, group, d).transpose(1, 0, 2, 3)
        return np.ascontiguousarray(out).reshape(tokens, heads, d)


@dataclass
class Part:
    """Attention over some keys: row shifts (kv, rows), sums Z and unnormalised outputs U, both relative to the shift."""

    shift: F32
    z: F32
    u: F32


@dataclass
class _OwnShare:
    """Attention that the trusted side computes itself; no key at all gives a part that weighs nothing."""

    q: F32
    keys: F32
    values: F32

    def sums_and_outputs(self) -> Part:
        kv, rows, d = self.q.shape
        if self.keys.shape[1] == 0:
            return Part(
                np.full((kv, rows), -np.inf, np.float32), np.zeros((kv, rows), np.float32), np.zeros_like(self.q)
            )
        s = (self.q * np.float32(d**-0.5)) @ self.keys.swapaxes(1, 2)
        top = s.max(axis=2)
        s -= top[:, :, None]
        np.exp(s, out=s)
        return Part(top, np.asarray(s.sum(axis=2), np.float32), np.asarray(s @ self.values, np.float32))


def merge(a: Part, b: Part) -> F32:
    """o = (U_a + U_b) / (Z_a + Z_b) with both relative to the larger shift."""
    top = np.maximum(a.shift, b.shift)
    fa, fb = np.exp(a.shift - top), np.exp(b.shift - top)
    u = a.u * fa[:, :, None] + b.u * fb[:, :, None]
    return np.asarray(u / (a.z * fa + b.z * fb)[:, :, None], np.float32)


@contextmanager
def _sender(link: FloatLink, requests: list[Attend], ahead: bool) -> Iterator[Callable[[Attend], None]]:
    """Sends requests: one block ahead of the claims in a thread of its own, or each when it is its turn."""
    if not ahead:
        yield lambda request: link.send(Frame.ATTEND, *request.parts())
        return
    failures: list[VeriattnError] = []
    turns = threading.Semaphore(1)
    stop = threading.Event()

    def run() -> None:
        try:
            for request in requests:
                turns.acquire()
                if stop.is_set():
                    return
                link.send(Frame.ATTEND, *request.parts())
        except VeriattnError as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="veriattn-float-sender", daemon=True)
    thread.start()

    def send(_: Attend) -> None:
        # Block b + 1 may leave when the claims of block b are about to be taken.
        if failures:
            raise failures[0]
        turns.release()

    try:
        yield send
    except BaseException:
        stop.set()
        link.abort()
        turns.release()
        thread.join()
        raise
    turns.release()
    thread.join()
    if failures:
        raise failures[0]


def recording(into: dict[str, float]) -> Judge:
    """A judge for calibration: lets everything finite pass and keeps the largest residual of every kind of check."""

    def judge(key: str, residual: float) -> bool:
        kind = kind_of(key)
        into[kind] = max(into.get(kind, 0.0), residual)
        return residual < float("inf")

    return judge


def bounded(tolerance: Callable[[str], float]) -> Judge:
    """A judge that accepts residuals up to the calibrated tolerance."""

    def judge(key: str, residual: float) -> bool:
        limit = tolerance(key)
        if not limit >= 0.0:
            raise InternalError(f"the tolerance of {key} is no number")
        return residual <= limit

    return judge
