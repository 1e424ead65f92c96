"""A bounded reader of safetensors files, sharded or single, that turns F32, F16 and BF16 rows into float32."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from veriattn.convert.checkpoint import F32
from veriattn.errors import ModelError

_MAX_HEADER_BYTES = 100 << 20
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HINT = "download the file again; it may be truncated"
_DTYPE_HINT = "use a checkpoint in float32, float16 or bfloat16"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `offset` is absolute in the file `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: ModelError if it is missing, not JSON, not an object, or repeats a key."""
    try:
        return _object(path.read_bytes(), str(path))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _object(data: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ModelError(f"{where}: a JSON key appears twice")
        return result

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where} is not valid JSON", hint=_HINT) from error
    if not isinstance(value, dict):
        raise ModelError(f"{where} is not a JSON object")
    return value


class SafetensorsStore:
    """All tensors of a checkpoint directory: `model.safetensors`, or the shards that its index names.

    Raises: ModelError for missing shards, damaged headers and tensors of other types than F32, F16 and BF16.
    """

    def __init__(self, directory: Path) -> None:
        self.files: list[Path] = []
        self._tensors: dict[str, StoredTensor] = {}
        index = directory / _INDEX
        if index.exists():
            self._open_shards(directory, index)
        elif (directory / _SINGLE).exists():
            self._add(directory / _SINGLE)
        elif any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
            raise ModelError(
                f"{directory} has pickled weights only, which are not read", hint="use a safetensors checkpoint"
            )
        else:
            raise ModelError(f"{directory} has neither {_SINGLE} nor {_INDEX}")

    def _open_shards(self, directory: Path, index: Path) -> None:
        weight_map = load_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map")
        self.files.append(index)
        for name in sorted({str(value) for value in weight_map.values()}):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"{index} names {name!r}, which is not a shard in its own directory")
            if not (directory / name).exists():
                raise ModelError(f"shard {name} is missing", hint="the download is incomplete")
            self._add(directory / name)
        if set(weight_map) != set(self._tensors):
            odd = sorted(set(weight_map) ^ set(self._tensors))[0]
            raise ModelError(f"index and shards disagree about tensor {odd}")
        for name, shard in weight_map.items():
            if self._tensors[name].path.name != shard:
                raise ModelError(f"tensor {name} is not in the shard {shard} that the index names")

    def _add(self, path: Path) -> None:
        self.files.append(path)
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                prefix = file.read(8)
                if len(prefix) != 8:
                    raise ModelError(f"{path} is truncated", hint=_HINT)
                (length,) = struct.unpack("<Q", prefix)
                if length > min(size - 8, _MAX_HEADER_BYTES):
                    raise ModelError(f"{path} is truncated or not a safetensors file", hint=_HINT)
                header = _object(file.read(length), f"the header of {path}")
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error
        start = 8 + length
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in self._tensors:
                raise ModelError(f"tensor {name} is in two files")
            self._tensors[name] = _stored(path, name, entry, start, size)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read_rows(self, name: str, start: int, stop: int) -> F32:
        """Rows [start, stop) of a tensor as float32 (stop - start, width); a vector is one row."""
        tensor = self._tensors[name]
        shape = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
        if len(shape) != 2 or not 0 <= start <= stop <= shape[0]:
            raise ModelError(f"rows {start}:{stop} of tensor {name} with shape {tensor.shape} do not exist")
        item, width = _ITEM_BYTES[tensor.dtype], shape[1]
        count = (stop - start) * width * item
        try:
            with tensor.path.open("rb") as file:
                file.seek(tensor.offset + start * width * item)
                raw = file.read(count)
        except OSError as error:
            raise ModelError(f"cannot read {tensor.path}: {error.strerror}") from error
        if len(raw) != count:
            raise ModelError(f"{tensor.path} ends before the data of tensor {name}", hint=_HINT)
        return _to_f32(raw, tensor.dtype).reshape(stop - start, width)


def _stored(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise ModelError(f"{path}: header of tensor {name} is malformed", hint=_HINT)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in _ITEM_BYTES:
        raise ModelError(f"tensor {name} has type {dtype!r}, which is not supported", hint=_DTYPE_HINT)
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2:
        raise ModelError(f"{path}: header of tensor {name} is malformed", hint=_HINT)
    count = _ITEM_BYTES[dtype]
    for dim in shape:
        count *= dim
    if offsets[1] - offsets[0] != count or start + offsets[1] > size:
        raise ModelError(f"{path} ends before the data of tensor {name}, or its size is wrong", hint=_HINT)
    return StoredTensor(path, dtype, tuple(shape), start + offsets[0])


def _whole(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _to_f32(raw: bytes, dtype: str) -> F32:
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(raw, "<f4" if dtype == "F32" else "<f2").astype(np.float32)
