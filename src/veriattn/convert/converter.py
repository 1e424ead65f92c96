"""Float checkpoint to canonical model: fold, rotate, quantise and calibrate, one layer at a time.

The same source gives the same bits on any CPU, BLAS and thread count: weights are transformed in binary64 by
elementwise operations in a fixed order, sums that choose something are integer sums, and calibration runs the
canonical integer function itself. Memory is a few copies of the largest matrix, never the model.
"""

from __future__ import annotations

import dataclasses
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType

import numpy as np
from tokenizers import Tokenizer

from veriattn.convert.matrices import F16, MatrixMaker
from veriattn.convert.quantise import CLIP_FRACTIONS
from veriattn.convert.rope import inverse_frequencies, rotary_tables
from veriattn.convert.sources import Source
from veriattn.errors import ModelError, UsageError
from veriattn.spec import reference
from veriattn.spec.constants import MAX_KEYS, TABLE_FLOOR
from veriattn.spec.forward import Batch, BatchEntry, run_layer, start_step
from veriattn.spec.local import LocalOperations
from veriattn.spec.model import LayerTensors, ModelConfig, ModelTensors
from veriattn.spec.modelfile import ModelWriter
from veriattn.spec.reference import F32, I8

RECIPE_VERSION = 1
CALIBRATION_WINDOW = 256
MIN_CALIBRATION_TOKENS = 64
#: Activations of all calibration tokens are held at once; more than this of a long text is not read.
MAX_CALIBRATION_TOKENS = 4096
#: Each thread holds some 30 MB of pieces.
MAX_THREADS = 32

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
    """Architecture of the canonical model that a source becomes. Raises: ModelError for sizes that it cannot have."""
    c = source.config
    try:
        return ModelConfig(
            hidden_size=c.hidden_size,
            num_layers=c.num_layers,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            intermediate_size=c.intermediate_size,
            vocab_size=c.vocab_size,
            max_positions=min(c.max_positions, MAX_KEYS),
            rotary_dim=c.rotary_dim,
            rms_eps=float(np.float32(c.rms_eps)),
            qkv_bias=c.attention_bias,
            qk_norm=c.qk_norm,
            # A bias on k is a constant offset that int8 would spend its range on; the calibrated centre removes it.
            k_center=c.attention_bias,
        )
    except ModelError as error:
        raise ModelError(error.message, hint="docs/spec.md section 2 has the sizes that are supported") from None


def _notes(source: Source) -> tuple[str, ...]:
    full = source.config.max_positions
    clamped = (f"context clamped from {full} to {MAX_KEYS} positions",) if full > MAX_KEYS else ()
    return source.config.notes + clamped


def convert(
    source: Source,
    out: Path,
    *,
    calibration_text: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    kernels: ModuleType,
) -> ConversionReport:
    """Write the canonical model of `source` to directory `out`, which is this conversion's own.

    The manifest is written last: what a failed or killed conversion leaves behind does not open as a model.

    Raises: ModelError for weights that do not fit the canonical numerics and for a directory that cannot be written;
    UsageError for a calibration text that is too short.
    """
    config = canonical_config(source)
    text = default_calibration_text() if calibration_text is None else calibration_text
    windows = _calibration_windows(source.tokenizer_json(), text, config, source.special.bos_id)
    try:
        digest = _write_model(source, config, out, windows, threads, progress or _silent, kernels)
    except OSError as error:
        raise ModelError(
            f"cannot write the model to {out}: {error.strerror}", hint="is there room, and may you write there?"
        ) from error
    return ConversionReport(digest, out, sum(len(w) for w in windows), _notes(source))


def _silent(_what: str, _done: int, _total: int) -> None:
    """No progress."""


