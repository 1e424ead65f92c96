"""The kernels under the names and with the bits of `veriattn.spec.reference` and `veriattn.spec.field`.

Arrays must have the dtype given and be C-contiguous: nothing is converted or copied behind the caller's back. The
extension checks type, shape and alignment of every argument; what it refuses is a bug on our side (InternalError).
Calls release the GIL and use up to `get_threads()` threads; results do not depend on how many, nor on the
instruction set. Field elements given as arguments must be below `veriattn.spec.field.P`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from mmap import mmap
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from veriattn.errors import ConfigError, InternalError, NumericsError
from veriattn.native import _native
from veriattn.native.layers import LocalLayer
from veriattn.spec.constants import query_scale_constant
from veriattn.spec.field import U8, U64
from veriattn.spec.model import LayerTensors, ModelConfig
from veriattn.spec.reference import F32, I8, I32, I64

#: Python 3.11 has no name for what supports the buffer protocol.
WritableBuffer = memoryview | bytearray | npt.NDArray[np.generic] | mmap

#: What NumPy keeps of small arrays that were freed: so many of each size below the bound.
_NUMPY_CACHED_BYTES, _NUMPY_CACHED_ARRAYS = 1024, 7

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def _checked(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Turn what the extension refuses into our error."""

    @wraps(function)
    def call(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError, AttributeError) as e:
            raise InternalError(f"{function.__name__}: {e}") from e

    return call


def out_of_domain() -> NumericsError:
    """The error for an activation that the canonical function does not know."""
    return NumericsError(
        "an activation is not finite or is 2**40 or larger",
        hint="the model does not fit the canonical numerics; convert it again and look at its quality report",
    )


def _in_domain(ok: bool) -> None:
    if not ok:
        raise out_of_domain()


# --- linear -----------------------------------------------------------------------------------------------------


class PackedLinear:
    """Weights (out, in) in the layout that the active instruction set multiplies fastest."""

    __slots__ = ("_packed", "nbytes", "shape")

    def __init__(self, w_i8: I8) -> None:
        """Raises: InternalError unless w is int8 with at most 131071 columns."""
        try:
            self._packed = _native.PackedLinear(w_i8)
        except (TypeError, ValueError) as e:
            raise InternalError(f"PackedLinear: {e}") from e
        self.shape: tuple[int, int] = self._packed.shape
        self.nbytes: int = self._packed.nbytes


def pack(w_i8: I8) -> PackedLinear:
    """Weights prepared for `gemm_packed`."""
    return PackedLinear(w_i8)


@_checked
def gemm_packed(packed: PackedLinear, a_i8: I8) -> I32:
    """Exact a @ w.T. Shapes: a (tokens, in) -> (tokens, out). Bounds: in <= 131071, so |y| < 2**31."""
    y = np.empty((a_i8.shape[0], packed.shape[0]), np.int32)
    packed._packed.multiply(a_i8, y)
    return y


@_checked
def gemm_i8(a_i8: I8, w_i8: I8) -> I32:
    """See `spec.reference.gemm_i8`."""
    y = np.empty((a_i8.shape[0], w_i8.shape[0]), np.int32)
    _native.gemm_i8(a_i8, w_i8, y)
    return y


# --- elementwise --------------------------------------------------------------------------------------------------


@_checked
def quantise(x: F32) -> tuple[I8, F32]:
    """See `spec.reference.quantise`."""
    a, scale = np.empty(x.shape, np.int8), np.empty(x.shape[:-1], np.float32)
    n = x.shape[-1]
    _in_domain(_native.quantise(x.reshape(-1, n), a.reshape(-1, n), scale.reshape(-1)))
    return a, scale


@_checked
def norm_quantise(x: F32, eps: np.float32) -> tuple[I8, F32]:
    """See `spec.reference.norm_quantise`."""
    a, scale = np.empty(x.shape, np.int8), np.empty(x.shape[:1], np.float32)
    _in_domain(_native.norm_quantise(x, float(eps), a, scale))
    return a, scale


