"""What every float checkpoint looks like to the converter: one configuration, one set of tensor names, read in rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from veriattn.errors import ModelError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Arch = Literal["llama", "mistral", "qwen2", "qwen3", "phi3"]

ARCHITECTURES: tuple[Arch, ...] = ("llama", "mistral", "qwen2", "qwen3", "phi3")
# Far above every real model: bounds what a damaged configuration can make this process allocate.
MAX_LAYERS = 1024
MAX_SIZE = 1 << 24
MAX_HEAD_DIM = 4096
_FINITE_CHECK_ELEMENTS = 1 << 24
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rotary scaling: long wavelengths stretched by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        values = (self.factor, self.low_freq_factor, self.high_freq_factor)
        if not all(math.isfinite(value) and value > 0 for value in values) or self.original_max_positions <= 0:
            raise ModelError("llama3 rope scaling has a factor that is not positive")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ModelError("llama3 rope scaling needs high_freq_factor > low_freq_factor")

    def apply(self, inv_freq: F64) -> F64:
        wavelength = 2 * math.pi / inv_freq
        smooth = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * inv_freq / self.factor + smooth * inv_freq


@dataclass(frozen=True)
class FrequencyFactors:
    """Explicit divisors of the rotary frequencies, one per pair (`rope_freqs.weight` of a GGUF; linear scaling)."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.factors or not all(math.isfinite(value) and value > 0 for value in self.factors):
            raise ModelError("rope frequency factors must be positive and finite")

    def apply(self, inv_freq: F64) -> F64:
        if len(self.factors) != inv_freq.size:
            raise ModelError(f"{len(self.factors)} rope frequency factors for {inv_freq.size} rotary pairs")
        return inv_freq / np.array(self.factors, dtype=np.float64)


RopeScaling = Llama3Scaling | FrequencyFactors


