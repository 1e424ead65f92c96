"""One run of `bench prefill` or `bench decode`: a random model, the rates of the machine, then strategy by strategy."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from veriattn.bench import measure
from veriattn.bench.rates import measure as measure_rates
from veriattn.bench.report import Conditions, Point, scaled
from veriattn.bench.roofline import NOTHING, Floor, Rates, head_floor, layer_floor
from veriattn.bench.runner import Models, Setup, StrategyRunner, compiled_kernels
from veriattn.bench.shapes import shape, write_random_model
from veriattn.bench.traffic import Part
from veriattn.engine.strategies import Strategy
from veriattn.errors import UsageError
from veriattn.native import set_threads
from veriattn.spec.model import ModelConfig
from veriattn.spec.modelfile import MANIFEST_FILE, read_manifest
from veriattn.verifier.session import Flow
from veriattn.wire.messages import AttentionCheck

#: Tokens of a step.
CHUNK = 1024

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is to be measured. ratios: offload ratios of a sweep (None adapts), empty for no sweep. steps: decode steps, rounds
    of a sweep, or repetitions of a prompt. other_lengths: lengths of the batches but the first, where they differ."""

    phase: str
    shape: str
    strategies: tuple[Strategy, ...]
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    layers: int | None
    device: str
    threads: int
    prover_threads: int
    setup: Setup
    ratios: tuple[float | None, ...] = ()
    steps: int = 5
    rates_seconds: float = 4.0
    model_dir: Path | None = None
    numerics: str = "exact"
    other_lengths: tuple[int, ...] | None = None

    def check(self) -> None:
        """Raises: UsageError for what can never run."""
        config = self.config()
        room = config.max_positions - 1 - (self.growth if self.phase == "decode" else 0)
        if not self.lengths or max(self.lengths) > room:
            raise UsageError(f"{self.shape} has room for {room} tokens, {max(self.lengths, default=0)} were asked for")
        if list(self.lengths) != sorted(set(self.lengths)):
            raise UsageError("--lengths must go up")
        gaps = zip(self.lengths, self.lengths[1:], strict=False)
        if self.phase == "decode" and not self.ratios and any(b - a <= self.growth for a, b in gaps):
            raise UsageError(f"lengths need {self.growth} tokens between them: sequences grow while they are measured")
        if self.ratios and (self.setup.prover_kv_tokens is None or set(self.strategies) - {"run-ahead", "veriattn"}):
            raise UsageError(
                "several offload ratios need --prover-kv-tokens and strategies that share attention",
                hint="--prover-kv-tokens 0 --strategies veriattn",
            )
        if self.numerics != "exact" and (self.ratios or self.batches != (1,) or self.setup.emulate_link is not None):
            raise UsageError(
                "floating point is measured with one sequence, without a sweep, over the link as it is",
                hint="--batch 1, without --emulate-link",
            )
        if self.numerics == "float" and not set(self.strategies) & {"full-tee", "veriattn", "tsdp"}:
            raise UsageError("none of these strategies has a floating-point form", hint="full-tee, veriattn, tsdp")
        if max(self.batches, default=0) > 64 or min(self.batches, default=0) < 1:
            raise UsageError("--batch takes sizes from 1 to 64")

    @property
    def chunk(self) -> int:
        """Most tokens of one step."""
        return self.setup.prefill_chunk or CHUNK

    @property
    def growth(self) -> int:
        """Tokens by which a sequence grows at one length."""
        return (self.steps * 2 + measure.COMPILING_STEPS) * max(1, len(self.ratios)) + measure.ADAPTING_STEPS + 4

    def config(self) -> ModelConfig:
        """The model that is run."""
        return shape(self.shape, self.layers)

    def conditions(self) -> Conditions:
        """What the results have in common."""
        link = self.setup.emulate_link
        layers = self.config().num_layers
        # A sweep is about one step's layers, as they are.
        full = layers if self.ratios else shape(self.shape).num_layers
        return Conditions(
            self.phase, self.shape, layers, full, self.device, self.threads,
            self.prover_threads if self.device == "cpu" else None, None if link is None else link.gb_per_s,
            self.setup.prover_kv_tokens,
        )  # fmt: skip