@_checked
def qkv_epilogue(
    y_i32: I32,
    a_scale: F32,
    w_scale: F32,
    bias: F32 | None,
    cos: F32,
    sin: F32,
    v_scale: F32,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    k_center: F32 | None = None,
    q_norm: F32 | None = None,
    k_norm: F32 | None = None,
    eps: np.float32 = np.float32(1.0),  # noqa: B008 - as in spec.reference
) -> tuple[I8, F32, I8, F32, I8]:
    """See `spec.reference.qkv_epilogue`."""
    tokens = y_i32.shape[0]
    q = np.empty((tokens, num_heads, head_dim), np.int8)
    k, v = np.empty((tokens, num_kv_heads, head_dim), np.int8), np.empty((tokens, num_kv_heads, head_dim), np.int8)
    q_scale, k_scale = np.empty((tokens, num_heads), np.float32), np.empty((tokens, num_kv_heads), np.float32)
    if q_norm is None or k_norm is None:
        q_norm = k_norm = None
    ok = _native.qkv_epilogue(
        y_i32, a_scale, w_scale, bias, cos, sin, v_scale, num_heads, num_kv_heads, head_dim, k_center, q_norm, k_norm,
        float(eps), float(query_scale_constant(head_dim)), q, q_scale, k, k_scale, v,
    )  # fmt: skip
    _in_domain(ok)
    return q, q_scale, k, k_scale, v


@_checked
def attention_epilogue(o_i64: I64, l_i32: I32, v_scale: F32) -> tuple[I8, F32]:
    """See `spec.reference.attention_epilogue`."""
    tokens, heads, d = o_i64.shape
    a, scale = np.empty((tokens, heads * d), np.int8), np.empty(tokens, np.float32)
    _in_domain(_native.attention_epilogue(o_i64, l_i32, v_scale, a, scale))
    return a, scale


@_checked
def mlp_epilogue(y_i32: I32, a_scale: F32, w_scale: F32) -> tuple[I8, F32]:
    """See `spec.reference.mlp_epilogue`."""
    tokens, n = y_i32.shape[0], y_i32.shape[1] // 2
    a, scale = np.empty((tokens, n), np.int8), np.empty(tokens, np.float32)
    _in_domain(_native.mlp_epilogue(y_i32, a_scale, w_scale, a, scale))
    return a, scale


@_checked
def residual_add(x: F32, y_i32: I32, a_scale: F32, w_scale: F32, bias: F32 | None = None) -> F32:
    """See `spec.reference.residual_add`."""
    out = np.empty(y_i32.shape, np.float32)
    _native.dequantise(x, y_i32, a_scale, w_scale, bias, out)
    return out


@_checked
def logits(y_i32: I32, a_scale: F32, w_scale: F32) -> F32:
    """See `spec.reference.logits`."""
    out = np.empty(y_i32.shape, np.float32)
    _native.dequantise(None, y_i32, a_scale, w_scale, None, out)
    return out


# --- whole layers (native.layers) -----------------------------------------------------------------------------------


def local_layer(
    config: ModelConfig, tensors: LayerTensors, weights: Sequence[PackedLinear]
) -> Callable[..., npt.NDArray[np.float32]]:
    """A layer as a function: `native.layers.LocalLayer.run`, with NumericsError outside the domain."""
    layer = LocalLayer(config, tensors, weights)

    def run(*args: Any) -> F32:
        out, ok = layer.run(*args)
        _in_domain(ok)
        return out

    return run


# --- attention over the paged cache (spec.kv) -----------------------------------------------------------------------


@_checked
def attention(
    q_i8: I8, q_scale: F32, k_pages: I8, k_scale_pages: F32, v_pages: I8, block_table: I32, start: int
) -> tuple[I64, I32]:
    """Causal attention of one run of queries at positions start, start + 1, ...; see `spec.reference.attention`.

    Shapes: q (tokens, heads, d), q_scale (tokens, heads), k_pages and v_pages (pages, kv_heads, 256, d),
    k_scale_pages (pages, kv_heads, 256), block_table at least ceil((start + tokens) / 256) page indices.
    Returns O (tokens, heads, d) int64 and L (tokens, heads) int32.
    """
    o, row_sum = np.empty(q_i8.shape, np.int64), np.empty(q_i8.shape[:2], np.int32)
    _native.attention(q_i8, q_scale, k_pages, k_scale_pages, v_pages, None, block_table, start, o, row_sum, None)
    return o, row_sum


@_checked
def attention_replay(
    q_i8: I8, q_scale: F32, k_pages: I8, k_scale_pages: F32, g_pages: U64, block_table: I32, start: int
) -> tuple[I32, U64]:
    """See `spec.field.attention_replay`. Scores stay in the cache of a core.

    Trust: q, k, g are the verifier's own. An O with O.w == P.g (mod p) in both repetitions is right but with
    probability p**-2 per wrong row.
    """
    row_sum, pg = np.empty(q_i8.shape[:2], np.int32), np.empty((*q_i8.shape[:2], 2), np.uint64)
    _native.attention(q_i8, q_scale, k_pages, k_scale_pages, None, g_pages, block_table, start, None, row_sum, pg)
    return row_sum, pg


