"""`--kv-shield` at the command line: the same tokens, named in the JSON, refused where the prover would need the order."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.conftest import Cli

ASK = ("--raw", "hello there", "--max-tokens", 4, "--json")


@pytest.mark.parametrize("strategy", ["veriattn", "tsdp"])
def test_the_json_says_which_shield(cli: Cli, tiny: Path, strategy: str) -> None:
    plain = cli("generate", "-m", tiny, *ASK).json
    for mode, more in (("static", ()), ("session", ("--shield-first-layers", 1, "--prover-kv-tokens", 3))):
        got = cli("generate", "-m", tiny, *ASK, "--strategy", strategy, "--kv-shield", mode, *more).json
        assert (got["kv_shield"], got["verified"], got["soundness_bits"]) == (mode, True, plain["soundness_bits"])
        assert got["token_ids"] == plain["token_ids"]


@pytest.mark.parametrize("strategy", ["run-ahead", "full-tee", "dangerous-unverified"])
@pytest.mark.parametrize("shield", [("--kv-shield", "static"), ("--shield-first-layers", 1)])
def test_refused_with_a_hint(cli: Cli, tiny: Path, strategy: str, shield: tuple[object, ...]) -> None:
    done = cli("generate", "-m", tiny, *ASK, "--strategy", strategy, *shield)
    assert done.code == 2
    assert "KV shield" in done.err
    assert ("leave --kv-shield out" if strategy == "full-tee" else "use --strategy veriattn") in done.err