def run(
    plan: Plan, progress: Progress, done: Callable[[Strategy, list[Point], Rates], None] | None = None
) -> tuple[list[Point], Rates]:
    """Measure everything. done: told of each strategy that is through. Raises: VeriattnError of whatever goes wrong."""
    plan.check()
    set_threads(plan.threads)
    config = plan.config()
    with _model(plan, config, progress) as path, compiled_kernels() as compiled:
        progress("measuring the rates of this machine")
        rates = measure_rates(
            config, plan.device, plan.threads, plan.prover_threads, plan.setup.emulate_link, plan.rates_seconds
        )
        set_threads(plan.threads)
        models, points = Models(path), []
        for strategy in plan.strategies if plan.numerics != "float" else ():
            progress(f"{strategy}: reading the model, starting the prover")
            gpu = plan.device != "cpu"
            setup = dataclasses.replace(
                plan.setup,
                batch=max(plan.batches),
                prefill_chunk=plan.chunk,
                gpu=gpu,
                kernels=compiled if gpu else None,
            )
            runner = StrategyRunner(strategy, models, setup)
            try:
                found = list(_points(plan, config, runner, rates, progress))
            finally:
                runner.close()
            points += found
            if done is not None:
                done(strategy, found, rates)
    if plan.numerics != "exact":
        points += _float_points(plan, config, progress)
    return points, rates


def _float_points(plan: Plan, config: ModelConfig, progress: Progress) -> list[Point]:
    """The paper's system in floating point (docs/paper-mode.md), on random weights of the same shape. No floor is known."""
    # Only where it is asked for: nothing of the exact system rests on it.
    from veriattn.floatmode.bench import FloatRunner, write_random_checkpoint  # noqa: PLC0415
    from veriattn.floatmode.engine import STRATEGIES as FLOAT_STRATEGIES  # noqa: PLC0415

    points = []
    conditions = plan.conditions()
    layers, full = conditions.layers, conditions.model_layers
    with tempfile.TemporaryDirectory(prefix="veriattn-bench-") as temporary:
        Path(temporary).chmod(0o755)
        path = Path(temporary) / "float"
        progress(f"writing random float16 weights: {plan.shape}, {config.num_layers} layer(s)")
        write_random_checkpoint(path, config)
        for strategy in FLOAT_STRATEGIES:
            if strategy not in plan.strategies:
                continue
            progress(f"{strategy} in floating point: reading the model, starting the prover")
            setup = dataclasses.replace(plan.setup, prefill_chunk=plan.chunk)
            runner = FloatRunner(strategy, path, setup)
            try:
                decoding = measure.Decoding(runner, 1, config.vocab_size)
                for length in plan.lengths:
                    progress(f"{runner.strategy}, {length} tokens")
                    if plan.phase == "prefill":
                        chunk = plan.chunk
                        sample = measure.prefill(runner, length, 1, chunk, config.vocab_size, plan.steps)
                    else:
                        sample = measure.decode(decoding, length, plan.steps)
                    head_s = min(sample.head_s or 0.0, sample.total_s)
                    attention_s = None if sample.attention_s is None else sample.attention_s * full / layers
                    seconds = scaled(sample.total_s, head_s, layers, full)
                    points.append(Point(runner.strategy, length, 1, seconds, attention_s, NOTHING, NOTHING, sample))
            finally:
                runner.close()
    return points


