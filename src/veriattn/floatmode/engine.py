"""Greedy generation in floating point under `full-tee`, `tsdp` and `veriattn`, checked within tolerances."""

from __future__ import annotations

import hashlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, get_args

import numpy as np

from veriattn.convert.checkpoint import F32, Source
from veriattn.convert.float_reference import (
    FloatKVCache,
    FloatReference,
    causal_attention,
    decoder_layer,
    rms_norm,
    rotary_tables,
)
from veriattn.engine.text import TextCodec
from veriattn.errors import ProverFault, UsageError
from veriattn.floatmode.checks import generator
from veriattn.floatmode.formats import rounded
from veriattn.floatmode.link import FloatLink, Frame
from veriattn.floatmode.params import GUARANTEE, NOTICE, CheckParams, Format, Tolerances
from veriattn.floatmode.requests import DEVICE_BYTES, LINEARS, Hello, Shift
from veriattn.floatmode.trusted import Counts, Judge, LinearSecrets, Outsourced, Setting, bounded
from veriattn.home import state_directory
from veriattn.verifier.isolation import ProverProcess, harden_self, spawn_prover
from veriattn.verifier.launch import quote_output
from veriattn.verifier.tiling import Tiling

Strategy = Literal["full-tee", "tsdp", "veriattn"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True)
class FloatConfig:
    """How to run. `exp_format`: of the attention weights on the wire; None is `format`, as the paper has it, except that
    float16 gives float32 (in float16 honest rows underflow, docs/paper-mode.md). `kv_tokens`: keys the prover can hold.
    """

    strategy: Strategy = "veriattn"
    backend: str = "numpy"
    device: str = "cpu"
    format: Format = "float32"
    exp_format: Format | None = None
    shift: Shift = "max"
    params: CheckParams = field(default_factory=CheckParams)
    tiling: Tiling | None = None
    kv_tokens: int = 1 << 30
    offload_ratio: float = 1.0
    prover_command: tuple[str, ...] | None = None
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UsageError(
                f"strategy {self.strategy!r} has no floating-point form", hint=f"one of {', '.join(STRATEGIES)}"
            )
        if not 0.0 <= self.offload_ratio <= 1.0 or self.kv_tokens < 0:
            raise UsageError("the offload ratio must lie in [0, 1] and the prover's capacity be no less than 0")
        if self.backend not in ("numpy", "torch"):
            raise UsageError(f"unknown backend {self.backend!r}", hint="numpy or torch")
        if self.backend == "numpy" and self.device != "cpu":
            raise UsageError(f"NumPy does not run on {self.device}", hint="--backend torch")

    @property
    def sent_exp_format(self) -> Format:
        """What E has on the wire."""
        return self.exp_format or ("float32" if self.format == "float16" else self.format)


def tolerance_file(digest: str, config: FloatConfig) -> Path:
    """Where `calibrate` keeps what was measured for a model and a setting."""
    shown = {k: v for k, v in asdict(config).items() if k in ("strategy", "backend", "device", "shift", "params")}
    text = f"{sorted(shown.items())} {config.format} {config.sent_exp_format}"
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return state_directory() / "tolerances" / digest[:32] / f"{config.strategy}-{config.format}-{name}.json"


def codec_of(source: Source) -> TextCodec:
    """The checkpoint's tokenizer and chat template."""
    s = source.special
    return TextCodec(
        source.tokenizer_json(), source.chat_template(), s.bos_id, s.eos_ids, s.add_bos, source.config.vocab_size
    )


class ModelOps(Protocol):
    """`FloatOps` for a sequence, layer by layer."""

    layer: int

    def reset(self) -> None: ...

    @property
    def length(self) -> int: ...

    def advance(self, tokens: int) -> None: ...

    def linear(self, name: str, x: F32) -> F32: ...

    def attention(self, layer: int, q: F32, k: F32, v: F32) -> F32: ...


class LocalOps:
    """Everything here: `full-tee`."""

    def __init__(self, source: Source, weights: Callable[[int, str], F32]) -> None:
        self._config, self._weights = source.config, weights
        self._cache = FloatKVCache(source.config)
        self.layer = 0

    def reset(self) -> None:
        self._cache = FloatKVCache(self._config)

    @property
    def length(self) -> int:
        return self._cache.length

    def advance(self, tokens: int) -> None:
        self._cache.length += tokens

    def linear(self, name: str, x: F32) -> F32:
        return x @ self._weights(self.layer, name).T

    def attention(self, layer: int, q: F32, k: F32, v: F32) -> F32:
        keys, values = self._cache.append(layer, k, v)
        return causal_attention(q, keys, values)


