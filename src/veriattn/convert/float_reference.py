"""The float32 model itself in NumPy: what the canonical integer model is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from veriattn.convert.checkpoint import F32, Source, SourceConfig
from veriattn.errors import UsageError

QUERY_BLOCK = 256
GROUP_TOKENS = 1024
HEAD_BLOCK_BYTES = 128 << 20


class FloatOps(Protocol):
    """The two operations of a decoder layer that carry nearly all the work."""

    def linear(self, name: str, x: F32) -> F32:
        """x @ W.T for the weight `name` of the current layer (`q`, `k`, `v`, `o`, `gate`, `up`, `down`)."""
        ...

    def attention(self, layer: int, q: F32, k: F32, v: F32) -> F32:
        """Causal attention. q (tokens, heads, d), k and v (tokens, kv_heads, d), rotated; result like q."""
        ...


@dataclass
class FloatKVCache:
    """Rotated keys and values of one sequence, per layer (kv_heads, capacity, head_dim)."""

    config: SourceConfig
    length: int = 0
    _keys: list[F32] = field(default_factory=list, repr=False)
    _values: list[F32] = field(default_factory=list, repr=False)

    def append(self, layer: int, k: F32, v: F32) -> tuple[F32, F32]:
        """Store k, v (tokens, kv_heads, d) behind `length`; all keys and values of the layer so far."""
        total = self.length + k.shape[0]
        if layer == len(self._keys):
            shape = (self.config.num_kv_heads, total, self.config.head_dim)
            self._keys.append(np.empty(shape, np.float32))
            self._values.append(np.empty(shape, np.float32))
        for store, new in ((self._keys, k), (self._values, v)):
            if store[layer].shape[1] < total:
                grown = np.empty((store[layer].shape[0], 2 * total, store[layer].shape[2]), np.float32)
                grown[:, : self.length] = store[layer][:, : self.length]
                store[layer] = grown
            store[layer][:, self.length : total] = new.swapaxes(0, 1)
        return self._keys[layer][:, :total], self._values[layer][:, :total]


@dataclass(frozen=True)
class FloatChunk:
    """Some tokens of one sequence: ids at positions start, start + 1, ...; `cache` holds what came before them."""

    token_ids: npt.NDArray[np.int64]
    cache: FloatKVCache | None = None

    @property
    def start(self) -> int:
        return 0 if self.cache is None else self.cache.length


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """RMSNorm over the last axis, as Llama has it."""
    variance = np.einsum("...i,...i->...", x, x) / np.float32(x.shape[-1])
    scale = np.float32(1.0) / np.sqrt(variance + np.float32(eps))
    return np.asarray(x * scale[..., None] * weight, dtype=np.float32)


def silu(x: F32) -> F32:
    """x * sigmoid(x), in one temporary."""
    # exp overflows to infinity for x below -88, where the quotient is zero as it should be.
    with np.errstate(over="ignore"):
        out = np.exp(np.negative(x))
    out += np.float32(1.0)
    return np.asarray(np.divide(x, out, out=out), dtype=np.float32)


def rotary_tables(config: SourceConfig, positions: npt.NDArray[np.int64]) -> tuple[F32, F32]:
    """cos and sin, float32 (positions, rotary_dim // 2), with the angle rounded to float32 as Hugging Face does."""
    inv_freq = config.inv_freq().astype(np.float32)
    angle = (positions.astype(np.float32)[:, None] * inv_freq[None, :]).astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: F32, cos: F32, sin: F32) -> F32:
    """Rotary embedding of x (tokens, heads, head_dim); pairs are (j, j + rotary_dim/2), the rest passes through."""
    half = cos.shape[1]
    first, second = x[..., :half], x[..., half : 2 * half]
    c, s = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * c - second * s, second * c + first * s, x[..., 2 * half :]], axis=-1)


