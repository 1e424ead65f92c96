"""The floating-point strategies behind the benchmarks' `Runner`, so that float and exact stand in one table."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from veriattn.bench.runner import Counters, PeakMemory, Setup, StepTime, memory_bytes, token_ids
from veriattn.bench.shapes import TOKENIZER
from veriattn.bench.traffic import Bytes
from veriattn.convert.checkpoint import F32
from veriattn.convert.sources import open_source
from veriattn.errors import UsageError
from veriattn.floatmode.engine import FloatConfig, FloatModel, FloatSession, ModelOps, Strategy
from veriattn.floatmode.formats import WIRE
from veriattn.floatmode.link import HEADER_BYTES
from veriattn.floatmode.requests import ATTEND_BYTES, LINEAR_BYTES, LINEARS, VALUES_BYTES
from veriattn.floatmode.trusted import recording
from veriattn.spec.forward import Batch
from veriattn.spec.model import ModelConfig
from veriattn.verifier.tiling import Tiling


def write_random_checkpoint(path: Path, config: ModelConfig) -> None:
    """A Hugging Face directory of the shape, with random weights in float16 that keep activations near 1."""
    c, rng = config, np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    arch = "Qwen3" if c.qk_norm else "Llama"
    described = {
        "architectures": [f"{arch}ForCausalLM"], "model_type": arch.lower(), "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim, "intermediate_size": c.intermediate_size, "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_positions, "rms_norm_eps": c.rms_eps, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "hidden_act": "silu", "torch_dtype": "float16", "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(described), encoding="utf-8")

    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")

    def matrix(out: int, width: int) -> Any:
        return (rng.standard_normal((out, width), np.float32) / np.float32(np.sqrt(width))).astype(np.float16)

    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    tensors = {"model.embed_tokens.weight": matrix(c.vocab_size, c.hidden_size)}
    tensors["model.norm.weight"] = np.ones(c.hidden_size, np.float16)
    for i in range(c.num_layers):
        sizes = {
            "self_attn.q_proj": (q, c.hidden_size), "self_attn.k_proj": (kv, c.hidden_size),
            "self_attn.v_proj": (kv, c.hidden_size), "self_attn.o_proj": (c.hidden_size, q),
            "mlp.gate_proj": (c.intermediate_size, c.hidden_size), "mlp.up_proj": (c.intermediate_size, c.hidden_size),
            "mlp.down_proj": (c.hidden_size, c.intermediate_size),
        }  # fmt: skip
        for name, size in sizes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = matrix(*size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = np.ones(c.hidden_size, np.float16)
        for name in ("q_norm", "k_norm") if c.qk_norm else ():
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = np.ones(c.head_dim, np.float16)
    save_file(tensors, path / "model.safetensors")
    for file in path.iterdir():
        file.chmod(0o644)
    path.chmod(0o755)


class _Timed:
    """Operations with the time of attention, and when the product with the vocabulary began."""

    def __init__(self, inner: ModelOps) -> None:
        self._inner = inner
        self.layer = 0
        self.attention_s, self.head_began = 0.0, 0.0

    def reset(self) -> None:
        self._inner.reset()

    @property
    def length(self) -> int:
        return self._inner.length

    def advance(self, tokens: int) -> None:
        self._inner.advance(tokens)

    def linear(self, name: str, x: F32) -> F32:
        self._inner.layer = self.layer
        if name == "lm_head":
            self.head_began = time.perf_counter()
        return self._inner.linear(name, x)

    def attention(self, layer: int, q: F32, k: F32, v: F32) -> F32:
        began = time.perf_counter()
        out = self._inner.attention(layer, q, k, v)
        self.attention_s += time.perf_counter() - began
        return out


class FloatRunner:
    """One floating-point strategy, one sequence at a time, with a real prover process and every check computed.

    Residuals are computed and kept, not compared: a random model has no calibration, and a comparison costs nothing.
    Raises: UsageError (more than one sequence, an emulated link); ProverFault and below.
    """

    def __init__(self, strategy: Strategy, path: Path, setup: Setup) -> None:
        if setup.batch != 1 or setup.emulate_link is not None:
            raise UsageError("floating point is measured with one sequence at a time over the link as it is")
        self._name = strategy
        capacity = 1 << 30 if setup.prover_kv_tokens is None else setup.prover_kv_tokens
        ratio = 1.0 if setup.offload_ratio is None else setup.offload_ratio
        self._config = FloatConfig(strategy, kv_tokens=capacity, offload_ratio=ratio)
        self._memory = PeakMemory()
        self.residuals: dict[str, float] = {}
        model = FloatModel(open_source(path))
        self._session = FloatSession(model, self._config, recording(self.residuals))
        self._ops = _Timed(self._session.ops)
        self._paper = Bytes(0, 0)
        self._chunk = setup.prefill_chunk or 1024
        self._base = self._moved()

    @property
    def strategy(self) -> str:
        return f"{self._name}-float"

    def step(self, batch: Batch, following: Batch | None = None) -> StepTime:
        """See `Runner.step`. Nobody is told of a step beforehand. Each ends with the product with the vocabulary, for its last
        token."""
        if len(batch.entries) != 1:
            raise UsageError("floating point is measured with one sequence at a time")
        self._ops.attention_s = 0.0
        entry = batch.entries[0]
        self._paper += self._expected(entry.start, entry.num_tokens)
        began = time.perf_counter()
        self._session.model.forward(self._ops, entry.token_ids)
        ended = time.perf_counter()
        return StepTime(ended - began, self._ops.attention_s, ended - self._ops.head_began)

    def fill(self, seq_id: int, tokens: int) -> None:
        """See `Runner.fill`: by running the model, always."""
        while self._ops.length < tokens:
            count = min(self._chunk, tokens - self._ops.length)
            self._paper += self._expected(self._ops.length, count)
            self._session.model.forward(
                self._ops, token_ids(count, self._session.model.config.vocab_size, self._ops.length)
            )

    def free(self, seq_id: int) -> None:
        """See `Runner.free`."""
        self._ops.reset()
        if self._session.link is not None:
            self._paper += Bytes(HEADER_BYTES, 0)

    def _moved(self) -> Bytes:
        link = self._session.link
        return Bytes(0, 0) if link is None else Bytes(link.bytes_sent, link.bytes_received)

    def counters(self) -> Counters:
        """See `Runner.counters`."""
        link = self._session.link
        return Counters(
            self._moved() - self._base, self._paper, time.process_time(), 0.0 if link is None else link.wait_s
        )

    def _expected(self, start: int, tokens: int) -> Bytes:
        """Bytes of a step from shapes: requests in float32, claims in their format, a header on each frame."""
        if self._name == "full-tee":
            return Bytes(0, 0)
        c, s = self._session.model.config, self._config
        size, exp_size = WIRE[s.format].itemsize, WIRE[s.sent_exp_format].itemsize
        group, d, kv, n = c.num_heads // c.num_kv_heads, c.head_dim, c.num_kv_heads, start + tokens
        shapes = c.layer_shapes()
        to = from_ = 0
        for name in LINEARS:
            out, width = (c.vocab_size, c.hidden_size) if name == "lm_head" else shapes[name]
            rows, times = (1, 1) if name == "lm_head" else (tokens, c.num_layers)
            to += times * (HEADER_BYTES + LINEAR_BYTES + 4 * rows * width)
            from_ += times * (HEADER_BYTES + size * rows * out)
        near = min(n, s.kv_tokens)
        split = self._name == "veriattn" and tokens == 1 and n > s.kv_tokens
        far = int(s.offload_ratio * (n - s.kv_tokens)) if split else n - near
        operands = 4 * d * (tokens * group + 2 * tokens + 2 * far)
        layer_to = layer_from = 0
        if self._name == "tsdp":
            layer_to += (
                HEADER_BYTES + ATTEND_BYTES + kv * operands + HEADER_BYTES + VALUES_BYTES + 4 * kv * n * tokens * group
            )
            layer_from += 2 * HEADER_BYTES + size * kv * tokens * group * (n + d)
        elif not split or near + far > 0:
            tiling = Tiling(1, 1, pipeline=False) if split else Tiling.default(n, tokens)
            tile = tiling.tile_rows(tokens)
            for block in tiling.kv_blocks(kv):
                layer_to += HEADER_BYTES + ATTEND_BYTES + len(block) * operands
                for lo in range(0, tokens, tile):
                    rows, seen = (
                        (min(lo + tile, tokens) - lo) * group,
                        near + far if split else start + min(lo + tile, tokens),
                    )
                    layer_from += 2 * HEADER_BYTES + len(block) * rows * (4 + exp_size * seen)
                layer_from += HEADER_BYTES + size * len(block) * tokens * group * d
        return Bytes(to + c.num_layers * layer_to, from_ + c.num_layers * layer_from)

    def shares(self, trace: bool) -> dict[str, Any] | None:
        """There is no trace of this mode."""
        return None

    def peaks(self) -> tuple[int, int | None]:
        """See `Runner.peaks`."""
        pid = self._session.pid
        return self._memory.bytes, None if pid is None else memory_bytes(pid, "VmHWM")

    def device_bytes(self) -> int | None:
        """Not looked at in this mode."""
        return None

    def close(self) -> None:
        """End the session and the prover."""
        self._session.close()
        self._memory.close()
