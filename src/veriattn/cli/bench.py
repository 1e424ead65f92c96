"""`bench`: kernels, prefill and decode, each beside the limits of the machine it runs on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from veriattn import doctor
from veriattn.bench import bars
from veriattn.bench import kernels as kernel_bench
from veriattn.bench import plot as pictures
from veriattn.bench.campaign import Plan, run
from veriattn.bench.report import (
    point_results,
    ratio_results,
    save,
    sweep_results,
    table,
    table_of_lines,
)
from veriattn.bench.runner import Setup
from veriattn.bench.shapes import SHAPES
from veriattn.cli.inputs import check_writable, prover_words
from veriattn.cli.output import json_option, note, print_json
from veriattn.engine.strategies import STRATEGIES, Strategy
from veriattn.errors import UsageError
from veriattn.home import resolve_model
from veriattn.verifier.launch import builtin_prover
from veriattn.wire.emulate import Throttle
from veriattn.wire.messages import AttentionCheck

_CHECKS = {"replay": AttentionCheck.REPLAY, "transfer": AttentionCheck.TRANSFER}


@click.group(no_args_is_help=False)
def bench() -> None:
    """Measure kernels, prompts and decoding, beside what this machine could do at best.

    \b
    Example:
      veriattn bench kernels
      veriattn bench prefill --shape llama-8b --layers 1 --lengths 1024,3072,6144 --emulate-link 15
    """


save_option = click.option(
    "--save", "save_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Append the results to FILE, one JSON object a line.",
)  # fmt: skip


def numbers(text: str, option: str, convert: Callable[[str], float] = float, example: str = "1,2,...,5") -> list[float]:
    """`a,b,c`, where `a,b,...,z` goes on in steps of b - a. Raises: UsageError."""
    out: list[float] = []
    words = [w.strip() for w in text.split(",")]
    try:
        for i, word in enumerate(words):
            if word != "...":
                out.append(convert(word))
                continue
            step, last = out[-1] - out[-2], convert(words[i + 1])
            if step <= 0:
                raise ValueError
            while out[-1] + 1.5 * step < last:
                out.append(convert(str(round(out[-1] + step, 9))))
    except (ValueError, IndexError):
        raise UsageError(
            f"{option} {text!r} is not a list of numbers", hint=f"for example {option} {example}"
        ) from None
    return out


def _ratios(text: str | None) -> tuple[tuple[float | None, ...], float | None]:
    """(ratios of a sweep, or none; the one ratio to use). Raises: UsageError."""
    if text is None or text == "auto":
        return (), None
    words = text.split(",")
    auto = words[-1].strip() == "auto"
    values = numbers(",".join(words[:-1] if auto else words), "--offload-ratio", example="0,.1,...,1")
    if any(not 0 <= v <= 1 for v in values):
        raise UsageError("an offload ratio lies between 0 and 1")
    if len(values) == 1 and not auto:
        return (), values[0]
    return (*values, *([None] if auto else [])), None


def _integers(text: str, option: str) -> tuple[int, ...]:
    def positive(word: str) -> int:
        value = int(float(word))
        if value < 1 or value != float(word):
            raise ValueError
        return value

    return tuple(int(v) for v in numbers(text, option, positive))


def _strategies(text: str) -> tuple[Strategy, ...]:
    names = [w.strip() for w in text.split(",")]
    for name in names:
        if name not in STRATEGIES:
            raise UsageError(f"unknown strategy {name!r}", hint=f"one or more of {','.join(STRATEGIES)}")
    return tuple(dict.fromkeys(s for s in STRATEGIES if s in names))


def measuring_options(lengths: str) -> Callable[[Any], Any]:
    """Options of `prefill` and `decode`."""
    options = [
        click.option("--shape", type=click.Choice(list(SHAPES)), default="llama-8b", show_default=True,
                     help="Whose sizes the random weights have."),
        click.option("--strategies", default=",".join(STRATEGIES), metavar="A,B,...", help="Which.  [default: all]"),
        click.option("--numerics", type=click.Choice(["exact", "float", "both"]), default="exact", show_default=True,
                     help="float: the paper's system, checked within a tolerance (docs/paper-mode.md)."),
        click.option("--lengths", default=lengths, show_default=True, metavar="N,N,...", help="In tokens, going up."),
        click.option("--batch", "batches", default="1", show_default=True, metavar="B,B,...",
                     help="Sequences at a time."),
        click.option("--layers", type=click.IntRange(min=1), metavar="N",
                     help="Run only N layers; times are scaled to the model's.  [default: all]"),
        click.option("--threads", type=click.IntRange(1, 1024), help="Threads of the TEE.  [default: all cores]"),
        click.option("--prover-threads", type=click.IntRange(1, 1024),
                     help="Threads of a CPU prover.  [default: as --threads]"),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
                     help="What the prover computes with."),
        click.option("--prover-command", metavar="CMD", help="Another program as the prover (docs/wire.md)."),
        click.option("--emulate-link", metavar="GBPS[,LATENCY_US]", help="Slow the link to the prover down."),
        click.option("--attention-check", type=click.Choice(sorted(_CHECKS)), default="replay", show_default=True,
                     help="Recompute attention scores, or have them sent and check those."),
        click.option("--prefill-chunk", type=click.IntRange(1, 1 << 16),
                     help="Most tokens of one step.  [default: 1024]"),
        click.option("--model-dir", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
                     help="Keep the random model here for the next run.  [default: a temporary directory]"),
        click.option("--rates-seconds", type=click.FloatRange(0, 600), default=4.0, show_default=True,
                     help="Time for measuring what the machine can do."),
        click.option("--plot", "plot_file", type=click.Path(path_type=Path), metavar="FILE",
                     help="Draw FILE.svg and FILE.png (needs matplotlib)."),
        save_option,
        json_option,
    ]  # fmt: skip

    def add(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return add


@bench.command()
@click.option("--seconds", type=click.FloatRange(0, 3600), default=20.0, show_default=True, help="About how long.")
@click.option("-m", "--model", metavar="MODEL", help="Also decode and read prompts with this model: verified and not.")
@save_option
@json_option
def kernels(seconds: float, model: str | None, save_file: Path | None, as_json: bool) -> None:
    """Native kernels on one core, beside memory bandwidth and multiplier of the same core.

    \b
    Example:
      veriattn bench kernels --seconds 10
      veriattn bench kernels -m smollm2
    """
    check_writable(save_file, makes_parents=True)
    path = None if model is None else resolve_model(model)
    note("measuring the kernels on one thread")
    results = [*kernel_bench.run(seconds), bars.verifier_memory()]
    if path is not None:
        note("measuring whole runs, on all cores")
        results += bars.whole_runs(path)
    if save_file is not None:
        save(save_file, doctor.origin(), results)
    click.echo(table_of_lines(results))
    if as_json:
        print_json({"results": results})


@bench.command()
@measuring_options("1024,3072,6144")
@click.option(
    "--repetitions", type=click.IntRange(1, 1000), default=3, show_default=True, help="Prompts of each length."
)
def prefill(repetitions: int, **options: Any) -> None:
    """Time to the first token's logits by strategy, length and batch; bytes, CPU time, idle shares, memory, floors.

    \b
    Example:
      veriattn bench prefill --shape llama-8b --layers 1 --lengths 1024,3072,6144 --threads 1 --emulate-link 15
    """
    _measure(_plan("prefill", repetitions, options), options)


@bench.command()
@measuring_options("2048,4096,6144,8192,10000")
@click.option("--steps", type=click.IntRange(1, 10000), default=9, show_default=True,
              help="Tokens timed at each length; rounds of a sweep.")  # fmt: skip
@click.option("--prover-kv-tokens", type=click.IntRange(min=0), metavar="C",
              help="Keys of one sequence that the prover keeps.  [default: all]")  # fmt: skip
@click.option("--offload-ratio", metavar="P|P,P,...,auto",
              help="Part of the other keys that is streamed; several are compared in turns.  [default: auto]")  # fmt: skip
def decode(steps: int, **options: Any) -> None:
    """Time per output token by strategy, length and batch; with several offload ratios, their comparison.

    Keys that the prover keeps come from running the model on a prompt; those beyond its capacity are made up, in the TEE.
    Sampling is not included. A sweep leaves the product with the vocabulary out.

    \b
    Example:
      veriattn bench decode --shape llama-8b --layers 1 --threads 1 --prover-kv-tokens 2000 --emulate-link 15
      veriattn bench decode --shape llama-8b --layers 1 --threads 1 --prover-kv-tokens 0 --strategies veriattn \\
        --lengths 2048,4096,8192 --batch 1,5 --offload-ratio 0,.1,...,1,auto
    """
    _measure(_plan("decode", steps, options), options)


def _plan(phase: str, steps: int, options: dict[str, Any]) -> Plan:
    link, threads = options["emulate_link"], options["threads"] or len(os.sched_getaffinity(0))
    ratios, ratio = _ratios(options.get("offload_ratio"))
    prover_threads = options["prover_threads"] or threads
    device = options["device"]
    command = _prover_command(options["prover_command"], device)
    setup = Setup(
        prefill_chunk=options["prefill_chunk"],
        attention_check=_CHECKS[options["attention_check"]],
        prover_kv_tokens=options.get("prover_kv_tokens"),
        offload_ratio=ratio,
        emulate_link=None if link is None else Throttle.parse(link),
        prover_command=command,
        prover_threads=prover_threads,
    )
    return Plan(
        phase=phase,
        shape=options["shape"],
        strategies=_strategies(options["strategies"]),
        lengths=_integers(options["lengths"], "--lengths"),
        batches=_integers(options["batches"], "--batch"),
        layers=options["layers"],
        device=device,
        threads=threads,
        prover_threads=prover_threads,
        setup=setup,
        ratios=ratios,
        steps=steps,
        rates_seconds=options["rates_seconds"],
        model_dir=options["model_dir"],
        numerics=options["numerics"],
    )


def _prover_command(text: str | None, device: str) -> tuple[str, ...] | None:
    built_in = None if device == "cpu" else builtin_prover(device)
    return prover_words(text) or built_in


def _measure(plan: Plan, options: dict[str, Any]) -> None:
    plan.check()
    check_writable(options["save_file"], makes_parents=True)
    plot_file: Path | None = options["plot_file"]
    if plot_file is not None:
        pictures.check(plot_file)
    points, rates = run(plan, note)
    conditions = plan.conditions()
    results = [r for p in points for r in point_results(conditions, p)]
    compared = sweep_results(conditions, points) if plan.ratios else ratio_results(conditions, points)
    results += compared
    machine = doctor.origin()
    if options["save_file"] is not None:
        save(options["save_file"], {**machine, **dataclasses.asdict(conditions)}, results)
    click.echo(table(conditions, points))
    if compared:
        click.echo("\n" + table_of_lines(compared))
    if plot_file is not None:
        for file in pictures.draw(plot_file, conditions, points):
            note(f"drew {file}")
    if options["as_json"]:
        link = plan.setup.emulate_link
        print_json(
            {
                "results": results,
                "points": [p.to_json() for p in points],
                "conditions": dataclasses.asdict(conditions),
                "emulated_link": None if link is None else {"gb_per_s": link.gb_per_s, "latency_us": link.latency_us},
                "rates": _finite(dataclasses.asdict(rates)),
                "machine": machine,
            }
        )


def _finite(value: Any) -> Any:
    """Infinite rates (no such limit) become None, for JSON."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if value == float("inf") else value
