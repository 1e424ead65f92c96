"""The parts of the run, the most valuable first, each with what it will take by its shapes."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.floors import DEVICE, FLOWS, many_cores
from veriattn.bench import measure
from veriattn.bench.campaign import CHUNK, Plan
from veriattn.bench.rates import device_side, with_link
from veriattn.bench.report import PAPER_KV_TOKENS, PAPER_LINK_GB_PER_S
from veriattn.bench.roofline import NOTHING, LinkRates, Rates, ScoreRates, SideRates, head_floor, layer_floor
from veriattn.bench.runner import Setup
from veriattn.bench.shapes import shape
from veriattn.bench.traffic import Bytes, batch_bytes
from veriattn.bench.traffic import Part as Rows
from veriattn.engine.strategies import Strategy
from veriattn.errors import UsageError
from veriattn.spec.model import ModelConfig
from veriattn.verifier.launch import builtin_prover
from veriattn.verifier.session import Flow
from veriattn.wire.emulate import Throttle


@dataclass(frozen=True)
class Program:
    """A part that is a program of its own, in one piece. guess_s: how long it may take."""

    name: str
    what: str
    guess_s: float
    limit_s: float
    needs_gpu: bool = True
    optional: bool = False

    @property
    def pieces(self) -> tuple[str, ...]:
        return ("all",)


@dataclass(frozen=True)
class Campaign:
    """A part that is one run of `veriattn bench`; each strategy is a piece. steps: as in `Plan`. optional: only where it is
    named."""

    name: str
    what: str
    phase: str
    shape: str
    strategies: tuple[Strategy, ...]
    lengths: tuple[int, ...]
    layers: int
    batches: tuple[int, ...] = (1,)
    other_lengths: tuple[int, ...] | None = None
    link: float | None = None
    prover_kv_tokens: int | None = None
    ratios: tuple[float | None, ...] = ()
    steps: int = 2
    rates_seconds: float = 4.0
    limit_s: float = 420.0
    optional: bool = False
    needs_gpu: bool = False

    @property
    def pieces(self) -> tuple[str, ...]:
        return self.strategies

    def config(self) -> ModelConfig:
        """The model that is run."""
        return shape(self.shape, self.layers)

    def plan(self, strategies: tuple[Strategy, ...], device: str, threads: int, model_dir: Path | None) -> Plan:
        """What the campaign is asked for."""
        setup = Setup(
            prover_kv_tokens=self.prover_kv_tokens,
            emulate_link=None if self.link is None else Throttle(self.link),
            prover_command=None if device == "cpu" else builtin_prover(device),
            prover_threads=threads,
        )
        return Plan(
            phase=self.phase, shape=self.shape, strategies=strategies, lengths=self.lengths, batches=self.batches,
            layers=self.layers, device=device, threads=threads, prover_threads=threads, setup=setup, ratios=self.ratios,
            steps=self.steps, rates_seconds=self.rates_seconds, model_dir=model_dir, other_lengths=self.other_lengths,
        )  # fmt: skip


Part = Program | Campaign

_MEDIATED: tuple[Strategy, ...] = ("run-ahead", "veriattn", "tsdp", "full-tee")
_NATIVE: tuple[Strategy, ...] = ("run-ahead", "dangerous-unverified", "full-tee", "tsdp")
_PROMPTS, _TOKENS = (1024, 3072, 6144), (2048, 6144, 10_000)
_TENTHS = tuple(i / 10 for i in range(11))


def _link15(name: str, of: str, layers: int, optional: bool = False) -> Campaign:
    what = f"prompts, {of}, the paper's bus emulated, batch 1 and 5, attention alone as well"
    return Campaign(name, what, "prefill", of, _MEDIATED, _PROMPTS, layers, batches=(1, 5), other_lengths=(6144,),
                    link=PAPER_LINK_GB_PER_S, steps=1, optional=optional)  # fmt: skip


def _decode15(name: str, of: str, layers: int, optional: bool = False) -> Campaign:
    what = f"tokens, {of}, the paper's bus emulated, the prover keeps {PAPER_KV_TOKENS:,} keys"
    return Campaign(name, what, "decode", of, _MEDIATED, _TOKENS, layers, link=PAPER_LINK_GB_PER_S,
                    prover_kv_tokens=PAPER_KV_TOKENS, steps=9, optional=optional)  # fmt: skip


PARTS: tuple[Part, ...] = (
    Program("correctness", "tests/gpu: every kernel, the backend and sessions, bit for bit", 200, 420),
    Program("kernels", "int8 products beside cuBLAS, attention beside FlashAttention", 60, 240),
    Program("ids", "token ids beside the CPU backend's", 100, 300, needs_gpu=False),
    Campaign("prefill-8b", "prompts, 8B, the bus as it is", "prefill", "llama-8b", _NATIVE, _PROMPTS, 8),
    Campaign("decode-8b", "tokens, 8B, the bus as it is", "decode", "llama-8b", _NATIVE, _TOKENS, 8, steps=15),
    _link15("link15-8b", "llama-8b", 4),
    _link15("link15-3b", "llama-3b", 3),
    _link15("link15-14b", "phi-14b", 2),
    _decode15("decode15-8b", "llama-8b", 4),
    Campaign("sweep", "offload ratios in turns, the prover keeps nothing", "decode", "llama-8b", ("veriattn",),
             (2048, 4096, 8192), 4, batches=(1, 5), prover_kv_tokens=0, ratios=(*_TENTHS, None), steps=5),
    Campaign("sweep15", "offload ratios in turns, the paper's bus emulated", "decode", "llama-8b", ("veriattn",),
             (2048, 4096, 8192), 4, batches=(1, 5), link=PAPER_LINK_GB_PER_S, prover_kv_tokens=0, ratios=(*_TENTHS, None),
             steps=5, optional=True),
    _decode15("decode15-3b", "llama-3b", 4, optional=True),
    _decode15("decode15-14b", "phi-14b", 2, optional=True),
    _link15("link15-qwen", "qwen-14b", 2, optional=True),
)  # fmt: skip


def chosen(names: str | None, parts: tuple[Part, ...] = PARTS) -> tuple[Part, ...]:
    """Parts by name, in the order of the list; without names all that are not optional. Raises: UsageError."""
    if names is None:
        return tuple(p for p in parts if not p.optional)
    wanted = [n.strip() for n in names.split(",")]
    if odd := set(wanted) - {p.name for p in parts}:
        raise UsageError(f"no part {', '.join(sorted(odd))}", hint=", ".join(p.name for p in parts))
    return tuple(p for p in parts if p.name in wanted)


def adapted(part: Part, layers: int | None, override: str | None) -> Part:
    """A part with so many layers, or at another shape: then as a rehearsal, with short contexts and few turns."""
    if isinstance(part, Program):
        return part
    if layers is not None:
        part = dataclasses.replace(part, layers=min(layers, shape(override or part.shape).num_layers))
    if override is None:
        return part
    few = tuple(sorted({64, 192, 384})) if part.phase == "prefill" else (300, 600, 900)
    return dataclasses.replace(
        part, shape=override, lengths=few, layers=min(part.layers, shape(override).num_layers), steps=1, rates_seconds=0.2,
        other_lengths=None if part.other_lengths is None else few[-1:],
        prover_kv_tokens=part.prover_kv_tokens and 100, ratios=(0.0, 1.0, None) if part.ratios else (),
    )  # fmt: skip


def settings(part: Part, more: str = "") -> str:
    """What a result depends on beside code and machine, in short."""
    told = dataclasses.asdict(part) | {"what": "", "limit_s": 0, "guess_s": 0, "optional": False, "more": more}
    return hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()[:12]


# -- what it will take ------------------------------------------------------------------------------------------------

_MANY = ScoreRates(attend=1e-9, replay=4.2e-10, transfer=4.3e-10, softmax=6e-10, qk=7e-10, pv=8e-10)
_ONE = ScoreRates(attend=1.7e-9, replay=1e-9, transfer=3.8e-10, softmax=2e-10, qk=7e-10, pv=1.1e-9)
#: One core as measured in docs/benchmarks.md; the machine has 16, and copies no faster than 30 GB/s.
_CORE = SideRates(4e11, 2.5e10, 1e10, 1.2e-10, 2.7e-5, 2.6e-5, _MANY, _ONE)
#: Real times over floors, to be on the safe side; seconds until a prover is up, without its model; bytes a second of writing
#: random weights and of reading them.
_OVER_FLOOR, _START_S, _WRITE, _READ = 2.5, 12.0, 4e8, 1e9


def _assumed(c: ModelConfig, link: float | None) -> Rates:
    tee = dataclasses.replace(many_cores(_CORE), copy=3e10)
    rates = Rates(tee, device_side(c, DEVICE), LinkRates(5e10, 5e10), 16, None, 16)
    return rates if link is None else with_link(rates, Throttle(link))


def model_bytes(c: ModelConfig) -> int:
    """What a model takes on disk."""
    size = {"I8": 1, "F16": 2, "F32": 4}
    total = 0
    for dtype, dims in c.tensor_specs().values():
        count = size[dtype]
        for n in dims:
            count *= n
        total += count
    return total


def estimate(part: Part, pieces: tuple[str, ...], written: bool = False) -> tuple[float, int]:
    """(seconds, bytes over the link) of those pieces. written: whether the weights are there already."""
    if isinstance(part, Program):
        return part.guess_s, 0
    c = part.config()
    seconds = 0.0 if written else model_bytes(c) / _WRITE
    crossed = 0
    for strategy in pieces:
        seconds += _START_S + 2 * model_bytes(c) / _READ + part.rates_seconds / len(pieces)
        for steps, rows in _steps(part, FLOWS[strategy]):
            floor, moved = _floor(c, FLOWS[strategy], steps, rows, part.link)
            seconds += floor * _OVER_FLOOR
            crossed += moved.to_prover + moved.from_prover
    return seconds, crossed


def _prompt(tokens: int, batch: int = 1) -> list[list[Rows]]:
    return [[Rows(at, min(CHUNK, tokens - at))] for _ in range(batch) for at in range(0, tokens, CHUNK)]


def _steps(part: Campaign, flow: Flow | None) -> list[tuple[list[list[Rows]], int]]:
    """Every step that is run under one strategy, with how often."""
    out: list[tuple[list[list[Rows]], int]] = []
    for batch in part.batches:
        lengths = part.lengths if batch == part.batches[0] else part.other_lengths or part.lengths
        if part.phase == "prefill":
            # One to warm up, one with the trace.
            out += [(_prompt(n, batch), part.steps + (1 if flow is None else 2)) for n in lengths]
            continue
        run_to = 0 if flow is None else min(lengths[-1], part.prover_kv_tokens or 0)
        if flow is not None and part.prover_kv_tokens is None:
            run_to = lengths[-1]
        out.append((_prompt(run_to, batch), 1))
        turns = len(part.ratios) * (2 * part.steps + measure.COMPILING_STEPS) or part.steps + 9
        turns += measure.ADAPTING_STEPS if part.prover_kv_tokens is not None and flow is not None else 0
        limit = part.prover_kv_tokens if flow not in (None, Flow.UNVERIFIED) else None
        out += [([[Rows(n, 1, limit, 0.5)] * batch], turns) for n in lengths]
    return out


def _floor(
    c: ModelConfig, flow: Flow | None, steps: list[list[Rows]], times: int, link: float | None
) -> tuple[float, Bytes]:
    rates, total, moved = _assumed(c, link), NOTHING, Bytes(0, 0)
    for parts in steps:
        total += layer_floor(c, flow, parts, rates)[0] * c.num_layers + head_floor(c, flow, 1, rates)
        if flow is not None:
            moved += batch_bytes(c, flow, parts, 1)
    return total.seconds * times, moved * times