class FloatModel:
    """Embeddings, norms and biases, and the forward pass of `convert.float_reference` over any operations."""

    def __init__(self, source: Source) -> None:
        self.source, self.config = source, source.config
        names = [n for n in source.config.layer_shapes() if n not in LINEARS]
        self.vectors = [
            {n: source.tensor(f"layers.{layer}.{n}") for n in names} for layer in range(self.config.num_layers)
        ]
        self._embed = source.tensor("embed")
        self.norm = source.tensor("final_norm")
        self._kept: dict[tuple[int, str], F32] = {}

    def weight(self, layer: int, name: str) -> F32:
        """A matrix, not kept."""
        return self.source.tensor("lm_head" if name == "lm_head" else f"layers.{layer}.{name}")

    def kept(self, layer: int, name: str) -> F32:
        """A matrix, held from now on: for the side that computes with it."""
        if name == "lm_head" and self.config.tie_embeddings:
            return self._embed
        if (layer, name) not in self._kept:
            self._kept[layer, name] = self.weight(layer, name)
        return self._kept[layer, name]

    def forward(self, ops: ModelOps, ids: Sequence[int]) -> F32:
        """Logits (vocab,) of the last of the tokens, which continue the operations' sequence."""
        positions = np.arange(ops.length, ops.length + len(ids))
        if not ids or positions[-1] >= self.config.max_positions:
            raise UsageError(f"{ops.length + len(ids)} tokens do not fit the context of {self.config.max_positions}")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise UsageError("token ids lie outside the vocabulary")
        cos, sin = rotary_tables(self.config, positions)
        x = self._embed[np.asarray(ids)]
        for layer, vectors in enumerate(self.vectors):
            ops.layer = layer
            x = decoder_layer(self.config, ops, vectors, layer, x, cos, sin)
        ops.layer = self.config.num_layers
        logits = ops.linear("lm_head", rms_norm(x[-1:], self.norm, self.config.rms_eps))[0]
        ops.advance(len(ids))
        return np.asarray(logits)


def linear_secrets(
    model: FloatModel, config: FloatConfig, rng: np.random.Generator, sets: int = 1
) -> list[dict[tuple[int, str], LinearSecrets]]:
    """Vectors for every weight matrix, `sets` times over, in one pass over the weights as the prover's format has them."""
    count = config.params.repetitions
    places = [(layer, name) for layer in range(model.config.num_layers) for name in LINEARS[:-1]]
    places.append((model.config.num_layers, "lm_head"))
    all_sets: list[dict[tuple[int, str], LinearSecrets]] = [{} for _ in range(sets)]
    for place in places:
        drawn = LinearSecrets.draw(rng, rounded(model.weight(*place), config.format), count * sets)
        for i, out in enumerate(all_sets):
            part = slice(i * count, (i + 1) * count)
            out[place] = LinearSecrets(np.ascontiguousarray(drawn.w[:, part]), np.ascontiguousarray(drawn.u[:, part]))
    return all_sets


