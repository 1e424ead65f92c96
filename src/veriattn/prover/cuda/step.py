"""One step of the whole model on the device: layers run ahead of the claims that leave for the verifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import torch
from veriattn.prover.backend import ClaimSink
from veriattn.prover.cuda import elementwise, mlp, qkv
from veriattn.prover.cuda.attention import Attention, DevicePlan, Plan, RunPlace, Shape, block_rows
from veriattn.prover.cuda.cache import DeviceCache
from veriattn.prover.cuda.gemm import Gemm
from veriattn.prover.cuda.memory import Layout, Outbox, Part, Slot, Upload, Workspace, named, place
from veriattn.prover.cuda.model import DeviceModel
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.spec.kv import PAGE

#: Runs of at most so many rows, times heads of a group, go through the kernels that are split over keys.
SHORT_ROWS = 64


@dataclass(frozen=True)
class Plans:
    """Attention of a step: runs that are split over the keys, and runs that are not. With `all_scores` every run is
    of the first kind.

    places: all runs, for the names and sizes of their scores. scores: number of scores, or room for them.
    """

    places: tuple[RunPlace, ...]
    split: tuple[DevicePlan, ...]
    whole: tuple[DevicePlan, ...]
    scores: int


@dataclass(frozen=True)
class Inputs:
    """What a step brings to the device."""

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logit_rows: torch.Tensor
    plans: Plans


@dataclass(frozen=True)
class LayerPlaces:
    """Where a layer's claims lie in a slot. The scores are last: their number changes from step to step, the others'
    places do not."""

    qkv: Part
    o_sums: Part
    o: Part
    gate_up: Part
    down: Part
    scores: Part
    fixed: int
    size: int

    @classmethod
    def of(cls, model: DeviceModel, tokens: int, scores: int) -> LayerPlaces:
        c, layout, i32 = model.config, Layout(), torch.int32
        parts = (
            layout.add((tokens, c.qkv_size), i32),
            layout.add((tokens, c.num_heads, c.head_dim), torch.int64),
            layout.add((tokens, c.hidden_size), i32),
            layout.add((tokens, 2 * c.intermediate_size), i32),
            layout.add((tokens, c.hidden_size), i32),
        )
        fixed = layout.size
        return cls(*parts, layout.add((scores,), i32), fixed, layout.size)


def make_plans(places: Sequence[RunPlace], group: int, all_scores: bool) -> tuple[list[Plan], list[Plan]]:
    """Cut the runs into plans: by way of scores, and in one kernel."""
    short = [p for p in places if p.rows * group <= SHORT_ROWS]
    long = [p for p in places if p.rows * group > SHORT_ROWS]

    def plan(runs: list[RunPlace]) -> list[Plan]:
        if not runs:
            return []
        return [Plan.make(runs, group, block_rows(max(p.rows for p in runs), group))]

    return (plan(short) + plan(long), []) if all_scores else (plan(short), plan(long))


class Stepper:
    """Runs layers. `flag` becomes 1 on the device where an activation leaves the function's domain."""

    def __init__(
        self,
        model: DeviceModel,
        cache: DeviceCache,
        attention: Attention,
        workspace: Workspace,
        outbox: Outbox,
        pin: bool,
    ) -> None:
        self.model, self.cache, self.kernels, self.workspace, self.outbox = model, cache, attention, workspace, outbox
        self.gemm = Gemm(model.embed.device)
        c = model.config
        self.shape = Shape(c.num_heads, c.num_kv_heads, 0, c.num_kv_heads, c.head_dim)
        self._upload = Upload(workspace, "inputs", pin)
        self.flag = torch.zeros(1, dtype=torch.int32, device=model.embed.device)

    # -- inputs --------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch, transfer: bool, shared: frozenset[int], pages_room: int | None) -> Inputs:
        """Reserve pages and bring a step's numbers to the device.

        shared: sequences whose keys are not kept and whose attention is computed elsewhere. pages_room: pad every
        block table to so
        many pages, so that the places of all inputs depend on it and on the number of runs alone.
        """
        slots, places, row, at = [], [], 0, 0
        heads = self.model.config.num_heads
        for e in batch.entries:
            keys = e.start + e.num_tokens
            if e.seq_id in shared:
                slots.append(np.full(e.num_tokens, -1, np.int32))
            else:
                self.cache.reserve(e.seq_id, keys)
                slots.append(self.cache.slots(e.seq_id, e.start, e.num_tokens))
                table = list(self.cache.table(e.seq_id))
                if pages_room is not None:
                    table += [0] * (pages_room - len(table))
                places.append(RunPlace(row, e.num_tokens, e.start, keys, table, at))
                if transfer or e.num_tokens * self.shape.group <= SHORT_ROWS:
                    at += heads * e.num_tokens * keys
            row += e.num_tokens
        split, whole = make_plans(places, self.shape.group, transfer)
        arrays: list[np.ndarray[Any, Any]] = [
            batch.token_ids(),
            batch.positions().astype(np.int32),
            np.concatenate(slots),
            np.array(batch.logit_rows(), np.int32),
        ]
        for p in split + whole:
            arrays += [p.runs_i64, p.tables_i32, p.tiles_i32]
        views = self._upload(arrays)

        def device_plan(number: int, p: Plan) -> DevicePlan:
            runs, tables, tiles = views[4 + 3 * number : 7 + 3 * number]
            keys = p.max_keys if pages_room is None else pages_room * PAGE
            return DevicePlan(runs, tables, tiles, p.block_m, keys)

        plans = [device_plan(i, p) for i, p in enumerate(split + whole)]
        room = at if pages_room is None else heads * len(places) * pages_room * PAGE
        step_plans = Plans(tuple(places), tuple(plans[: len(split)]), tuple(plans[len(split) :]), room)
        return Inputs(views[0], views[1], views[2], views[3], step_plans)

    # -- pieces of a layer -----------------------------------------------------------------------------------------

    def _room(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.model.config
        width = max(c.hidden_size, c.attention_size, c.intermediate_size)
        return self.workspace.get("a", (tokens * width,), torch.int8), self.workspace.get(
            "a_scale", (tokens,), torch.float32
        )

    def stream(self, tokens: int) -> torch.Tensor:
        """The residual stream."""
        return self.workspace.get("x", (tokens, self.model.config.hidden_size), torch.float32)

    def queries(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.model.config
        q = self.workspace.get("q", (tokens, c.num_heads, c.head_dim), torch.int8)
        return q, self.workspace.get("q_scale", (tokens, c.num_heads), torch.float32)

    def row_sums(self, tokens: int) -> torch.Tensor:
        return self.workspace.get("row_sums", (tokens, self.model.config.num_heads), torch.int32)

    def start(self, inputs: Inputs) -> None:
        """Clear the flag, gather the embeddings."""
        self.flag.zero_()
        elementwise.gather_rows(self.model.embed, inputs.tokens, self.stream(inputs.tokens.shape[0]))

    def before_attention(self, i: int, inputs: Inputs, y_qkv: torch.Tensor) -> None:
        """Norm, qkv product, queries ready, keys and values in the cache."""
        m, c = self.model, self.model.config
        tokens = y_qkv.shape[0]
        a, a_scale = self._room(tokens)
        a = a[: tokens * c.hidden_size].view(tokens, c.hidden_size)
        elementwise.norm_quantise(self.stream(tokens), m.eps, a, a_scale, self.flag)
        self.gemm(a, m.weights[f"layers.{i}.qkv"], y_qkv)
        q, q_scale = self.queries(tokens)
        qkv.qkv_epilogue(
            c, y_qkv, a_scale, m.layers[i], m.cos, m.sin, inputs.positions, inputs.slots, q, q_scale,
            self.cache.layer(i), self.flag, m.eps,
        )  # fmt: skip

    def attention(self, i: int, inputs: Inputs, o_sums: torch.Tensor, scores: torch.Tensor) -> None:
        """O and L of all runs in the plans; scores of those that are split over the keys stay in memory."""
        tokens, pages, plans = o_sums.shape[0], self.cache.layer(i), inputs.plans
        q, q_scale = self.queries(tokens)
        row_sums = self.row_sums(tokens)
        if plans.split:
            top = self.workspace.get("top", (tokens, self.shape.heads), torch.int32)
            for accumulator in (top, row_sums, o_sums):
                accumulator.zero_()
            for plan in plans.split:
                self.kernels.scores(self.shape, q, pages, plan, scores, top.view(torch.uint32))
                self.kernels.values(self.shape, scores, q_scale, top.view(torch.uint32), pages, plan, o_sums, row_sums)
        for plan in plans.whole:
            self.kernels.prefill(self.shape, q, q_scale, pages, plan, o_sums, row_sums)

    def after_attention(
        self, i: int, o_sums: torch.Tensor, y_o: torch.Tensor, y_gate_up: torch.Tensor, y_down: torch.Tensor
    ) -> None:
        """From attention's sums to the residual stream after the layer."""
        m, c, layer, work = self.model, self.model.config, self.model.layers[i], self.workspace
        tokens, x = o_sums.shape[0], self.stream(o_sums.shape[0])
        room, a_scale = self._room(tokens)
        a = room[: tokens * c.attention_size].view(tokens, c.attention_size)
        elementwise.attention_epilogue(o_sums, self.row_sums(tokens), layer["v_scale"], a, a_scale, self.flag)
        self.gemm(a, m.weights[f"layers.{i}.o"], y_o)
        elementwise.residual_add(x, y_o, a_scale, layer["o_scale"], x)
        a = room[: tokens * c.hidden_size].view(tokens, c.hidden_size)
        elementwise.norm_quantise(x, m.eps, a, a_scale, self.flag)
        self.gemm(a, m.weights[f"layers.{i}.gate_up"], y_gate_up)
        h = work.get("h", (tokens, c.intermediate_size), torch.float32)
        top = work.get("mlp_top", (tokens,), torch.int32)
        top.zero_()
        a = room[: tokens * c.intermediate_size].view(tokens, c.intermediate_size)
        scale = work.get("mlp_scale", (tokens,), torch.float32)
        mlp.mlp_epilogue(y_gate_up, a_scale, layer["gate_up_scale"], h, top, a, scale, self.flag)
        self.gemm(a, m.weights[f"layers.{i}.down"], y_down)
        elementwise.residual_add(x, y_down, scale, layer["down_scale"], x)

    def head(self, inputs: Inputs, y: torch.Tensor, logits: torch.Tensor) -> None:
        """Final norm and lm_head for the rows asked for."""
        m, c, rows = self.model, self.model.config, y.shape[0]
        x = self.workspace.get("x_rows", (rows, c.hidden_size), torch.float32)
        elementwise.gather_rows(self.stream(inputs.tokens.shape[0]), inputs.logit_rows, x)
        a = self.workspace.get("a_rows", (rows, c.hidden_size), torch.int8)
        scale = self.workspace.get("a_rows_scale", (rows,), torch.float32)
        elementwise.norm_quantise(x, m.eps, a, scale, self.flag)
        self.gemm(a, m.weights["lm_head"], y)
        elementwise.logits(y, scale, m.lm_head_scale, logits)

    # -- a step ----------------------------------------------------------------------------------------------------

    def layer_work(self, i: int, inputs: Inputs, slot: Slot, places: LayerPlaces) -> None:
        """Everything of a layer, into a slot. Same addresses, same kernels: fit for a CUDA graph."""
        o_sums = place(slot, places.o_sums)
        self.before_attention(i, inputs, place(slot, places.qkv))
        self.attention(i, inputs, o_sums, place(slot, places.scores))
        self.after_attention(i, o_sums, place(slot, places.o), place(slot, places.gate_up), place(slot, places.down))
        slot.raw[:4].view(torch.int32).copy_(self.flag)

    def claims(self, i: int, batch: Batch, inputs: Inputs, places: LayerPlaces, transfer: bool) -> list[Part]:
        """A layer's claims in the order of docs/wire.md section 6."""
        name, heads = f"layers.{i}.", self.model.config.num_heads
        parts = [named(places.qkv, f"{name}qkv")]
        if transfer:
            for entry, run in zip(batch.entries, inputs.plans.places, strict=True):
                shape = (heads, run.rows, run.keys)
                parts.append(named(places.scores, f"{name}scores.{entry.seq_id}", 4 * run.scores_at, shape))
        parts.append(named(places.o_sums, f"{name}attention"))
        return [*parts, *(named(getattr(places, p), f"{name}{p}") for p in ("o", "gate_up", "down"))]

    def run(
        self,
        batch: Batch,
        inputs: Inputs,
        transfer: bool,
        sink: ClaimSink | None,
        work: Callable[[int, Inputs, Slot, LayerPlaces], None] | None = None,
    ) -> np.ndarray[Any, Any]:
        """All layers and the logits. `work` does what `layer_work` does, in another way. With a sink, the last claims are
        still on their way at the end. Raises: NumericsError."""
        work = work or self.layer_work
        tokens = batch.num_tokens
        places = LayerPlaces.of(self.model, tokens, inputs.plans.scores)
        heads = self.model.config.num_heads
        used = sum(heads * run.rows * run.keys for run in inputs.plans.places) if transfer else 0
        copied = places.fixed + 4 * used if sink is not None else 0
        self.start(inputs)
        for i in range(self.model.config.num_layers):
            slot = self.outbox.take(places.size)
            work(i, inputs, slot, places)
            if sink is not None:
                claims = self.claims(i, batch, inputs, places, transfer)
                self.outbox.submit(slot, copied, claims, sink, f"layers.{i}")
            self._ran(batch.entries, i)
        return self.logits(inputs, sink)

    def _ran(self, entries: Sequence[BatchEntry], layer: int) -> None:
        for e in entries:
            self.cache.extend(layer, e.seq_id, e.num_tokens)

    def logits(self, inputs: Inputs, sink: ClaimSink | None) -> np.ndarray[Any, Any]:
        """The end of a step. With a sink the product with the vocabulary is its last claim, and what follows from it is
        nobody's business here; without one the logits come back, (rows, vocab). Raises: NumericsError."""
        rows, layout = inputs.logit_rows.shape[0], Layout()
        shape = rows, self.model.config.vocab_size
        if sink is not None and not rows:
            return np.empty(shape, np.float32)
        # What leaves comes first.
        dtypes = (torch.float32, torch.int32) if sink is None else (torch.int32, torch.float32)
        first = layout.add(shape, dtypes[0])
        size, second = layout.size, layout.add(shape, dtypes[1])
        slot = self.outbox.take(layout.size)
        if rows:
            y, logits = (second, first) if sink is None else (first, second)
            self.head(inputs, place(slot, y), place(slot, logits))
        slot.raw[:4].view(torch.int32).copy_(self.flag)
        if sink is not None:
            self.outbox.submit(slot, size, [named(first, "lm_head")], sink, "lm_head")
            return np.empty((0, shape[1]), np.float32)
        self.outbox.submit(slot, size, [first], None)
        (values,) = self.outbox.flush()
        return values
