"""A whole decoder layer in one call: computed, or replayed over claims that are checked on the way.

The bits, and what is looked at in which order, are those of `spec.forward.run_layer` over single operations; the calls are
there because a decode step of a small model is otherwise mostly the calling of kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from veriattn.errors import InternalError
from veriattn.native import _native
from veriattn.spec.constants import query_scale_constant
from veriattn.spec.field import U8, U64
from veriattn.spec.model import LayerTensors, ModelConfig
from veriattn.spec.reference import F32, I8, I32

#: int32 qkv, int64 attention outputs, int32 o, gate_up, down: what a prover claims of a layer, in this order.
Claims = tuple[npt.NDArray[Any], ...]
_NO_CLAIMS = (None,) * 5


def claim_buffers(config: ModelConfig, rows: int) -> Claims:
    """Room for a layer's claims."""
    c = config
    return (
        np.empty((rows, c.qkv_size), np.int32),
        np.empty((rows, c.num_heads, c.head_dim), np.int64),
        np.empty((rows, c.hidden_size), np.int32),
        np.empty((rows, 2 * c.intermediate_size), np.int32),
        np.empty((rows, c.hidden_size), np.int32),
    )


def _sizes_and_tensors(c: ModelConfig, t: LayerTensors) -> tuple[Any, ...]:
    has_norms = t.q_norm is not None and t.k_norm is not None
    return (
        c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size, float(np.float32(c.rms_eps)),
        float(query_scale_constant(c.head_dim)),
        (t.qkv_scale, t.o_scale, t.gate_up_scale, t.down_scale, t.v_scale, t.qkv_bias, t.k_center,
         t.q_norm if has_norms else None, t.k_norm if has_norms else None),
    )  # fmt: skip


class LocalLayer:
    """A layer with its packed weights."""

    def __init__(self, config: ModelConfig, tensors: LayerTensors, weights: Sequence[Any]) -> None:
        """weights: `kernels.PackedLinear` of qkv, o, gate_up, down. Raises: InternalError where shapes do not fit."""
        try:
            self._native = _native.LocalLayer(*(w._packed for w in weights), *_sizes_and_tensors(config, tensors))
        except (TypeError, ValueError) as e:
            raise InternalError(f"LocalLayer: {e}") from e

    def run(
        self,
        x: F32,
        cos: F32,
        sin: F32,
        runs_i64: npt.NDArray[np.int64],
        block_tables: list[I32],
        k_pages: I8,
        k_scale_pages: F32,
        v_pages: I8,
        claims: Claims | None = None,
    ) -> tuple[F32, bool]:
        """The residual stream after the layer, and whether everything was in the domain of the canonical function.

        Shapes: x (tokens, hidden), cos and sin (tokens, rotary_dim / 2), runs (n, 2): start and tokens of each run,
        pages as in `kernels.attention`; the runs' keys and values are stored there. claims: filled where given.
        """
        out = np.empty_like(x)
        try:
            ok = self._native.run(
                x, cos, sin, runs_i64, block_tables, k_pages, k_scale_pages, v_pages, out, claims or _NO_CLAIMS
            )
        except (TypeError, ValueError) as e:
            raise InternalError(f"LocalLayer: {e}") from e
        return out, ok


class Finding(IntEnum):
    """What was found first in a layer's claims."""

    RIGHT = 0
    OUT_OF_DOMAIN = 1
    WRONG_QKV = 2
    WRONG_O = 3
    WRONG_GATE_UP = 4
    WRONG_DOWN = 5
    OUTPUT_TOO_LARGE = 6
    WRONG_OUTPUT = 7


class CheckedLayer:
    """A layer with the challenges of its linears and of its attention's outputs."""

    def __init__(
        self, config: ModelConfig, tensors: LayerTensors, linears: Sequence[tuple[U64, U64]], w_u64: U64
    ) -> None:
        """linears: (r, u) of qkv, o, gate_up, down. w: (kv_heads, 2, d).

        The arrays are kept, not copied: once a key set is destroyed, calls are the caller's to refuse.
        Raises: InternalError where shapes do not fit.
        """
        secrets = [array for pair in linears for array in pair]
        try:
            self._native = _native.CheckedLayer(*secrets, w_u64, *_sizes_and_tensors(config, tensors))
        except (TypeError, ValueError) as e:
            raise InternalError(f"CheckedLayer: {e}") from e

    def run(
        self,
        x: F32,
        cos: F32,
        sin: F32,
        runs_i64: npt.NDArray[np.int64],
        block_tables: list[I32],
        k_pages: I8,
        k_scale_pages: F32,
        g_pages: U64,
        claims: Claims,
        rows_ok: U8,
    ) -> tuple[F32, Finding, int, int]:
        """The residual stream after the layer, what was found first, and in which row and head.

        Shapes: as `LocalLayer.run`, with g (pages, kv_heads, 256, 2) in place of values; rows_ok (tokens,) says which rows
        of the linear checked last are right. Where anything but RIGHT was
        found, the stream means nothing and the session must close.
        Trust: claims are adversarial, in private memory; x and everything else is the verifier's own.
        Soundness: a wrong row of a claim is accepted with probability at most p**-2.
        """
        out = np.empty_like(x)
        try:
            finding, row, head = self._native.run(
                x, cos, sin, runs_i64, block_tables, k_pages, k_scale_pages, g_pages, out, claims, rows_ok
            )
        except (TypeError, ValueError) as e:
            raise InternalError(f"CheckedLayer: {e}") from e
        return out, Finding(finding), row, head
