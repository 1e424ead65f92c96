"""CPU backend: the canonical forward pass over the native kernels, claims leaving operation by operation."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from veriattn.errors import NumericsError
from veriattn.native import kernels as native_kernels
from veriattn.native.layers import Claims, claim_buffers
from veriattn.prover.backend import ClaimSink, GroupSink
from veriattn.prover.split import SplitProver, SplitStep
from veriattn.spec.forward import AttentionInput, Batch, Operations, StepContext, check_batch, forward
from veriattn.spec.local import LocalOperations
from veriattn.spec.model import LayerTensors
from veriattn.spec.modelfile import ModelDirectory, TensorCollector
from veriattn.spec.reference import F32, I8, I32, I64
from veriattn.wire.messages import AttentionCheck, BadRequest
from veriattn.wire.operations import AttendRequest, LinearRequest, LoadRequest, Reply, WeightsRequest, row_tiles
from veriattn.wire.split import SplitRequest

#: Up to this many tokens a step waits for memory rather than for the CPU: the verifier, who works at the same time and often
#: on the same machine, makes more of the last core than one more thread here would.
_BOUND_BY_MEMORY = 4


class _ClaimingOperations:
    """`LocalOperations` whose results are claimed as they are made. Attention of `split` sequences is shared with the
    verifier, who holds their later keys."""

    def __init__(
        self, local: LocalOperations, check: AttentionCheck, sink: ClaimSink, split: SplitStep | None = None
    ) -> None:
        self._local, self._check, self._sink, self._split = local, check, sink, split
        self._group = sink if isinstance(sink, GroupSink) else None
        self._claims: Claims | None = None  # of one layer after the other: they are sent before the next is begun

    def fused_layer(self, ctx: StepContext, i: int, layer: LayerTensors, x: F32) -> F32 | None:
        """See `FusedOperations`. A layer's claims leave together, also where the layer leaves the domain."""
        sink = self._group
        if sink is None or self._split is not None or self._check is AttentionCheck.TRANSFER:
            return None
        if self._claims is None:
            self._claims = claim_buffers(ctx.model.config, x.shape[0])
        try:
            out = self._local.fused_layer(ctx, i, layer, x, self._claims)
        except NumericsError:
            sink.claim_group(f"layers.{i}", self._claims)
            raise
        if out is not None:
            sink.claim_group(f"layers.{i}", self._claims)
        return out

    def linear(self, name: str, a_i8: I8) -> I32:
        y = self._local.linear(name, a_i8)
        self._sink.claim(name, y)
        return y

    def attention(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        if self._split is None:
            return self._whole(layer, batch, x)
        o = np.empty(x.q_i8.shape, np.int64)
        row_sum = np.empty(x.q_i8.shape[:2], np.int32)
        whole, rows = batch.without(self._split.seq_ids)
        if whole is not None:
            part = AttentionInput(x.q_i8[rows], x.q_scale[rows], x.k_i8[rows], x.k_scale[rows], x.v_i8[rows])
            o[rows], row_sum[rows] = self._whole(layer, whole, part)
        shares = self._split.shares
        for entry, at in zip(batch.entries, batch.slices(), strict=True):
            if entry.seq_id in self._split.seq_ids:
                for request, tile in shares.exchanges(entry.seq_id, layer, at):
                    ours = shares.answer(request, self._local, x.q_i8[tile], x.q_scale[tile], self._sink)
                    theirs = shares.other_share(request.rows)
                    o[tile], row_sum[tile] = ours[0] + theirs[0], ours[1] + theirs[1]
        return o, row_sum

    def _whole(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        o, row_sum = self._local.attention(layer, batch, x)
        if self._check is AttentionCheck.TRANSFER:
            for entry, rows in zip(batch.entries, batch.slices(), strict=True):
                scores = self._local.scores(layer, entry.seq_id, x.q_i8[rows], entry.start + entry.num_tokens)
                self._sink.claim(f"layers.{layer}.scores.{entry.seq_id}", scores)
        self._sink.claim(f"layers.{layer}.attention", o)
        return o, row_sum


class CpuBackend:
    """The embedded default: NumPy and the native extension, no torch."""

    device = "cpu"

    def __init__(
        self,
        directory: Path,
        *,
        expected_digest: str,
        kv_tokens: int,
        max_sequences: int,
        kernels: ModuleType = native_kernels,
    ) -> None:
        """Load and pack the weights. Raises: ModelError."""
        model = ModelDirectory(directory, expected_digest=expected_digest)
        collector = TensorCollector(model.config)
        specs = model.config.tensor_specs()
        packed: dict[str, Any] = {}
        matrix = np.empty((0, 0), np.int8)
        # An honest prover has no use for the hashes: the verifier checks what comes of the weights.
        for name, first, chunk in model.stream(verify=False):
            if collector.add(name, first, chunk):
                continue
            shape = specs[name][1]
            if first == 0:
                matrix = np.empty(shape, np.int8)
            matrix[first : first + chunk.shape[0]] = chunk
            if first + chunk.shape[0] == shape[0]:
                packed[name[: -len(".weight")]] = kernels.pack(matrix)
        self.config = model.config
        self.tensors = collector.tensors()
        self._kernels = kernels
        self._packed = packed
        self._loading: dict[str, list[I8]] = {}
        self._linear_names = list(model.config.linear_shapes())
        # Pages are per sequence: each may leave one partly filled.
        max_pages = -(-kv_tokens // 256) + max_sequences
        self.operations = LocalOperations(model.config, packed.__getitem__, kernels, max_pages=max_pages)

    def step(self, batch: Batch, check: AttentionCheck, sink: ClaimSink | None, split: SplitStep | None = None) -> F32:
        """See `Backend.step`. Raises: InternalError for tokens that do not continue their sequence; NumericsError."""
        shared = frozenset() if split is None else split.seq_ids
        lengths = [e.start if e.seq_id in shared else self.length(e.seq_id) for e in batch.entries]
        check_batch(self.tensors, batch, lengths)
        if sink is None:
            return forward(self.tensors, batch, self.operations, self._kernels)
        ops: Operations = _ClaimingOperations(self.operations, check, sink, split)
        threads = native_kernels.get_threads()
        spare = threads > 1 and batch.num_tokens <= _BOUND_BY_MEMORY
        if spare:
            native_kernels.set_threads(threads - 1)
        try:
            return forward(self.tensors, batch, ops, self._kernels)
        finally:
            if spare:
                native_kernels.set_threads(threads)

    def finish(self) -> None:
        """See `Backend.finish`: every claim left at once."""

    def split(self, request: SplitRequest, sink: ClaimSink, shares: SplitProver) -> None:
        """See `Backend.split`. Raises: BadRequest."""
        if request.q_i8 is None or request.q_scale is None:
            raise BadRequest("SPLIT comes without queries")
        shares.answer(request, self.operations, request.q_i8, request.q_scale, sink)

    def load_rows(self, request: LoadRequest) -> None:
        """See `Backend.load_rows`. Raises: BadRequest for rows out of order."""
        name = self._linear_names[request.index]
        rows, _ = self.config.linear_shapes()[name]
        parts = self._loading.setdefault(name, [])
        if sum(p.shape[0] for p in parts) != request.first_row:
            raise BadRequest(f"rows of {name} come out of order")
        parts.append(request.w_i8)
        if request.first_row + request.w_i8.shape[0] == rows:
            self._packed[name] = self._kernels.pack(np.concatenate(self._loading.pop(name)))

    def linear(self, request: LinearRequest, sink: ClaimSink) -> None:
        """See `Backend.linear`."""
        name = self._linear_names[request.index]
        sink.claim(name, self.operations.linear(name, request.a_i8))

    def attend(self, request: AttendRequest, sink: ClaimSink) -> None:
        """See `Backend.attend`. Raises: BadRequest for runs that do not continue their sequence."""
        r, local = request, self.operations
        kv_heads = range(r.first_kv_head, r.first_kv_head + r.num_kv_heads)
        row = 0
        for run in r.runs:
            rows = slice(row, row + run.num_tokens)
            row = rows.stop
            expected = run.start if r.first_kv_head == 0 else run.start + run.num_tokens
            if local.layer_length(r.layer, run.seq_id) != expected:
                raise BadRequest(f"sequence {run.seq_id} does not continue at {run.start} in layer {r.layer}")
            local.append(r.layer, run.seq_id, run.start, kv_heads, r.k_i8[rows], r.k_scale[rows], r.v_i8[rows])
            q, q_scale = r.q_i8[rows], r.q_scale[rows]
            for tile in row_tiles(run.num_tokens, r.row_tile):
                name = f"layers.{r.layer}.{{}}.{run.seq_id}.{r.first_kv_head}.{tile.start}"
                if r.reply is not Reply.OUTPUTS:
                    keys = run.start + tile.stop
                    sink.claim(name.format("scores"), local.scores(r.layer, run.seq_id, q[tile], keys, kv_heads))
                if r.reply is not Reply.SCORES:
                    start = run.start + tile.start
                    o, _ = local.attend(r.layer, run.seq_id, start, kv_heads, q[tile], q_scale[tile])
                    sink.claim(name.format("attention"), o)

    def weights(self, request: WeightsRequest, sink: ClaimSink) -> None:
        """See `Backend.weights`. Raises: BadRequest for more keys than there are."""
        if request.p_u16.shape[2] > self.operations.layer_length(request.layer, request.seq_id):
            raise BadRequest(f"sequence {request.seq_id} has fewer keys in layer {request.layer}")
        o = self.operations.weighted_values(request.layer, request.seq_id, request.p_u16)
        sink.claim(f"layers.{request.layer}.attention.{request.seq_id}", o)

    def length(self, seq_id: int) -> int:
        return self.operations.length(seq_id)

    def free(self, seq_id: int) -> None:
        self.operations.free(seq_id)
