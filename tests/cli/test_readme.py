"""README and help agree: every command is shown, with the exit codes there are; every help has an example that parses."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from tests.test_documents import check_command, snippets

from veriattn.cli.app import app
from veriattn.engine.strategies import STRATEGIES
from veriattn.errors import VeriattnError

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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
        check_command(line)


def leaves(group: click.Group) -> list[click.Command]:
    return [leaf for c in group.commands.values() for leaf in (leaves(c) if isinstance(c, click.Group) else [c])]


def test_every_command_has_json_and_says_what_options_do() -> None:
    for command in leaves(app):
        options = [p for p in command.params if isinstance(p, click.Option)]
        assert any("--json" in p.opts for p in options)
        assert all(p.help for p in options)


def test_exit_codes_are_those_of_the_errors() -> None:
    def tree(kind: type[VeriattnError]) -> set[int]:
        return {kind.exit_code}.union(*map(tree, kind.__subclasses__()))

    codes = {int(n) for n in re.findall(r"(\d+) (?:good|internal|usage|verification|prover|bad|interrupted)", README)}
    assert codes == tree(VeriattnError) | {0, 130}
