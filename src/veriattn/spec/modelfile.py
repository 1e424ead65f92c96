"""The model directory: manifest, layout of the weight file, and one streaming reader that hashes what it hands out.

Trust: the directory is untrusted until its digest is compared with a pinned one and every tensor's hash with the
manifest. Sizes and offsets follow from the configuration alone; the file must agree with them, never the reverse.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from veriattn.errors import ModelError
from veriattn.spec.constants import SCALE_MAX, SCALE_MIN, SPEC_VERSION, TABLE_FLOOR
from veriattn.spec.model import LayerTensors, ModelConfig, ModelTensors

FORMAT = "veriattn-model"
WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
QUALITY_FILE = "quality.json"

_DTYPES: dict[str, np.dtype[Any]] = {
    "I8": np.dtype(np.int8),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
_MANIFEST_FIELDS = {
    "format", "spec_version", "config", "tensors", "tokenizer_sha256", "chat_template_sha256", "generation", "source",
    "conversion",
}  # fmt: skip
_MAX_MANIFEST_BYTES = 16 << 20
_CHUNK_BYTES = 4 << 20
_DAMAGED = "fetch or convert the model again"

Array = np.ndarray[Any, Any]


def canonical_json(data: object) -> bytes:
    """Sorted keys, no spaces, ASCII: one byte string per value."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


@dataclass(frozen=True)
class Manifest:
    """What a model is; its digest is the model's name."""

    digest: str
    config: ModelConfig
    tensor_sha256: dict[str, str]
    tokenizer_sha256: str
    chat_template_sha256: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    source: dict[str, str] = field(default_factory=dict)


def _bounded_read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as f:
            data = f.read(limit + 1)
    except OSError as e:
        raise ModelError(
            f"cannot read {path}: {e.strerror}", hint="name a directory made by `veriattn convert` or `veriattn pull`"
        ) from None
    if len(data) > limit:
        raise ModelError(f"{path} is larger than {limit} bytes", hint=_DAMAGED)
    return data


def _expect(ok: bool, what: str) -> None:
    if not ok:
        raise ModelError(f"manifest: {what}", hint=_DAMAGED)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def read_manifest(directory: Path) -> Manifest:
    """Parse and check manifest.json. Raises: ModelError."""
    raw = _bounded_read(directory / MANIFEST_FILE, _MAX_MANIFEST_BYTES)
    try:
        data = json.loads(raw)
        canonical = canonical_json(data)
    except (ValueError, RecursionError):
        raise ModelError(f"{directory / MANIFEST_FILE} is not JSON", hint=_DAMAGED) from None
    _expect(isinstance(data, dict), "not an object")
    # One meaning per digest: no field given twice, nothing that another parser might read differently.
    _expect(raw == canonical, "not canonical JSON")
    _expect(data.get("format") == FORMAT, f"format is not {FORMAT!r}")
    version = data.get("spec_version")
    if type(version) is not int or version != SPEC_VERSION:
        raise ModelError(
            f"model is for spec version {version!r}, this program implements {SPEC_VERSION}",
            hint="convert the model again with this version of veriattn",
        )
    odd = sorted(set(data) ^ _MANIFEST_FIELDS)
    _expect(not odd, f"missing or unknown fields: {', '.join(odd)[:200]}")
    config = ModelConfig.from_json(data["config"])
    tensors = data.get("tensors")
    specs = config.tensor_specs()
    _expect(isinstance(tensors, dict) and set(tensors) == set(specs), "its tensors are not those of its configuration")
    for name, (dtype, shape) in specs.items():
        t = tensors[name]
        _expect(isinstance(t, dict) and _is_sha256(t.get("sha256")), f"hash of tensor {name}")
        # As text: in Python 1, 1.0 and true are equal.
        described = {"dtype": dtype, "shape": list(shape), "sha256": t["sha256"]}
        _expect(canonical_json(t) == canonical_json(described), f"tensor {name}")
    template = data.get("chat_template_sha256")
    _expect(_is_sha256(data.get("tokenizer_sha256")), "tokenizer_sha256")
    _expect(template is None or _is_sha256(template), "chat_template_sha256")
    generation = data.get("generation")
    _expect(isinstance(generation, dict) and set(generation) == {"bos_id", "eos_ids", "add_bos"}, "generation")
    bos, eos, add_bos = generation.get("bos_id"), generation.get("eos_ids"), generation.get("add_bos")

    def is_token(v: object) -> bool:
        return type(v) is int and 0 <= v < config.vocab_size

    _expect(bos is None or is_token(bos), "bos_id")
    _expect(isinstance(eos, list) and all(is_token(v) for v in eos), "eos_ids")
    _expect(type(add_bos) is bool, "add_bos")
    source = data.get("source")
    _expect(isinstance(source, dict) and all(isinstance(v, str) for v in source.values()), "source")
    return Manifest(
        digest=hashlib.sha256(raw).hexdigest(),
        config=config,
        tensor_sha256={name: tensors[name]["sha256"] for name in specs},
        tokenizer_sha256=data["tokenizer_sha256"],
        chat_template_sha256=template,
        bos_id=bos,
        eos_ids=tuple(eos),
        add_bos=add_bos,
        source=dict(source),
    )


