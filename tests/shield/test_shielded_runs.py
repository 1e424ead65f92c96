"""Shielded runs: the same tokens, scrambled memory at the prover, refused where it cannot work, lies caught all the same."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tests.helpers import make_model

from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.errors import UsageError
from veriattn.native import kernels
from veriattn.redteam.kv_leak import leak_of
from veriattn.redteam.public_model import PublicModel

PROMPTS = ((1, 5, 9, 2, 7, 7, 3, 11, 4, 8), (6, 2, 2, 9, 13, 1), (3, 3, 3, 8), (10, 4, 12, 5, 6, 7, 8, 9))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shield")
    make_model(directory / "tiny")
    return directory / "tiny"


def answers(model: Path, prompts: tuple[tuple[int, ...], ...], **settings: object) -> list[list[int]]:
    with Engine(model, EngineConfig(**settings)) as engine:  # type: ignore[arg-type]
        states = engine.generate([Request(p, max_tokens=6, ignore_eos=True) for p in prompts])
        return [s.output_ids for s in states]


@pytest.mark.parametrize("strategy", ["veriattn", "tsdp"])
@pytest.mark.parametrize(("mode", "own"), [("static", 0), ("session", 0), ("session", 1), ("off", 1)])
def test_the_same_tokens_as_without(tiny: Path, strategy: str, mode: str, own: int) -> None:
    plain = answers(tiny, PROMPTS)
    shielded = {"strategy": strategy, "kv_shield": mode, "shield_first_layers": own}
    assert answers(tiny, PROMPTS, **shielded) == plain
    assert answers(tiny, PROMPTS[:1], **shielded) == plain[:1]


@pytest.mark.parametrize("limit", [0, 3])
def test_with_keys_that_the_prover_cannot_hold(tiny: Path, limit: int) -> None:
    plain = answers(tiny, PROMPTS)
    for strategy in ("veriattn", "tsdp"):
        settings = {"strategy": strategy, "kv_shield": "session", "prover_kv_tokens": limit, "offload_ratio": 1.0}
        assert answers(tiny, PROMPTS, **settings) == plain


@pytest.mark.parametrize("strategy", ["run-ahead", "dangerous-unverified", "full-tee"])
@pytest.mark.parametrize("settings", [{"kv_shield": "static"}, {"shield_first_layers": 1}])
def test_refused_where_the_prover_would_need_the_order(tiny: Path, strategy: str, settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="KV shield") as caught:
        answers(tiny, PROMPTS[:1], strategy=strategy, **settings)
    assert caught.value.hint


@pytest.mark.parametrize(("mode", "scrambled"), [("off", False), ("static", True), ("session", True)])
def test_the_provers_memory_holds_no_unpermuted_values(tiny: Path, tmp_path: Path, mode: str, scrambled: bool) -> None:
    """Read out of a prover that writes its memory down; and nothing of a sequence is left once it has ended."""
    tmp_path.chmod(0o777)
    leak, _ = leak_of(tiny, PROMPTS[0], mode, 0, tmp_path)
    expected = PublicModel(tiny, kernels).cached_values(PROMPTS[0], 0)
    held = leak.cache["0.v"][: len(PROMPTS[0])]
    assert np.array_equal(held, expected) is not scrambled
    assert np.array_equal(np.sort(np.abs(held), axis=2), np.sort(np.abs(expected), axis=2))
    assert leak.left_bytes == 0


def test_the_prover_never_sees_the_first_layers(tiny: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    leak, _ = leak_of(tiny, PROMPTS[0], "session", 1, tmp_path)
    assert not any(name.startswith("0.") for name in leak.cache)
    assert "input.layers.0.qkv" not in leak.seen
    assert sys.modules.get("veriattn.redteam.leaky") is None
