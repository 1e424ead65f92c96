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
from veriattn.cli.output import Interrupted, error_json, print_error, print_json
from veriattn.cli.receipt import receipt
from veriattn.cli.redteam import redteam
from veriattn.cli.serve import api_key, serve
from veriattn.errors import EXIT_INTERNAL, EXIT_OK, EXIT_USAGE, MachineError, UsageError, VeriattnError

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _open_standard_streams()
    # Clean up on SIGTERM as on Ctrl-C: end the prover, say what was verified so far.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = app.main(args=arguments, prog_name="veriattn", standalone_mode=False)
    except click.ClickException as error:
        return _fail(UsageError(" ".join(error.format_message().split())), arguments)
    except (click.Abort, KeyboardInterrupt):
        return _fail(Interrupted("interrupted"), arguments)
    except VeriattnError as error:
        return _fail(error, arguments)
    except BrokenPipeError:
        # The reader went away; nothing more can be told, and the interpreter must not try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INTERNAL
    except OSError as error:
        where = "" if error.filename is None else f": {error.filename}"
        return _fail(MachineError(f"{error.strerror or error}{where}"), arguments)
    except MemoryError:
        return _fail(MachineError("not enough memory"), arguments)
    return result if isinstance(result, int) else EXIT_OK


def _open_standard_streams() -> None:
    """Give standard streams that were closed somewhere to lead: descriptors 0 to 2 must not become sockets and files."""
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


def _fail(error: VeriattnError, arguments: Sequence[str]) -> int:
    if error.hint is None and error.exit_code == EXIT_USAGE:
        error.hint = f"`{' '.join(_named(arguments))} --help` says what is possible"
    print_error(error)
    if "--json" in arguments:
        print_json({"error": error_json(error)})
    return error.exit_code


def _named(arguments: Sequence[str]) -> list[str]:
    """The command that the arguments begin with, as far as there is one."""
    names, command = ["veriattn"], app
    for word in arguments:
        found = command.commands.get(word)
        if found is None:
            break
        names.append(word)
        if not isinstance(found, click.Group):
            break
        command = found
    return names
