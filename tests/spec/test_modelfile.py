"""The model directory: what is written comes back, and every kind of damage is a ModelError."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tests.helpers import ARCHITECTURES, LocalModel, make_model, tiny_config, tiny_tensors

from veriattn.errors import EXIT_MODEL, ModelError
from veriattn.spec.model import ModelConfig
from veriattn.spec.modelfile import (
    ModelDirectory,
    ModelWriter,
    canonical_json,
    read_manifest,
    safetensors_header,
    validate_tensor,
)

SMALL = {"num_layers": 1, "vocab_size": 37, "max_positions": 8}
FILES = ["model.safetensors", "manifest.json", "tokenizer.json", "chat_template.jinja"]


def consume(path: Path, **options: Any) -> None:
    """Read all there is to a model, as a program that loads it does."""
    directory = ModelDirectory(path, **options)
    directory.tokenizer_json()
    directory.chat_template()
    for _ in directory.stream():
        pass


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "model"
    make_model(path, **SMALL)
    return path


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def refused(path: Path, match: str | None = None, **options: Any) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        consume(path, **options)
    assert caught.value.exit_code == EXIT_MODEL


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_comes_back(tmp_path: Path, architecture: str) -> None:
    changes = ARCHITECTURES[architecture]
    digest = make_model(tmp_path / "a", seed=3, **changes)
    assert make_model(tmp_path / "b", seed=3, **changes) == digest != make_model(tmp_path / "c", seed=4, **changes)
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in FILES)
    directory = ModelDirectory(tmp_path / "a", expected_digest=digest)
    config = tiny_config(**changes)
    assert directory.config == config and directory.manifest.digest == digest
    assert directory.manifest.eos_ids == (1, 3) and directory.manifest.bos_id == 0
    expected = tiny_tensors(config, 3)
    rows = dict.fromkeys(expected, 0)
    for name, first, chunk in directory.stream():
        assert first == rows[name] and np.array_equal(chunk, expected[name][first : first + len(chunk)])
        rows[name] += len(chunk)
    assert rows == {name: len(v) for name, v in expected.items()}
    # Others read the weights too.
    with safe_open(tmp_path / "a" / "model.safetensors", "np") as f:
        assert set(f.keys()) == set(expected)
        assert all(np.array_equal(f.get_tensor(n), v) for n, v in expected.items())


def test_large_tensors_come_in_pieces(tmp_path: Path) -> None:
    make_model(tmp_path / "m", vocab_size=70_000, hidden_size=64, num_layers=1, max_positions=8)
    pieces, read = [], []
    for name, first, chunk in ModelDirectory(tmp_path / "m").stream(on_bytes=read.append):
        if name == "lm_head.weight":
            pieces.append((first, len(chunk)))
    assert len(pieces) > 1 and pieces[1][0] == pieces[0][1] and sum(n for _, n in pieces) == 70_000
    header = len(safetensors_header(ModelDirectory(tmp_path / "m").config))
    assert sum(read) + header == (tmp_path / "m" / "model.safetensors").stat().st_size
    loaded = LocalModel.open(tmp_path / "m")
    config = tiny_config(vocab_size=70_000, hidden_size=64, num_layers=1, max_positions=8)
    assert loaded.run([5, 6]).tobytes() == LocalModel(config, tiny_tensors(config)).run([5, 6]).tobytes()


def test_the_untampered_model_is_good(model: Path) -> None:
    consume(model)
    consume(model, expected_digest=ModelDirectory(model).manifest.digest)


def test_another_digest_is_refused(model: Path) -> None:
    refused(model, "not the expected", expected_digest="0" * 64)


# --- damaged bytes ------------------------------------------------------------------------------------------------------


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), file=st.sampled_from(FILES))
def test_any_flipped_bit_is_found(pristine: Path, model: Path, data: st.DataObject, file: str) -> None:
    raw = (pristine / file).read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    damaged = bytearray(raw)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    (model / file).write_bytes(damaged)
    try:
        # Some bits of the manifest make another well-formed manifest: a model of another name.
        refused(model, expected_digest=ModelDirectory(pristine).manifest.digest)
    finally:
        (model / file).write_bytes(raw)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, -1])
def test_truncated_files(model: Path, file: str, cut: int) -> None:
    path = model / file
    raw = path.read_bytes()
    path.write_bytes(raw[:cut] if cut != 100 else raw[: len(raw) // 2])
    refused(model)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("extra", [b"\0", b" ", b"\n", b"x" * 5000])
def test_files_with_more_at_the_end(model: Path, file: str, extra: bytes) -> None:
    digest = ModelDirectory(model).manifest.digest
    with (model / file).open("ab") as f:
        f.write(extra)
    refused(model, expected_digest=digest)


@pytest.mark.parametrize("file", FILES)
def test_missing_files(model: Path, file: str) -> None:
    (model / file).unlink()
    refused(model)


@pytest.mark.parametrize("file", FILES)
def test_directories_in_place_of_files(model: Path, file: str) -> None:
    (model / file).unlink()
    (model / file).mkdir()
    refused(model)


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no model directory")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty")


def test_huge_manifests_are_not_read(model: Path) -> None:
    with (model / "manifest.json").open("r+b") as f:
        f.truncate(1 << 40)
    refused(model, "larger than")


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xed\xa0\x80"])
def test_text_that_is_not_utf8(tmp_path: Path, model: Path, text: bytes) -> None:
    edit(model, lambda m: m.update(tokenizer_sha256=sha256(text)))
    (model / "tokenizer.json").write_bytes(text)
    refused(model, "UTF-8")


# --- manifests that are well-formed and wrong -----------------------------------------------------------------------------


def sha256(raw: bytes) -> str:
    import hashlib

    return hashlib.sha256(raw).hexdigest()


def edit(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = model / "manifest.json"
    data = json.loads(path.read_bytes())
    change(data)
    path.write_bytes(canonical_json(data))


def setting(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set a dotted field; `...` removes it."""

    def change(data: dict[str, Any]) -> None:
        *parents, last = name.split("/")
        for p in parents:
            data = data[p]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return change


