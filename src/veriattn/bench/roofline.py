"""How fast each strategy could be at best: its bytes over measured bandwidth, its operations over measured rates.

Pure functions of shapes and rates. What may overlap in a strategy is counted as the longest of its parts, what may not as
their sum; Python, messages and the filling of pipelines count as nothing. So a floor is below any real time, and value over
floor says what an implementation leaves on the table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from veriattn.bench.traffic import (
    Bytes,
    Part,
    attention_bytes,
    crossing_scores,
    linear_bytes,
    linear_sizes,
    streamed_keys,
)
from veriattn.spec.model import ModelConfig
from veriattn.verifier.session import Flow
from veriattn.verifier.tiling import MIN_ROWS, Tiling

#: What a floor can be limited by.
LIMITS = ("prover", "link", "tee")


@dataclass(frozen=True)
class ScoreRates:
    """Seconds per score (one query head and one key) at the shape's head_dim.

    attend: all of attention; replay, transfer: the verifier's two checks; softmax: weights from scores; qk, pv: the halves.
    """

    attend: float
    replay: float
    transfer: float
    softmax: float
    qk: float
    pv: float


@dataclass(frozen=True)
class SideRates:
    """What one side can do with its threads or its device, measured alone.

    macs: int8 multiply-adds a second in a matrix product of many rows. read, copy: bytes a second, the
    latter from shared into private memory as large claims go. check: seconds per claimed int32. token, token_one:
    seconds per token and layer of everything elementwise, among many rows and alone.
    """

    macs: float
    read: float
    copy: float
    check: float
    token: float
    token_one: float
    many: ScoreRates
    one: ScoreRates

    def scores(self, rows: int) -> ScoreRates:
        """Rates for a run of so many rows."""
        return self.many if rows >= MIN_ROWS else self.one

    def elementwise(self, rows: int) -> float:
        """Seconds per layer."""
        return rows * (self.token if rows >= MIN_ROWS else self.token_one)


@dataclass(frozen=True)
class LinkRates:
    """Bytes a second each way beyond the copies that both sides make, infinite for shared memory; one-way delay."""

    to_prover: float = math.inf
    from_prover: float = math.inf
    latency_s: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Everything that a floor is computed from. prover_threads: None where the prover computes elsewhere than on `cores`."""

    tee: SideRates
    prover: SideRates
    link: LinkRates = LinkRates()
    tee_threads: int = 1
    prover_threads: int | None = 1
    cores: int = 2

    @property
    def crowding(self) -> float:
        """Threads per core where both sides compute on the same machine; 1 where each thread has its own."""
        if self.prover_threads is None:
            return 1.0
        return max(1.0, (self.tee_threads + self.prover_threads) / self.cores)


@dataclass(frozen=True)
class Operation:
    """One exchange: bytes each way; seconds of the prover; of the TEE while the prover works, and after its answer."""

    moved: Bytes
    prover: float
    during: float
    after: float


@dataclass(frozen=True)
class Floor:
    """Least seconds, what they are made of by side, and what limits them."""

    seconds: float
    prover: float
    link: float
    tee: float

    @property
    def limit(self) -> str:
        """The side that takes longest."""
        return max(LIMITS, key=lambda side: float(getattr(self, side)))

    def __add__(self, other: Floor) -> Floor:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Floor(*(a + b for a, b in pairs))

    def __mul__(self, count: float) -> Floor:
        return Floor(*(a * count for a in dataclasses.astuple(self)))


NOTHING = Floor(0.0, 0.0, 0.0, 0.0)


# -- operations -------------------------------------------------------------------------------------------------------


def linear_seconds(side: SideRates, out: int, width: int, rows: int) -> float:
    """A product of `rows` rows with a matrix that is read once."""
    return max(rows * out * width / side.macs, out * width / side.read)


def check_seconds(tee: SideRates, out: int, width: int, rows: int) -> float:
    """The verifier's check of such a product: claims, challenges and their images in the weights."""
    return max(rows * out * tee.check, (4 * rows * out + 16 * out + 16 * width) / tee.read)