def causal_attention(q: F32, keys: F32, values: F32) -> F32:
    """Softmax attention of the last tokens of a sequence, by blocks of queries.

    Shapes: q (tokens, heads, d) at the positions [n - tokens, n); keys, values (kv_heads, n, d). Result like q.
    Query t sees the keys 0 .. n - tokens + t.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, total, _ = keys.shape
    group = heads // kv_heads
    scale = np.float32(1.0 / np.sqrt(head_dim))
    out = np.empty((tokens, heads, head_dim), np.float32)
    for start in range(0, tokens, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, tokens)
        visible = total - tokens + stop
        rows = stop - start
        # Within the block, row r must not see the last rows - 1 - r of the visible keys.
        hidden = np.triu(np.ones((rows, rows), dtype=bool), 1)
        for h in range(kv_heads):
            block = q[start:stop, h * group : (h + 1) * group].swapaxes(0, 1).reshape(group * rows, head_dim)
            scores = (block * scale) @ keys[h, :visible].T
            tail = scores.reshape(group, rows, visible)[:, :, visible - rows :]
            tail[:, hidden] = -np.inf
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            sums = scores.sum(axis=1, keepdims=True)
            result = (scores @ values[h, :visible]) / sums
            out[start:stop, h * group : (h + 1) * group] = result.reshape(group, rows, head_dim).swapaxes(0, 1)
    return out


def decoder_layer(
    config: SourceConfig, ops: FloatOps, vectors: dict[str, F32], layer: int, x: F32, cos: F32, sin: F32
) -> F32:
    """One layer, x (tokens, hidden) to the same; `vectors` holds the layer's norms and biases."""
    tokens = x.shape[0]
    normed = rms_norm(x, vectors["attn_norm"], config.rms_eps)
    heads = {}
    for name, count in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
        y = ops.linear(name, normed)
        if config.attention_bias:
            y = y + vectors[f"{name}_bias"]
        heads[name] = y.reshape(tokens, count, config.head_dim)
    if config.qk_norm:
        heads["q"] = rms_norm(heads["q"], vectors["q_norm"], config.rms_eps)
        heads["k"] = rms_norm(heads["k"], vectors["k_norm"], config.rms_eps)
    q, k = rotate(heads["q"], cos, sin), rotate(heads["k"], cos, sin)
    attended = ops.attention(layer, q, k, heads["v"]).reshape(tokens, config.q_size)
    x = x + ops.linear("o", attended)
    normed = rms_norm(x, vectors["mlp_norm"], config.rms_eps)
    inner = silu(ops.linear("gate", normed)) * ops.linear("up", normed)
    return x + ops.linear("down", inner)


class _LayerOps:
    """`FloatOps` over one layer's weights for a ragged group of chunks, whose rows lie one after the other."""

    def __init__(self, weights: dict[str, F32], chunks: Sequence[FloatChunk]) -> None:
        self._weights = weights
        self._chunks = chunks

    def linear(self, name: str, x: F32) -> F32:
        return x @ self._weights[name].T

    def attention(self, layer: int, q: F32, k: F32, v: F32) -> F32:
        out = np.empty_like(q)
        row = 0
        for chunk in self._chunks:
            rows = slice(row, row + chunk.token_ids.size)
            if chunk.cache is None:
                keys, values = k[rows].swapaxes(0, 1), v[rows].swapaxes(0, 1)
            else:
                keys, values = chunk.cache.append(layer, k[rows], v[rows])
            out[rows] = causal_attention(q[rows], keys, values)
            row = rows.stop
        return out


