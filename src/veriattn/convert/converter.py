"""Float checkpoint to canonical model: fold, rotate, quantise and calibrate, one layer at a time.

The same source gives the same bits on any CPU, BLAS and thread count: weights are transformed in binary64 by
elementwise operations in a fixed order, sums that choose something are integer sums, and calibration runs the
canonical integer function itself. Memory is a few copies of the largest matrix, never the model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from veriattn.convert.quantise import CLIP_FRACTIONS, quantise_rows
from veriattn.convert.rope import inverse_frequencies, rotary_tables
from veriattn.convert.rotation import F64, hadamard_normalised, rotate_residual
from veriattn.convert.sources import Source
from veriattn.errors import ModelError
from veriattn.spec import reference
from veriattn.spec.constants import TABLE_FLOOR, largest_power_of_two_divisor
from veriattn.spec.forward import Batch, BatchEntry, run_layer, start_step
from veriattn.spec.local import LocalOperations
from veriattn.spec.model import LayerTensors, ModelConfig, ModelTensors
from veriattn.spec.modelfile import ModelWriter
from veriattn.spec.reference import F32, I8

RECIPE_VERSION = 1
CALIBRATION_WINDOW = 256
_ROW_BLOCK_BYTES = 64 << 20

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion made; `notes` are the source's (a clamped context, say)."""

    digest: str
    path: Path
    calibration_tokens: int
    notes: tuple[str, ...]


def default_calibration_text() -> str:
    """The public-domain sample that ships with the package."""
    return resources.files("veriattn.convert").joinpath("calibration.txt").read_text(encoding="utf-8")


def canonical_config(source: Source) -> ModelConfig:
    """Architecture of the canonical model that a source becomes."""
    c = source.config
    return ModelConfig(
        hidden_size=c.hidden_size,
        num_layers=c.num_layers,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.intermediate_size,
        vocab_size=c.vocab_size,
        max_positions=c.max_positions,
        rotary_dim=c.rotary_dim,
        rms_eps=float(np.float32(c.rms_eps)),
        qkv_bias=c.attention_bias,
        qk_norm=c.qk_norm,
        # A bias on k is a constant offset that int8 would spend its range on; the calibrated centre removes it.
        k_center=c.attention_bias,
    )


def convert(
    source: Source,
    out: Path,
    *,
    calibration_text: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    kernels: ModuleType,
) -> ConversionReport:
    """Write the canonical model of `source` to directory `out`.

    Raises: ModelError for weights that do not fit the canonical numerics or a calibration text that is too short.
    """
    config = canonical_config(source)
    tokenizer_json = source.tokenizer_json()
    windows = _calibration_windows(
        tokenizer_json, calibration_text or default_calibration_text(), config, source.special.bos_id
    )
    tell = progress or (lambda _what, _done, _total: None)
    total = config.num_layers + 2
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        writer = ModelWriter(out, config)
        embed = _embeddings(source, config)
        writer.write("embed", embed)
        frequencies = inverse_frequencies(source.config.rope_theta, config.rotary_dim, source.config.rope_scaling)
        cos, sin = rotary_tables(frequencies, config.max_positions)
        writer.write("rope.cos", cos)
        writer.write("rope.sin", sin)
        tell("embeddings", 1, total)

        batch = Batch(tuple(BatchEntry(i, 0, tuple(w), "none") for i, w in enumerate(windows)))
        public = ModelTensors(config, embed, cos, sin, (), np.empty(0, np.float32))
        weights: dict[str, object] = {}
        ops = LocalOperations(config, weights.__getitem__, kernels)
        ctx, x = start_step(public, batch, ops, kernels)
        # Only what calibration gathered from the embedding is needed from here on.
        del embed, public
        for i in range(config.num_layers):
            layer, matrices = _convert_layer(source, config, i, pool)
            weights = {name: kernels.pack(w) for name, w in matrices.items()}
            ops = LocalOperations(config, weights.__getitem__, kernels)
            ctx = type(ctx)(ctx.model, batch, ctx.cos, ctx.sin, ops, kernels)
            layer = _calibrate(config, layer, x, ctx.model.eps, weights[f"layers.{i}.qkv"], ctx.cos, ctx.sin, kernels)
            x = run_layer(ctx, i, layer, x)
            _write_layer(writer, config, i, layer, matrices)
            tell(f"layer {i}", i + 2, total)

        scales: list[F32] = []
        writer.write("lm_head.weight", _lm_head(source, config, pool, scales))
        writer.write("lm_head.scale", np.concatenate(scales))
        tell("lm_head", total, total)
    special = source.special
    digest = writer.finish(
        tokenizer_json=tokenizer_json,
        chat_template=source.chat_template(),
        generation={"bos_id": special.bos_id, "eos_ids": list(special.eos_ids), "add_bos": special.add_bos},
        source={"name": source.config.name, "arch": source.config.arch, "sha256": source.digest()},
        conversion={
            "recipe": RECIPE_VERSION,
            "clip_candidates": len(CLIP_FRACTIONS),
            "calibration_tokens": batch.num_tokens,
            "calibration_window": CALIBRATION_WINDOW,
        },
    )
    return ConversionReport(digest, out, batch.num_tokens, source.config.notes)


