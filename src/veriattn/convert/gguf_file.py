"""A bounded reader of GGUF files: every count and offset is checked against the size of the file before it is used."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from veriattn.convert.checkpoint import F32
from veriattn.errors import ModelError

Scalar = int | float | bool | str
Value = Scalar | list[Scalar]

_MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_HINT = "download the file again; it may be truncated"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's header; `shape` is row-major (GGUF stores the reverse), `offset` is absolute in the file."""

    qtype: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    row_bytes: int
    rows: int


class GgufFile:
    """Metadata and tensors of one GGUF file (version 2 or 3, little-endian, not split).

    Raises: ModelError for anything truncated, malformed or of a tensor type that `gguf` cannot dequantise.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._size = path.stat().st_size
            with path.open("rb") as file:
                self._header(file)
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error

    def _header(self, file: BinaryIO) -> None:
        if self._take(file, 4) != _MAGIC:
            raise ModelError(f"{self.path} is not a GGUF file (wrong magic)")
        version = self._int(file, "<I")
        if version & 0xFFFF == 0:
            raise ModelError(f"{self.path} is a big-endian GGUF, which is not supported")
        if version not in (2, 3):
            raise ModelError(f"{self.path} is GGUF version {version}; versions 2 and 3 are supported")
        num_tensors, num_keys = self._int(file, "<Q"), self._int(file, "<Q")
        self._fits(file, num_keys * _MIN_KEY_BYTES + num_tensors * _MIN_TENSOR_BYTES, "header")
        self.metadata: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self._string(file)
            if key in self.metadata:
                raise ModelError(f"{self.path}: key {key} appears twice", hint=_HINT)
            self.metadata[key] = self._value(file, self._int(file, "<I"))
        headers: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self._string(file)
            num_dims = self._int(file, "<I")
            if not 1 <= num_dims <= _MAX_DIMS:
                raise ModelError(f"{self.path}: tensor {name} has {num_dims} dimensions", hint=_HINT)
            dims = [self._int(file, "<Q") for _ in range(num_dims)]
            if name in headers:
                raise ModelError(f"{self.path}: tensor {name} appears twice", hint=_HINT)
            headers[name] = (tuple(reversed(dims)), self._int(file, "<I"), self._int(file, "<Q"))
        alignment = self.metadata.get("general.alignment", 32)
        if (
            isinstance(alignment, bool)
            or not isinstance(alignment, int)
            or alignment < 1
            or alignment & (alignment - 1)
        ):
            raise ModelError(f"{self.path}: alignment {alignment!r} is not a power of two", hint=_HINT)
        data_start = -(-file.tell() // alignment) * alignment
        self.tensors = {
            name: self._tensor(name, shape, type_id, data_start + offset)
            for name, (shape, type_id, offset) in headers.items()
        }

    def _tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GgufTensor:
        try:
            qtype = GGMLQuantizationType(type_id)
        except ValueError as error:
            raise ModelError(f"{self.path}: tensor {name} has the unknown type number {type_id}") from error
        block, block_bytes = GGML_QUANT_SIZES[qtype]
        if min(shape) <= 0 or shape[-1] % block:
            raise ModelError(f"{self.path}: tensor {name} of type {qtype.name} cannot have shape {shape}", hint=_HINT)
        rows = 1
        for dim in shape[:-1]:
            rows *= dim
        row_bytes = shape[-1] // block * block_bytes
        if offset + rows * row_bytes > self._size:
            raise ModelError(f"{self.path} ends before the data of tensor {name}", hint=_HINT)
        return GgufTensor(qtype, shape, offset, row_bytes, rows)

    def check_types(self) -> None:
        """Refuse by name the tensor types that cannot be dequantised."""
        for name, tensor in self.tensors.items():
            block_bytes = GGML_QUANT_SIZES[tensor.qtype][1]
            try:
                dequantize(np.zeros((1, block_bytes), np.uint8), tensor.qtype)
            except NotImplementedError as error:
                raise ModelError(
                    f"tensor {name} has type {tensor.qtype.name}, which cannot be dequantised",
                    hint="use a GGUF in F16, BF16, Q8_0 or another type that the gguf package dequantises",
                ) from error

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read_rows(self, name: str, start: int, stop: int) -> F32:
        """Rows [start, stop) of a tensor as float32 (stop - start, width); a vector is one row."""
        tensor = self.tensors[name]
        if not 0 <= start <= stop <= tensor.rows:
            raise ModelError(f"{self.path}: rows {start}:{stop} of tensor {name} do not exist")
        count = (stop - start) * tensor.row_bytes
        try:
            with self.path.open("rb") as file:
                file.seek(tensor.offset + start * tensor.row_bytes)
                raw = file.read(count)
        except OSError as error:
            raise ModelError(f"cannot read {self.path}: {error.strerror}") from error
        if len(raw) != count:
            raise ModelError(f"{self.path} ends before the data of tensor {name}", hint=_HINT)
        if start == stop:
            return np.empty((0, tensor.shape[-1]), np.float32)
        data = np.frombuffer(raw, np.uint8).reshape(stop - start, tensor.row_bytes)
        # Damaged scales overflow here; the caller's check for finite values names the tensor.
        with np.errstate(all="ignore"):
            values = dequantize(data, tensor.qtype)
        return np.ascontiguousarray(values, dtype=np.float32)

    def _fits(self, file: BinaryIO, count: int, what: str) -> None:
        if count > self._size - file.tell():
            raise ModelError(f"{self.path} is truncated or damaged: {what} is larger than the file", hint=_HINT)

    def _take(self, file: BinaryIO, count: int) -> bytes:
        data = file.read(count)
        if len(data) != count:
            raise ModelError(f"{self.path} is truncated", hint=_HINT)
        return data

    def _int(self, file: BinaryIO, code: str) -> int:
        return int(struct.unpack(code, self._take(file, struct.calcsize(code)))[0])

    def _string(self, file: BinaryIO) -> str:
        length = self._int(file, "<Q")
        self._fits(file, length, "a string")
        try:
            return self._take(file, length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path} holds a string that is not UTF-8", hint=_HINT) from error

    def _value(self, file: BinaryIO, type_id: int) -> Value:
        if type_id == _STRING:
            return self._string(file)
        if type_id in _SCALARS:
            code = _SCALARS[type_id]
            scalar: Scalar = struct.unpack(code, self._take(file, struct.calcsize(code)))[0]
            return scalar
        if type_id != _ARRAY:
            raise ModelError(f"{self.path}: metadata of unknown type {type_id}", hint=_HINT)
        item_type, count = self._int(file, "<I"), self._int(file, "<Q")
        if item_type == _STRING:
            self._fits(file, count * 8, "an array")
            return [self._string(file) for _ in range(count)]
        if item_type not in _SCALARS:
            raise ModelError(f"{self.path}: metadata array of unknown type {item_type}", hint=_HINT)
        code = _SCALARS[item_type]
        item_bytes = struct.calcsize(code)
        self._fits(file, count * item_bytes, "an array")
        data = self._take(file, count * item_bytes)
        return [item[0] for item in struct.iter_unpack(code, data)]
