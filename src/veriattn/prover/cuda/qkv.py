"""From the qkv product to attention's operands: dequantise, head norm, rotary step, Hadamard, quantise, into the cache."""

from __future__ import annotations

import triton
import triton.language as tl

import torch
from veriattn.prover.cuda import numerics as nm
from veriattn.prover.cuda.cache import KvPages
from veriattn.prover.cuda.launch import ceil_div, launch, next_power_of_two, pointer_or, tile_rows
from veriattn.spec.constants import largest_power_of_two_divisor, query_scale_constant
from veriattn.spec.model import ModelConfig


@triton.jit
def _dequantised(y_ptr, at, channel, inside, a_scale, w_scale_ptr, bias_ptr, BIAS: tl.constexpr):
    y = tl.load(y_ptr + at + channel, mask=inside, other=0).to(tl.float32)
    x = (y * tl.load(w_scale_ptr + channel, mask=inside, other=0.0)) * a_scale
    if BIAS:
        x = x + tl.load(bias_ptr + channel, mask=inside, other=0.0)
    return x


@triton.jit
def qkv_kernel(
    y_ptr,
    a_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    slot_ptr,
    v_scale_ptr,
    k_center_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    q_scale_ptr,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    flag_ptr,
    tokens,
    eps,
    q_constant,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    LOG_HADAMARD: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    BIAS: tl.constexpr,
    QK_NORM: tl.constexpr,
    K_CENTER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One head (of q, then k, then v) of ROWS tokens."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < tokens
    i = tl.arange(0, D_PAD)[None, :]
    inside = valid[:, None] & (i < D)
    at = row.to(tl.int64)[:, None] * ((HEADS + 2 * KV_HEADS) * D)
    a_scale = tl.load(a_scale_ptr + row, mask=valid, other=0.0)[:, None]
    x = _dequantised(y_ptr, at, head * D + i, inside, a_scale, w_scale_ptr, bias_ptr, BIAS)
    top = tl.max(nm.abs_bits(x), 1)
    nm.raise_flag(flag_ptr, top)
    slot = tl.load(slot_ptr + row, mask=valid, other=-1)
    if head >= HEADS + KV_HEADS:
        kv = head - HEADS - KV_HEADS
        base = (slot // PAGE).to(tl.int64) * KV_HEADS + kv
        inverse = nm.over(1.0, tl.load(v_scale_ptr + kv + tl.zeros((1, 1), tl.int32)))
        v = nm.round_i8(tl.minimum(tl.maximum(x * inverse, -127.0), 127.0))
        to = v_ptr + (base[:, None] * D + i) * PAGE + (slot % PAGE)[:, None]
        tl.store(to, v, mask=inside & (slot >= 0)[:, None])
    else:
        # The other element of the pair is computed a second time: cheaper than to exchange it.
        partner = tl.where(i < ROTARY // 2, i + ROTARY // 2, tl.where(i < ROTARY, i - ROTARY // 2, i))
        other = _dequantised(y_ptr, at, head * D + partner, inside, a_scale, w_scale_ptr, bias_ptr, BIAS)
        if QK_NORM:
            m = nm.floored(top)
            to_i16, step = nm.over(32767.0, m)[:, None], nm.by(m, 32767.0)
            b = nm.round_i16(x * to_i16)
            wide = b.to(tl.int64)
            factor = (step * nm.reciprocal_rms(tl.sum(wide * wide, 1), D, step, eps))[:, None]
            weight_ptr = q_norm_ptr
            if head >= HEADS:
                weight_ptr = k_norm_ptr
            x = (b.to(tl.float32) * factor) * tl.load(weight_ptr + i, mask=i < D, other=0.0)
            other = nm.round_i16(other * to_i16).to(tl.float32) * factor
            other = other * tl.load(weight_ptr + partner, mask=i < D, other=0.0)
        position = tl.load(position_ptr + row, mask=valid, other=0).to(tl.int64)
        pair = position[:, None] * (ROTARY // 2) + tl.where(i < ROTARY // 2, i, partner)
        cos = tl.load(cos_ptr + pair, mask=inside & (i < ROTARY), other=0.0)
        sin = tl.load(sin_ptr + pair, mask=inside & (i < ROTARY), other=0.0)
        turned = other * sin
        x = tl.where(i < ROTARY, x * cos + tl.where(i < ROTARY // 2, -turned, turned), x)
        if K_CENTER:  # noqa: SIM102 - the compiler decides the first, the program the second
            if head >= HEADS:
                x = x - tl.load(k_center_ptr + (head - HEADS) * D + i, mask=i < D, other=0.0)
        x = nm.hadamard(x, ROWS, D_PAD, LOG_HADAMARD)
        top = tl.max(tl.where(inside, nm.abs_bits(x), 0), 1)
        nm.raise_flag(flag_ptr, top)
        m = nm.floored(top)
        a, scale = nm.round_i8(x * nm.over(127.0, m)[:, None]), nm.by(m, 127.0)
        if head < HEADS:
            to_head = row.to(tl.int64) * HEADS + head
            tl.store(q_ptr + to_head[:, None] * D + i, a, mask=inside)
            tl.store(q_scale_ptr + to_head, scale * q_constant, mask=valid)
        else:
            at_key = ((slot // PAGE).to(tl.int64) * KV_HEADS + head - HEADS) * PAGE + slot % PAGE
            tl.store(k_ptr + at_key[:, None] * D + i, a, mask=inside & (slot >= 0)[:, None])
            tl.store(k_scale_ptr + at_key, scale, mask=valid & (slot >= 0))


def qkv_epilogue(
    config: ModelConfig,
    y_i32: torch.Tensor,
    a_scale: torch.Tensor,
    layer: dict[str, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions_i32: torch.Tensor,
    slots_i32: torch.Tensor,
    q_i8: torch.Tensor,
    q_scale: torch.Tensor,
    pages: KvPages,
    flag: torch.Tensor,
    eps: float,
) -> None:
    """`reference.qkv_epilogue`, keys and values going to their places in the cache.

    Shapes: y (tokens, (heads + 2 kv_heads) d), cos and sin (max_positions, r / 2), positions (tokens,), slots
    (tokens,): page * PAGE +
    place in the page, or -1 for keys that are not kept; q (tokens, heads, d), q_scale (tokens, heads). `layer` has
    qkv_scale, v_scale and
    what the model has of qkv_bias, k_center, q_norm, k_norm.
    """
    c, tokens = config, y_i32.shape[0]
    block = largest_power_of_two_divisor(c.head_dim)
    per, d_pad = tile_rows(4), next_power_of_two(c.head_dim)
    grid = (ceil_div(tokens, per), c.num_heads + 2 * c.num_kv_heads)
    w_scale = layer["qkv_scale"]
    launch(
        qkv_kernel, grid, y_i32, a_scale, w_scale, pointer_or(layer.get("qkv_bias"), w_scale), cos, sin,
        positions_i32, slots_i32,
        layer["v_scale"], *(pointer_or(layer.get(name), w_scale) for name in ("k_center", "q_norm", "k_norm")),
        q_i8, q_scale, pages.k, pages.k_scale, pages.v, flag, tokens, eps, float(query_scale_constant(c.head_dim)),
        HEADS=c.num_heads, KV_HEADS=c.num_kv_heads, D=c.head_dim, D_PAD=d_pad, LOG_HADAMARD=block.bit_length() - 1,
        ROTARY=c.rotary_dim, PAGE=pages.page, BIAS=c.qkv_bias, QK_NORM=c.qk_norm, K_CENTER=c.k_center, ROWS=per,
    )  # fmt: skip
