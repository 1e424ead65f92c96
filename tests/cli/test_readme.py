"""README and help agree: every command and option that a document shows exists, and every command is shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from veriattn.cli.app import app
from veriattn.engine.strategies import STRATEGIES
from veriattn.errors import VeriattnError

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "serving.md", ROOT / "docs" / "benchmarks.md"]


def snippets(text: str) -> list[str]:
    """Command lines that begin with `veriattn`, from blocks of code and from code in a sentence."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(veriattn [^`]*)`", text)
    return [line for line in lines + inline if re.match(r"veriattn [a-z]", line)]


def check(line: str) -> None:
    """Parse a command line as the program would, without running it."""
    _, name, *arguments = shlex.split(line, comments=True)
    command = app.commands[name]
    if isinstance(command, click.Group) and arguments:
        name, command = arguments[0], command.commands[arguments.pop(0)]
    if not arguments:
        return
    # An option that must be given may be left out in prose; what is written must exist.
    for parameter in command.params:
        parameter.required = False
    command.make_context(name, list(arguments), resilient_parsing=False)


SNIPPETS = [(path.relative_to(ROOT), line) for path in DOCUMENTS for line in snippets(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("document", "line"), SNIPPETS)
def test_what_documents_show_exists(document: Path, line: str) -> None:
    check(line)


def test_the_check_can_fail() -> None:
    for line in ("veriattn generate --no-such-option x", "veriattn eval -m a --max-tokens many"):
        with pytest.raises(click.UsageError):
            check(line)
    with pytest.raises(KeyError):
        check("veriattn improve")


def test_every_command_and_strategy_is_in_the_readme() -> None:
    shown = {line.split()[1] for line in snippets(README)}
    assert shown >= set(app.commands)
    for strategy in STRATEGIES:
        assert f"`{strategy}`" in README


@pytest.mark.parametrize("name", sorted(app.commands))
def test_every_help_has_an_example_that_parses(name: str) -> None:
    command = app.commands[name]
    text = command.help or ""
    assert "Example:" in text
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith("veriattn ")]
    assert examples and all(line.split()[1] == name for line in examples)
    for line in examples:
        check(line)


def leaves(group: click.Group) -> list[click.Command]:
    return [leaf for c in group.commands.values() for leaf in (leaves(c) if isinstance(c, click.Group) else [c])]


def test_every_command_has_json_and_says_what_options_do() -> None:
    for command in leaves(app):
        options = [p for p in command.params if isinstance(p, click.Option)]
        assert any("--json" in p.opts for p in options)
        assert all(p.help for p in options)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_exit_codes_are_those_of_the_errors() -> None:
    def tree(kind: type[VeriattnError]) -> set[int]:
        return {kind.exit_code}.union(*map(tree, kind.__subclasses__()))

    codes = {int(n) for n in re.findall(r"(\d+) (?:good|internal|usage|verification|prover|bad|interrupted)", README)}
    assert codes == tree(VeriattnError) | {0, 130}
