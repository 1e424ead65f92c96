"""The attacker's copy of a public model: layer-0 tables of the vocabulary, and partial runs on guessed prefixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from veriattn.engine.strategies import TeeWeights
from veriattn.spec import reference
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry, finish_step, run_layer, start_step
from veriattn.spec.local import LocalOperations
from veriattn.spec.modelfile import ModelDirectory
from veriattn.spec.reference import F32, I8, I32, I64
from veriattn.verifier.own import read_matrices

Ids = npt.NDArray[np.int64]


class _Recorder:
    """Local operations that keep what attention was given, layer by layer."""

    def __init__(self, local: LocalOperations) -> None:
        self._local = local
        self.operands: dict[int, AttentionInput] = {}
        self.inputs: dict[str, I8] = {}
        self.products: dict[str, I32] = {}

    def linear(self, name: str, a_i8: I8) -> I32:
        self.inputs[name] = a_i8
        self.products[name] = self._local.linear(name, a_i8)
        return self.products[name]

    def attention(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        self.operands[layer] = x
        return self._local.attention(layer, batch, x)


class PublicModel:
    """Everything that an attacker can compute from the published model."""

    def __init__(self, path: Path, kernels: ModuleType) -> None:
        self._weights = TeeWeights(path)
        self._kernels = kernels
        self._tensors = self._weights.tensors
        self.config = self._tensors.config
        self._tokenizer = Tokenizer.from_str(self._weights.tokenizer_json)
        self._layer0: tuple[I8, I8] | None = None
        self._qkv0 = read_matrices(ModelDirectory(path), {"layers.0.qkv"})["layers.0.qkv"]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _local(self) -> LocalOperations:
        return LocalOperations(self.config, self._weights.packed.__getitem__, self._kernels)

    def _embedded(self) -> tuple[I8, F32]:
        x = self._tensors.embed_f16.astype(np.float32)
        a, scale = self._kernels.norm_quantise(x, self._tensors.eps)
        return a, scale

    def layer0_inputs(self) -> I8:
        """Input of the first linear for every token, (vocab, hidden)."""
        return self._tables()[0]

    def layer0_values(self) -> I8:
        """Cached values of layer 0 for every token, (vocab, kv_heads, d): no position enters them."""
        return self._tables()[1]

    def _tables(self) -> tuple[I8, I8]:
        if self._layer0 is None:
            a, scale = self._embedded()
            self._layer0 = (a, self._values_of(a, scale))
        return self._layer0

    def _values_of(self, a: I8, scale: F32) -> I8:
        c, layer = self.config, self._tensors.layers[0]
        first = (c.num_heads + c.num_kv_heads) * c.head_dim
        y = self._kernels.gemm_i8(a, np.ascontiguousarray(self._qkv0[first:]))
        bias = None if layer.qkv_bias is None else layer.qkv_bias[first:]
        v = reference.dequantise(y, layer.qkv_scale[first:], scale, bias).reshape(-1, c.num_kv_heads, c.head_dim)
        inverse = np.float32(1.0) / layer.v_scale
        values: I8 = np.clip(np.rint(np.clip(v * inverse[None, :, None], -127, 127)), -127, 127).astype(np.int8)
        return values

    def match_value_rows(self, matrix: I8) -> Ids:
        """For each row of v in a permuted qkv matrix, which dimension of its head it is, (kv_heads, d): rows match exactly."""
        c = self.config
        first = (c.num_heads + c.num_kv_heads) * c.head_dim
        order = np.zeros((c.num_kv_heads, c.head_dim), np.int64)
        for head in range(c.num_kv_heads):
            rows = slice(first + head * c.head_dim, first + (head + 1) * c.head_dim)
            public = {row.tobytes(): i for i, row in enumerate(self._qkv0[rows])}
            order[head] = [public.get(row.tobytes(), 0) for row in matrix[rows]]
        return order

    def _run(self, entries: tuple[BatchEntry, ...], local: LocalOperations, layers: int) -> tuple[_Recorder, F32]:
        ops = _Recorder(local)
        batch = Batch(entries)
        ctx, x = start_step(self._tensors, batch, ops, self._kernels)
        for i in range(layers):
            x = run_layer(ctx, i, self._tensors.layers[i], x)
        logits = finish_step(ctx, x) if layers == self.config.num_layers else x
        return ops, logits

    def cached_values(self, ids: Sequence[int], layer: int) -> I8:
        """What an unshielded cache holds of a prompt in one layer, (tokens, kv_heads, d)."""
        ops, _ = self._run((BatchEntry(0, 0, tuple(ids), "none"),), self._local(), layer + 1)
        return ops.operands[layer].v_i8

    def last_layer(self, ids: Sequence[int]) -> tuple[npt.NDArray[np.generic], ...]:
        """Keys, values, input and product of the last linear of the last layer for a prompt, a row per token each."""
        last = self.config.num_layers - 1
        ops, _ = self._run((BatchEntry(0, 0, tuple(ids), "none"),), self._local(), last + 1)
        x, down = ops.operands[last], f"layers.{last}.down"
        return tuple(a.reshape(len(ids), -1) for a in (x.k_i8, x.v_i8, ops.inputs[down], ops.products[down]))

    def candidates(self, known: Sequence[int], count: int) -> Ids:
        """The model's most likely next tokens after a prefix of at least one token."""
        _, logits = self._run((BatchEntry(0, 0, tuple(known), "last"),), self._local(), self.config.num_layers)
        best: Ids = np.argpartition(-logits[0], min(count, logits.shape[1]) - 1)[:count].astype(np.int64)
        return best

    def values_of_next(self, known: Sequence[int], candidates: Ids, layer: int) -> I8:
        """Cached values of one layer for every candidate as the next token, (candidates, kv_heads, d)."""
        if layer == 0:
            return self.layer0_values()[candidates]
        return self._next(known, candidates, layer, lambda ops: ops.operands[layer].v_i8)

    def inputs_of_next(self, known: Sequence[int], candidates: Ids, name: str) -> I8:
        """Input of one linear for every candidate as the next token, (candidates, in)."""
        if name == "layers.0.qkv":
            return self.layer0_inputs()[candidates]
        return self._next(known, candidates, int(name.split(".")[1]), lambda ops: ops.inputs[name])

    def _next(self, known: Sequence[int], candidates: Ids, layer: int, pick: Callable[[_Recorder], I8]) -> I8:
        parts, local, prefix = [], self._local(), tuple(known)
        for start in range(0, len(candidates), 512):
            some = candidates[start : start + 512]
            entries = tuple(BatchEntry(i, 0, (*prefix, int(t)), "none") for i, t in enumerate(some))
            ops, _ = self._run(entries, local, layer + 1)
            parts.append(pick(ops)[len(prefix) :: len(prefix) + 1])
            for entry in entries:
                local.free(entry.seq_id)
        return np.concatenate(parts)