WRONG = [
    ("format", "other"), ("format", ...), ("spec_version", 2), ("spec_version", "1"),
    ("spec_version", 1.0), ("spec_version", True), ("spec_version", ...),
    ("config", ...), ("config", []), ("config/extra", 1), ("config/hidden_size", ...),
    ("config/hidden_size", 0), ("config/hidden_size", -64), ("config/hidden_size", 64.0), ("config/hidden_size", True),
    ("config/hidden_size", "64"), ("config/hidden_size", 2**31), ("config/hidden_size", 10**30),
    ("config/hidden_size", 131_072), ("config/hidden_size", 65), ("config/num_layers", 1025), ("config/num_layers", 2),
    ("config/num_kv_heads", 3), ("config/head_dim", 257), ("config/head_dim", 15), ("config/rotary_dim", 18),
    ("config/rotary_dim", 15), ("config/max_positions", 131_073), ("config/max_positions", 9),
    ("config/vocab_size", 2**31 - 1), ("config/intermediate_size", 131_071), ("config/rms_eps", 0.0),
    ("config/rms_eps", 1), ("config/rms_eps", 0.2), ("config/rms_eps", None), ("config/qkv_bias", 1),
    ("config/qkv_bias", True), ("config/qk_norm", True), ("config/k_center", True),
    ("tensors", []), ("tensors", {}), ("tensors/embed", ...), ("tensors/more", {}), ("tensors/embed", None),
    ("tensors/embed/dtype", "F32"), ("tensors/embed/dtype", "I8"), ("tensors/embed/shape", [64, 37]),
    ("tensors/embed/shape", [37]),
    ("tensors/embed/shape", [37.0, 64]), ("tensors/embed/sha256", "0" * 63), ("tensors/embed/sha256", "G" * 64),
    ("tensors/embed/sha256", 5), ("tensors/embed/sha256", ...), ("tensors/embed/sha256", "0" * 64),
    ("tensors/lm_head.weight/sha256", "0" * 64), ("tensors/rope.cos/sha256", "f" * 64),
    ("tokenizer_sha256", None), ("tokenizer_sha256", ...), ("tokenizer_sha256", "0" * 64),
    ("chat_template_sha256", "x"), ("chat_template_sha256", "0" * 64), ("chat_template_sha256", 3),
    ("generation", ...), ("generation", []), ("generation/bos_id", 37), ("generation/bos_id", -1),
    ("generation/bos_id", True), ("generation/eos_ids", 1), ("generation/eos_ids", [37]), ("generation/eos_ids", ["1"]),
    ("generation/eos_ids", ...), ("generation/add_bos", 0), ("generation/add_bos", ...),
    ("source", ...), ("source", "x"), ("source/sha256", 3), ("conversion", ...), ("extra", 1), ("", 1),
    ("generation/extra", 1), ("tensors/embed/extra", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{n}={str(v)[:20]}" for n, v in WRONG])
def test_wrong_manifests(model: Path, name: str, value: Any) -> None:
    edit(model, setting(name, value))
    refused(model)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"{",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"format":' * 50_000,
        b"NaN",
        b"1" * 5000,
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_manifests_that_are_not_objects(model: Path, raw: bytes) -> None:
    (model / "manifest.json").write_bytes(raw)
    refused(model)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'{"chat', b'{"format":"veriattn-model","chat'),
        (b",", b", "),
        (b"{", b"{\n"),
        (b'"format"', b'"\\u0066ormat"'),
        (b"1e-05", b"0.00001"),
    ],
)
def test_manifests_with_two_spellings(model: Path, old: bytes, new: bytes) -> None:
    """Equal as data, so nothing else is wrong with them."""
    raw = (model / "manifest.json").read_bytes()
    changed = raw.replace(old, new, 1)
    assert raw != changed and json.loads(raw) == json.loads(changed)
    (model / "manifest.json").write_bytes(changed)
    refused(model, "canonical")


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    make_model(tmp_path / "m", chat_template=None, **SMALL)
    assert ModelDirectory(tmp_path / "m").chat_template() is None
    consume(tmp_path / "m")