class FloatSession:
    """A prover process and the secrets for it; ends at the first rejected claim. A context manager."""

    def __init__(self, model: FloatModel, config: FloatConfig, judge: Judge, secret_sets: int = 1) -> None:
        """secret_sets: of vectors for weight matrices, drawn in one pass over the weights (`next_secrets`).

        Raises: ProverUnavailable.
        """
        self.config, self.model = config, model
        self._process: ProverProcess | None = None
        self.device: str | None = None
        self.link: FloatLink | None = None
        self.counts = Counts()
        if config.strategy == "full-tee":
            self.ops: ModelOps = LocalOps(model.source, model.kept)
            return
        harden_self()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        path = Path(model.source.path)
        command = config.prover_command or (sys.executable, "-m", "veriattn.floatmode.prover")
        try:
            self._process = spawn_prover(command, theirs.fileno(), readable=[path])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            self.link = FloatLink.offer(ours, config.timeout_s)
            hello = Hello(
                str(path.absolute()), config.backend, config.device, config.format, config.sent_exp_format, config.shift,
                config.kv_tokens,
            )  # fmt: skip
            self.link.send(Frame.HELLO, hello.encode())
            self._secret_sets = linear_secrets(model, config, generator(), secret_sets)
            device = self.link.claim((DEVICE_BYTES,), np.dtype(np.uint8), Frame.READY)
            self.device = device.tobytes().rstrip(b"\0").decode("ascii", "replace")
            setting = Setting(
                model.config, config.params, config.format, config.sent_exp_format, config.shift, config.tiling,
                config.kv_tokens, config.offload_ratio,
            )  # fmt: skip
            self.ops = Outsourced(self.link, setting, self._secret_sets.pop(), judge, config.strategy, self.counts)
        except BaseException as error:
            self._explain(error)
            self.close()
            raise

    def next_secrets(self) -> None:
        """Go on with the next set of vectors for weight matrices; the last one stays."""
        if isinstance(self.ops, Outsourced) and self._secret_sets:
            self.ops.linears = self._secret_sets.pop()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def _explain(self, error: BaseException) -> None:
        if self._process is not None:
            quote_output(error, self._process.output_tail())

    def step(self, ids: Sequence[int]) -> F32:
        """Logits after the tokens. After a fault the session is over. Raises: ProverFault."""
        try:
            return self.model.forward(self.ops, ids)
        except ProverFault as error:
            self._explain(error)
            self.close()
            raise

    def generate(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> Iterator[int]:
        """Greedy tokens of a new sequence, each released after its checks; ends after a stop token."""
        self.ops.reset()
        ids = list(prompt)
        for _ in range(max_tokens):
            token = int(np.argmax(self.step(ids)))
            yield token
            if token in stop or self.ops.length >= self.model.config.max_positions:
                return
            ids = [token]

    def close(self) -> None:
        """End the prover. May be called twice."""
        link, self.link = self.link, None
        process, self._process = self._process, None
        if link is not None:
            link.close()
        if process is not None:
            process.terminate()

    def __enter__(self) -> FloatSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_checked(model: FloatModel, config: FloatConfig, tolerances: Tolerances | None = None) -> FloatSession:
    """A session with this model's calibrated tolerances. Raises: ModelError (not calibrated); ProverUnavailable."""
    if config.strategy == "full-tee":
        return FloatSession(model, config, lambda _key, _residual: False)
    if tolerances is None:
        tolerances = Tolerances.load(tolerance_file(model.source.digest(), config))
    return FloatSession(model, config, bounded(tolerances.get))


def reference_greedy(
    reference: FloatReference, prompt: Sequence[int], max_tokens: int, stop: Sequence[int] = ()
) -> list[int]:
    """Greedy tokens of the float reference itself."""
    cache = FloatKVCache(reference.config)
    ids, out = list(prompt), []
    for _ in range(max_tokens):
        out.append(int(np.argmax(reference.logits(ids, cache)[-1])))
        if out[-1] in stop:
            break
        ids = out[-1:]
    return out


def run_json(session: FloatSession, results: list[dict[str, Any]], began: float) -> dict[str, Any]:
    """What a run says of itself."""
    counts, link, outsourced = session.counts, session.link, session.config.strategy != "full-tee"
    return {
        "verified": True,
        "guarantee": GUARANTEE if outsourced else "trusted-compute",
        "notice": NOTICE if outsourced else "floating point, computed here",
        "numerics": "float",
        "strategy": session.config.strategy,
        "format": session.config.format,
        "exp_format": session.config.sent_exp_format,
        "params": asdict(session.config.params),
        "soundness_bits": None,
        "prover": {"pid": session.pid, "device": session.device},
        "checks": {"linear_rows": counts.linear_rows, "attention_rows": counts.attention_rows},
        "kv": {
            "prover_tokens": counts.prover_keys,
            "streamed_tokens": counts.streamed_keys,
            "tee_tokens": counts.tee_keys,
            "offload_ratio": session.config.offload_ratio,
        },
        "bytes": {
            "to_prover": 0 if link is None else link.bytes_sent,
            "from_prover": 0 if link is None else link.bytes_received,
        },
        "timing": {
            "total_s": time.perf_counter() - began,
            "check_s": counts.check_s,
            "attention_s": counts.attention_s,
            "prover_wait_s": 0.0 if link is None else link.wait_s,
        },
        "results": results,
    }
