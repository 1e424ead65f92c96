"""Time to first token, time per output token and the sweep over offload ratios, of any `Runner`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from veriattn.bench.runner import Counters, Runner, StepTime, StrategyRunner, token_ids
from veriattn.bench.traffic import Bytes
from veriattn.errors import UsageError
from veriattn.spec.forward import Batch, BatchEntry, LogitRows
from veriattn.verifier.session import Flow

#: Steps that the controller of the offload ratio gets before its steps count.
ADAPTING_STEPS = 40
#: Steps before any counts where kernels are compiled and the second step of a shape is captured.
COMPILING_STEPS = 4


@dataclass(frozen=True)
class Sample:
    """One prompt or one step of decoding, as measured: medians over its repetitions.

    attention_s, head_s: as `StepTime`. spread: slowest over median. moved, paper: bytes of one repetition. tee_cpu_s: CPU
    time of this process. shares: from a repetition of its own with the trace on. ratio: offload ratio of the last repetition.
    device_bytes: memory held on a GPU.
    """

    total_s: float
    attention_s: float | None
    head_s: float | None
    repetitions: int
    spread: float
    moved: Bytes
    paper: Bytes
    tee_cpu_s: float
    prover_wait_s: float
    shares: dict[str, Any] | None
    tee_peak_bytes: int
    prover_peak_bytes: int | None
    ratio: float | None = None
    device_bytes: int | None = None


def _combine(times: Sequence[StepTime]) -> StepTime:
    """Steps that follow each other, as one."""

    def add(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) if len(known) == len(values) else None

    return StepTime(sum(t.total_s for t in times), add([t.attention_s for t in times]), add([t.head_s for t in times]))


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if len(known) == len(values) else None


def sample_of(
    runner: Runner,
    times: Sequence[StepTime],
    before: Counters,
    after: Counters,
    shares: dict[str, Any] | None,
    ratio: float | None = None,
) -> Sample:
    """Medians of repetitions that ran between two readings of the counters."""
    count, totals = len(times), [t.total_s for t in times]
    middle = statistics.median(totals)
    moved, paper = after.moved - before.moved, after.paper - before.paper
    tee, prover = runner.peaks()
    return Sample(
        total_s=middle,
        attention_s=_median([t.attention_s for t in times]),
        head_s=_median([t.head_s for t in times]),
        repetitions=count,
        spread=max(totals) / middle,
        moved=Bytes(moved.to_prover // count, moved.from_prover // count),
        paper=Bytes(paper.to_prover // count, paper.from_prover // count),
        tee_cpu_s=(after.tee_cpu_s - before.tee_cpu_s) / count,
        prover_wait_s=(after.prover_wait_s - before.prover_wait_s) / count,
        shares=shares,
        tee_peak_bytes=tee,
        prover_peak_bytes=prover,
        ratio=ratio,
        device_bytes=runner.device_bytes(),
    )


# -- prefill ----------------------------------------------------------------------------------------------------------


def prompt_steps(length: int, batch: int, chunk: int, vocab_size: int) -> list[Batch]:
    """Prompts of so many tokens in steps of at most `chunk`, first come, first served, as the engine's scheduler forms them."""
    entries: list[list[BatchEntry]] = [[]]
    room = chunk
    for seq_id in range(batch):
        ids = token_ids(length, vocab_size, seq_id)
        start = 0
        while start < length:
            count = min(room, length - start)
            rows: LogitRows = "last" if start + count == length else "none"
            entries[-1].append(BatchEntry(seq_id, start, ids[start : start + count], rows))
            start, room = start + count, room - count
            if not room:
                entries.append([])
                room = chunk
    return [Batch(tuple(step)) for step in entries if step]


def prefill(runner: Runner, length: int, batch: int, chunk: int, vocab_size: int, repetitions: int) -> Sample:
    """Prompts until all of them have their first token's logits; one repetition more, with the trace on, gives the shares.

    To warm up, one step (its memory is new, and comes slowly); where kernels are compiled for the shapes they meet, all steps.
    """
    steps = prompt_steps(length, batch, chunk, vocab_size)
    # As the engine does it: the next step is certain where this one ends in no sample.
    following = [None if step.logit_rows() else after for step, after in zip(steps, [*steps[1:], None], strict=True)]

    def once() -> StepTime:
        return _combine([runner.step(step, after) for step, after in zip(steps, following, strict=True)])

    def free() -> None:
        for seq_id in range(batch):
            runner.free(seq_id)

    if _compiles(runner):
        once()
        free()
    else:
        runner.step(Batch((BatchEntry(0, 0, token_ids(min(chunk, length), vocab_size)),)))
        runner.free(0)
    times, readings = [], []
    for _ in range(repetitions):
        before = runner.counters()
        times.append(once())
        readings.append((before, runner.counters()))
        free()
    shares = None
    if not isinstance(runner, StrategyRunner) or runner.flow is not None:
        runner.shares(trace=True)
        once()
        shares = runner.shares(trace=False)
        free()
    return sample_of(runner, times, readings[0][0], _sum(readings), shares)