def test_sizes_are_checked_before_anything_is_allocated(model: Path) -> None:
    """A manifest that is consistent and describes terabytes: the file's header differs before any tensor is made."""
    config = tiny_config(vocab_size=2**31 - 1, hidden_size=131_071, intermediate_size=131_071, num_layers=1)
    data = json.loads((model / "manifest.json").read_bytes())
    data["config"] = config.to_json()
    data["tensors"] = {
        n: {"dtype": d, "shape": list(s), "sha256": "0" * 64} for n, (d, s) in config.tensor_specs().items()
    }
    (model / "manifest.json").write_bytes(canonical_json(data))
    assert read_manifest(model).config == config
    refused(model, "truncated")
    # Even with the right header the first chunk is not there to be read, and chunks are small.
    (model / "model.safetensors").write_bytes(safetensors_header(config))
    refused(model, "truncated")


# --- values out of bounds -------------------------------------------------------------------------------------------------


BAD_VALUES = [
    ("layers.0.qkv.weight", -128), ("lm_head.weight", -128), ("embed", np.nan), ("embed", np.inf),
    ("layers.0.o.scale", np.nan), ("layers.0.o.scale", np.inf), ("layers.0.o.scale", 0.0), ("layers.0.o.scale", -1.0),
    ("layers.0.o.scale", 2.0**-21), ("layers.0.down.scale", 2.0**21), ("lm_head.scale", 1e-40),
    ("layers.0.v_scale", 0.0), ("layers.0.v_scale", np.nan), ("rope.cos", 8.5), ("rope.sin", np.nan), ("rope.sin", 1e-12),
    ("layers.0.qkv.bias", np.nan), ("layers.0.qkv.bias", 2.0**21), ("layers.0.qkv.bias", 1e-40),
    ("layers.0.k_center", np.inf), ("layers.0.q_norm", 2.0**-31), ("layers.0.k_norm", -np.inf),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_values_out_of_bounds(tmp_path: Path, name: str, value: float) -> None:
    """Refused when written; and when read, even though every hash matches."""
    changes = {**SMALL, "qkv_bias": True, "qk_norm": True, "k_center": True}
    config = tiny_config(**changes)
    tensors = tiny_tensors(config)
    bad = tensors[name].copy()
    bad.flat[bad.size // 2] = value
    with pytest.raises(ModelError, match=name):
        make_model(tmp_path / "refused", tensors=tensors | {name: bad}, **changes)
    assert not (tmp_path / "refused" / "manifest.json").exists()
    path = tmp_path / "m"
    make_model(path, **changes)
    consume(path)
    raw = (path / "model.safetensors").read_bytes()
    at = raw.index(tensors[name].tobytes())
    (path / "model.safetensors").write_bytes(raw[:at] + bad.tobytes() + raw[at + bad.nbytes :])
    edit(path, setting(f"tensors/{name}/sha256", sha256(bad.tobytes())))
    refused(path, "bounds")


@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-30, -(2.0**-30), 8.0])
def test_tables_at_their_bounds(value: float) -> None:
    validate_tensor("rope.cos", np.array([value], np.float32))
    validate_tensor("layers.0.qkv.bias", np.array([value, 2.0**20], np.float32))


def test_scales_at_their_bounds() -> None:
    validate_tensor("layers.0.o.scale", np.array([2.0**-20, 2.0**20], np.float32))
    validate_tensor("layers.0.o.weight", np.array([-127, 127], np.int8))


# --- writing ------------------------------------------------------------------------------------------------------------


def finish(writer: ModelWriter) -> None:
    writer.finish(
        tokenizer_json="{}",
        chat_template=None,
        generation={"bos_id": None, "eos_ids": [], "add_bos": False},
        source={},
        conversion={},
    )


def test_a_writer_that_stops_leaves_no_model(tmp_path: Path, pristine: Path) -> None:
    path = Path(shutil.copytree(pristine, tmp_path / "m"))
    config = tiny_config(**SMALL)
    writer = ModelWriter(path, config)
    refused(path)
    tensors = tiny_tensors(config)
    names = list(tensors)
    writer.write(names[0], tensors[names[0]])
    with pytest.raises(ModelError, match="ended before"):
        finish(writer)
    refused(path)


@pytest.mark.parametrize("damage", ["order", "dtype", "rows", "columns"])
def test_a_writer_takes_only_what_belongs(tmp_path: Path, damage: str) -> None:
    config = tiny_config(**SMALL)
    writer = ModelWriter(tmp_path / "m", config)
    embed = tiny_tensors(config)["embed"]
    name, values = {
        "order": ("rope.cos", embed),
        "dtype": ("embed", embed.astype(np.float32)),
        "rows": ("embed", embed[1:]),
        "columns": ("embed", embed[:, 1:]),
    }[damage]
    with pytest.raises(ModelError):
        writer.write(name, values)


def test_configurations_go_through_json() -> None:
    for changes in ARCHITECTURES.values():
        config = tiny_config(**changes)
        assert ModelConfig.from_json(json.loads(canonical_json(config.to_json()))) == config
