"""Acceptance of the floating-point system on SmolLM2: tokens, Table 1, lemmas, and the attacks' exact twins. `make accept`."""

from __future__ import annotations

from pathlib import Path

import pytest

from veriattn.cli.floatmode import find_source
from veriattn.convert.float_reference import FloatReference
from veriattn.convert.sources import open_source
from veriattn.floatmode.calibrate import calibrate, calibration_prompts
from veriattn.floatmode.engine import FloatConfig, FloatModel, codec_of, open_checked, reference_greedy
from veriattn.floatmode.reproduce import exact_twins, lemmas, table1
from veriattn.floatmode.reproduce.heads import capture

pytestmark = pytest.mark.accept

PROMPTS = (
    "The capital of France is",
    "In 1969, the first humans",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "Once upon a time, in a small village,",
)
TOKENS, TRIALS = 64, 1000


@pytest.fixture(scope="module")
def model(smollm2: Path) -> FloatModel:
    return FloatModel(open_source(find_source(str(smollm2))))


@pytest.fixture(scope="module")
def text_ids(model: FloatModel) -> list[int]:
    text = Path(str(table1.__file__)).parents[2] / "convert" / "calibration.txt"
    return codec_of(model.source).encode(text.read_text(encoding="utf-8"))


@pytest.mark.parametrize("strategy", ["full-tee", "tsdp", "veriattn"])
def test_float32_gives_the_tokens_of_the_reference(strategy: str, model: FloatModel, text_ids: list[int]) -> None:
    config = FloatConfig(strategy)  # type: ignore[arg-type]
    found = None if strategy == "full-tee" else calibrate(model, config, calibration_prompts(text_ids, 128), 16)
    reference, codec = FloatReference(model.source), codec_of(model.source)
    with open_checked(model, config, found) as session:
        for prompt in PROMPTS:
            ids = codec.encode(prompt)
            assert list(session.generate(ids, TOKENS)) == reference_greedy(reference, ids, TOKENS)


def test_faults_of_the_paper(model: FloatModel, text_ids: list[int]) -> None:
    heads, kv = capture(model, text_ids[: table1.TRIAL_TOKENS]), model.config.num_kv_heads
    some = [heads[layer * kv + layer % kv] for layer in range(0, model.config.num_layers, 2)]
    for name, cell in table1.trials(some, ("float32", "float32"), TRIALS).items():
        print(
            f"\n{name}: {cell['detected']} of {cell['faulty']} found, {cell['false_rejects']} of {cell['clean']} rejected"
        )
        assert (cell["detected"], cell["false_rejects"]) == (TRIALS, 0)


def test_checks_cost_less_than_recomputing() -> None:
    for name, t in table1.times().items():
        print(f"\n{name}: check {t['check']:.5f} s, recompute {t['recompute']:.5f} s, ratio {t['ratio']:.3f}")
        assert t["ratio"] < 1


def test_lemmas() -> None:
    data = lemmas.measure(TRIALS)
    print(f"\nexcess over the bounds in standard errors: {data['worst_excess_in_standard_errors']}")
    assert max(data["worst_excess_in_standard_errors"].values()) < 6


def test_exact_numerics_catch_the_least_lie(smollm2: Path) -> None:
    result = exact_twins.measure(smollm2, 100, lambda _line: None)
    print(f"\n{result['detections']} of {result['trials']} caught, {result['honest']['false_rejects']} honest rejected")
    assert result["detections"] == result["trials"] > 0
    assert result["failures"] == result["honest"]["false_rejects"] == 0