def safetensors_header(config: ModelConfig) -> bytes:
    """The exact bytes before the first tensor: tensors in order of `tensor_specs`, back to back."""
    entries: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in config.tensor_specs().items():
        size = int(np.prod(shape, dtype=np.int64)) * _DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    body = json.dumps(entries, separators=(",", ":")).encode("ascii")
    body += b" " * (-len(body) % 64)
    return len(body).to_bytes(8, "little") + body


def validate_tensor(name: str, x: Array) -> None:
    """Check the bounds of docs/spec.md section 2. Raises: ModelError naming the tensor."""
    if x.dtype == np.int8:
        ok = not bool(np.any(x == -128))
    elif x.dtype == np.float16:
        ok = bool(np.all(np.isfinite(x)))
    elif name.endswith((".scale", ".v_scale")):
        ok = bool(np.all((x >= SCALE_MIN) & (x <= SCALE_MAX)))
    else:
        limit = np.float32(8.0) if name.startswith("rope.") else SCALE_MAX
        size = np.abs(x)
        ok = bool(np.all((size == 0) | ((size >= TABLE_FLOOR) & (size <= limit))))
    if not ok:
        raise ModelError(f"tensor {name} holds values outside the bounds of the canonical numerics", hint=_DAMAGED)


class ModelDirectory:
    """An opened canonical model. Raises: ModelError for anything missing, damaged or not of this format."""

    def __init__(self, path: str | os.PathLike[str], *, expected_digest: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ModelError(
                f"no model directory at {self.path}",
                hint="`veriattn pull smollm2` fetches the demo model; `veriattn convert` makes one from a checkpoint",
            )
        self.manifest = read_manifest(self.path)
        if expected_digest is not None and self.manifest.digest != expected_digest:
            raise ModelError(
                f"model digest {self.manifest.digest} is not the expected {expected_digest}",
                hint="this is another model, or another version of it",
            )
        self._check_size()

    def _check_size(self) -> None:
        """Nobody allocates what a manifest asks for before the weight file has that size."""
        path = self.path / WEIGHTS_FILE
        specs = self.config.tensor_specs().values()
        expected = sum(math.prod(shape) * _DTYPES[dtype].itemsize for dtype, shape in specs)
        expected += len(safetensors_header(self.config))
        try:
            status = path.stat()
        except OSError as e:
            raise ModelError(f"cannot read {path}: {e.strerror}", hint=_DAMAGED) from None
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is not a file", hint=_DAMAGED)
        if status.st_size != expected:
            what = "truncated" if status.st_size < expected else "longer than its header says"
            raise ModelError(f"{path} is {what}: {status.st_size} bytes, {expected} belong", hint=_DAMAGED)

    @property
    def config(self) -> ModelConfig:
        return self.manifest.config

    def tokenizer_json(self) -> str:
        """The tokenizer's text, checked against the manifest."""
        return self._pinned_text(TOKENIZER_FILE, self.manifest.tokenizer_sha256)

    def chat_template(self) -> str | None:
        """The chat template's text, checked against the manifest."""
        digest = self.manifest.chat_template_sha256
        return None if digest is None else self._pinned_text(CHAT_TEMPLATE_FILE, digest)

    def _pinned_text(self, name: str, sha256: str) -> str:
        raw = _bounded_read(self.path / name, 256 << 20)
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise ModelError(f"{self.path / name} does not match the manifest", hint=_DAMAGED)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{self.path / name} is not UTF-8", hint=_DAMAGED) from None

    def stream(
        self, *, verify: bool = True, on_bytes: Callable[[int], None] | None = None
    ) -> Iterator[tuple[str, int, Array]]:
        """Read the weight file once, in order, as (tensor name, first row, private rows).

        Chunks of a tensor are consecutive rows of about 4 MiB. With `verify`, each tensor's SHA-256 is taken over the
        very bytes handed out and compared after its last chunk, so a consumer that finishes the stream has used only
        checked bytes; one that stops early has not. Values are checked against their bounds either way.

        Raises: ModelError when the file is truncated, longer, or differs from the manifest.
        """
        path = self.path / WEIGHTS_FILE
        header = safetensors_header(self.config)
        try:
            with path.open("rb") as f:
                if f.read(len(header)) != header:
                    raise ModelError(f"{path}: header does not follow from the manifest", hint=_DAMAGED)
                for name, (dtype, shape) in self.config.tensor_specs().items():
                    yield from self._stream_tensor(f, name, _DTYPES[dtype], shape, verify, on_bytes)
                if f.read(1):
                    raise ModelError(f"{path} is longer than its header says", hint=_DAMAGED)
        except OSError as e:
            raise ModelError(f"cannot read {path}: {e.strerror}", hint=_DAMAGED) from None

    def _stream_tensor(
        self,
        f: BinaryIO,
        name: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        verify: bool,
        on_bytes: Callable[[int], None] | None,
    ) -> Iterator[tuple[str, int, Array]]:
        row_elements = int(np.prod(shape[1:], dtype=np.int64))
        rows_per_chunk = max(1, _CHUNK_BYTES // (row_elements * dtype.itemsize))
        digest = hashlib.sha256()
        for first in range(0, shape[0], rows_per_chunk):
            rows = min(rows_per_chunk, shape[0] - first)
            chunk = np.empty((rows, *shape[1:]), dtype)
            view = memoryview(chunk.data).cast("B")
            got = 0
            while got < len(view):
                n = f.readinto(view[got:])  # type: ignore[attr-defined]
                if not n:
                    raise ModelError(f"{self.path / WEIGHTS_FILE} is truncated in tensor {name}", hint=_DAMAGED)
                got += n
            if verify:
                digest.update(view)
            validate_tensor(name, chunk)
            yield name, first, chunk
            if on_bytes is not None:
                on_bytes(len(view))
        if verify and digest.hexdigest() != self.manifest.tensor_sha256[name]:
            raise ModelError(f"tensor {name} does not match the manifest", hint=_DAMAGED)


class TensorCollector:
    """Gathers from a stream what the forward pass itself reads (everything but weight matrices)."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._specs = config.tensor_specs()
        self._arrays: dict[str, Array] = {}

    def add(self, name: str, first: int, chunk: Array) -> bool:
        """Take a chunk; returns False for weight matrices, which the caller handles."""
        if name.endswith(".weight"):
            return False
        if name not in self._arrays:
            dtype, shape = self._specs[name]
            self._arrays[name] = np.empty(shape, _DTYPES[dtype])
        self._arrays[name][first : first + chunk.shape[0]] = chunk
        return True

    def tensors(self) -> ModelTensors:
        """What was collected, once every tensor has been seen."""
        a = self._arrays
        layers = tuple(
            LayerTensors(
                qkv_scale=a[f"layers.{i}.qkv.scale"],
                o_scale=a[f"layers.{i}.o.scale"],
                gate_up_scale=a[f"layers.{i}.gate_up.scale"],
                down_scale=a[f"layers.{i}.down.scale"],
                v_scale=a[f"layers.{i}.v_scale"],
                qkv_bias=a.get(f"layers.{i}.qkv.bias"),
                k_center=a.get(f"layers.{i}.k_center"),
                q_norm=a.get(f"layers.{i}.q_norm"),
                k_norm=a.get(f"layers.{i}.k_norm"),
            )
            for i in range(self._config.num_layers)
        )
        return ModelTensors(
            config=self._config,
            embed_f16=a["embed"],
            rope_cos=a["rope.cos"],
            rope_sin=a["rope.sin"],
            layers=layers,
            lm_head_scale=a["lm_head.scale"],
        )


class ModelWriter:
    """Writes a canonical model tensor by tensor in file order; the manifest comes last, so a killed run leaves no model."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._path = path
        self._config = config
        self._pending = list(config.tensor_specs().items())
        self._sha256: dict[str, str] = {}
        path.mkdir(parents=True, exist_ok=True)
        (path / MANIFEST_FILE).unlink(missing_ok=True)
        self._file = (path / WEIGHTS_FILE).open("wb")
        self._file.write(safetensors_header(config))

    def write(self, name: str, chunks: Iterator[Array] | Array) -> None:
        """Append the next tensor, whole or as consecutive rows. Raises: ModelError if it breaks a bound."""
        expected, (dtype, shape) = self._pending.pop(0)
        rows, digest = 0, hashlib.sha256()
        for chunk in [chunks] if isinstance(chunks, np.ndarray) else chunks:
            if name != expected or chunk.dtype != _DTYPES[dtype] or chunk.shape[1:] != shape[1:]:
                raise ModelError(f"conversion wrote {name} where {expected} {dtype} {shape} belongs")
            try:
                validate_tensor(name, chunk)
            except ModelError as error:
                raise ModelError(error.message, hint="the checkpoint is damaged, or int8 cannot hold it") from None
            raw = np.ascontiguousarray(chunk).tobytes()
            digest.update(raw)
            self._file.write(raw)
            rows += chunk.shape[0]
        if rows != shape[0]:
            raise ModelError(f"conversion wrote {rows} rows of {name}, {shape[0]} belong")
        self._sha256[name] = digest.hexdigest()

    def finish(
        self,
        *,
        tokenizer_json: str,
        chat_template: str | None,
        generation: dict[str, Any],
        source: dict[str, str],
        conversion: dict[str, Any],
    ) -> str:
        """Write the text files and the manifest. Returns the model digest."""
        if self._pending:
            raise ModelError(f"conversion ended before tensor {self._pending[0][0]}")
        self._file.close()
        (self._path / TOKENIZER_FILE).write_bytes(tokenizer_json.encode())
        template_sha256 = None
        if chat_template is not None:
            (self._path / CHAT_TEMPLATE_FILE).write_bytes(chat_template.encode())
            template_sha256 = hashlib.sha256(chat_template.encode()).hexdigest()
        specs = self._config.tensor_specs()
        manifest = canonical_json(
            {
                "format": FORMAT,
                "spec_version": SPEC_VERSION,
                "config": self._config.to_json(),
                "tensors": {
                    n: {"dtype": d, "shape": list(s), "sha256": self._sha256[n]} for n, (d, s) in specs.items()
                },
                "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
                "chat_template_sha256": template_sha256,
                "generation": generation,
                "source": source,
                "conversion": conversion,
            }
        )
        temporary = self._path / (MANIFEST_FILE + ".part")
        temporary.write_bytes(manifest)
        os.replace(temporary, self._path / MANIFEST_FILE)
        return hashlib.sha256(manifest).hexdigest()
