"""Small random canonical models, written once per test run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import veriattn
from veriattn.spec.model import ModelConfig
from veriattn.spec.modelfile import ModelWriter

#: Odd on purpose: head_dim is not hidden / heads, three query heads per KV head, a vocabulary that is no round number.
TINY = ModelConfig(
    hidden_size=40,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=12,
    intermediate_size=56,
    vocab_size=307,
    max_positions=2048,
    rotary_dim=8,
    rms_eps=1e-5,
)


def byte_tokenizer() -> str:
    """Every byte is a token, then one special token (id 256)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return str(tokenizer.to_str())


def write_model(path: Path, config: ModelConfig, seed: int = 0) -> Path:
    """Random weights under which activations stay in range and logits differ by much more than a rounding."""
    rng = np.random.default_rng(seed)
    writer = ModelWriter(path, config)
    positions, half = config.max_positions, config.rotary_dim // 2
    angle = np.arange(positions)[:, None] * 10000.0 ** (-np.arange(half) / half)[None, :]
    tables = {"rope.cos": np.cos(angle), "rope.sin": np.sin(angle)}
    for name, (dtype, shape) in config.tensor_specs().items():
        if dtype == "F16":
            x = rng.normal(0, 1, shape).astype(np.float16)
        elif dtype == "I8":
            x = rng.integers(-127, 128, shape, dtype=np.int8)
        elif name in tables:
            x = tables[name].astype(np.float32)
            x[np.abs(x) < 2.0**-29] = 0
        elif name.endswith("v_scale"):
            x = np.full(shape, 0.02, np.float32)
        elif name.endswith(".scale"):
            fan_in = config.linear_shapes()[name[: -len(".scale")]][1]
            gain = 4.0 if name.startswith("lm_head") else 1.0
            x = (gain * rng.uniform(0.8, 1.2, shape) / (73.0 * np.sqrt(fan_in))).astype(np.float32)
        else:  # biases, centers, norms
            x = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        writer.write(name, x)
    writer.finish(
        tokenizer_json=byte_tokenizer(),
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
        generation={"bos_id": None, "eos_ids": [256], "add_bos": False},
        source={"name": "random", "sha256": "0" * 64},
        conversion={"seed": seed},
    )
    return path


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model directory for `TINY` with some fields changed; the same arguments give the same directory."""
    made: dict[tuple[ModelConfig, int], Path] = {}

    def make(seed: int = 0, **changes: object) -> Path:
        config = dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]
        if (config, seed) not in made:
            directory = tmp_path_factory.mktemp("models")
            directory.parent.parent.chmod(0o755)  # a prover with its own user must be able to read it
            directory.parent.chmod(0o755)
            directory.chmod(0o755)
            made[config, seed] = write_model(directory / "model", config, seed)
        return made[config, seed]

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., Path]) -> Path:
    """A model directory for `TINY`."""
    return make_model()


@pytest.fixture(scope="session")
def listening_prover(tiny_model: Path) -> Iterator[str]:
    """Address of a prover that listens on TCP and has the tiny model, for several sessions at a time."""
    with listening(tiny_model, sessions=8) as address:
        yield address


@pytest.fixture(scope="session")
def start_listening() -> Callable[..., contextlib.AbstractContextManager[str]]:
    """`listening`: a prover at an address of one's own, as a context."""
    return listening


@contextlib.contextmanager
def listening(model_dir: Path, address: str = "tcp://127.0.0.1:0", sessions: int = 1) -> Iterator[str]:
    """`python -m veriattn.prover --listen`, up and running."""
    command = [sys.executable, "-m", "veriattn.prover", "--listen", address, "--sessions", str(sessions)]
    command += ["--model-dir", str(model_dir)]
    environment = {**os.environ, "VERIATTN_THREADS": "1", "PYTHONPATH": str(Path(veriattn.__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            assert line.startswith("listening at "), line
            yield line.split()[-1]
        finally:
            process.terminate()
            assert process.wait(15) == 0
