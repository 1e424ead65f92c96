"""What several commands take: shared options, text files, digests, commands of provers, and files to be written."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

import click
from click.core import ParameterSource

from veriattn.errors import ModelError, UsageError


def check_digest(
    _context: click.Context, _parameter: click.Parameter, value: str | tuple[str, ...] | None
) -> str | tuple[str, ...] | None:
    """Callback of options that take SHA-256 digests: in lower case from here on. Raises: click.BadParameter."""
    given = [] if value is None else [value] if isinstance(value, str) else value
    digests = tuple(text.lower() for text in given)
    for text in digests:
        if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
            raise click.BadParameter(f"{text!r} is not 64 hexadecimal digits")
    return digests if isinstance(value, tuple) else next(iter(digests), None)


threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads of the native kernels.  [default: all cores]"
)
model_option = click.option("-m", "--model", required=True, metavar="MODEL", help="A model directory or a pulled name.")


def read_text(path: Path) -> str:
    """A text file. Raises: ModelError where it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint="name a text file") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text (byte {error.start})", hint="save it as UTF-8") from error


def prover_words(text: str | None) -> tuple[str, ...] | None:
    """The words of --prover-command. Raises: UsageError."""
    if text is None:
        return None
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--prover-command cannot be split into words: {error}") from error
    if not words:
        raise UsageError("--prover-command is empty", hint="leave it out for the built-in prover")
    return words


def refuse_given(names: Iterable[str], why: str) -> None:
    """Raises: UsageError where one of these options of the running command was given."""
    context = click.get_current_context()
    written = {p.name: p.opts[-1] for p in context.command.params}
    for name in names:
        if context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT):
            raise UsageError(f"{written[name]}: {why}", hint="leave it out")


def check_writable(path: Path | None, *, makes_parents: bool = False) -> None:
    """Refuse a file that cannot be written before anything long is begun; it is opened later.

    makes_parents: whoever writes it makes the directories that are missing. Raises: UsageError.
    """
    if path is None:
        return
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if path.is_dir():
        why = "it is a directory"
    elif not place.is_dir() and place != path:
        why = f"{place} is not a directory"
    elif place not in (path, path.absolute().parent) and not makes_parents:
        why = f"there is no directory {path.parent}"
    elif not os.access(place, os.W_OK):
        why = "permission denied"
    else:
        return
    raise UsageError(f"cannot write {path}: {why}", hint="name a file in a directory that you may write to")
