"""A canonical model's tensors on the device."""

from __future__ import annotations

from pathlib import Path

import torch
from veriattn.spec.model import ModelTensors
from veriattn.spec.modelfile import ModelDirectory, TensorCollector

_LAYER_TENSORS = (
    "qkv_scale", "o_scale", "gate_up_scale", "down_scale", "v_scale", "qkv_bias", "k_center", "q_norm", "k_norm"
)  # fmt: skip


class DeviceModel:
    """Weights as int8 (out, in), scales and tables as float32, embeddings as float16. Raises: ModelError."""

    def __init__(self, directory: Path, expected_digest: str, device: torch.device) -> None:
        model = ModelDirectory(directory, expected_digest=expected_digest)
        self.config = model.config
        collector, specs = TensorCollector(model.config), model.config.tensor_specs()
        self.weights: dict[str, torch.Tensor] = {}
        # An honest prover has no use for the hashes: the verifier checks what comes of the weights.
        for name, first, chunk in model.stream(verify=False):
            if collector.add(name, first, chunk):
                continue
            linear = name.removesuffix(".weight")
            if first == 0:
                self.weights[linear] = torch.empty(specs[name][1], dtype=torch.int8, device=device)
            self.weights[linear][first : first + chunk.shape[0]] = torch.from_numpy(chunk.copy())
        #: On the host, for the checks of a batch.
        self.tensors: ModelTensors = collector.tensors()
        t = self.tensors
        self.embed, self.cos, self.sin, self.lm_head_scale = (
            torch.from_numpy(x.copy()).to(device) for x in (t.embed_f16, t.rope_cos, t.rope_sin, t.lm_head_scale)
        )
        self.layers: list[dict[str, torch.Tensor]] = []
        for layer in t.layers:
            found = {name: getattr(layer, name) for name in _LAYER_TENSORS}
            self.layers.append({n: torch.from_numpy(x.copy()).to(device) for n, x in found.items() if x is not None})
        self.eps = float(t.eps)