def _calibration_windows(tokenizer_json: str, text: str, config: ModelConfig, bos_id: int | None) -> list[list[int]]:
    ids = Tokenizer.from_str(tokenizer_json).encode(text, add_special_tokens=False).ids
    prefix = [] if bos_id is None else [bos_id]
    size = min(CALIBRATION_WINDOW, config.max_positions) - len(prefix)
    windows = [prefix + ids[i : i + size] for i in range(0, len(ids), size)]
    if not ids:
        raise ModelError("the calibration text has no tokens", hint="give a text of a few hundred words or more")
    return windows


def _row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _ROW_BLOCK_BYTES // (8 * columns))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _embeddings(source: Source, config: ModelConfig) -> npt.NDArray[np.float16]:
    out = np.empty((config.vocab_size, config.hidden_size), np.float16)
    for a, b in _row_blocks(*out.shape):
        out[a:b] = rotate_residual(source.tensor_rows("embed", a, b).astype(np.float64)).astype(np.float32)
    return out


def _lm_head(source: Source, config: ModelConfig, pool: ThreadPoolExecutor, scales: list[F32]) -> Iterator[I8]:
    norm = source.tensor("final_norm").astype(np.float64)
    for a, b in _row_blocks(config.vocab_size, config.hidden_size):
        w = rotate_residual(source.tensor_rows("lm_head", a, b).astype(np.float64) * norm)
        q, scale = quantise_rows(w, pool)
        scales.append(scale)
        yield q


def _reading(source: Source, name: str, norm: F64) -> F64:
    """A matrix that reads the residual stream: norm folded in, input side rotated."""
    return rotate_residual(source.tensor(name).astype(np.float64) * norm)


def _writing(w: F64) -> F64:
    """A matrix that writes the residual stream: output side rotated."""
    return np.ascontiguousarray(rotate_residual(np.ascontiguousarray(w.T)).T)


def _heads_hadamard(w: F64, config: ModelConfig) -> F64:
    """Hadamard over head_dim along the last axis of (..., heads * d)."""
    return hadamard_normalised(w, largest_power_of_two_divisor(config.head_dim))