@contextmanager
def _model(plan: Plan, config: ModelConfig, progress: Progress) -> Iterator[Path]:
    """The random model: in a directory of the user's, made if it is not there, or in a temporary one."""
    if plan.model_dir is not None and (plan.model_dir / MANIFEST_FILE).exists():
        if read_manifest(plan.model_dir).config != config:
            raise UsageError(f"{plan.model_dir} holds a model of another shape")
        yield plan.model_dir
        return
    with tempfile.TemporaryDirectory(prefix="veriattn-bench-") as temporary:
        path = plan.model_dir or Path(temporary) / "model"
        Path(temporary).chmod(0o755)  # a prover with a user of its own must be able to read it
        progress(f"writing random weights: {plan.shape}, {config.num_layers} layer(s)")
        try:
            write_random_model(path, config)
            path.chmod(0o755)
        except OSError as error:
            raise UsageError(f"cannot write the model to {path}: {error.strerror}", hint="--model-dir") from error
        yield path


def _points(
    plan: Plan, config: ModelConfig, runner: StrategyRunner, rates: Rates, progress: Progress
) -> Iterator[Point]:
    for batch in plan.batches:
        decoding = measure.Decoding(runner, batch, config.vocab_size)
        other = plan.other_lengths is not None and batch != plan.batches[0]
        for length in (plan.other_lengths if other else None) or plan.lengths:
            what = f"{runner.strategy}, {length} tokens, batch {batch}"
            progress(what)
            if plan.phase == "prefill":
                chunk = plan.chunk
                sample = measure.prefill(runner, length, batch, chunk, config.vocab_size, plan.steps)
                steps = measure.prompt_steps(length, batch, chunk, config.vocab_size)
                pieces = [[Part(e.start, e.num_tokens) for e in step.entries] for step in steps]
                rows = [len(step.logit_rows()) for step in steps]
                yield _point(plan, config, runner, rates, (length, batch), sample, pieces, rows)
            elif not plan.ratios:
                adapting = plan.setup.offload_ratio is None and plan.setup.prover_kv_tokens is not None
                sample = measure.decode(decoding, length, plan.steps, adapting=adapting)
                auto = "auto" if adapting and sample.ratio is not None else plan.setup.offload_ratio
                parts = _decode_parts(plan, runner, length, batch, sample.ratio)
                yield _point(plan, config, runner, rates, (length, batch), sample, [parts], [batch], auto)
            else:
                swept = measure.sweep(runner, decoding, length, plan.ratios, plan.steps)
                for ratio, sample in swept.items():
                    parts = _decode_parts(plan, runner, length, batch, sample.ratio)
                    label = "auto" if ratio is None else ratio
                    yield _point(plan, config, runner, rates, (length, batch), sample, [parts], [0], label)
        decoding.free()


def _decode_parts(plan: Plan, runner: StrategyRunner, length: int, batch: int, ratio: float | None) -> list[Part]:
    limited = runner.flow not in (None, Flow.UNVERIFIED)
    return [Part(length, 1, plan.setup.prover_kv_tokens if limited else None, ratio or 0.0)] * batch


def _point(
    plan: Plan,
    config: ModelConfig,
    runner: StrategyRunner,
    rates: Rates,
    at: tuple[int, int],
    sample: measure.Sample,
    steps: Sequence[Sequence[Part]],
    logit_rows: Sequence[int],
    ratio: float | str | None = None,
) -> Point:
    """A sample beside its floors, both for the whole model."""
    conditions, flow = plan.conditions(), runner.flow
    transfer = plan.setup.attention_check is AttentionCheck.TRANSFER
    layer, attention, head = NOTHING, NOTHING, NOTHING
    for parts, rows in zip(steps, logit_rows, strict=True):
        one, shared = layer_floor(config, flow, parts, rates, transfer=transfer)
        layer, attention = layer + one, attention + shared
        head = head + head_floor(config, flow, rows, rates)
    layers, full = conditions.layers, conditions.model_layers
    floor: Floor = layer * full + head
    head_s = head.seconds if sample.head_s is None else sample.head_s
    return Point(
        strategy=runner.strategy,
        length=at[0],
        batch=at[1],
        seconds=scaled(sample.total_s, min(head_s, sample.total_s), layers, full),
        attention_s=None if sample.attention_s is None else sample.attention_s * full / layers,
        floor=floor,
        attention_floor=attention * full,
        sample=sample,
        ratio=ratio,
    )
