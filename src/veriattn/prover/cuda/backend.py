"""CUDA backend: the canonical forward pass over Triton kernels, claims leaving layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import torch
from veriattn.errors import InternalError
from veriattn.prover.backend import ClaimSink
from veriattn.prover.cuda.attention import Attention, DevicePlan, Plan, RunPlace, Shape, block_rows
from veriattn.prover.cuda.cache import DeviceCache
from veriattn.prover.cuda.exponential import device_table, self_test
from veriattn.prover.cuda.graphs import DecodeGraphs, pages_room
from veriattn.prover.cuda.memory import Layout, Outbox, Part, Slot, Upload, Workspace, named, place
from veriattn.prover.cuda.model import DeviceModel
from veriattn.prover.cuda.shares import DeviceShares
from veriattn.prover.cuda.step import SHORT_ROWS, Stepper
from veriattn.prover.split import SplitProver, SplitStep
from veriattn.spec.forward import Batch, check_batch
from veriattn.spec.kv import PAGE
from veriattn.spec.reference import F32
from veriattn.wire.messages import AttentionCheck, BadRequest
from veriattn.wire.operations import AttendRequest, LinearRequest, LoadRequest, Reply, Run, WeightsRequest, row_tiles
from veriattn.wire.split import SplitRequest


@contextlib.contextmanager
def _device_memory() -> Iterator[None]:
    """A device that is full is reported like any memory that is."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise MemoryError(f"the GPU's memory is full: {str(e).splitlines()[0]}") from e


def _device_plan(arrays: list[torch.Tensor], plan: Plan) -> DevicePlan:
    runs, tables, tiles = arrays
    return DevicePlan(runs, tables, tiles, plan.block_m, plan.max_keys)


