"""`redteam` as people run it: all caught, counted, and a failure that ends it otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.cli.conftest import Cli

from veriattn.cli.app import app
from veriattn.redteam import campaign


def test_a_small_campaign(cli: Cli, tiny: Path) -> None:
    done = cli(
        "redteam", "-m", tiny, "--trials", 8, "--seed", 3, "--attack", "bit/*", "--attack", "element/*", "--json"
    )
    assert done.code == 0, done.err
    got = done.json
    assert got["ok"] is True and got["failures"] == 0 and got["honest"]["false_rejects"] == 0
    assert sum(a["trials"] for a in got["attacks"].values()) == 8
    assert all(a["detections"] == a["trials"] for a in got["attacks"].values())
    assert all(name.split("/")[0] in ("bit", "element") for name in got["attacks"])


def test_no_such_attack(cli: Cli, tiny: Path) -> None:
    done = cli("redteam", "-m", tiny, "--attack", "flattery", "--json")
    assert done.code == 2 and done.json["error"]["code"] == "usage" and "flattery" in done.json["error"]["message"]


@pytest.mark.parametrize("as_json", [True, False])
def test_a_miss_is_not_hidden(tiny: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    def run(*_: object) -> dict[str, Any]:
        return {
            "attacks": {"bit/o": {"trials": 2, "detections": 1, "redrawn": 0, "codes": {"ok": 1, "freivalds_mismatch": 1}}},
            "strategies": {"tsdp": {"trials": 2, "detections": 1}},
            "links": {"memfd": {"trials": 2, "detections": 1}},
            "honest": {"sessions": 1, "runs": 1, "checks": 9, "false_rejects": 0},
            "failures": 1,
            "failure_examples": ["bit/o: accepted"],
            "ok": False,
        }  # fmt: skip

    monkeypatch.setattr(campaign, "run", run)
    done = CliRunner().invoke(
        app, ["redteam", "-m", str(tiny), *(["--json"] if as_json else [])], standalone_mode=False
    )
    assert done.return_value == 1
    assert "error[internal]: the campaign found 1 failures" in done.stderr
    if as_json:
        assert json.loads(done.stdout.splitlines()[-1])["error"]["exit_code"] == 1
    else:
        assert "bit/o  1/2" in done.stdout and "tsdp 1/2\nmemfd 1/2\n" in done.stdout
        assert "FAILURE bit/o: accepted" in done.stdout
