"""The command group, and what becomes of errors: one line with a code, a hint, and a documented exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import click

import veriattn
from veriattn.cli.bench import bench
from veriattn.cli.doctor import doctor
from veriattn.cli.floatmode import calibrate, reproduce
from veriattn.cli.generate import generate
from veriattn.cli.models import convert, evaluate, pull
from veriattn.cli.output import error_json, print_error, print_json
from veriattn.cli.receipt import receipt
from veriattn.cli.redteam import redteam
from veriattn.cli.serve import api_key, serve
from veriattn.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, UsageError, VeriattnError

EXIT_CODES = """\
\b
Exit codes: 0 good; 1 internal error; 2 usage; 3 verification failed;
4 prover unavailable; 5 bad model or input file; 130 interrupted."""


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(veriattn.__version__, prog_name="veriattn")
def app() -> None:
    """Verified LLM inference: an untrusted prover computes, this program checks every step before it shows a token.

    \b
    Example:
      veriattn pull smollm2
      veriattn generate -m smollm2 "Why is the sky blue?"
    """


for command in (pull, convert, generate, evaluate, redteam, serve, api_key, receipt, bench, doctor):
    app.add_command(command)
for command in (calibrate, reproduce):
    app.add_command(command)


class Interrupted(VeriattnError):
    """Ctrl-C or SIGTERM."""

    code = "interrupted"
    exit_code = EXIT_INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Clean up on SIGTERM as on Ctrl-C: end the prover, say what was verified so far.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = app.main(args=arguments, prog_name="veriattn", standalone_mode=False)
    except click.ClickException as error:
        return _fail(UsageError(error.format_message()), arguments)
    except (click.Abort, KeyboardInterrupt):
        return _fail(Interrupted("interrupted"), arguments)
    except VeriattnError as error:
        return _fail(error, arguments)
    except BrokenPipeError:
        # The reader went away; nothing more can be told, and the interpreter must not try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INTERNAL
    return result if isinstance(result, int) else EXIT_OK


def _fail(error: VeriattnError, arguments: Sequence[str]) -> int:
    if error.hint is None and error.exit_code == EXIT_USAGE:
        named = f" {arguments[0]}" if arguments and arguments[0] in app.commands else ""
        error.hint = f"`veriattn{named} --help` says what is possible"
    print_error(error)
    if "--json" in arguments:
        print_json({"error": error_json(error)})
    return error.exit_code