def _convert_layer(
    source: Source, config: ModelConfig, i: int, pool: ThreadPoolExecutor
) -> tuple[LayerTensors, dict[str, I8]]:
    """Fold, rotate and quantise the matrices of one layer; v_scale is still 1, k_center still 0."""
    at = f"layers.{i}."
    norm = source.tensor(at + "attn_norm").astype(np.float64)
    v = _reading(source, at + "v", norm)
    # The value rotation sits on v's output side and o's input side, head by head.
    v = np.ascontiguousarray(_heads_hadamard(np.ascontiguousarray(v.T), config).T)
    parts = [quantise_rows(w, pool) for w in (_reading(source, at + "q", norm), _reading(source, at + "k", norm), v)]
    qkv, qkv_scale = (np.concatenate([p[j] for p in parts]) for j in (0, 1))
    bias: F32 | None = None
    if config.qkv_bias:
        v_bias = _heads_hadamard(source.tensor(at + "v_bias").astype(np.float64)[None], config)[0]
        bias = np.concatenate([source.tensor(at + "q_bias"), source.tensor(at + "k_bias"), v_bias.astype(np.float32)])
        bias[np.abs(bias) < TABLE_FLOOR] = 0
    o, o_scale = quantise_rows(_writing(_heads_hadamard(source.tensor(at + "o").astype(np.float64), config)), pool)
    norm = source.tensor(at + "mlp_norm").astype(np.float64)
    parts = [quantise_rows(_reading(source, at + name, norm), pool) for name in ("gate", "up")]
    gate_up, gate_up_scale = (np.concatenate([p[j] for p in parts]) for j in (0, 1))
    down = source.tensor(at + "down").astype(np.float64)
    block = largest_power_of_two_divisor(config.intermediate_size)
    # The online transform before `down` is unnormalised: its inverse is the transform over block size.
    down = hadamard_normalised(down, block) * (1.0 / float(np.sqrt(np.float64(block))))
    down_q, down_scale = quantise_rows(_writing(down), pool)
    head_norms = [_snap(source.tensor(at + name)) if config.qk_norm else None for name in ("q_norm", "k_norm")]
    layer = LayerTensors(
        qkv_scale=qkv_scale,
        o_scale=o_scale,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
        v_scale=np.ones(config.num_kv_heads, np.float32),
        qkv_bias=bias,
        k_center=np.zeros((config.num_kv_heads, config.head_dim), np.float32) if config.k_center else None,
        q_norm=head_norms[0],
        k_norm=head_norms[1],
    )
    matrices = {at + "qkv": qkv, at + "o": o, at + "gate_up": gate_up, at + "down": down_q}
    return layer, matrices


def _snap(x: F32) -> F32:
    out = x.astype(np.float32)
    out[np.abs(out) < TABLE_FLOOR] = 0
    return out


def _calibrate(
    config: ModelConfig,
    layer: LayerTensors,
    x: F32,
    eps: np.float32,
    qkv_weight: object,
    cos: F32,
    sin: F32,
    kernels: ModuleType,
) -> LayerTensors:
    """Static v scale from the largest value seen, k centre from the mean key after the rotary step."""
    a, a_scale = kernels.norm_quantise(x, eps)
    y = kernels.gemm_packed(qkv_weight, a)
    heads, kv, d = config.num_heads, config.num_kv_heads, config.head_dim
    values = reference.dequantise(y, layer.qkv_scale, a_scale, layer.qkv_bias).reshape(x.shape[0], heads + 2 * kv, d)
    peak = np.max(np.abs(values[:, heads + kv :]), axis=(0, 2))
    v_scale = np.clip(peak / np.float32(127.0), np.float32(2.0**-20), np.float32(2.0**20))
    center = layer.k_center
    if center is not None:
        k = values[:, heads : heads + kv]
        if layer.k_norm is not None:
            k = reference.head_norm(k, layer.k_norm, eps)
        k = reference.rotary(k, cos, sin)
        # An integer mean: the same in any order of summation.
        units = np.rint(np.clip(k.astype(np.float64), -(2.0**20), 2.0**20) * 65536.0).astype(np.int64)
        center = _snap((units.sum(axis=0).astype(np.float64) / (65536.0 * k.shape[0])).astype(np.float32))
    return dataclasses.replace(layer, v_scale=v_scale.astype(np.float32), k_center=center)


def _write_layer(
    writer: ModelWriter, config: ModelConfig, i: int, layer: LayerTensors, matrices: dict[str, I8]
) -> None:
    values = {
        "qkv.scale": layer.qkv_scale,
        "v_scale": layer.v_scale,
        "qkv.bias": layer.qkv_bias,
        "k_center": layer.k_center,
        "q_norm": layer.q_norm,
        "k_norm": layer.k_norm,
        "o.scale": layer.o_scale,
        "gate_up.scale": layer.gate_up_scale,
        "down.scale": layer.down_scale,
    }
    prefix = f"layers.{i}."
    for name in config.tensor_specs():
        if name.startswith(prefix):
            short = name[len(prefix) :]
            array = matrices[name[: -len(".weight")]] if short.endswith(".weight") else values[short]
            if array is None:
                raise ModelError(f"conversion made no {name}")
            writer.write(name, array)
