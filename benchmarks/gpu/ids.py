"""Token ids of greedy answers by every flow on a device, beside those of the CPU backend, and the logits behind them.

`python -m benchmarks.gpu.ids MODEL DIRECTORY` shortens a model: its first four layers and 16,384 tokens, 42 MB of SmolLM2.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from veriattn.bench.kernels import Result
from veriattn.bench.report import line
from veriattn.bench.runner import KERNELS_VARIABLE, compiled_kernels, token_ids
from veriattn.bench.shapes import shape, write_random_model
from veriattn.errors import ConfigError
from veriattn.home import resolve_model
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.spec.modelfile import MANIFEST_FILE, ModelDirectory, ModelWriter
from veriattn.verifier.launch import ChildProver, Launcher, builtin_prover
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig

LAYERS, VOCABULARY = 4, 16_384
PROMPTS, ANSWER = (7, 300, 700), 32


def shorten(source: Path, target: Path, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> None:
    """The first layers and tokens of a canonical model, as a model. Raises: ModelError."""
    whole = ModelDirectory(source)
    config = dataclasses.replace(
        whole.config,
        num_layers=min(layers, whole.config.num_layers),
        vocab_size=min(vocabulary, whole.config.vocab_size),
    )
    kept: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in config.tensor_specs()}
    for name, _, rows in whole.stream():
        if name in kept:
            kept[name].append(rows)
    writer = ModelWriter(target, config)
    for name, (_, size) in config.tensor_specs().items():
        writer.write(name, np.concatenate(kept[name])[: size[0]])
    writer.finish(
        tokenizer_json=whole.tokenizer_json(),
        chat_template=None,
        generation={"bos_id": None, "eos_ids": [], "add_bos": False},
        source={"name": f"the first {config.num_layers} layers of {whole.manifest.digest}"},
        conversion={},
    )


def compare(device: str, model: Path | None, models: Path, progress: Callable[[str], None]) -> list[Result]:
    """Answers to three prompts in one batch. Raises: ConfigError at the first difference."""
    if model is None:
        path, name = models / f"smollm2-{LAYERS}", "random weights of SmolLM2's shape"
        if not (path / MANIFEST_FILE).exists():
            progress(f"no real model (--model DIR): {name}, {LAYERS} layers")
            write_random_model(path, shape("smollm2", LAYERS))
    else:
        manifest = ModelDirectory(model).manifest
        path, name = model, manifest.source.get("name", "a model")
        if manifest.config.num_layers > LAYERS:
            path = models / f"short-{manifest.digest[:12]}"
            if not (path / MANIFEST_FILE).exists():
                progress(f"shortening {model} to {LAYERS} layers")
                shorten(model, path)
    verifier = VerifierModel(path)
    progress("the CPU backend's ids")
    expected = list(_answers(verifier, Flow.RUN_AHEAD, "cpu"))
    for flow in Flow:
        progress(f"{flow.value} on {device}")
        for step, (ours, theirs) in enumerate(zip(_answers(verifier, flow, device), expected, strict=True)):
            if ours.tobytes() != theirs.tobytes():
                raise ConfigError(f"{flow.value} on {device}: logits of step {step} are not the CPU backend's")
    count = len(Flow) * len(PROMPTS) * ANSWER
    text = f"ids equal to the CPU backend's: {name}, {verifier.tensors.config.num_layers} layers"
    return [line("ids.equal", count, text, met=True)]


def _answers(model: VerifierModel, flow: Flow, device: str) -> Iterator[npt.NDArray[np.float32]]:
    """Logits of every step, each token the likeliest of the last."""
    vocabulary = model.tensors.config.vocab_size
    new = {i: token_ids(n, vocabulary, i) for i, n in enumerate(PROMPTS)}
    at = dict.fromkeys(new, 0)
    config = SessionConfig(max_tokens_per_step=sum(PROMPTS))
    with compiled_kernels() as compiled, Session(model, _launcher(device, compiled), config, flow) as session:
        for _ in range(ANSWER):
            logits = session.run(Batch(tuple(BatchEntry(i, at[i], ids) for i, ids in new.items())))
            yield logits
            for i, ids in new.items():
                at[i] += len(ids)
            new = {i: (int(np.argmax(row)),) for i, row in zip(new, logits, strict=True)}


def _launcher(device: str, compiled: Path) -> Launcher:
    return lambda m: ChildProver(m, builtin_prover(device), environment={KERNELS_VARIABLE: str(compiled)})


if __name__ == "__main__":
    shorten(resolve_model(sys.argv[1]), Path(sys.argv[2]))
