"""Canonical models against transformers itself: file in, integer model out, and the same rotary scaling."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch.nn")
transformers = pytest.importorskip("transformers")

from tests.convert.models import text_of  # noqa: E402
from tests.helpers import LocalModel, tiny_tokenizer_json  # noqa: E402

import torch  # noqa: E402
from veriattn.convert.checkpoint import Llama3Scaling  # noqa: E402
from veriattn.convert.converter import convert  # noqa: E402
from veriattn.convert.rope import inverse_frequencies, rotary_tables  # noqa: E402
from veriattn.convert.sources import open_source  # noqa: E402
from veriattn.spec import reference  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
BASE = {
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,
    "vocab_size": 307,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "sliding_window": None,
}
#: head_dim other than hidden / heads where the family allows it, 1 and 3 KV heads, odd vocabularies, tied and untied.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1kv-tied-llama3": (
        "Llama",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": LLAMA3, "vocab_size": 311},
    ),
    "llama-mha": ("Llama", {"num_key_value_heads": 6, "head_dim": 32}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {"hidden_size": 144}),
    "qwen2-1kv-tied": ("Qwen2", {"hidden_size": 144, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 40}),
    "qwen3-1kv-tied": ("Qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {"num_attention_heads": 3, "head_dim": 32}),
    "phi3-partial-rotary": (
        "Phi3",
        {"num_attention_heads": 3, "head_dim": 32, "num_key_value_heads": 1, "partial_rotary_factor": 0.75},
    ),
}


@pytest.fixture(params=CASES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LocalModel]:
    family, changes = CASES[request.param]
    config = getattr(transformers, f"{family}Config")(**(BASE | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(5)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
                parameter[::9] *= 3.0  # outlier channels
            elif name.endswith("bias"):
                parameter.normal_(0.0, 1.0)
            else:
                gain = 0.7 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                parameter.normal_(0.0, gain * parameter.shape[1] ** -0.5)
            if "embed" in name:
                parameter.mul_(2.0 if config.tie_word_embeddings else parameter.shape[1] ** 0.5)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    tokenizer = json.loads(tiny_tokenizer_json(config.vocab_size))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    convert(open_source(directory), directory / "canonical", calibration_text=text_of(600), kernels=reference)
    return model, LocalModel.open(directory / "canonical")


def log_softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    z = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def divergence(model: Any, canonical: LocalModel, shift: int = 0) -> tuple[float, float]:
    """KL of transformers' distribution from the canonical one, mean over positions, and the share of equal choices."""
    kl, agree, count = 0.0, 0, 0
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, canonical.config.vocab_size, 100)
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
        p, q = log_softmax(expected), log_softmax(canonical.run([int(t) for t in np.roll(ids, shift)], [37, 1, 62]))
        kl += float((np.exp(p) * (p - q)).sum())
        agree += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        count += len(ids)
    return kl / count, agree / count


def test_canonical_model_answers_like_transformers(pair: tuple[Any, LocalModel]) -> None:
    """A tolerance, for int8 is not float32; bits are pinned elsewhere. Measured: KL 0.0007 to 0.014, top-1 0.89 to 0.96."""
    kl, top1 = divergence(*pair)
    assert kl < 0.02
    assert top1 > 0.85


def test_the_comparison_notices_other_tokens(pair: tuple[Any, LocalModel]) -> None:
    kl, top1 = divergence(*pair, shift=1)
    assert kl > 0.2
    assert top1 < 0.7


@pytest.mark.parametrize(
    ("theta", "head_dim", "scaling"),
    [
        (10000.0, 64, None),
        (1000000.0, 128, None),
        (500000.0, 128, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        (500000.0, 64, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
    ],
)
def test_rotary_tables_match_transformers(theta: float, head_dim: int, scaling: Llama3Scaling | None) -> None:
    """transformers works in float32: frequencies agree to its precision, angles to that of position times frequency."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        parameters |= LLAMA3 | {"factor": scaling.factor, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=131072,
        rope_parameters=parameters,
    )  # fmt: skip
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    frequencies = inverse_frequencies(theta, head_dim, scaling)
    got = np.array([float(f) for f in frequencies])
    want = rotary.inv_freq.double().numpy()
    assert np.max(np.abs(got / want - 1)) < 2.0**-20
    assert np.max(np.abs(got / (want * 1.0001) - 1)) > 2.0**-20
    positions = 1000
    cos, sin = rotary_tables(frequencies, positions)
    theirs = rotary(torch.zeros(1, 1, head_dim), torch.arange(positions)[None])
    for ours, table in zip((cos, sin), theirs, strict=True):
        # Angles up to 1000 radians carry an error of 1000 * 2**-23 in float32.
        assert np.max(np.abs(ours - table[0, :, : head_dim // 2].numpy())) < 1000 * 2.0**-22
