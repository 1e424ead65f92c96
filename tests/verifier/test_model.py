"""One hashed pass makes public tensors and independent key sets; whatever differs from the manifest makes none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import veriattn
from veriattn.errors import ModelError
from veriattn.spec.field import P
from veriattn.spec.modelfile import WEIGHTS_FILE, ModelDirectory, safetensors_header
from veriattn.verifier import model as model_module
from veriattn.verifier.keys import KeySet
from veriattn.verifier.model import VerifierModel


@pytest.fixture
def own_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[KeySet]:
    """Every key set that comes into being."""
    out: list[KeySet] = []

    class Recorded(KeySet):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            out.append(self)

    monkeypatch.setattr(model_module, "KeySet", Recorded)
    return out


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 1]))


def weights(path: Path) -> dict[str, np.ndarray]:
    chunks: dict[str, list[np.ndarray]] = {}
    for name, _, chunk in ModelDirectory(path).stream():
        chunks.setdefault(name, []).append(chunk)
    return {name: np.concatenate(parts) for name, parts in chunks.items()}


def test_u_is_the_weights_times_r(tiny_model: Path) -> None:
    model = VerifierModel(tiny_model)
    keys, tensors = model.take_keys(), weights(tiny_model)
    for name in model.tensors.config.linear_shapes():
        r, u = keys.linear(name)
        expected = (r.astype(object) @ tensors[f"{name}.weight"].astype(object)) % P
        assert np.array_equal(u, expected.astype(np.uint64)), name


def test_key_sets_are_independent_and_never_handed_out_twice(tiny_model: Path, made: list[KeySet]) -> None:
    model = VerifierModel(tiny_model)
    taken = [model.take_keys() for _ in range(5)]
    assert len({id(keys) for keys in taken}) == 5 and len(made) == 6
    for name in model.tensors.config.linear_shapes():
        for part in (0, 1):
            assert len({keys.linear(name)[part].tobytes() for keys in taken}) == 5
    assert len({keys.attention(0).tobytes() for keys in taken}) == 5
    spare = taken[1].linear("lm_head")[0].copy()
    taken[0].destroy()
    assert np.array_equal(taken[1].linear("lm_head")[0], spare), "the spare set shares memory with the burnt one"


def test_one_pass_serves_two_sessions(own_copy: Path) -> None:
    """A reject does not read the weights again: the spare works although the file is gone."""
    model = VerifierModel(own_copy)
    (own_copy / WEIGHTS_FILE).unlink()
    model.take_keys()
    model.take_keys()
    with pytest.raises(ModelError):
        model.take_keys()


def test_weights_that_change_between_passes_are_refused(own_copy: Path, made: list[KeySet]) -> None:
    model = VerifierModel(own_copy)
    flip_byte(own_copy / WEIGHTS_FILE, len(safetensors_header(model.tensors.config)) + 1)
    model.take_keys()
    model.take_keys()
    with pytest.raises(ModelError, match="embed"):
        model.take_keys()
    assert len(made) == 4 and not any(keys._alive for keys in made[2:])


def test_another_model_in_the_same_place_is_refused(own_copy: Path, make_model: Callable[..., Path]) -> None:
    model = VerifierModel(own_copy)
    shutil.rmtree(own_copy)
    shutil.copytree(make_model(9), own_copy)
    model.take_keys()
    model.take_keys()
    with pytest.raises(ModelError, match="digest"):
        model.take_keys()


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_makes_no_keys(own_copy: Path, made: list[KeySet], where: str) -> None:
    size = (own_copy / WEIGHTS_FILE).stat().st_size
    start = len(safetensors_header(ModelDirectory(own_copy).config))
    flip_byte(own_copy / WEIGHTS_FILE, {"first": start, "middle": size // 2, "last": size - 1}[where])
    with pytest.raises(ModelError):
        VerifierModel(own_copy)
    assert made and not any(keys._alive for keys in made)
    assert not any(a.any() for keys in made for a in keys.secret_arrays())


def test_sizes_are_looked_at_before_keys_are_drawn(own_copy: Path, made: list[KeySet]) -> None:
    """A manifest may ask for anything; nothing is drawn for it until the file has that size."""
    with (own_copy / WEIGHTS_FILE).open("ab") as f:
        f.write(b"\0")
    with pytest.raises(ModelError, match="longer"):
        VerifierModel(own_copy)
    os.truncate(own_copy / WEIGHTS_FILE, 1000)
    with pytest.raises(ModelError, match="truncated"):
        VerifierModel(own_copy)
    (own_copy / WEIGHTS_FILE).unlink()
    os.mkfifo(own_copy / WEIGHTS_FILE)
    with pytest.raises(ModelError, match="not a file"):
        VerifierModel(own_copy)
    assert made == []


def test_pinned_digest(tiny_model: Path) -> None:
    digest = ModelDirectory(tiny_model).manifest.digest
    assert VerifierModel(tiny_model, expected_digest=digest).digest == digest
    with pytest.raises(ModelError, match="digest"):
        VerifierModel(tiny_model, expected_digest="0" * 64)


def test_memory_is_counted(tiny_model: Path) -> None:
    model = VerifierModel(tiny_model)
    before = model.nbytes
    model.take_keys()
    assert 0 < model.nbytes < before


CLOSED = """
import ctypes, sys
from veriattn.verifier import keys
from veriattn.verifier.model import VerifierModel
libc, seen = ctypes.CDLL(None), []
draw = keys.random_field
keys.random_field = lambda *shape: seen.append(libc.prctl(3, 0, 0, 0, 0)) or draw(*shape)
before = libc.prctl(3, 0, 0, 0, 0)
VerifierModel(sys.argv[1])
print(before, sorted(set(seen)))
"""


def test_memory_is_closed_before_the_first_key_is_drawn(tiny_model: Path) -> None:
    """Also where no child is started, whose launch would close it: another process of this user may be waiting."""
    environment = {**os.environ, "PYTHONPATH": str(Path(veriattn.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", CLOSED, str(tiny_model)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split(maxsplit=1) == ["1", "[0]\n"]