@_checked
def attention_transfer(
    scores_i32: I32,
    q_i8: I8,
    q_scale: F32,
    k_i8: I8,
    c_u64: U64,
    r_u64: U64,
    k_scale_pages: F32,
    g_pages: U64,
    block_table: I32,
    start: int,
) -> tuple[U8, I32, U64]:
    """See `spec.field.attention_transfer`.

    Trust: scores are adversarial and may change while they are read: each is loaded once, and that value is both
    checked and used. L and P.g mean nothing where ok is 0. c is not changed; add the chunk with `key_projection`.
    """
    ok, row_sum = np.empty(q_i8.shape[:2], np.uint8), np.empty(q_i8.shape[:2], np.int32)
    pg = np.empty((*q_i8.shape[:2], 2), np.uint64)
    _native.attention_transfer(
        scores_i32, q_i8, q_scale, k_i8, c_u64, r_u64, k_scale_pages, g_pages, block_table, start, ok, row_sum, pg
    )
    return ok, row_sum, pg


@_checked
def attention_scores(q_i8: I8, k_pages: I8, block_table: I32, keys: int, kv_heads: range) -> I32:
    """See `spec.reference.attention_scores`."""
    out = np.empty((q_i8.shape[1], q_i8.shape[0], keys), np.int32)
    _native.share_scores(q_i8, k_pages, block_table, keys, out, 0, kv_heads.start, len(kv_heads))
    return out


@_checked
def attention_weights_paged(
    scores_i32: I32, q_scale: F32, k_scale_pages: F32, block_table: I32, start: int
) -> npt.NDArray[np.uint16]:
    """See `spec.reference.attention_weights_paged`."""
    p = np.empty(scores_i32.shape, np.uint16)
    _native.attention_weights(scores_i32, q_scale, k_scale_pages, block_table, start, p)
    return p


@_checked
def weighted_values(p_u16: npt.NDArray[np.uint16], v_pages: I8, block_table: I32) -> I64:
    """See `spec.reference.weighted_values`. Raises: InternalError where a weight is above 16384."""
    # Kernels multiply signed 16-bit numbers and count on P < 2**14 + 1 for their sums.
    if p_u16.size and int(p_u16.max()) > 16384:
        raise InternalError("attention weights above 16384")
    o = np.zeros((p_u16.shape[1], p_u16.shape[0], v_pages.shape[3]), np.int64)
    _native.share_outputs(p_u16, 0, p_u16.shape[2], v_pages, block_table, o)
    return o


# --- field ------------------------------------------------------------------------------------------------------------


@_checked
def linear_check(y_i32: I32, r_u64: U64, a_i8: I8, u_u64: U64, out: I32 | None = None) -> U8:
    """See `spec.field.linear_check`; with `out`, also copy y there.

    Trust: y is adversarial and may lie in shared memory: each word is loaded once, and that value is both checked and
    stored in `out`. The caller must go on with `out` then, never with y.
    Soundness: a wrong row is accepted with probability at most p**-2 < 2**-99.
    """
    ok = np.empty(y_i32.shape[0], np.uint8)
    _native.linear_check(y_i32, r_u64, a_i8, u_u64, out, ok)
    return ok


@_checked
def project_weights(w_i8: I8, r_u64: U64, u_u64: U64) -> None:
    """See `spec.field.project_weights`: u += r @ w mod p in place, w a chunk of rows."""
    _native.project_weights(w_i8, r_u64, u_u64)


@_checked
def value_projection(v_i8: I8, w_u64: U64) -> U64:
    """See `spec.field.value_projection`."""
    g = np.empty((*v_i8.shape[:2], 2), np.uint64)
    _native.value_projection(v_i8, w_u64, g)
    return g


@_checked
def project_outputs(o_i64: I64, w_u64: U64) -> tuple[U64, bool]:
    """See `spec.field.project_outputs`. Trust: O is adversarial; where the flag is false it must be rejected."""
    out = np.empty((*o_i64.shape[:2], 2), np.uint64)
    ok = _native.project_outputs(o_i64, w_u64, out)
    return out, ok


@_checked
def key_projection(k_i8: I8, r_u64: U64, start: int, c_u64: U64) -> None:
    """See `spec.field.key_projection`: adds to c in place."""
    _native.key_projection(k_i8, r_u64, start, c_u64)