def _compiles(runner: Runner) -> bool:
    return isinstance(runner, StrategyRunner) and runner.compiles


def _sum(readings: Sequence[tuple[Counters, Counters]]) -> Counters:
    """The first reading plus what each repetition added: what lies between repetitions does not count."""
    first = readings[0][0]
    moved, paper, cpu, wait = first.moved, first.paper, first.tee_cpu_s, first.prover_wait_s
    for before, after in readings:
        moved, paper = moved + (after.moved - before.moved), paper + (after.paper - before.paper)
        cpu, wait = cpu + after.tee_cpu_s - before.tee_cpu_s, wait + after.prover_wait_s - before.prover_wait_s
    return Counters(moved, paper, cpu, wait)


# -- decode -----------------------------------------------------------------------------------------------------------


class Decoding:
    """Sequences that grow together: filled to a length, then decoded token by token."""

    def __init__(self, runner: Runner, batch: int, vocab_size: int) -> None:
        self.runner, self._batch, self._vocab = runner, batch, vocab_size
        self.length = 0

    def fill(self, length: int) -> None:
        """Bring all sequences to a length. Raises: UsageError where they are longer already."""
        if length < self.length:
            raise UsageError("lengths must go up, with room for the steps between them")
        for seq_id in range(self._batch):
            self.runner.fill(seq_id, length)
        self.length = length

    def step(self, logits: LogitRows = "last") -> StepTime:
        """One more token for every sequence."""
        ids = token_ids(self._batch, self._vocab, self.length)
        entries = [BatchEntry(i, self.length, (ids[i],), logits) for i in range(self._batch)]
        self.length += 1
        return self.runner.step(Batch(tuple(entries)))

    def free(self) -> None:
        """Forget all sequences."""
        for seq_id in range(self._batch):
            self.runner.free(seq_id)
        self.length = 0


def decode(decoding: Decoding, length: int, steps: int, *, adapting: bool = False) -> Sample:
    """Time per output token at a length: one step to warm up (more where a controller adapts, or kernels are compiled),
    then `steps` that count."""
    runner = decoding.runner
    decoding.fill(length)
    if adapting and isinstance(runner, StrategyRunner):
        runner.restart_controller()  # no sequence grows by thousands of keys from one token to the next
    for _ in range(ADAPTING_STEPS if adapting else COMPILING_STEPS if _compiles(runner) else 1):
        decoding.step()
    before = runner.counters()
    times = [decoding.step() for _ in range(steps)]
    after = runner.counters()
    ratio = _ratio(runner)
    runner.shares(trace=True)
    for _ in range(2):
        decoding.step()
    sample = sample_of(runner, times, before, after, runner.shares(trace=False), ratio)
    if sample.attention_s is None and isinstance(runner, StrategyRunner):
        # Whole layers were done in one call. What attention is of it shows where they are not.
        runner.apart(True)
        sample = replace(sample, attention_s=_median([decoding.step().attention_s for _ in range(3)]))
        runner.apart(False)
    return sample


def _ratio(runner: Runner) -> float | None:
    if not isinstance(runner, StrategyRunner) or runner.session is None or runner.flow is Flow.TSDP:
        return None
    split = runner.session.split
    return split.stats.ratios[-1] if split is not None and split.stats.ratios else None


def sweep(
    runner: StrategyRunner,
    decoding: Decoding,
    length: int,
    ratios: Sequence[float | None],
    rounds: int,
) -> dict[float | None, Sample]:
    """Decode steps (without the product with the vocabulary) under several offload ratios in turns; None adapts.

    The turns make drift of the machine and of the growing sequence the same for all. The controller sees its own steps only.
    Raises: UsageError without a limited prover.
    """
    split = None if runner.session is None else runner.session.split
    if split is None:
        raise UsageError("an offload ratio needs --prover-kv-tokens", hint="for example --prover-kv-tokens 0")
    decoding.free()
    decoding.fill(length)
    split.restart_controller()
    for ratio in ratios:
        split.fix_ratio(ratio)
        for _ in range(ADAPTING_STEPS if ratio is None else COMPILING_STEPS if runner.compiles else 1):
            decoding.step("none")
    times: dict[float | None, list[StepTime]] = {ratio: [] for ratio in ratios}
    readings: dict[float | None, list[tuple[Counters, Counters]]] = {ratio: [] for ratio in ratios}
    chosen: dict[float | None, float] = {}
    for _ in range(rounds):
        for ratio in ratios:
            split.fix_ratio(ratio)
            decoding.step("none")
            before = runner.counters()
            times[ratio].append(decoding.step("none"))
            chosen[ratio] = split.stats.ratios[-1]
            readings[ratio].append((before, runner.counters()))
    return {r: sample_of(runner, times[r], readings[r][0][0], _sum(readings[r]), None, chosen[r]) for r in ratios}
