"""Build a model directory whole or not at all: convert beside the target, measure quality, then move it into place."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from veriattn.convert.converter import Progress, convert
from veriattn.convert.quality import SAMPLE_WINDOW, Quality, measure
from veriattn.convert.sources import Source
from veriattn.errors import ModelError, UsageError
from veriattn.spec.modelfile import MANIFEST_FILE, QUALITY_FILE, ModelDirectory


@dataclass(frozen=True)
class BuildReport:
    """A finished model directory."""

    path: Path
    digest: str
    quality: Quality
    notes: tuple[str, ...]


def build_model(
    source: Source,
    out: Path,
    *,
    calibration_text: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    kernels: ModuleType,
    expected_digest: str | None = None,
    source_path: Path | None = None,
) -> BuildReport:
    """Convert `source` into directory `out`, replacing a model that is there.

    A run that is killed leaves at most a hidden directory beside `out`, which the next run removes. quality.json keeps
    the figures of a small sample and `source_path`, where `eval` finds the float reference again; neither is in the
    digest.

    Raises: ModelError (unsupported source; a digest that is not `expected_digest`); UsageError (`out` holds something
    that is not a model).
    """
    check_target(out)
    tell = progress or (lambda _what, _done, _total: None)
    with _staging(out) as staged:
        report = convert(
            source, staged, calibration_text=calibration_text, threads=threads, progress=progress, kernels=kernels
        )
        if expected_digest is not None and report.digest != expected_digest:
            raise ModelError(
                f"the conversion gave model digest {report.digest}, the published one is {expected_digest}",
                hint="conversion gives the same bits everywhere: please report this, with what `veriattn doctor` prints",
            )
        directory = ModelDirectory(staged)
        quality = measure(directory, source, kernels, progress=lambda done, total: tell("quality", done, total))
        record = {
            "sample": "quality.txt of the package",
            "window": SAMPLE_WINDOW,
            "quality": quality.to_json(),
            "source_path": None if source_path is None else str(source_path.absolute()),
        }
        (staged / QUALITY_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return BuildReport(out, report.digest, quality, report.notes)


def check_target(out: Path) -> None:
    """Refuse to replace what is not a model. Raises: UsageError."""
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_FILE).is_file():
        raise UsageError(f"{out} exists and is not a model directory", hint="name a new directory")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} exists and is not a directory", hint="name a new directory")


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden directory beside `out` that takes its place if the block succeeds, and is removed if not."""
    out = out.absolute()
    name = f".{out.name}.{secrets.token_hex(8)}"
    staged, old = out.with_name(f"{name}.new"), out.with_name(f"{name}.old")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in [*out.parent.glob(f".{out.name}.*.new"), *out.parent.glob(f".{out.name}.*.old")]:
            with try_lock(left) as ours:
                if ours:
                    shutil.rmtree(left, ignore_errors=True)
        staged.mkdir()
        with try_lock(staged):
            yield staged
            if out.exists():
                os.rename(out, old)
            try:
                os.rename(staged, out)
            except OSError:
                if old.exists():
                    os.rename(old, out)
                raise
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error.strerror}", hint="is there room, may you write there?") from error
    finally:
        for left in (staged, old):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """A lock on an existing file or directory; False if another process holds it. A killed holder holds nothing."""
    fd = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(fd)
