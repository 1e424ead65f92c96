"""Hugging Face directories: the same tensors come out that went in, and everything unsupported is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veriattn.convert.sources import Llama3Scaling, open_source
from veriattn.errors import EXIT_MODEL, ModelError

ARCHS = ["llama", "mistral", "qwen2", "qwen3", "phi3"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("shards", "tied"), [(1, False), (3, True)])
def test_tensors_come_back(make_hf: Any, make_tiny: Any, tmp_path: Path, arch: str, shards: int, tied: bool) -> None:
    files = make_hf(arch, tied=tied)
    files.shards = shards
    source = open_source(files.write(tmp_path))
    expected = make_tiny(arch, tied=tied).tensors
    if tied:
        expected["lm_head"] = expected["embed"]
    assert set(source.config.tensor_shapes()) == set(expected)
    for name, values in expected.items():
        got = source.tensor(name)
        assert got.dtype == np.float32 and got.flags.c_contiguous
        np.testing.assert_array_equal(got, values)
        if values.ndim == 2:
            np.testing.assert_array_equal(source.tensor_rows(name, 3, 20), values[3:20])
    assert source.config.tie_embeddings is tied
    assert source.config.arch == arch


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision(make_hf: Any, make_tiny: Any, tmp_path: Path, dtype: str) -> None:
    files = make_hf("llama")
    files.dtype = dtype
    source = open_source(files.write(tmp_path))
    for name, values in make_tiny("llama").tensors.items():
        if dtype == "F16":
            expected = values.astype(np.float16).astype(np.float32)
        else:
            expected = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        np.testing.assert_array_equal(source.tensor(name), expected)


def test_tokens_template_and_digest(make_hf: Any, tmp_path: Path) -> None:
    directory = make_hf("llama").write(tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    source = open_source(directory)
    assert source.special.bos == "<|im_start|>" and source.special.bos_id == 1
    assert source.special.eos == "<|im_end|>" and source.special.eos_ids == (0, 2)
    assert source.config.eos_ids == (0, 2) and source.config.bos_id == 1
    assert source.special.add_bos is False
    assert source.chat_template() == "{{ messages[0].content }}"
    assert source.tokenizer_json() == (directory / "tokenizer.json").read_text()
    names = sorted(path.name for path in directory.iterdir())
    lines = [f"{hashlib.sha256((directory / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    assert source.digest() == hashlib.sha256("".join(lines).encode()).hexdigest()
    (directory / "chat_template.jinja").write_text("newer")
    reopened = open_source(directory)
    assert reopened.chat_template() == "newer"
    assert reopened.digest() != source.digest()


def test_bos_is_added_where_the_tokenizer_adds_it(make_hf: Any, tmp_path: Path) -> None:
    files = make_hf("llama")
    files.tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    assert open_source(files.write(tmp_path)).special.add_bos is True


def test_named_chat_templates(make_hf: Any, tmp_path: Path) -> None:
    files = make_hf("llama")
    files.tokenizer_config["chat_template"] = [
        {"name": "tool_use", "template": "t"},
        {"name": "default", "template": "d"},
    ]
    assert open_source(files.write(tmp_path)).chat_template() == "d"


def test_llama3_scaling_in_old_and_new_form(make_hf: Any, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old, new = make_hf("llama"), make_hf("llama")
    old.config |= {"rope_scaling": scaling, "rope_theta": 5e5}
    del new.config["rope_theta"]
    new.config |= {"rope_parameters": scaling | {"rope_theta": 5e5}}
    first, second = (open_source(f.write(tmp_path / n)).config for f, n in ((old, "old"), (new, "new")))
    assert first.rope_scaling == second.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 64)
    assert first.rope_theta == second.rope_theta == 5e5
    plain = open_source(make_hf("llama").write(tmp_path / "plain")).config
    assert first.inv_freq()[0] == 1.0
    assert first.inv_freq()[-1] == 5e5 ** (-30 / 32) / 8
    assert plain.inv_freq()[-1] == 10000.0 ** (-30 / 32)


def test_sliding_window_clamps_the_context(make_hf: Any, tmp_path: Path) -> None:
    files = make_hf("mistral")
    files.config["sliding_window"] = 50
    config = open_source(files.write(tmp_path / "a")).config
    assert config.max_positions == 50 and config.sliding_window == 50
    assert config.notes == ("context clamped from 128 to the sliding window of 50 positions",)
    unused = make_hf("qwen2")
    unused.config |= {"sliding_window": 50, "use_sliding_window": False}
    assert open_source(unused.write(tmp_path / "b")).config.max_positions == 128


def test_a_stored_copy_of_tied_embeddings_must_be_equal(make_hf: Any, tmp_path: Path) -> None:
    files = make_hf("llama", tied=True)
    copy = files.tensors["model.embed_tokens.weight"].copy()
    files.tensors["lm_head.weight"] = copy
    assert open_source(files.write(tmp_path / "same")).config.tie_embeddings
    copy[7, 7] += 1
    with pytest.raises(ModelError, match="ties the embeddings"):
        open_source(files.write(tmp_path / "other"))


CONFIG_ERRORS: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown class": ("llama", {"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
    "no class": ("llama", {"architectures": None}, "architecture None"),
    "contradicting type": ("llama", {"model_type": "granite"}, "granite"),
    "gptq": ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    "awq": ("llama", {"quantization_config": {"quant_method": "awq"}}, "awq"),
    "activation": ("llama", {"hidden_act": "gelu"}, "gelu"),
    "output bias": ("llama", {"attention_bias": True}, "attention_bias"),
    "mlp bias": ("llama", {"mlp_bias": True}, "mlp_bias"),
    "softcap": ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "final softcap": ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "experts": ("mistral", {"num_local_experts": 8}, "num_local_experts"),
    "layers without rope": ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    "yarn": ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    "longrope": ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "longrope"),
    "dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    "two thetas": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "two values"),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "negative partial rotary": ("phi3", {"partial_rotary_factor": -1.0}, "partial_rotary_factor"),
    "infinite theta": ("llama", {"rope_theta": float("inf")}, "theta"),
    "huge theta": ("llama", {"rope_theta": 10**400}, "rope_theta"),
    "layer type": ("qwen3", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    "no sizes": ("llama", {"hidden_size": None}, "hidden_size"),
    "size as text": ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers"),
    "size as bool": ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
    "zero heads": ("llama", {"num_attention_heads": 0, "head_dim": None}, "heads"),
    "a million layers": ("llama", {"num_hidden_layers": 10**6}, "num_layers"),
    "more layers than stored": ("llama", {"num_hidden_layers": 3}, "model.layers.2.* is missing"),
    "fewer layers than stored": ("llama", {"num_hidden_layers": 1}, "model.layers.1"),
    "other width": ("llama", {"intermediate_size": 95}, "shape"),
    "other heads": ("llama", {"num_key_value_heads": 4}, "shape"),
    "indivisible heads": ("llama", {"num_key_value_heads": 3}, "divide"),
    "missing head": ("llama", {"tie_word_embeddings": True}, "ties the embeddings"),
    "eos beyond the vocabulary": ("llama", {"eos_token_id": 265}, "special token id 265"),
    "vocabulary below the tokenizer": ("llama", {"vocab_size": 200}, "token id"),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_unsupported_configuration_is_named(make_hf: Any, tmp_path: Path, case: str) -> None:
    arch, changes, message = CONFIG_ERRORS[case]
    files = make_hf(arch)
    directory = files.write(tmp_path)
    open_source(directory)
    (directory / "config.json").write_text(json.dumps(files.config | changes))
    with pytest.raises(ModelError, match=message) as caught:
        open_source(directory)
    assert caught.value.exit_code == EXIT_MODEL


def _drop(name: str) -> Callable[[Any], None]:
    return lambda files: files.tensors.pop(name)


def _put(name: str, value: Any) -> Callable[[Any], None]:
    return lambda files: files.tensors.__setitem__(name, value)


FILE_ERRORS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "missing tensor": (_drop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight is missing"),
    "attention sinks": (_put("model.layers.0.self_attn.sinks", np.zeros(4)), "sinks"),
    "unexpected bias": (_put("model.layers.0.self_attn.o_proj.bias", np.zeros(64)), "o_proj.bias"),
    "wrong shape": (_put("model.norm.weight", np.zeros(63)), "model.norm.weight has shape"),
    "one dimension too many": (_put("model.norm.weight", np.zeros((64, 1))), "model.norm.weight has shape"),
    "float8": (lambda files: setattr(files, "dtype", "F8_E4M3"), "F8_E4M3"),
    "float64": (lambda files: setattr(files, "dtype", "F64"), "F64"),
    "tokenizer of garbage": (lambda files: setattr(files, "tokenizer", {"model": {"type": "X"}}), "tokenizer"),
    "unknown bos": (lambda files: files.tokenizer_config.update(bos_token="<zzz>"), "<zzz>"),
    "end token appended": (lambda files: files.tokenizer_config.update(add_eos_token=True), "end token"),
    "no default template": (
        lambda files: files.tokenizer_config.update(chat_template=[{"name": "rag", "template": ""}]),
        "default",
    ),
}


@pytest.mark.parametrize("case", FILE_ERRORS)
def test_bad_files_are_named(make_hf: Any, tmp_path: Path, case: str) -> None:
    change, message = FILE_ERRORS[case]
    files = make_hf("llama")
    change(files)
    with pytest.raises(ModelError, match=message):
        open_source(files.write(tmp_path)).chat_template()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_named(make_hf: Any, tmp_path: Path, value: float) -> None:
    files = make_hf("llama")
    files.tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    source = open_source(files.write(tmp_path))
    source.tensor("layers.0.up")
    source.tensor_rows("layers.1.up", 0, 5)
    for read in (lambda: source.tensor("layers.1.up"), lambda: source.tensor_rows("layers.1.up", 5, 6)):
        with pytest.raises(ModelError, match=r"layers\.1\.up contains NaN or infinity"):
            read()


def test_missing_pieces(make_hf: Any, tmp_path: Path) -> None:
    for missing, message in (
        ("config.json", "config.json"),
        ("tokenizer.json", "tokenizer.json"),
        ("model-00002-of-00003.safetensors", "shard"),
    ):
        files = make_hf("llama")
        files.shards = 3
        directory = files.write(tmp_path / missing)
        open_source(directory)
        (directory / missing).unlink()
        with pytest.raises(ModelError, match=message):
            open_source(directory)
    pickled = make_hf("llama").write(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        open_source(pickled)
    adapter = make_hf("llama").write(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        open_source(adapter)


def test_index_must_stay_in_its_directory(make_hf: Any, tmp_path: Path) -> None:
    files = make_hf("llama")
    files.shards = 2
    directory = files.write(tmp_path / "m")
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = next(iter(weight_map))
    for shard, message in (("../x.safetensors", "shard"), (weight_map[name], "disagree")):
        changed = weight_map | {name: shard}
        if message == "disagree":
            changed |= {"model.extra": shard}
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ModelError, match=message):
            open_source(directory)


def test_damaged_files_never_raise_anything_else(make_hf: Any, tmp_path: Path) -> None:
    directory = make_hf("llama", layers=1).write(tmp_path)
    weights = directory / "model.safetensors"
    original = weights.read_bytes()
    rng = np.random.default_rng(5)
    refused = 0
    for trial in range(120):
        damaged = bytearray(original)
        if trial % 2:
            damaged = damaged[: int(rng.integers(0, len(original)))]
        else:
            damaged[int(rng.integers(0, 2500))] ^= 1 << int(rng.integers(0, 8))
        weights.write_bytes(damaged)
        try:
            source = open_source(directory)
            for name in source.config.tensor_shapes():
                source.tensor(name)
        except ModelError:
            refused += 1
    # Every truncation is noticed; a flipped bit may also hit a value or a name of the metadata.
    assert refused >= 60
    for text in ("", "[]", "{", '{"a": 1, "a": 2}', "\xff", '{"hidden_size": ' + "9" * 5000 + "}"):
        (directory / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ModelError):
            open_source(directory)
