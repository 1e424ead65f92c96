"""`redteam`: lie to the verifier many times, and count what it catches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from veriattn.cli.inputs import model_option, read_text, refuse_given
from veriattn.cli.output import Progress, error_json, json_option, note, print_error, print_json
from veriattn.errors import EXIT_INTERNAL, EXIT_OK, InternalError, UsageError
from veriattn.home import resolve_model


@click.command()
@model_option
@click.option("--trials", type=click.IntRange(min=1), default=200, show_default=True, help="Random faults to inject.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed that chooses the faults.")
@click.option("--attack", "attacks", multiple=True, metavar="PATTERN",
              help="Only attacks of such names (bit/*, header_*). May be given several times.")  # fmt: skip
@click.option("--kv-leak", is_flag=True,
              help="Instead: reconstruct prompts from a leaked key/value cache, with and without --kv-shield.")  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Text to take prompts from (--kv-leak).")  # fmt: skip
@click.option(
    "--prompts", type=click.IntRange(min=1), default=20, show_default=True, help="Prompts of 64 to 256 tokens."
)
@json_option
def redteam(
    model: str,
    trials: int,
    seed: int,
    attacks: tuple[str, ...],
    kv_leak: bool,
    text: Path | None,
    prompts: int,
    as_json: bool,
) -> int:
    """Tampering campaign: lying provers, a fresh session after every reject, honest twins in between.

    Reports trials, detections and error codes per attack. A lie that was not met by its error, anything released from a
    wrong claim, or an honest prover that was rejected ends the command with exit code 1.

    \b
    Example:
      veriattn redteam -m smollm2 --trials 50
      veriattn redteam -m smollm2 --attack "bit/*" --json
      veriattn redteam -m smollm2 --kv-leak --text valid.txt
    """
    if kv_leak:
        refuse_given(("trials", "seed", "attacks"), "--kv-leak has no such thing")
        return _kv_leak(resolve_model(model), text, prompts, as_json)
    refuse_given(("text", "prompts"), "only --kv-leak takes prompts")
    # A lying prover has no business in the process of any other command.
    from veriattn.redteam.campaign import run  # noqa: PLC0415

    path = resolve_model(model)
    progress = Progress()
    try:
        result = run(path, trials, seed, list(attacks) or None, lambda done, total: progress("trials", done, total))
    finally:
        progress.close()
    failed = InternalError(
        f"the campaign found {result['failures']} failures", hint="report it privately, see SECURITY.md"
    )
    if as_json:
        print_json(result if result["ok"] else {**result, "error": error_json(failed)})
    else:
        _show(result)
    if result["ok"]:
        note("every lie was met by its error, and no honest claim was rejected")
        return EXIT_OK
    print_error(failed)
    return failed.exit_code


def _kv_leak(path: Path, text: Path | None, prompts: int, as_json: bool) -> int:
    # Lying and leaking provers have no business in the process of any other command.
    from veriattn.redteam.kv_leak import run  # noqa: PLC0415

    if text is None:
        raise UsageError("--kv-leak needs prompts of real text", hint="--text FILE, a few thousand words")
    content = read_text(text)
    progress = Progress()
    try:
        result = run(path, content, prompts, lambda case, done, total: progress(f"shield {case}", done, total))
    finally:
        progress.close()
    if as_json:
        print_json(result)
    else:
        click.echo(f"{result['prompts']} prompts, {result['prompt_tokens']} tokens; recovered share of tokens:")
        for name, case in result["cases"].items():
            for where in ("cache", "memory"):
                rates = "  ".join(f"{attack} {score['rate']:.3f}" for attack, score in case[where].items())
                click.echo(f"{name:10} {where:7} {rates}")
        for name, count in result["after_end"].items():
            click.echo(f"after the end, {name}: {count['found']} of {count['rows']} rows left in memory")
    return EXIT_OK if result["same_tokens"] else EXIT_INTERNAL


def _show(result: dict[str, Any]) -> None:
    width = max(map(len, result["attacks"]), default=0)
    for name, tally in result["attacks"].items():
        codes = ", ".join(f"{code} {count}" for code, count in sorted(tally["codes"].items()))
        click.echo(f"{name:{width}}  {tally['detections']}/{tally['trials']}  {codes}")
    for where in ("strategies", "links"):
        click.echo(", ".join(f"{n} {t['detections']}/{t['trials']}" for n, t in result[where].items()))
    honest = result["honest"]
    click.echo(
        f"honest: {honest['runs']} runs in {honest['sessions']} sessions, {honest['checks']} checks, "
        f"{honest['false_rejects']} rejected"
    )
    for example in result["failure_examples"]:
        click.echo(f"FAILURE {example}")