# --- words shared with another process -------------------------------------------------------------------------------


def load_acquire_u64(buffer: WritableBuffer, byte_offset: int) -> int:
    """Atomic load of an aligned 8-byte word; later reads see what its writer wrote before. Raises: ValueError."""
    return _native.load_acquire_u64(buffer, byte_offset)


def store_release_u64(buffer: WritableBuffer, byte_offset: int, value: int) -> None:
    """Atomic store of an aligned 8-byte word, after all earlier writes. Raises: ValueError."""
    _native.store_release_u64(buffer, byte_offset, value)


@_checked
def ring_put(
    page: memoryview,
    base: int,
    data: memoryview,
    slot_bytes: int,
    pos: int,
    tail: int,
    headers: bytes,
    payloads: list[Any],
) -> tuple[int, int, int, bool]:
    """Messages into a shared ring (wire/ring.py), as many as there is room for, published together.

    pos: bytes since the start; tail: the reader's counter; headers: 32 bytes for each payload.
    Returns (pos, tail, messages written, whether the reader waits).
    """
    return _native.ring_put(page, base, data, slot_bytes, pos, tail, headers, payloads)


@_checked
def ring_take(
    page: memoryview,
    base: int,
    data: memoryview,
    slot_bytes: int,
    pos: int,
    head: int,
    headers: bytes,
    payloads: list[Any],
) -> tuple[int, int, int, bool]:
    """Messages out of a shared ring into private memory, as many as are complete and have the expected headers.

    Trust: the ring is adversarial. Its counter is loaded, checked and used as one value, and every byte is read once.
    Returns (pos, head, messages taken, whether the writer waits). What is not as expected stays where it is.
    """
    return _native.ring_take(page, base, data, slot_bytes, pos, head, headers, payloads)


@_checked
def copy_in(out: WritableBuffer, out_offset: int, source: WritableBuffer | bytes, offset: int, count: int) -> None:
    """out[out_offset:][:count] = source[offset:][:count], in bytes, with `get_threads()` threads where they are many.

    out: private; all of it is one message, whose size says whether it can stay in a cache. source: shared with another
    process, which may be changing it; nothing of it is read after the call. The two do not overlap.
    """
    _native.copy_in(out, out_offset, source, offset, count)


# --- the machine ----------------------------------------------------------------------------------------------------


@_checked
def peak_products(rounds: int) -> int:
    """Run the int8 multiplier of the active instruction set on registers; returns multiply-adds, 0 where there is none."""
    return _native.peak_products(rounds)


@_checked
def read_words(words: U64) -> int:
    """Read an array once, in order, with one thread; for the bandwidth of memory."""
    return _native.read_words(words)


def cpu_features() -> list[str]:
    """Features of CPU and operating system that kernels could use."""
    return _native.cpu_features()


def available_isas() -> list[str]:
    """Instruction sets that this machine can run, slowest first."""
    return _native.available_isas()


def active_isa() -> str:
    """The instruction set in use; the fastest available one unless `set_isa` chose another."""
    return _native.active_isa()


def set_isa(name: str) -> None:
    """Force an instruction set, for tests. Weights packed before keep their layout and may be refused afterwards.

    Raises: ConfigError where this machine cannot run it.
    """
    try:
        _native.set_isa(name)
    except ValueError as e:
        raise ConfigError(f"instruction set {name!r}: {e}", hint=f"available: {', '.join(available_isas())}") from e


def set_threads(n: int) -> None:
    """Threads that one call may use. Raises: ConfigError outside 1..256."""
    try:
        _native.set_threads(n)
    except (TypeError, ValueError) as e:
        raise ConfigError(str(e)) from e


def get_threads() -> int:
    """Threads that one call may use; by default the CPUs that this process may run on."""
    return _native.get_threads()


def wipe_free_memory() -> None:
    """Overwrite what this process no longer uses: scratch of the kernels, free pieces of the heap, the stack below.

    From the main thread, while no kernel runs. Where the C library is not glibc the heap is left as it is.
    """
    _native.wipe_free_memory()
    # NumPy keeps small arrays that were freed, some of each size, out of the allocator's sight. Only now: what is
    # allocated for them, and does not fill its place, comes from clean memory.
    small = [np.empty(size, np.uint8) for size in range(1, _NUMPY_CACHED_BYTES) for _ in range(_NUMPY_CACHED_ARRAYS)]
    _native.wipe_blocks(small)
