"""Bytes on paper: what each strategy must move, from shapes alone; docs/strategies.md and docs/wire.md have it in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veriattn.spec.kv import PAGE
from veriattn.spec.model import ModelConfig
from veriattn.verifier.mediated import LINEAR_TILE_ROWS
from veriattn.verifier.session import Flow
from veriattn.verifier.split import exchanges
from veriattn.verifier.tiling import Tiling, score_groups, score_tiles
from veriattn.wire.messages import HEADER_BYTES

_M = HEADER_BYTES


@dataclass(frozen=True)
class Bytes:
    """Both ways, with the 32 bytes before each message."""

    to_prover: int
    from_prover: int

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.to_prover + other.to_prover, self.from_prover + other.from_prover)

    def __sub__(self, other: Bytes) -> Bytes:
        return Bytes(self.to_prover - other.to_prover, self.from_prover - other.from_prover)

    def __mul__(self, count: int) -> Bytes:
        return Bytes(self.to_prover * count, self.from_prover * count)


NOTHING = Bytes(0, 0)


@dataclass(frozen=True)
class Part:
    """A sequence's part of a step: `tokens` new ones at `start`. limit: keys that the prover keeps of it, None for all;
    a part lies on one side of it. ratio: share of the other keys that is streamed to the prover."""

    start: int
    tokens: int
    limit: int | None = None
    ratio: float = 0.0

    @property
    def keys(self) -> int:
        """Keys that its last row sees."""
        return self.start + self.tokens

    @property
    def split(self) -> bool:
        """Whether prover and verifier share its attention."""
        return self.limit is not None and self.start >= self.limit


def streamed_keys(part: Part, flow: Flow) -> int:
    """Keys that a shared part streams to the prover: under `tsdp` all that it does not keep, else whole blocks."""
    limit = part.limit or 0
    if flow is Flow.TSDP:
        return part.keys - limit
    before = part.start - limit
    return min(before // PAGE, int(part.ratio * (before + part.tokens)) // PAGE) * PAGE


def crossing_scores(c: ModelConfig, part: Part) -> int:
    """Scores of a part that `tsdp` moves there and back as weights: every row of a tile sees all keys of its last one."""
    tiles = score_tiles(part.tokens, part.keys, c.num_heads)
    return c.num_heads * sum(n * (part.start + at + n) for at, n in tiles)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def linear_sizes(c: ModelConfig) -> list[tuple[int, int]]:
    """(out, in) of one layer's linears: qkv, o, gate_up, down."""
    return list(c.linear_shapes().values())[:4]


def batch_bytes(
    c: ModelConfig,
    flow: Flow,
    parts: Sequence[Part],
    logit_rows: int,
    cut: Tiling | None = None,
    transfer: bool = False,
) -> Bytes:
    """One step over some sequences; logit_rows of them ask for logits. transfer: scores are sent and checked."""
    tokens = sum(p.tokens for p in parts)
    head = _M + 4 * logit_rows * c.vocab_size if logit_rows else 0
    step = _M + 24 + 24 * len(parts) + 4 * tokens
    if flow is Flow.UNVERIFIED:
        return Bytes(step, head)
    linears = linear_bytes(c, flow, tokens, cut or Tiling.default(max(p.keys for p in parts), tokens))
    layer = linears + attention_bytes(c, flow, parts, cut, transfer)
    if flow is Flow.RUN_AHEAD:
        return layer * c.num_layers + Bytes(step, head)
    return layer * c.num_layers + Bytes(_M + 16 + logit_rows * c.hidden_size if logit_rows else 0, head)


def linear_bytes(c: ModelConfig, flow: Flow, tokens: int, cut: Tiling) -> Bytes:
    """The four linears of one layer: claims, and activations where the verifier asks for them."""
    sizes = linear_sizes(c)
    claims = 4 * tokens * sum(out for out, _ in sizes)
    if flow is Flow.RUN_AHEAD:
        return Bytes(0, claims + 4 * _M)
    pieces = _ceil(tokens, LINEAR_TILE_ROWS) if flow is Flow.VERIATTN and cut.pipeline else 1
    activations = tokens * sum(width for _, width in sizes)
    return Bytes(activations + 4 * pieces * (_M + 16), claims + 4 * pieces * _M)


