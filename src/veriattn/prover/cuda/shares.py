"""The device's part of split attention: resident keys where they are, streamed ones in a page of their own, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np

import torch
from veriattn.prover.cuda.attention import Attention, DevicePlan, Plan, RunPlace, Shape, block_rows
from veriattn.prover.cuda.cache import DeviceCache, KvPages
from veriattn.prover.cuda.memory import Upload, Workspace
from veriattn.spec.kv import PAGE
from veriattn.spec.model import ModelConfig
from veriattn.spec.reference import F32, I8, I32, I64
from veriattn.wire.split import SplitRequest


class DeviceShares:
    """`prover.split.Share` on the device, for one request at a time."""

    def __init__(
        self, config: ModelConfig, cache: DeviceCache, attention: Attention, workspace: Workspace, pin: bool
    ) -> None:
        self._config, self._cache, self._kernels, self._workspace = config, cache, attention, workspace
        self._upload = Upload(workspace, "share_inputs", pin)
        self._upload_block = Upload(workspace, "share_block", pin)
        c = config
        self._shape = Shape(c.num_heads, c.num_kv_heads, 0, c.num_kv_heads, c.head_dim)

    def cached(self, layer: int, seq_id: int) -> int:
        """Keys that the device holds."""
        return self._cache.length(layer, seq_id)

    def begin(self, request: SplitRequest, q_i8: I8 | torch.Tensor, q_scale: F32 | torch.Tensor) -> None:
        """Take queries, from the wire or from the device, and make room for the share's scores."""
        r, c, device = request, self._config, self._cache.layer(0).k.device
        self._request, self._pages = r, self._cache.layer(r.layer)
        q, scale = (torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for x in (q_i8, q_scale))
        self._q, self._q_scale = q.to(device).contiguous(), scale.to(device).contiguous()
        self._keys = r.resident + r.streamed
        self._scores = self._workspace.get("share_scores", (c.num_heads, r.rows, self._keys), torch.int32)
        self._o = self._workspace.get("share_o", (r.rows, c.num_heads, c.head_dim), torch.int64)
        self._sums = self._workspace.get("share_sums", (r.rows, c.num_heads), torch.int32)
        self._o.zero_()
        self._sums.zero_()
        # The place of block b is page b of a small cache: scales and values of one block are all that it ever holds.
        self._block = KvPages(
            self._workspace.get("block_k", (1, c.num_kv_heads, PAGE, c.head_dim), torch.int8),
            self._workspace.get("block_k_scale", (1, c.num_kv_heads, PAGE), torch.float32),
            self._workspace.get("block_v", (1, c.num_kv_heads, c.head_dim, PAGE), torch.int8),
        )
        self._scales: list[F32] = []
        self._by_weights = False

    def _plan(self, keys: int, table: list[int]) -> DevicePlan:
        rows, group = self._request.rows, self._shape.group
        plan = Plan.make([RunPlace(0, rows, 0, keys, table)], group, block_rows(rows, group))
        runs, tables, tiles = self._upload([plan.runs_i64, plan.tables_i32, plan.tiles_i32])
        return DevicePlan(runs, tables, tiles, plan.block_m, keys)

    def _own(self) -> DevicePlan:
        return self._plan(self._request.resident, self._cache.table(self._request.seq_id))

    def _piece(self, count: int) -> torch.Tensor:
        r = self._request
        return self._workspace.get("share_piece", (self._config.num_heads, r.rows, count), torch.int32)

    def resident_scores(self) -> None:
        """q.k of the keys in the cache."""
        self._scores_of(self._pages, self._own(), 0, self._request.resident)

    def block_scores(self, at: int, k_i8: I8, k_scale: F32) -> None:
        """q.k of streamed keys. Shapes: k (kv_heads, count, d), k_scale (kv_heads, count)."""
        count = k_i8.shape[1]
        (k,) = self._upload_block([k_i8])
        self._block.k[0, :, :count] = k
        self._scales.append(k_scale)
        self._scores_of(self._block, self._plan(count, [0]), at, count)

    def _scores_of(self, pages: KvPages, plan: DevicePlan, at: int, count: int) -> None:
        if count:
            piece = self._piece(count)
            self._kernels.scores(self._shape, self._q, pages, plan, piece, None)
            self._scores[:, :, at : at + count] = piece

    def scores(self) -> I32:
        """All scores of the share, (heads, rows, keys)."""
        scores: I32 = self._scores.cpu().numpy().copy()
        return scores

    def weights(self, p_u16: np.ndarray[tuple[int, ...], np.dtype[np.uint16]]) -> None:
        """Take P from the verifier in place of the scores; (heads, rows, keys)."""
        self._by_weights = True
        self._scores.copy_(torch.from_numpy(p_u16.astype(np.int32)))

    def row_max(self, row_max: F32) -> None:
        """Take the maxima over all keys, (rows, heads)."""
        bits = np.ascontiguousarray(row_max).view(np.int32)
        ordered = np.where(bits < 0, ~bits, bits ^ np.int32(-(2**31))).astype(np.int32)
        top = self._workspace.get("share_top", ordered.shape, torch.int32)
        top.copy_(torch.from_numpy(ordered))
        self._top = top.view(torch.uint32)

    def resident_outputs(self) -> None:
        """Add the cache's part of O and L."""
        self._outputs_of(self._pages, self._own(), 0, self._request.resident)

    def block_outputs(self, at: int, v_i8: I8) -> None:
        """Add streamed values' part. Shape: v (kv_heads, count, d)."""
        count = v_i8.shape[1]
        arrays: list[np.ndarray[Any, Any]] = [np.ascontiguousarray(v_i8.swapaxes(1, 2))]
        if not self._by_weights:
            arrays.append(self._scales.pop(0))
        v, *scale = self._upload_block(arrays)
        self._block.v.zero_()
        self._block.v[0, :, :, :count] = v
        for k_scale in scale:
            self._block.k_scale[0, :, :count] = k_scale
        self._outputs_of(self._block, self._plan(count, [0]), at, count)

    def _outputs_of(self, pages: KvPages, plan: DevicePlan, at: int, count: int) -> None:
        if not count:
            return
        piece = self._piece(count)
        piece.copy_(self._scores[:, :, at : at + count])
        if self._by_weights:
            p = self._workspace.get("share_p", tuple(piece.shape), torch.int16)
            p.copy_(piece)
            self._kernels.weighted_values(self._shape, p.view(torch.uint16), pages, plan, self._o, self._sums)
        else:
            self._kernels.values(
                self._shape, piece, self._q_scale, self._top, pages, plan, self._o, self._sums, causal=False
            )

    def outputs(self) -> tuple[I64, I32]:
        """O and L of the share; L is 0 where the verifier sends weights."""
        sums = self._sums.cpu().numpy().copy()
        return self._o.cpu().numpy().copy(), np.zeros_like(sums) if self._by_weights else sums