def _write_model(
    source: Source,
    config: ModelConfig,
    out: Path,
    windows: list[list[int]],
    threads: int | None,
    tell: Progress,
    kernels: ModuleType,
) -> str:
    total = config.num_layers + 2
    workers = min(threads or len(os.sched_getaffinity(0)), MAX_THREADS)
    with ThreadPoolExecutor(workers) as pool:
        maker = MatrixMaker(source, config, pool)
        writer = ModelWriter(out, config)
        batch, seen = _calibration_batch(windows)
        embed = np.empty((len(seen), config.hidden_size), np.float16)
        writer.write("embed", _keep_rows(maker.embedding(), seen, embed))
        frequencies = inverse_frequencies(source.config.rope_theta, config.rotary_dim, source.config.rope_scaling)
        cos, sin = rotary_tables(frequencies, config.max_positions)
        writer.write("rope.cos", cos)
        writer.write("rope.sin", sin)
        tell("embeddings", 1, total)

        weights: dict[str, object] = {}
        ops = LocalOperations(config, weights.__getitem__, kernels)
        public = ModelTensors(config, embed, cos, sin, (), np.empty(0, np.float32))
        ctx, x = start_step(public, batch, ops, kernels)
        for i in range(config.num_layers):
            layer, matrices = _convert_layer(source, config, i, maker)
            weights.update((name, kernels.pack(w)) for name, w in matrices.items())
            layer = _calibrate(config, layer, x, ctx.model.eps, weights[f"layers.{i}.qkv"], ctx.cos, ctx.sin, kernels)
            ops = LocalOperations(config, weights.__getitem__, kernels)
            x = run_layer(dataclasses.replace(ctx, ops=ops), i, layer, x)
            weights.clear()
            _write_layer(writer, config, i, layer, matrices)
            del matrices
            tell(f"layer {i}", i + 2, total)

        scale = np.empty(config.vocab_size, np.float32)
        writer.write("lm_head.weight", maker.lm_head(scale))
        writer.write("lm_head.scale", scale)
        tell("lm_head", total, total)
    special = source.special
    return writer.finish(
        tokenizer_json=source.tokenizer_json(),
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


def _calibration_windows(tokenizer_json: str, text: str, config: ModelConfig, bos_id: int | None) -> list[list[int]]:
    ids = Tokenizer.from_str(tokenizer_json).encode(text, add_special_tokens=False).ids[:MAX_CALIBRATION_TOKENS]
    if len(ids) < MIN_CALIBRATION_TOKENS:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens; at least {MIN_CALIBRATION_TOKENS} are needed",
            hint="give a text of a few hundred words or more",
        )
    prefix = [] if bos_id is None else [bos_id]
    size = max(1, min(CALIBRATION_WINDOW, config.max_positions) - len(prefix))
    return [prefix + ids[i : i + size] for i in range(0, len(ids), size)]


def _calibration_batch(windows: list[list[int]]) -> tuple[Batch, list[int]]:
    """All windows as one step over a small vocabulary: token k of the batch is token seen[k] of the model."""
    seen = sorted({token for window in windows for token in window})
    index = {token: k for k, token in enumerate(seen)}
    entries = (BatchEntry(i, 0, tuple(index[t] for t in w), "none") for i, w in enumerate(windows))
    return Batch(tuple(entries)), seen


def _keep_rows(blocks: Iterator[F16], rows: list[int], kept: F16) -> Iterator[F16]:
    """Pass blocks of consecutive rows through; row rows[k] is copied to kept[k]."""
    first = 0
    for block in blocks:
        for k in range(bisect_left(rows, first), bisect_left(rows, first + block.shape[0])):
            kept[k] = block[rows[k] - first]
        first += block.shape[0]
        yield block


def _convert_layer(
    source: Source, config: ModelConfig, i: int, maker: MatrixMaker
) -> tuple[LayerTensors, dict[str, I8]]:
    """Fold, rotate and quantise the matrices of one layer; v_scale is still 1, k_center still 0."""
    at = f"layers.{i}."
    made = {"qkv": maker.qkv(i), "o": maker.o(i), "gate_up": maker.gate_up(i), "down": maker.down(i)}
    bias: F32 | None = None
    if config.qkv_bias:
        parts = [source.tensor(at + "q_bias"), source.tensor(at + "k_bias"), maker.v_bias(i)]
        bias = _snap(np.concatenate(parts))
    layer = LayerTensors(
        qkv_scale=made["qkv"][1],
        o_scale=made["o"][1],
        gate_up_scale=made["gate_up"][1],
        down_scale=made["down"][1],
        v_scale=np.ones(config.num_kv_heads, np.float32),
        qkv_bias=bias,
        k_center=np.zeros((config.num_kv_heads, config.head_dim), np.float32) if config.k_center else None,
        q_norm=_snap(source.tensor(at + "q_norm")) if config.qk_norm else None,
        k_norm=_snap(source.tensor(at + "k_norm")) if config.qk_norm else None,
    )
    return layer, {at + name: matrix for name, (matrix, _) in made.items()}


def _snap(x: F32) -> F32:
    """Values below the floor of stored tables become 0."""
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