class CudaBackend:
    """The model on one GPU. Equal to `CpuBackend` in every bit of every claim.

    device: "cuda", "cuda:1" and so on; "cpu" for CPU tensors, where kernels run in Triton's interpreter
    (TRITON_INTERPRET=1): how the
    tests reach this code without a GPU.
    """

    def __init__(
        self, directory: Path, *, expected_digest: str, kv_tokens: int, max_sequences: int, device: str = "cuda"
    ) -> None:
        """Load the weights and test the exponential. Raises: ModelError; InternalError where kernels give wrong
        bits; MemoryError."""
        where = torch.device(device)
        cuda = where.type == "cuda"
        if cuda:
            torch.cuda.set_device(where)
        self.device = f"cuda {torch.cuda.get_device_name(where)}" if cuda else "cuda (interpreted)"
        with _device_memory():
            by_table = not self_test(where)
            if by_table and not self_test(where, by_table=True):
                raise InternalError(
                    "the GPU computes wrong attention weights even from the table", hint="check its driver"
                )
            self._model = DeviceModel(directory, expected_digest, where)
            self.config, self.tensors = self._model.config, self._model.tensors
            self.attention = Attention(device_table(where), by_table)
            # Pages are per sequence: each may leave one partly filled.
            max_pages = -(-kv_tokens // PAGE) + max_sequences
            self.cache = DeviceCache(self.config, max_pages, where)
            self._workspace, self._outbox = Workspace(where), Outbox(where)
            self._stepper = Stepper(self._model, self.cache, self.attention, self._workspace, self._outbox, cuda)
            self._graphs = DecodeGraphs(self._stepper) if cuda else None
            self._upload = Upload(self._workspace, "requests", cuda)
            self._shares = DeviceShares(self.config, self.cache, self.attention, self._workspace, cuda)
        self._loading: dict[str, int] = {}
        self._incoming: dict[str, torch.Tensor] = {}
        self._linear_names = list(self.config.linear_shapes())

    # -- whole steps -----------------------------------------------------------------------------------------------

    def step(self, batch: Batch, check: AttentionCheck, sink: ClaimSink | None, split: SplitStep | None = None) -> F32:
        """See `Backend.step`. Raises: InternalError for tokens that do not continue their sequence; NumericsError;
        MemoryError."""
        shared = frozenset[int]() if split is None else split.seq_ids
        lengths = [e.start if e.seq_id in shared else self.length(e.seq_id) for e in batch.entries]
        check_batch(self.tensors, batch, lengths)
        transfer = check is AttentionCheck.TRANSFER and sink is not None
        with self._claims():
            if split is not None and sink is not None:
                return self._split_step(batch, transfer, sink, split)
            room = self._graph_room(batch)
            if room is not None:
                # What is repeated by a graph must meet the same slots.
                self._outbox.flush()
                self._outbox.rewind()
            inputs = self._stepper.prepare(batch, transfer, shared, room)
            work = None
            if room is not None and self._graphs is not None:
                graphs = self._graphs
                found = graphs.layers((len(batch.entries), len(batch.logit_rows()), room, transfer))
                if found is not None:
                    work = lambda i, *rest: graphs.run(found, i, *rest)  # noqa: E731
            return self._stepper.run(batch, inputs, transfer, sink, work)

    def finish(self) -> None:
        """See `Backend.finish`. Raises: NumericsError."""
        with self._claims():
            self._outbox.flush()

    def _graph_room(self, batch: Batch) -> int | None:
        """Pages of the padded block tables if the step is one of decoding and may become a graph."""
        decoding = all(e.num_tokens == 1 for e in batch.entries) and self._stepper.shape.group <= SHORT_ROWS
        if self._graphs is None or not decoding:
            return None
        return pages_room(max(-(-(e.start + 1) // PAGE) for e in batch.entries))

    @contextlib.contextmanager
    def _claims(self) -> Iterator[None]:
        """After an error nothing stays on its way."""
        with _device_memory():
            try:
                yield
            except BaseException:
                self._outbox.drop()
                raise

    def _split_step(self, batch: Batch, transfer: bool, sink: ClaimSink, split: SplitStep) -> F32:
        """A step with sequences whose attention is shared: layer by layer, with the verifier's answers in between."""
        stepper, c, tokens = self._stepper, self.config, batch.num_tokens
        inputs = stepper.prepare(batch, transfer, split.seq_ids, None)
        kept = [
            (e, rows) for e, rows in zip(batch.entries, batch.slices(), strict=True) if e.seq_id not in split.seq_ids
        ]
        index = torch.tensor(
            [i for _, r in kept for i in range(r.start, r.stop)], dtype=torch.int64, device=stepper.flag.device
        )
        i32, i64 = torch.int32, torch.int64
        stepper.start(inputs)
        for i in range(c.num_layers):
            y = self._workspace.get("split_qkv", (tokens, c.qkv_size), i32)
            stepper.before_attention(i, inputs, y)
            self._send(f"layers.{i}.qkv", y, sink)
            o_sums = self._workspace.get("split_o_sums", (tokens, c.num_heads, c.head_dim), i64)
            scores = self._workspace.get("split_scores", (inputs.plans.scores,), i32)
            stepper.attention(i, inputs, o_sums, scores)
            if kept:
                if transfer:
                    for (e, _), run in zip(kept, inputs.plans.places, strict=True):
                        piece = scores[run.scores_at : run.scores_at + c.num_heads * run.rows * run.keys]
                        self._send(f"layers.{i}.scores.{e.seq_id}", piece.view(c.num_heads, run.rows, run.keys), sink)
                self._send(f"layers.{i}.attention", o_sums[index], sink)
            self._share_out(i, batch, o_sums, sink, split)
            linears = [
                self._workspace.get(f"split_{n}", (tokens, w), i32)
                for n, w in (("o", c.hidden_size), ("gate_up", 2 * c.intermediate_size), ("down", c.hidden_size))
            ]
            stepper.after_attention(i, o_sums, *linears)
            for n, y in zip(("o", "gate_up", "down"), linears, strict=True):
                self._send(f"layers.{i}.{n}", y, sink)
            for e, _ in kept:
                self.cache.extend(i, e.seq_id, e.num_tokens)
        return stepper.logits(inputs, sink)

    def _share_out(self, i: int, batch: Batch, o_sums: torch.Tensor, sink: ClaimSink, split: SplitStep) -> None:
        """Attention of the shared sequences: both sides' parts added up."""
        row_sums, (q, q_scale) = self._stepper.row_sums(batch.num_tokens), self._stepper.queries(batch.num_tokens)
        for e, at in zip(batch.entries, batch.slices(), strict=True):
            if e.seq_id not in split.seq_ids:
                continue
            for request, tile in split.shares.exchanges(e.seq_id, i, at):
                ours = split.shares.exchange(request, self._shares, q[tile], q_scale[tile], sink)
                theirs = split.shares.other_share(request.rows)
                o_sums[tile].copy_(torch.from_numpy(ours[0] + theirs[0]))
                row_sums[tile].copy_(torch.from_numpy(ours[1] + theirs[1]))

    def _send(self, name: str, values: torch.Tensor, sink: ClaimSink) -> None:
        """One claim at once, after everything before it."""
        layout = Layout()
        part = layout.add(tuple(values.shape), values.dtype)
        slot = self._outbox.take(layout.size)
        place(slot, part).copy_(values)
        slot.raw[:4].view(torch.int32).copy_(self._stepper.flag)
        self._outbox.submit(slot, layout.size, [named(part, name)], sink, name)
        self._outbox.flush()

    # -- single operations -----------------------------------------------------------------------------------------

    def load_rows(self, request: LoadRequest) -> None:
        """See `Backend.load_rows`. Raises: BadRequest for rows out of order."""
        name = self._linear_names[request.index]
        rows = self.config.linear_shapes()[name][0]
        if self._loading.get(name, 0) != request.first_row:
            raise BadRequest(f"rows of {name} come out of order")
        with _device_memory():
            if request.first_row == 0:
                self._incoming[name] = torch.empty_like(self._model.weights[name])
            last = request.first_row + request.w_i8.shape[0]
            self._incoming[name][request.first_row : last].copy_(torch.from_numpy(request.w_i8.copy()))
        self._loading[name] = last
        if last == rows:
            self._model.weights[name].copy_(self._incoming.pop(name))
            del self._loading[name]

    def linear(self, request: LinearRequest, sink: ClaimSink) -> None:
        """See `Backend.linear`."""
        name = self._linear_names[request.index]
        rows, out = request.a_i8.shape[0], self.config.linear_shapes()[name][0]
        with self._claims():
            (a,) = self._upload([request.a_i8])
            layout = Layout()
            y = layout.add((rows, out), torch.int32)
            slot = self._outbox.take(layout.size)
            self._stepper.gemm(a, self._model.weights[name], place(slot, y))
            self._submit(slot, layout, [named(y, name)], sink)

    def _submit(self, slot: Slot, layout: Layout, parts: list[Part], sink: ClaimSink) -> None:
        """Claims of a single operation; they leave while the next one is computed, or with `finish`."""
        # There is no norm in it and so no flag.
        slot.raw[:4].zero_()
        self._outbox.submit(slot, layout.size, parts, sink, parts[0].name or "")

    def attend(self, request: AttendRequest, sink: ClaimSink) -> None:
        """See `Backend.attend`. Raises: BadRequest for runs that do not continue their sequence."""
        r = request
        for run in r.runs:
            expected = run.start if r.first_kv_head == 0 else run.start + run.num_tokens
            if self.cache.length(r.layer, run.seq_id) != expected:
                raise BadRequest(f"sequence {run.seq_id} does not continue at {run.start} in layer {r.layer}")
        with self._claims():
            tiles = self._tiles(r)
            slots = [self._slots(r, run) for run in r.runs]
            arrays: list[np.ndarray[Any, Any]] = [r.q_scale, r.k_scale, r.q_i8, r.k_i8, r.v_i8, np.concatenate(slots)]
            for _, _, plan in tiles:
                arrays += [plan.runs_i64, plan.tables_i32, plan.tiles_i32]
            q_scale, k_scale, q, k, v, where, *plans = self._upload(arrays)
            self._append(r, k, k_scale, v, where)
            for n, (run, tile, plan) in enumerate(tiles):
                device_plan = _device_plan(plans[3 * n : 3 * n + 3], plan)
                self._tile(r, run, tile, q, q_scale, device_plan, sink)

    def _slots(self, r: AttendRequest, run: Run) -> np.ndarray[Any, np.dtype[np.int64]]:
        if r.first_kv_head == 0:
            self.cache.reserve(run.seq_id, run.start + run.num_tokens)
            self.cache.extend(r.layer, run.seq_id, run.num_tokens)
        return self.cache.slots(run.seq_id, run.start, run.num_tokens).astype(np.int64)

    def _tiles(self, r: AttendRequest) -> list[tuple[Run, slice, Plan]]:
        group, row, tiles = r.q_i8.shape[1] // r.num_kv_heads, 0, []
        for run in r.runs:
            self.cache.reserve(run.seq_id, run.start + run.num_tokens)
            for tile in row_tiles(run.num_tokens, r.row_tile):
                rows, keys = tile.stop - tile.start, run.start + tile.stop
                where = RunPlace(row + tile.start, rows, run.start + tile.start, keys, self.cache.table(run.seq_id))
                tiles.append((run, tile, Plan.make([where], group, block_rows(rows, group))))
            row += run.num_tokens
        return tiles

    def _append(
        self, r: AttendRequest, k: torch.Tensor, k_scale: torch.Tensor, v: torch.Tensor, where: torch.Tensor
    ) -> None:
        """Store keys and values of some KV heads."""
        pages, last = self.cache.layer(r.layer), r.first_kv_head + r.num_kv_heads
        heads = torch.arange(r.first_kv_head, last, device=where.device)[None, :]
        page, at = (where // PAGE)[:, None], (where % PAGE)[:, None]
        pages.k[page, heads, at] = k
        pages.k_scale[page, heads, at] = k_scale
        pages.v[page, heads, :, at] = v

    def _tile(
        self,
        r: AttendRequest,
        run: Run,
        tile: slice,
        q: torch.Tensor,
        q_scale: torch.Tensor,
        plan: DevicePlan,
        sink: ClaimSink,
    ) -> None:
        """Scores and/or outputs of some rows of a run."""
        c, heads, rows = self.config, r.q_i8.shape[1], tile.stop - tile.start
        shape = Shape(heads, c.num_kv_heads, r.first_kv_head, r.num_kv_heads, c.head_dim)
        name = f"layers.{r.layer}.{{}}.{run.seq_id}.{r.first_kv_head}.{tile.start}"
        layout, parts = Layout(), []
        # Kernels count rows from the start of the request; the tile's share of the result is what is sent.
        total = r.q_i8.shape[0]
        o_all = self._workspace.get("attend_o", (total, heads, c.head_dim), torch.int64)
        sums = self._workspace.get("attend_sums", (total, heads), torch.int32)
        first = int(sum(x.num_tokens for x in r.runs[: r.runs.index(run)])) + tile.start
        with_scores = r.reply is not Reply.OUTPUTS
        scores = layout.add((heads, rows, run.start + tile.stop), torch.int32)
        o = layout.add((rows, heads, c.head_dim), torch.int64)
        slot, pages = self._outbox.take(layout.size), self.cache.layer(r.layer)
        by_scores = with_scores or rows * shape.group <= SHORT_ROWS
        if by_scores:
            top = self._workspace.get("attend_top", (total, heads), torch.int32)
            top[first : first + rows].zero_()
            self.attention.scores(shape, q, pages, plan, place(slot, scores), top.view(torch.uint32))
        if with_scores:
            parts.append(named(scores, name.format("scores")))
        if r.reply is not Reply.SCORES:
            if by_scores:
                o_all[first : first + rows].zero_()
                sums[first : first + rows].zero_()
                self.attention.values(
                    shape, place(slot, scores), q_scale, top.view(torch.uint32), pages, plan, o_all, sums
                )
            else:
                self.attention.prefill(shape, q, q_scale, pages, plan, o_all, sums)
            place(slot, o).copy_(o_all[first : first + rows])
            parts.append(named(o, name.format("attention")))
        self._submit(slot, layout, parts, sink)

    def weights(self, request: WeightsRequest, sink: ClaimSink) -> None:
        """See `Backend.weights`. Raises: BadRequest for more keys than there are."""
        r, c = request, self.config
        heads, rows, keys = r.p_u16.shape
        if keys > self.cache.length(r.layer, r.seq_id):
            raise BadRequest(f"sequence {r.seq_id} has fewer keys in layer {r.layer}")
        shape = Shape(heads, c.num_kv_heads, 0, c.num_kv_heads, c.head_dim)
        where = RunPlace(0, rows, 0, keys, self.cache.table(r.seq_id))
        plan = Plan.make([where], shape.group, block_rows(rows, shape.group))
        with self._claims():
            p, *arrays = self._upload([r.p_u16.view(np.int16), plan.runs_i64, plan.tables_i32, plan.tiles_i32])
            layout = Layout()
            o = layout.add((rows, heads, c.head_dim), torch.int64)
            slot = self._outbox.take(layout.size)
            sums = self._workspace.get("attend_sums", (rows, heads), torch.int32)
            sums.zero_()
            place(slot, o).zero_()
            device_plan = _device_plan(arrays, plan)
            self.attention.weighted_values(
                shape, p.view(torch.uint16), self.cache.layer(r.layer), device_plan, place(slot, o), sums
            )
            self._submit(slot, layout, [named(o, f"layers.{r.layer}.attention.{r.seq_id}")], sink)

    def split(self, request: SplitRequest, sink: ClaimSink, shares: SplitProver) -> None:
        """See `Backend.split`. Raises: BadRequest."""
        if request.q_i8 is None or request.q_scale is None:
            raise BadRequest("SPLIT comes without queries")
        with self._claims():
            self._outbox.flush()
            shares.exchange(request, self._shares, request.q_i8, request.q_scale, sink)

    # -- sequences -------------------------------------------------------------------------------------------------

    def length(self, seq_id: int) -> int:
        return self.cache.length(self.config.num_layers - 1, seq_id)

    def free(self, seq_id: int) -> None:
        """Forget a sequence; its pages and all activations are zeroed, on the device and in pinned memory."""
        self.finish()
        self.cache.free(seq_id)
        self._workspace.wipe()
        self._outbox.wipe()

    def nonzero_bytes(self) -> int:
        """Bytes of caches, activations and claims that are not zero: none once every sequence has been freed."""
        return self.cache.nonzero_bytes() + self._workspace.nonzero_bytes() + self._outbox.nonzero_bytes()