def linear_scaling(factor: float, rotary_dim: int) -> FrequencyFactors:
    """Linear rope scaling: every frequency divided by `factor`."""
    if not 0 < rotary_dim <= MAX_HEAD_DIM:
        raise ModelError(f"rotary dimension {rotary_dim} is out of range")
    return FrequencyFactors((factor,) * (rotary_dim // 2))


@dataclass(frozen=True)
class SourceConfig:
    """Shape and constants of a decoder: RMSNorm, rotary attention with grouped keys and values, SwiGLU.

    `max_positions` is the context within which full causal attention is exact: where the checkpoint has a sliding
    window shorter than its context, the context is clamped to the window (`notes` says so).
    Attention scores are scaled by 1/sqrt(head_dim) in every supported architecture.
    """

    arch: Arch
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    rope_theta: float
    rotary_dim: int
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    sliding_window: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    name: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        for key in (*sizes, "vocab_size", "max_positions", "rotary_dim"):
            limit = {"num_layers": MAX_LAYERS, "head_dim": MAX_HEAD_DIM}.get(key, MAX_SIZE)
            if not 0 < getattr(self, key) <= limit:
                raise ModelError(f"model configuration: {key} is {getattr(self, key)}, must be from 1 to {limit}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{self.num_heads} attention heads do not divide among {self.num_kv_heads} KV heads")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ModelError(f"rotary dimension {self.rotary_dim} is odd or larger than head_dim {self.head_dim}")
        if not (math.isfinite(self.rms_eps) and 0 < self.rms_eps < 1):
            raise ModelError(f"rms_norm epsilon {self.rms_eps} is out of range")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 1):
            raise ModelError(f"rope theta {self.rope_theta} is out of range")
        for token_id in (*(() if self.bos_id is None else (self.bos_id,)), *self.eos_ids):
            if not 0 <= token_id < self.vocab_size:
                raise ModelError(f"special token id {token_id} is outside the vocabulary of {self.vocab_size}")
        self.inv_freq()

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def inv_freq(self) -> F64:
        """Rotary frequencies in radians per position, scaling applied: float64 (rotary_dim // 2,)."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim
        inv_freq = 1.0 / np.power(self.rope_theta, exponents)
        return inv_freq if self.rope_scaling is None else self.rope_scaling.apply(inv_freq)

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's float tensors by canonical name (without the `layers.{i}.` prefix)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,),
            "mlp_norm": (hidden,),
            "q": (self.q_size, hidden),
            "k": (self.kv_size, hidden),
            "v": (self.kv_size, hidden),
            "o": (hidden, self.q_size),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }
        if self.attention_bias:
            shapes |= {"q_bias": (self.q_size,), "k_bias": (self.kv_size,), "v_bias": (self.kv_size,)}
        if self.qk_norm:
            shapes |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all float tensors by canonical name; tied models list `lm_head` too."""
        shapes: dict[str, tuple[int, ...]] = {
            "embed": (self.vocab_size, self.hidden_size),
            "final_norm": (self.hidden_size,),
            "lm_head": (self.vocab_size, self.hidden_size),
        }
        layer = self.layer_shapes()
        for i in range(self.num_layers):
            shapes |= {f"layers.{i}.{key}": shape for key, shape in layer.items()}
        return shapes


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens by string and id; `eos_ids` holds every id that ends a generation.

    `add_bos` says whether plain text is to start with the BOS token. Encode with `add_special_tokens=False` and put
    `bos_id` in front where it is set, so that a chat template that writes BOS itself does not get two.
    """

    bos: str | None
    bos_id: int | None
    eos: str | None
    eos_ids: tuple[int, ...]
    add_bos: bool


class Source(Protocol):
    """A float checkpoint, opened and checked: names, shapes and types are all known to be right."""

    path: Path

    @property
    def config(self) -> SourceConfig: ...

    @property
    def special(self) -> SpecialTokens: ...

    def tensor(self, name: str) -> F32:
        """One tensor by canonical name, float32, (out, in) row-major, rotate-half order for q and k rows."""
        ...

    def tensor_rows(self, name: str, start: int, stop: int) -> F32:
        """Rows [start, stop) of one matrix."""
        ...

    def digest(self) -> str:
        """SHA-256 (hex) of the source files."""
        ...

    def tokenizer_json(self) -> str: ...

    def chat_template(self) -> str | None: ...


class TensorStore(Protocol):
    """Stored tensors by their own names; reads give float32 and fail with ModelError."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read_rows(self, name: str, start: int, stop: int) -> F32: ...


@dataclass(frozen=True)
class TensorView:
    """Where a canonical tensor lies in a store: rows [first_row, first_row + rows) of `stored`.

    `interleaved_head_dim` marks rows that llama.cpp permuted within each head of that size, rotary pairs adjacent.
    """

    stored: str
    shape: tuple[int, ...]
    first_row: int = 0
    interleaved_head_dim: int | None = None


class TensorTable:
    """Canonical tensors as views of a store. Construction checks every name and shape, so that nothing is left over.

    Raises: ModelError, naming the first missing, unexpected or wrongly shaped tensor.
    """

    def __init__(
        self,
        config: SourceConfig,
        store: TensorStore,
        views: Mapping[str, TensorView],
        ignored: Iterable[str] = (),
    ) -> None:
        self._store = store
        self._views = dict(views)
        stored = store.shapes()
        expected = config.tensor_shapes()
        if set(expected) != set(self._views):
            raise ModelError(f"no rule for the tensors {sorted(set(expected) ^ set(self._views))[:4]}")
        used: dict[str, list[TensorView]] = {}
        for name, view in self._views.items():
            if view.shape != expected[name]:
                raise ModelError(f"tensor {view.stored} has shape {view.shape}, expected {expected[name]} for {name}")
            if view.stored not in stored:
                raise ModelError(
                    f"tensor {view.stored} is missing from the checkpoint",
                    hint="the download may be incomplete, or the configuration belongs to another model",
                )
            if name == "lm_head" and view.stored == self._views["embed"].stored:
                continue
            used.setdefault(view.stored, []).append(view)
        for stored_name, parts in used.items():
            rows = sum(view.shape[0] for view in parts)
            shape = (rows, *parts[0].shape[1:])
            if stored[stored_name] != shape:
                raise ModelError(
                    f"tensor {stored_name} has shape {stored[stored_name]}, the configuration asks for {shape}"
                )
        extra = sorted(set(stored) - set(used) - set(ignored))
        if extra:
            raise ModelError(
                f"the checkpoint has {len(extra)} tensors that this architecture does not use, first {extra[0]}",
                hint="the model may be a variant that is not supported (biases, experts, attention sinks, adapters)",
            )

    def tensor(self, name: str) -> F32:
        view = self._view(name)
        if len(view.shape) == 1:
            # A fused vector would need element offsets; no supported architecture has one.
            return self._finite(name, self._store.read_rows(view.stored, 0, 1).reshape(view.shape))
        return self.tensor_rows(name, 0, view.shape[0])

    def tensor_rows(self, name: str, start: int, stop: int) -> F32:
        view = self._view(name)
        if len(view.shape) != 2 or not 0 <= start <= stop <= view.shape[0]:
            raise ModelError(f"rows {start}:{stop} of {name} with shape {view.shape} do not exist")
        if view.interleaved_head_dim is None:
            rows = self._store.read_rows(view.stored, view.first_row + start, view.first_row + stop)
            return self._finite(name, rows)
        head_dim = view.interleaved_head_dim
        first, last = start // head_dim, -(-stop // head_dim)
        rows = self._store.read_rows(view.stored, view.first_row + first * head_dim, view.first_row + last * head_dim)
        rows = to_rotate_half(rows, head_dim)[start - first * head_dim : stop - first * head_dim]
        return self._finite(name, np.ascontiguousarray(rows))

    def _view(self, name: str) -> TensorView:
        if name not in self._views:
            raise ModelError(f"the model has no tensor {name}")
        return self._views[name]

    @staticmethod
    def _finite(name: str, values: F32) -> F32:
        flat = values.reshape(-1)
        for start in range(0, flat.size, _FINITE_CHECK_ELEMENTS):
            if not np.isfinite(flat[start : start + _FINITE_CHECK_ELEMENTS]).all():
                raise ModelError(f"tensor {name} contains NaN or infinity", hint="the checkpoint is damaged")
        return values


def to_rotate_half(rows: F32, head_dim: int) -> F32:
    """Undo llama.cpp's permutation of q and k rows, (heads * head_dim, in): pairs (2j, 2j+1) become (j, j + d/2)."""
    width = rows.shape[1]
    heads = rows.reshape(-1, head_dim // 2, 2, width)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(-1, width)


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file, read in blocks."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(HASH_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def clamp_to_window(max_positions: int, window: int | None) -> tuple[int, tuple[str, ...]]:
    """Context within which a sliding window hides nothing, and the note that says so."""
    if window is None or window >= max_positions:
        return max_positions, ()
    if window <= 0:
        raise ModelError(f"sliding window {window} is not positive")
    note = f"context clamped from {max_positions} to the sliding window of {window} positions"
    return window, (note,)
