"""What documents name is there: commands, options, files, tests, modules, targets of make; and links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import click
import pytest
from tests.helpers import make_model

from veriattn.cli import main
from veriattn.cli.app import app
from veriattn.errors import VeriattnError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
TEXT = {name: path.read_text(encoding="utf-8") for name, path in zip(NAMES, DOCUMENTS, strict=True)}

#: Options of other people's programs that documents show.
FOREIGN = {
    "--cap-add", "--cap-drop", "--extra", "--fmad", "--generate-hashes", "--no-annotate", "--no-header",
    "--python-version", "--read-only", "--rm", "--tmpfs", "--ulimit", "--user",
}  # fmt: skip
#: Programs of ours beside `veriattn`.
PROGRAMS = ("src/veriattn/prover/__main__.py", "tools/build_native.py", "benchmarks/gpu/__main__.py")
#: Files that are made at run time, or belong to the system.
MADE = {"gpu.jsonl", "manifest.json", "quality.json", "tokenizer.json", "config.json", "/etc/veriattn/serve.toml"}


def snippets(text: str) -> list[str]:
    """Command lines that begin with `veriattn`, from blocks of code and from code in a sentence."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"^    (veriattn .*)$", text, re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(veriattn [^`]*)`", text)
    return [line for line in lines + inline if re.match(r"veriattn [a-z]", line)]


def check_command(line: str) -> None:
    """Parse a command line as the program would, without running it."""
    _, name, *arguments = shlex.split(line.replace("$DIGEST", "0" * 64), comments=True)
    command = app.commands[name]
    while isinstance(command, click.Group) and arguments:
        name, command = arguments[0], command.commands[arguments.pop(0)]
    if not arguments:
        return
    # What must be given may be left out in prose; what is written must exist.
    for parameter in command.params:
        parameter.required = False
    command.make_context(name, list(arguments), resilient_parsing=False)


def options(command: click.Command) -> list[list[str]]:
    """The spellings of each option of a command and of those below it."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    own = [p.opts for p in command.params if isinstance(p, click.Option)]
    return own + [opts for child in below for opts in options(child)]


@cache
def known_options() -> set[str]:
    ours = {o for program in PROGRAMS for o in re.findall(r'"(--[a-z-]+)"', (ROOT / program).read_text())}
    return {o for opts in options(app) for o in opts} | ours | FOREIGN | {"--help"}


@cache
def files() -> list[str]:
    """Every file of the project: tracked, or not there in git yet."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0:
        return listed.stdout.splitlines()
    return [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]


def unknown_options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known_options()


def broken_links(place: Path, text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)#]+)", text)
    return [t for t in targets if not t.startswith("https://") and not (place / t).exists()]


def missing_files(text: str) -> set[str]:
    # Figures are no part of a source archive.
    here = (ROOT / "benchmarks" / "results").exists()
    named = set(re.findall(r"`([\w./-]+\.(?:py|cpp|h|md|jsonl?|txt|toml|lock|service|svg|png))`", text)) - MADE
    named = {n for n in named if here or not n.startswith("benchmarks/results/")}
    return {n for n in named if not any(f == n or f.endswith("/" + n) for f in files())}


def missing_tests(text: str) -> set[str]:
    """Names such as `adversary/test_killed`, `test_killed::test_silence_*` and, after one of these, `test_other_name`."""
    out = set()
    for module, name in re.findall(r"`((?:\w+/)*test_\w+)(?:::(test_\w+\*?))?`", text):
        holders = [f for f in files() if f.startswith("tests/") and f.endswith(f"/{module}.py")]
        wanted = name or ("" if holders else module)
        pattern = "^def " + wanted.replace("*", r"\w*") + r"\b"
        places = holders or [f for f in files() if f.startswith("tests/") and f.endswith(".py")]
        if wanted and not any(re.search(pattern, (ROOT / f).read_text(), re.MULTILINE) for f in places):
            out.add(f"{module}::{name}")
    return out


def missing_modules(text: str) -> set[str]:
    named = set(re.findall(r"python -m ((?:veriattn|benchmarks|tests)[\w.]*)", text))
    return {n for n in named if not _has_module(n)}


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def missing_targets(text: str) -> set[str]:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return set(re.findall(r"`make ([a-z-]+)", text)) - targets


@pytest.mark.parametrize(("document", "line"), [(name, line) for name, text in TEXT.items() for line in snippets(text)])
def test_commands_parse(document: str, line: str) -> None:
    check_command(line)


@pytest.mark.parametrize("document", NAMES)
def test_what_a_document_names_is_there(document: str) -> None:
    text = TEXT[document]
    assert not unknown_options(text)
    assert not broken_links((ROOT / document).parent, text)
    assert not missing_files(text)
    assert not missing_tests(text)
    assert not missing_modules(text)
    assert not missing_targets(text)


def test_every_option_is_in_some_document() -> None:
    shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", "\n".join(TEXT.values())))
    assert not [opts for opts in options(app) if not set(opts) & shown]


def table(text: str, heading: str) -> list[list[str]]:
    """Rows of the tables below a heading."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ", maxsplit=1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in row] for row in rows]


def test_error_codes_are_those_there_are() -> None:
    def tree(kind: type[VeriattnError]) -> dict[str, int]:
        ours = [child for child in kind.__subclasses__() if child.__module__.startswith("veriattn.")]
        below = {code: number for child in ours for code, number in tree(child).items()}
        return {kind.code: kind.exit_code, **below}

    for module in ("veriattn.attest.quotes", "veriattn.cli.output", "veriattn.wire.messages"):
        importlib.import_module(module)
    rows = table(TEXT["docs/command-line.md"], "Exit codes and errors")[1:]
    shown = {code: int(number) for number, _, codes in rows for code in re.findall(r"`([a-z_]+)`", codes)}
    # Never raised as such, or on the prover's side, where nobody sees a code.
    unseen = {"error", "verification", "bad_request", "verifier_gone"}
    assert shown == {code: number for code, number in tree(VeriattnError).items() if code not in unseen}


def test_the_json_of_generate_is_what_its_table_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "model")
    arguments = ["--strategy", "full-tee", "--raw", "hello", "--max-tokens", "1", "--logprobs", "0", "--json"]
    assert main(["generate", "-m", str(tmp_path / "model"), *arguments]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = table(TEXT["docs/command-line.md"], "`generate`")
    exact = [row[0] for row in rows[rows.index(["JSON", ""]) + 1 :] if "`numerics`" not in row[0]]
    shown = {name for cell in exact for name in re.findall(r"`([a-z_]+)`", re.sub(r"\{.*?\}|\(.*?\)", "", cell))}
    assert shown == set(found)


def test_the_checks_can_fail() -> None:
    for line in ("veriattn generate --no-such-option x", "veriattn eval -m a --max-tokens many"):
        with pytest.raises(click.UsageError):
            check_command(line)
    with pytest.raises(KeyError):
        check_command("veriattn improve")
    assert unknown_options("`--no-such-option`") == {"--no-such-option"}
    assert broken_links(ROOT, "[text](docs/nowhere.md)") == ["docs/nowhere.md"]
    assert missing_files("`nowhere.py`") == {"nowhere.py"}
    assert missing_tests("`adversary/test_nothing` `test_killed::test_nothing`")
    assert missing_modules("python -m veriattn.nothing") and missing_modules("python -m benchmarks.no.such")
    assert missing_targets("`make coffee`") == {"coffee"}
