"""Strategies over a real prover process: the reference's tokens, and what becomes of lies."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from veriattn.convert.float_reference import FloatReference, causal_attention
from veriattn.errors import AttentionMismatch, FreivaldsMismatch, ModelError, ProverFault, UsageError
from veriattn.floatmode.calibrate import calibrate
from veriattn.floatmode.engine import FloatConfig, FloatModel, FloatSession, open_checked, reference_greedy
from veriattn.floatmode.params import CheckParams, Tolerances
from veriattn.floatmode.trusted import Part, merge
from veriattn.verifier.tiling import Tiling

TOKENS = 6
# A calibration this short leaves tails; what is tested here is that honest claims pass and gross lies do not.
WIDE = CheckParams(factor=32.0)
CONFIGS = {
    "tsdp": FloatConfig("tsdp", params=WIDE),
    "veriattn": FloatConfig("veriattn", params=WIDE),
    "sequence": FloatConfig("veriattn", params=replace(WIDE, challenges="sequence")),
    "one-piece": FloatConfig("veriattn", params=WIDE, tiling=Tiling(1, 1, pipeline=False)),
    "split": FloatConfig("veriattn", params=WIDE, kv_tokens=9, offload_ratio=0.5),
    "all-here": FloatConfig("veriattn", params=WIDE, kv_tokens=0, offload_ratio=0.0),
    "all-streamed": FloatConfig("veriattn", params=WIDE, kv_tokens=0),
    "tsdp-streamed": FloatConfig("tsdp", params=WIDE, kv_tokens=5),
}
LIAR = Path(__file__).with_name("lying_prover.py")


@pytest.fixture(scope="module")
def expected(model: FloatModel, prompts: list[list[int]]) -> list[list[int]]:
    reference = FloatReference(model.source)
    return [reference_greedy(reference, p, TOKENS) for p in prompts]


@pytest.fixture(scope="module")
def tolerances(model: FloatModel, prompts: list[list[int]]) -> dict[str, Tolerances]:
    return {name: calibrate(model, CONFIGS[name], prompts, TOKENS) for name in ("veriattn", "tsdp")}


def test_full_tee(model: FloatModel, prompts: list[list[int]], expected: list[list[int]]) -> None:
    with open_checked(model, FloatConfig("full-tee")) as session:
        assert [list(session.generate(p, TOKENS)) for p in prompts] == expected
        assert session.pid is None


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_float32_gives_the_tokens_of_the_reference(
    name: str, model: FloatModel, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    config = CONFIGS[name]
    found = calibrate(model, config, prompts, TOKENS)
    with open_checked(model, config, found) as session:
        assert [list(session.generate(p, TOKENS)) for p in prompts] == expected
        assert session.pid not in (None, os.getpid())
        assert session.counts.linear_rows > 0
        assert session.counts.attention_rows > 0


@pytest.mark.parametrize("fmt", ["bfloat16", "float16"])
def test_half_formats_run(fmt: str, model: FloatModel, prompts: list[list[int]]) -> None:
    config = FloatConfig(format=fmt, params=WIDE)  # type: ignore[arg-type]
    found = calibrate(model, config, prompts, 2)
    with open_checked(model, config, found) as session:
        assert len(list(session.generate(prompts[0], 2))) == 2
    wide = calibrate(model, FloatConfig(params=WIDE), prompts[:1], 1)
    assert found.get("0.q") > 10 * wide.get("0.q")


@pytest.mark.parametrize(
    ("lie", "strategy", "error"),
    [
        ("linear", "veriattn", FreivaldsMismatch),
        ("exp", "veriattn", AttentionMismatch),
        ("zero", "veriattn", AttentionMismatch),
        ("outputs", "veriattn", AttentionMismatch),
        ("scores", "tsdp", AttentionMismatch),
        ("values", "tsdp", AttentionMismatch),
        ("short", "veriattn", ProverFault),
    ],
)
def test_a_gross_lie_is_rejected_and_ends_the_session(
    lie: str,
    strategy: str,
    error: type[ProverFault],
    model: FloatModel,
    prompts: list[list[int]],
    tolerances: dict[str, Tolerances],
) -> None:
    command = (sys.executable, str(LIAR), lie)
    config = FloatConfig(strategy, params=WIDE, prover_command=command)  # type: ignore[arg-type]
    with open_checked(model, config, tolerances[strategy]) as session:
        with pytest.raises(error):
            list(session.generate(prompts[1], 2))
        assert session.link is None


def test_an_honest_twin_of_the_liar_passes(
    model: FloatModel, prompts: list[list[int]], expected: list[list[int]], tolerances: dict[str, Tolerances]
) -> None:
    config = FloatConfig(params=WIDE, prover_command=(sys.executable, str(LIAR), "none"))
    with open_checked(model, config, tolerances["veriattn"]) as session:
        assert list(session.generate(prompts[1], 2)) == expected[1][:2]


def test_tolerances_are_kept_and_missed(model: FloatModel, tolerances: dict[str, Tolerances], tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    tolerances["veriattn"].save(file)
    assert Tolerances.load(file) == tolerances["veriattn"]
    with pytest.raises(ModelError):
        tolerances["veriattn"].get("9.none")
    with pytest.raises(ModelError):
        Tolerances.load(tmp_path / "none.json")
    file.write_text(file.read_text().replace('"q":', '"q": NaN, "x":'))
    with pytest.raises(ModelError):
        Tolerances.load(file)


def test_what_floating_point_does_not_have(model: FloatModel) -> None:
    with pytest.raises(UsageError):
        FloatConfig("run-ahead")  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        calibrate(model, FloatConfig("full-tee"), [[1]], 1)
    with FloatSession(model, FloatConfig("full-tee"), lambda _k, _r: True) as session, pytest.raises(UsageError):
        session.step([10**6])


def test_merge_of_parts_is_attention_over_all_keys() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((1, 4, 8), (2, 30, 8), (2, 30, 8)))
    parts = []
    for keys in (slice(0, 11), slice(11, 30)):
        s = (q.reshape(2, 2, 8) / np.float32(np.sqrt(8))) @ k[:, keys].swapaxes(1, 2)
        top = s.max(axis=2)
        e = np.exp(s - top[:, :, None])
        parts.append(Part(top, e.sum(axis=2), e @ v[:, keys]))
    out = merge(*parts).reshape(1, 4, 8)
    assert np.abs(out - causal_attention(q, k, v)).max() < 1e-6
    nothing = Part(np.full((2, 2), -np.inf, np.float32), np.zeros((2, 2), np.float32), np.zeros((2, 2, 8), np.float32))
    alone = parts[0].u / parts[0].z[:, :, None]
    assert np.array_equal(merge(parts[0], nothing), alone)


def test_the_exact_system_does_not_import_floating_point() -> None:
    code = (
        "import sys, veriattn.verifier.session, veriattn.engine.engine, veriattn.prover.serve, veriattn.server.app;"
        "sys.exit(any(m.startswith('veriattn.floatmode') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    also = code.replace("veriattn.server.app", "veriattn.floatmode.engine")  # the check can fail
    assert subprocess.run([sys.executable, "-c", also], check=False).returncode == 1


def test_the_trusted_side_does_not_import_torch() -> None:
    code = "import sys, veriattn.floatmode.calibrate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
