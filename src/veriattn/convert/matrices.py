"""The weight matrices of a source as int8 rows in the rotated basis, made in small pieces by several threads.

A piece is a few rows (or columns) that fit a cache. Pieces do not depend on each other, so neither their size nor the
number of threads changes a bit. Memory: one binary64 copy of the matrices that write the residual stream, else pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from veriattn.convert.checkpoint import Source
from veriattn.convert.quantise import quantise_rows
from veriattn.convert.rotation import F64, hadamard_normalised, rotate_residual, rotation_signs
from veriattn.spec.constants import largest_power_of_two_divisor
from veriattn.spec.model import ModelConfig
from veriattn.spec.reference import F32, I8

F16 = npt.NDArray[np.float16]

_PIECE_ELEMENTS = 1 << 16
_READ_ELEMENTS = 1 << 19
_STREAM_BYTES = 64 << 20


class MatrixMaker:
    """Folds, rotates and quantises matrices of `source`, which is read from several threads."""

    def __init__(self, source: Source, config: ModelConfig, pool: ThreadPoolExecutor) -> None:
        self._source = source
        self._config = config
        self._pool = pool
        self._signs = rotation_signs(config.hidden_size)

    def embedding(self) -> Iterator[F16]:
        """Rows of the rotated embedding in binary16, block after block."""
        hidden = self._config.hidden_size
        for start, stop in _ranges(0, self._config.vocab_size, _STREAM_BYTES // (2 * hidden)):
            out = np.empty((stop - start, hidden), np.float16)

            def piece(row: int, w: F64, first: int = start, out: F16 = out) -> None:
                with np.errstate(over="ignore"):  # An infinity is refused by name when it is written.
                    out[row - first : row - first + w.shape[0]] = w.astype(np.float32)

            self._reading("embed", None, start, stop, piece)
            yield out

    def lm_head(self, scale: F32) -> Iterator[I8]:
        """Rows of lm_head with the final norm folded in, block after block; their scales go into `scale` (vocab,)."""
        norm = self._vector("final_norm")
        hidden = self._config.hidden_size
        for start, stop in _ranges(0, self._config.vocab_size, _STREAM_BYTES // hidden):
            out = np.empty((stop - start, hidden), np.int8)
            self._reading("lm_head", norm, start, stop, _into(out, scale[start:stop], start))
            yield out

    def qkv(self, layer: int) -> tuple[I8, F32]:
        """q, k and v rows, attn_norm folded in; v's heads turned by the Hadamard that `o` undoes."""
        c, at = self._config, f"layers.{layer}."
        norm = self._vector(at + "attn_norm")
        out, scale = np.empty((c.qkv_size, c.hidden_size), np.int8), np.empty(c.qkv_size, np.float32)
        row = 0
        for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            size = heads * c.head_dim
            store = _into(out[row : row + size], scale[row : row + size], 0)
            turn = largest_power_of_two_divisor(c.head_dim) if name == "v" else 1
            self._reading(at + name, norm, 0, size, store, align=c.head_dim, turn=turn)
            row += size
        return out, scale

    def v_bias(self, layer: int) -> F32:
        """v's bias, turned like v's rows."""
        bias = self._vector(f"layers.{layer}.v_bias")
        return hadamard_normalised(bias[:, None], largest_power_of_two_divisor(self._config.head_dim))[:, 0].astype(
            np.float32
        )

    def o(self, layer: int) -> tuple[I8, F32]:
        """Rows of o: inputs turned by the Hadamard that v's rows carry, outputs rotated."""
        return self._writing(f"layers.{layer}.o", largest_power_of_two_divisor(self._config.head_dim), 1.0)

    def gate_up(self, layer: int) -> tuple[I8, F32]:
        """Rows of gate, then of up, mlp_norm folded in."""
        c, at = self._config, f"layers.{layer}."
        norm = self._vector(at + "mlp_norm")
        size = c.intermediate_size
        out, scale = np.empty((2 * size, c.hidden_size), np.int8), np.empty(2 * size, np.float32)
        for i, name in enumerate(("gate", "up")):
            store = _into(out[i * size : (i + 1) * size], scale[i * size : (i + 1) * size], 0)
            self._reading(at + name, norm, 0, size, store)
        return out, scale

    def down(self, layer: int) -> tuple[I8, F32]:
        """Rows of down behind the online Hadamard, outputs rotated."""
        block = largest_power_of_two_divisor(self._config.intermediate_size)
        # The online transform is unnormalised: its inverse is the transform over the block's size.
        return self._writing(f"layers.{layer}.down", block, 1.0 / float(np.sqrt(np.float64(block))))

    def _vector(self, name: str) -> F64:
        return self._source.tensor(name).astype(np.float64)

    def _reading(
        self,
        name: str,
        norm: F64 | None,
        first: int,
        last: int,
        store: Callable[[int, F64], None],
        *,
        align: int = 1,
        turn: int = 1,
    ) -> None:
        """Rows [first, last) of a matrix that reads the residual stream: norm folded in, input side rotated.

        `store(row, w)` gets each piece; pieces start at multiples of `align` rows, and `turn` > 1 is the size of a
        Hadamard along those rows.
        """
        width = self._config.hidden_size

        def job(bounds: tuple[int, int]) -> None:
            block = self._source.tensor_rows(name, *bounds)
            for a, b in _ranges(0, block.shape[0], _PIECE_ELEMENTS // width, align if turn > 1 else 1):
                x = np.empty((width, b - a))
                if norm is None:
                    x[...] = block[a:b].T
                else:
                    np.multiply(block[a:b].T, norm[:, None], out=x)
                w = np.ascontiguousarray(rotate_residual(x, self._signs).T)
                store(bounds[0] + a, hadamard_normalised(w, turn) if turn > 1 else w)

        self._each(job, _ranges(first, last, _READ_ELEMENTS // width, align))

    def _writing(self, name: str, turn: int, factor: float) -> tuple[I8, F32]:
        """A matrix that writes the residual stream: inputs through a Hadamard of size `turn`, output side rotated."""
        rows, width = self._config.linear_shapes()[name]
        w = np.empty((rows, width))
        out, scale = np.empty((rows, width), np.int8), np.empty(rows, np.float32)

        def inputs(bounds: tuple[int, int]) -> None:
            block = self._source.tensor_rows(name, *bounds)
            for a, b in _ranges(0, block.shape[0], _PIECE_ELEMENTS // width):
                x = hadamard_normalised(block[a:b].T.astype(np.float64, order="C"), turn)
                w[bounds[0] + a : bounds[0] + b] = (x * factor if factor != 1.0 else x).T

        def outputs(bounds: tuple[int, int]) -> None:
            columns = np.ascontiguousarray(w[:, slice(*bounds)])
            w[:, slice(*bounds)] = rotate_residual(columns, self._signs)

        def quantise(bounds: tuple[int, int]) -> None:
            a, b = bounds
            out[a:b], scale[a:b] = quantise_rows(w[a:b])

        self._each(inputs, _ranges(0, rows, _READ_ELEMENTS // width))
        self._each(outputs, _ranges(0, width, _PIECE_ELEMENTS // rows))
        self._each(quantise, _ranges(0, rows, _PIECE_ELEMENTS // width))
        return out, scale

    def _each(self, job: Callable[[tuple[int, int]], None], ranges: Iterator[tuple[int, int]]) -> None:
        for _ in self._pool.map(job, ranges):
            pass


def _ranges(start: int, stop: int, step: int, align: int = 1) -> Iterator[tuple[int, int]]:
    step = max(align, step // align * align)
    for a in range(start, stop, step):
        yield a, min(a + step, stop)


def _into(out: I8, scale: F32, first: int) -> Callable[[int, F64], None]:
    """Quantise each piece into rows of `out`, whose row 0 is row `first` of the matrix."""

    def store(row: int, w: F64) -> None:
        rows = slice(row - first, row - first + w.shape[0])
        out[rows], scale[rows] = quantise_rows(w)

    return store