def attention_bytes(
    c: ModelConfig, flow: Flow, parts: Sequence[Part], cut: Tiling | None = None, transfer: bool = False
) -> Bytes:
    """Attention of one layer."""
    whole = [p for p in parts if not p.split]
    total = NOTHING
    if whole:
        total += _whole_attention(c, flow, whole, cut, transfer)
    for part in parts:
        if part.split:
            total += _shared_attention(c, flow, part)
    return total


def _whole_attention(c: ModelConfig, flow: Flow, parts: Sequence[Part], cut: Tiling | None, transfer: bool) -> Bytes:
    h, g, d = c.num_heads, c.num_kv_heads, c.head_dim
    tokens = sum(p.tokens for p in parts)
    outputs = 8 * tokens * h * d
    scores = sum(4 * h * p.tokens * p.keys for p in parts)
    if flow is Flow.RUN_AHEAD:
        return Bytes(0, outputs + _M + (scores + len(parts) * _M if transfer else 0))
    operands = tokens * (d * (h + 2 * g) + 4 * (h + g))
    if flow is Flow.TSDP:
        to, back = operands, outputs
        for group in score_groups([(p.start, p.tokens) for p in parts], h):
            to += _M + 32 + 16 * len(group)
            for i, at, n in group:
                keys = parts[i].start + at + n
                to += 2 * h * n * keys + _M + 24
                back += 4 * h * n * keys + 2 * _M
        return Bytes(to, back)
    most = max(p.tokens for p in parts)
    cut = cut or Tiling.default(max(p.keys for p in parts), most)
    blocks, rows = len(cut.kv_blocks(g)), cut.tile_rows(most)
    back = outputs
    for p in parts:
        tiles = _ceil(p.tokens, rows)
        back += blocks * tiles * _M
        if transfer:  # a tile's scores end at its last row
            ends = [p.start + min((i + 1) * rows, p.tokens) for i in range(tiles)]
            sizes = [min(rows, p.tokens - i * rows) for i in range(tiles)]
            back += 4 * h * sum(n * e for n, e in zip(sizes, ends, strict=True)) + blocks * tiles * _M
    return Bytes(operands + blocks * (_M + 32 + 16 * len(parts)), back)


def _shared_attention(c: ModelConfig, flow: Flow, part: Part) -> Bytes:
    """A part whose keys the prover does not all have, in exchanges of so many rows: docs/wire.md section 8."""
    ratio, limit = 1.0 if flow is Flow.TSDP else part.ratio, part.limit or 0
    total = NOTHING
    for at, rows in exchanges(part.tokens, part.keys - limit, limit, ratio, c.num_heads):
        total += _exchange(c, flow, Part(part.start + at, rows, part.limit, part.ratio))
    return total


def _exchange(c: ModelConfig, flow: Flow, part: Part) -> Bytes:
    h, g, d, n = c.num_heads, c.num_kv_heads, c.head_dim, part.tokens
    streamed = streamed_keys(part, flow)
    share = (part.limit or 0) + streamed
    blocks = _ceil(streamed, PAGE)
    stream = 2 * blocks * (_M + 16) + streamed * g * (2 * d + 4)
    mediated = flow is not Flow.RUN_AHEAD
    request = _M + 32 + (n * h * (d + 4) if mediated else 0)
    to = 0 if mediated else request + _M + 8 * n * h * d + 4 * n * h  # SHARE: the prover needs our part as well
    if not share:
        return Bytes(to, 0)
    normaliser = 2 * h * n * share if flow is Flow.TSDP else 4 * n * h
    to += (request if mediated else 0) + stream + _M + normaliser
    return Bytes(to, 4 * h * n * share + 8 * n * h * d + 2 * _M)


def step_bytes(
    c: ModelConfig,
    flow: Flow,
    start: int,
    tokens: int,
    logit_rows: int,
    cut: Tiling | None = None,
    transfer: bool = False,
) -> Bytes:
    """A step of one sequence."""
    return batch_bytes(c, flow, [Part(start, tokens)], logit_rows, cut, transfer)


def prompt_bytes(c: ModelConfig, flow: Flow, prompt: int, chunk: int, cut: Tiling | None = None) -> Bytes:
    """A prompt in chunks, with the logits of its last token."""
    total = NOTHING
    for start in range(0, prompt, chunk):
        tokens = min(chunk, prompt - start)
        total += step_bytes(c, flow, start, tokens, int(start + tokens == prompt), cut)
    return total