class FloatReference:
    """Float32 forward pass of a source.

    With `stream=False` all weights are held in float32 (0.5 GB for 135M parameters). With `stream=True` only one
    layer is held at a time and every call reads the checkpoint once, so give all windows in one call; memory is then
    one layer plus the hidden states. Not canonical: BLAS may round differently on another machine.
    """

    def __init__(self, source: Source, *, stream: bool = False) -> None:
        self.source = source
        self.config = source.config
        self.stream = stream
        self._layers: dict[int, dict[str, F32]] = {}
        self._head: F32 | None = None

    def logits(self, token_ids: Sequence[int] | npt.NDArray[np.int64], cache: FloatKVCache | None = None) -> F32:
        """Logits (tokens, vocab) of one chunk, which continues the cache or else starts at position 0."""
        return next(self.logits_of([FloatChunk(_as_ids(token_ids), cache)]))

    def window_logits(self, windows: Sequence[Sequence[int] | npt.NDArray[np.int64]]) -> Iterator[F32]:
        """Logits (tokens, vocab) of independent sequences, one after the other, each starting at position 0."""
        return self.logits_of([FloatChunk(_as_ids(window)) for window in windows])

    def logits_of(self, chunks: Sequence[FloatChunk]) -> Iterator[F32]:
        """Logits (tokens, vocab) per chunk of a ragged batch. Caches have been extended when the first one arrives."""
        hidden = self.hidden(chunks)
        return (self.head(x) for x in hidden)

    def hidden(self, chunks: Sequence[FloatChunk]) -> list[F32]:
        """Hidden states after the final norm, (tokens, hidden) per chunk; extends the chunks' caches."""
        self._check(chunks)
        config = self.config
        states = [self._embed(chunk.token_ids) for chunk in chunks]
        groups = _groups(chunks)
        tables = [
            rotary_tables(config, np.concatenate([np.arange(c.token_ids.size) + c.start for c in chunks[lo:hi]]))
            for lo, hi in groups
        ]
        for layer in range(config.num_layers):
            weights = self._layer(layer)
            for (lo, hi), (cos, sin) in zip(groups, tables, strict=True):
                x = np.concatenate(states[lo:hi])
                x = decoder_layer(config, _LayerOps(weights, chunks[lo:hi]), weights, layer, x, cos, sin)
                bounds = np.cumsum([c.token_ids.size for c in chunks[lo:hi]])[:-1]
                states[lo:hi] = np.split(x, bounds)
        norm = self.source.tensor("final_norm")
        for chunk in chunks:
            if chunk.cache is not None:
                chunk.cache.length += chunk.token_ids.size
        return [rms_norm(x, norm, config.rms_eps) for x in states]

    def head(self, hidden: F32) -> F32:
        """Logits (tokens, vocab) of hidden states (tokens, hidden)."""
        if self._head is None and not self.stream:
            self._head = self.source.tensor("lm_head")
        if self._head is not None:
            return hidden @ self._head.T
        vocab, width = self.config.vocab_size, self.config.hidden_size
        out = np.empty((hidden.shape[0], vocab), np.float32)
        step = max(1, HEAD_BLOCK_BYTES // (4 * width))
        for start in range(0, vocab, step):
            stop = min(start + step, vocab)
            out[:, start:stop] = hidden @ self.source.tensor_rows("lm_head", start, stop).T
        return out

    def _embed(self, token_ids: npt.NDArray[np.int64]) -> F32:
        if self._head is None and self.config.tie_embeddings and not self.stream:
            self._head = self.source.tensor("lm_head")
        if self._head is not None and self.config.tie_embeddings:
            return self._head[token_ids]
        out = np.empty((token_ids.size, self.config.hidden_size), np.float32)
        for token_id in np.unique(token_ids):
            row = self.source.tensor_rows("embed", int(token_id), int(token_id) + 1)
            out[token_ids == token_id] = row
        return out

    def _layer(self, layer: int) -> dict[str, F32]:
        if layer in self._layers:
            return self._layers[layer]
        weights = {key: self.source.tensor(f"layers.{layer}.{key}") for key in self.config.layer_shapes()}
        if not self.stream:
            self._layers[layer] = weights
        return weights

    def _check(self, chunks: Sequence[FloatChunk]) -> None:
        caches = [id(chunk.cache) for chunk in chunks if chunk.cache is not None]
        if len(set(caches)) != len(caches):
            raise UsageError("two chunks of one batch share a cache")
        for chunk in chunks:
            ids = chunk.token_ids
            if ids.size == 0:
                raise UsageError("a chunk has no tokens")
            if chunk.start + ids.size > self.config.max_positions:
                raise UsageError(f"{chunk.start + ids.size} tokens exceed the context of {self.config.max_positions}")
            if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:
                raise UsageError(f"token ids lie outside the vocabulary of {self.config.vocab_size}")


def _as_ids(token_ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.ndim != 1:
        raise UsageError(f"token ids must form one sequence, got shape {ids.shape}")
    return ids


def _groups(chunks: Sequence[FloatChunk]) -> list[tuple[int, int]]:
    """Ranges of consecutive chunks of together at most GROUP_TOKENS tokens (or one chunk): bounds the activations."""
    groups: list[tuple[int, int]] = []
    start, tokens = 0, 0
    for i, chunk in enumerate(chunks):
        if i > start and tokens + chunk.token_ids.size > GROUP_TOKENS:
            groups.append((start, i))
            start, tokens = i, 0
        tokens += chunk.token_ids.size
    if start < len(chunks):
        groups.append((start, len(chunks)))
    return groups
