"""What every command prints: results on standard output, progress, errors and hints on standard error."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import click

from veriattn.errors import EXIT_INTERRUPTED, VeriattnError

UNVERIFIED_MARK = "[UNVERIFIED] "

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of the output.")


def print_json(data: Mapping[str, Any]) -> None:
    """The one JSON object of a command, on a line of its own."""
    click.echo(json.dumps(data, ensure_ascii=False, allow_nan=False))


def error_json(error: VeriattnError) -> dict[str, Any]:
    """An error as it stands under `error` in JSON."""
    return {"code": error.code, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}


def print_error(error: VeriattnError) -> None:
    """`error[code]: message`, and `hint: ...` where there is one."""
    click.echo(f"error[{error.code}]: {error.message}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)


def note(text: str) -> None:
    """A line for people."""
    click.echo(text, err=True)


class Interrupted(VeriattnError):
    """Ctrl-C or SIGTERM."""

    code = "interrupted"
    exit_code = EXIT_INTERRUPTED


class Progress:
    """Progress on standard error: one line that rewrites itself on a terminal, one line per stage elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown_at = 0.0
        self._stage = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        stage = what.split(" ", 1)[0]
        if self._live:
            now = time.monotonic()
            if now - self._shown_at < 0.1 and done < total:
                return
            self._shown_at = now
            share = f" {100 * done // total:3d}%" if total else ""
            sys.stderr.write(f"\r\x1b[K{what}{share}")
            sys.stderr.flush()
        elif stage != self._stage:
            note(f"{what} ...")
        self._stage = stage

    def close(self) -> None:
        """Clear the line."""
        if self._live and self._stage:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def bytes_of(self, what: str, total: int) -> Callable[[int], None]:
        """A callback that adds up sizes."""
        seen = 0

        def add(size: int) -> None:
            nonlocal seen
            seen += size
            self(what, min(seen, total), total)

        return add


# All that moves a cursor or starts a command of a terminal: text of a model must not repaint what stands above it.
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029], "\ufffd") | {0x0A: "\n", 0x09: "\t"}


class TextStream:
    """Released text, written at once; with a mark, at the beginning of every line.

    On a terminal, and wherever there is a mark, control characters are shown as U+FFFD.
    """

    def __init__(self, mark: str = "", *, to_stderr: bool = False) -> None:
        self._file = sys.stderr if to_stderr else sys.stdout
        self._mark = mark
        self._tame = bool(mark) or self._file.isatty()
        self._line_open = False

    def write(self, text: str) -> None:
        """Show `text`."""
        text = text.translate(_CONTROLS) if self._tame else text
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            if self._mark and not self._line_open:
                self._file.write(self._mark)
            self._file.write(line)
            self._line_open = not line.endswith("\n")
        self._file.flush()

    def end(self) -> None:
        """Finish the line that is open."""
        if self._line_open:
            self._file.write("\n")
            self._file.flush()
            self._line_open = False