def visible_scores(c: ModelConfig, part: Part) -> int:
    """Scores of a causal run: every query head, every key that its row sees."""
    return c.num_heads * (part.tokens * part.start + part.tokens * (part.tokens + 1) // 2)


def _scores_seconds(
    c: ModelConfig, side: SideRates, count: float, per_score: float, keys: int, key_bytes: int
) -> float:
    return max(count * per_score, keys * c.num_kv_heads * key_bytes / side.read)


def own_attention_seconds(c: ModelConfig, side: SideRates, part: Part, keys: int | None = None) -> float:
    """Attention of a run computed by one side, over all keys or over a share of them that every row sees."""
    count = visible_scores(c, part) if keys is None else c.num_heads * part.tokens * keys
    rate = side.scores(part.tokens).attend
    return _scores_seconds(c, side, count, rate, part.keys if keys is None else keys, 2 * c.head_dim + 4)


def attention_operations(
    c: ModelConfig, flow: Flow, part: Part, r: Rates, cut: Tiling | None = None, transfer: bool = False
) -> list[Operation]:
    """The exchanges that one layer's attention of a sequence is made of."""
    d, rows, moved = c.head_dim, part.tokens, attention_bytes(c, flow, [part], cut, transfer)
    tee, prover = r.tee.scores(rows), r.prover.scores(rows)
    outputs = 8 * rows * c.num_heads * d / r.tee.read
    if flow is Flow.TSDP or part.split:
        share = (part.limit or 0) + streamed_keys(part, flow) if part.split else part.keys
        sent = crossing_scores(c, part) if flow is Flow.TSDP else c.num_heads * rows * share
        asked = _scores_seconds(c, r.prover, sent, prover.qk, share, d)
        weighed = _scores_seconds(c, r.prover, sent, prover.pv, share, d)
        checked = _scores_seconds(c, r.tee, sent, tee.transfer, share, 20)
        if flow is Flow.TSDP:
            back = 4 * sent
            first = Operation(Bytes(moved.to_prover - 2 * sent, back), asked, 0.0, checked + sent * tee.softmax)
            second = Operation(Bytes(2 * sent, moved.from_prover - back), weighed, 0.0, outputs)
            return [first, second]
        own = own_attention_seconds(c, r.tee, part, part.keys - share)
        return [Operation(moved, asked + weighed, own, checked + outputs)]
    work = own_attention_seconds(c, r.prover, part)
    if not transfer:
        replay = _scores_seconds(c, r.tee, visible_scores(c, part), tee.replay, part.keys, d + 20)
        return [Operation(moved, work, replay, outputs)]
    sent = c.num_heads * rows * part.keys
    checked = _scores_seconds(c, r.tee, sent, tee.transfer, part.keys, 20)
    return [Operation(moved, work, 0.0, checked + outputs)]


def linear_operations(c: ModelConfig, flow: Flow, rows: int, r: Rates) -> list[Operation]:
    """The four linears of a layer."""
    moved = linear_bytes(c, flow, rows, Tiling(1, 1, pipeline=False))
    sizes = linear_sizes(c)
    outs, widths = sum(out for out, _ in sizes), sum(width for _, width in sizes)
    return [
        Operation(
            Bytes(moved.to_prover * width // widths, moved.from_prover * out // outs),
            linear_seconds(r.prover, out, width, rows),
            0.0,
            check_seconds(r.tee, out, width, rows),
        )
        for out, width in sizes
    ]


# -- strategies -------------------------------------------------------------------------------------------------------


def _parts(op: Operation, r: Rates) -> tuple[float, float, float, float]:
    """Seconds of the prover, of the link each way, and of the TEE, copies included."""
    to, back = op.moved.to_prover, op.moved.from_prover
    prover = (op.prover + (to + back) / r.prover.copy) * r.crowding
    tee = (op.during + op.after + (to + back) / r.tee.copy) * r.crowding
    return prover, to / r.link.to_prover, back / r.link.from_prover, tee


def overlapped(op: Operation, r: Rates) -> Floor:
    """Everything at the same time."""
    prover, to, back, tee = _parts(op, r)
    return Floor(max(prover, to, back, tee) + 2 * r.link.latency_s, prover, max(to, back), tee)


def in_turns(op: Operation, r: Rates, *, replay: bool) -> Floor:
    """Ask, compute, answer, check. replay: the verifier may work while the prover does."""
    prover, to, back, tee = _parts(op, r)
    sent = max(to, op.moved.to_prover / r.tee.copy, op.moved.to_prover / r.prover.copy)
    received = max(back, op.moved.from_prover / r.tee.copy, op.moved.from_prover / r.prover.copy)
    together = replay and r.crowding == 1
    middle = max(op.prover, op.during) if together else op.prover + op.during
    return Floor(sent + middle + received + op.after + 2 * r.link.latency_s, prover, to + back, tee)


def layer_floor(
    c: ModelConfig,
    flow: Flow | None,
    parts: Sequence[Part],
    r: Rates,
    cut: Tiling | None = None,
    transfer: bool = False,
) -> tuple[Floor, Floor]:
    """(all of one layer, its attention alone). flow: None for `full-tee`."""
    rows = sum(p.tokens for p in parts)
    if flow is None or flow is Flow.UNVERIFIED:
        side = r.tee if flow is None else r.prover
        attention = sum(own_attention_seconds(c, side, p) for p in parts)
        linears = sum(linear_seconds(side, out, width, rows) for out, width in linear_sizes(c))
        floors = [_one_side(flow, s) for s in (attention + linears + side.elementwise(rows), attention)]
        return floors[0], floors[1]
    asked = linear_operations(c, flow, rows, r)
    shares = [op for p in parts for op in attention_operations(c, flow, p, r, cut, transfer)]
    elementwise = r.tee.elementwise(rows)
    if flow is Flow.RUN_AHEAD:
        return _run_ahead(asked, shares, elementwise, rows, any(p.split for p in parts), r)
    pipelined = flow is Flow.VERIATTN and rows >= MIN_ROWS and (cut is None or cut.pipeline)

    def total(operations: Sequence[Operation]) -> Floor:
        if pipelined:
            return sum((overlapped(op, r) for op in operations), NOTHING)
        return sum((in_turns(op, r, replay=flow is Flow.VERIATTN) for op in operations), NOTHING)

    attention_floor = total(shares)
    return total(asked) + attention_floor + Floor(elementwise, 0.0, 0.0, elementwise), attention_floor


def _one_side(flow: Flow | None, seconds: float) -> Floor:
    return Floor(seconds, 0.0, 0.0, seconds) if flow is None else Floor(seconds, seconds, 0.0, 0.0)


def _run_ahead(
    asked: Sequence[Operation], shares: Sequence[Operation], elementwise: float, rows: int, split: bool, r: Rates
) -> tuple[Floor, Floor]:
    """Three queues that never wait, but at attention whose keys are shared: there both sides meet in every layer."""
    attention = _queues(shares, 0.0, 0.0, r)
    if split:
        linears = _queues(asked, elementwise, r.prover.elementwise(rows), r)
        return linears + attention, attention
    return _queues([*asked, *shares], elementwise, r.prover.elementwise(rows), r), attention


def _queues(operations: Sequence[Operation], tee_s: float, prover_s: float, r: Rates) -> Floor:
    parts = [_parts(op, r) for op in operations]
    prover = sum(p[0] for p in parts) + prover_s * r.crowding
    link = max(sum(p[1] for p in parts), sum(p[2] for p in parts))
    tee = sum(p[3] for p in parts) + tee_s * r.crowding
    return Floor(max(prover, link, tee), prover, link, tee)


def head_floor(c: ModelConfig, flow: Flow | None, rows: int, r: Rates) -> Floor:
    """The final product with the vocabulary for `rows` rows."""
    if not rows:
        return NOTHING
    out, width = c.vocab_size, c.hidden_size
    if flow is None or flow is Flow.UNVERIFIED:
        return _one_side(flow, linear_seconds(r.tee if flow is None else r.prover, out, width, rows))
    activations = 0 if flow is Flow.RUN_AHEAD else rows * width
    op = Operation(
        Bytes(activations, 4 * rows * out),
        linear_seconds(r.prover, out, width, rows),
        0.0,
        check_seconds(r.tee, out, width, rows),
    )
    return overlapped(op, r) if flow is Flow.RUN_AHEAD else in_turns(op, r, replay=False)
