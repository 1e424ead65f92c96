"""`calibrate`, `reproduce`, and what `generate` does with `--numerics float`: the paper's system in floating point."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from veriattn.cli.inputs import prover_words, read_text, refuse_given
from veriattn.cli.output import Progress, TextStream, error_json, json_option, note, print_error, print_json
from veriattn.convert.sources import open_source
from veriattn.errors import ModelError, VeriattnError
from veriattn.floatmode.calibrate import calibrate_and_save, calibration_prompts
from veriattn.floatmode.engine import FloatConfig, FloatModel, codec_of, open_checked, run_json, tolerance_file
from veriattn.floatmode.params import FORMATS, GUARANTEE, NOTICE, CheckParams
from veriattn.home import resolve_model, sources_directory
from veriattn.spec.modelfile import MANIFEST_FILE
from veriattn.verifier.tiling import Tiling

MARK = "[TOLERANCE] "
CHECK_OPTIONS = (
    "format_", "exp_format", "backend", "challenges", "n_a", "tau_a", "tau_g", "repetitions", "tolerance_factor",
)  # fmt: skip
_FLOAT_OPTIONS = {
    *CHECK_OPTIONS, "device", "system", "raw", "max_tokens", "strategy", "tiles", "prover_kv_tokens", "offload_ratio",
    "prover_command", "numerics", "threads",
}  # fmt: skip
_TEXT = Path(__file__).resolve().parents[1] / "convert" / "calibration.txt"


def find_source(model: str) -> Path:
    """The float checkpoint: a file or Hugging Face directory, or that which a canonical model was converted from.

    Raises: ModelError.
    """
    path = Path(model)
    if path.is_file() or (path / "config.json").is_file():
        return path
    directory = resolve_model(model)
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        digest = manifest["source"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        digest = None
    found = sources_directory() / f"{digest}.gguf"
    if digest is None or not found.is_file():
        raise ModelError(
            f"the float checkpoint of {model} is not here", hint="name it itself: -m WHEEL_OR_GGUF_OR_DIRECTORY"
        )
    return found


def check_options(function: Any) -> Any:
    """Options of the floating-point checks."""
    for option in reversed(
        [
            click.option("--format", "format_", type=click.Choice(FORMATS), default="float32", show_default=True,
                         help="In what the prover computes and answers."),
            click.option("--exp-format", type=click.Choice(FORMATS), help="Attention weights.  [default: see docs]"),
            click.option("--backend", type=click.Choice(["numpy", "torch"]), default="numpy", show_default=True,
                         help="What the prover computes with."),
            click.option("--device", default="cpu", show_default=True, help="Where the prover runs: cpu or cuda."),
            click.option("--challenges", type=click.Choice(["fresh", "sequence"]), default="fresh", show_default=True,
                         help="Attention's secret vectors: per call, or kept for a sequence (the paper's)."),
            click.option("--n-a", type=int, default=16, show_default=True, help="Coefficients are drawn from 1..N."),
            click.option("--tau-a", type=int, default=1, show_default=True, help="Coefficient vectors."),
            click.option("--tau-g", type=int, default=8, show_default=True, help="Gaussian factors per log-product."),
            click.option("--repetitions", type=int, default=3, show_default=True, help="Gaussian vectors per product."),
            click.option("--tolerance-factor", type=float, default=2.0, show_default=True,
                         help="Tolerance over the largest clean residual."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


def float_config(strategy: str, options: dict[str, Any], **more: Any) -> FloatConfig:
    """The configuration that the options describe. Raises: UsageError."""
    params = CheckParams(
        n_a=options["n_a"],
        tau_a=options["tau_a"],
        tau_g=options["tau_g"],
        repetitions=options["repetitions"],
        factor=options["tolerance_factor"],
        challenges=options["challenges"],
    )
    return FloatConfig(
        strategy,  # type: ignore[arg-type]
        backend=options["backend"],
        device=options["device"],
        format=options["format_"],
        exp_format=options["exp_format"],
        params=params,
        **more,
    )


@click.command()
@click.option("-m", "--model", required=True, metavar="SRC", help="A float checkpoint, or a pulled name.")
@click.option("--strategy", type=click.Choice(["veriattn", "tsdp"]), default="veriattn", show_default=True,
              help="Of which checks the tolerances are.")  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Text to take prompts from.  [default: one that ships]")  # fmt: skip
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens of a prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=16, show_default=True, help="Decoded after each.")
@check_options
@json_option
def calibrate(model: str, strategy: str, text: Path | None, as_json: bool, **options: Any) -> None:
    """Measure the tolerances of `--numerics float`: twice the largest residual of clean runs, ten repetitions.

    The prover is taken to be honest while this runs. Stored under $VERIATTN_HOME/tolerances with the checkpoint's digest.

    \b
    Example:
      veriattn calibrate -m smollm2 --format float32
    """
    config = float_config(strategy, options)
    source = open_source(find_source(model))
    codec = codec_of(source)
    prompts = calibration_prompts(codec.encode(read_text(text or _TEXT)), options["prompt_tokens"])
    progress = Progress()
    try:
        result = calibrate_and_save(
            FloatModel(source),
            config,
            prompts,
            options["max_tokens"],
            lambda done, total: progress("runs", done, total),
        )
    finally:
        progress.close()
    path = tolerance_file(result.digest, config)
    values = dict(sorted(result.values.items()))
    data = {"path": str(path), "model_digest": result.digest, "guarantee": GUARANTEE, "notice": NOTICE,
            "max_tokens": result.max_tokens, "tolerances": values}  # fmt: skip
    if as_json:
        print_json(data)
        return
    click.echo(f"{path}\n" + "\n".join(f"{kind:8} {value:.3e}" for kind, value in values.items()))
    note(NOTICE)


def generate_float(
    model: str, prompts: list[str], options: dict[str, Any], tiling: Tiling | None, *, single: bool, as_json: bool
) -> int:
    """`generate --numerics float`: greedy, one prompt after the other. Raises: VeriattnError."""
    refuse_given(sorted(set(options) - _FLOAT_OPTIONS), "--numerics float has no such thing")
    strategy = "veriattn" if options["strategy"] == "run-ahead" else options["strategy"]
    capacity, ratio = options["prover_kv_tokens"], options["offload_ratio"]
    config = float_config(
        strategy,
        options,
        prover_command=prover_words(options["prover_command"]),
        tiling=tiling,
        kv_tokens=1 << 30 if capacity is None else capacity,
        offload_ratio=1.0 if ratio is None else ratio,
    )
    source = open_source(find_source(model))
    codec, began = codec_of(source), time.perf_counter()
    stream, results = TextStream(MARK if strategy != "full-tee" else "", to_stderr=as_json), []
    failed: VeriattnError | None = None
    with open_checked(FloatModel(source), config) as session:
        for prompt in prompts:
            raw = options["raw"] or not codec.has_chat_template
            system = [] if options["system"] is None else [{"role": "system", "content": options["system"]}]
            ids = codec.encode(prompt) if raw else codec.encode_chat([*system, {"role": "user", "content": prompt}])
            out: list[int] = []
            start = time.perf_counter()
            first = start
            try:
                for token in session.generate(ids, options["max_tokens"], codec.eos_ids):
                    if not out:
                        first = time.perf_counter()
                    out.append(token)
            except VeriattnError as error:
                failed = error
            text = codec.decode(out)
            stream.write(text)
            stream.end()
            spent = time.perf_counter() - first
            results.append({
                "text": text, "token_ids": out, "prompt_tokens": len(ids), "ttft_s": first - start,
                "tpot_s": spent / (len(out) - 1) if len(out) > 1 else None,
            })  # fmt: skip
            if failed is not None:
                break
        data = run_json(session, results, began)
    if single:
        data.update(results[0])
    if failed is not None:
        print_error(failed)
        data = {"error": error_json(failed), "verified": False, "partial": {"results": results}}
    note(f"{MARK}{NOTICE}" if strategy != "full-tee" else "computed here, nothing outsourced (full-tee, float)")
    if as_json:
        print_json({**data, "model": {"name": model, "path": str(source.path), "digest": source.digest()}})
    return 0 if failed is None else failed.exit_code


@click.command()
@click.argument("what", type=click.Choice(["table1", "table2", "lemmas", "underflow", "attacks", "published"]))
@click.option("-m", "--model", metavar="SRC", help="A float checkpoint or a pulled name.")
@click.option("--exact-model", metavar="MODEL",
              help="attacks: the same ones on exact numerics with this canonical model.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("paper-results"),
              show_default=True, help="Where JSON and plot go.")  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Text for activations and calibration.  [default: one that ships]")  # fmt: skip
@click.option("--trials", type=click.IntRange(1), default=1000, show_default=True,
              help="Of each kind (`attacks` has counts of its own, but for --exact-model).")  # fmt: skip
@json_option
def reproduce(
    what: str, model: str | None, exact_model: str | None, out: Path, text: Path | None, trials: int, as_json: bool
) -> None:
    """Measure on this machine what the paper measured, or attack its tolerances; writes JSON and a plot.

    \b
    table1     check beside recompute; detections and false rejects over faulty and clean trials
    table2     top-1 agreement and logit differences against the float reference
    lemmas     measured false accepts beside the bounds of both lemmas
    underflow  score ranges at which half precision rejects honest rows
    attacks    what adaptive provers can change unnoticed
    published  figures of proof systems, with sources

    \b
    Example:
      veriattn reproduce table1 -m smollm2 --trials 1000
      veriattn reproduce lemmas --out results
    """
    # Experiments and attacks have no business in the process of any other command.
    from veriattn.floatmode.reproduce import run  # noqa: PLC0415

    result = run(
        what, out, source=None if model is None else find_source(model),
        exact_model=None if exact_model is None else resolve_model(exact_model), trials=trials,
        text=read_text(text or _TEXT), note=note,
    )  # fmt: skip
    if as_json:
        print_json(result)
    else:
        click.echo(f"{result['file']}\n{result['plot'] or 'no plot: matplotlib is not installed (the bench extra)'}")
    note(NOTICE)
