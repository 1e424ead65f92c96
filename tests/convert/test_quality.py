"""Quality figures: the streamed canonical model is the canonical model, and the figures are what they say they are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from tests.convert.models import MemorySource, float_model, random_windows, text_of
from tests.helpers import LocalModel

from veriattn.convert import quality
from veriattn.convert.converter import convert, default_calibration_text
from veriattn.convert.float_reference import FloatReference
from veriattn.errors import ModelError, UsageError
from veriattn.spec import reference
from veriattn.spec.modelfile import WEIGHTS_FILE, ModelDirectory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelDirectory, MemorySource]:
    source = float_model("qwen2", max_positions=1024)
    path = tmp_path_factory.mktemp("quality") / "model"
    convert(source, path, calibration_text=text_of(300), threads=1, kernels=reference)
    return ModelDirectory(path), source


def test_streamed_layers_give_the_logits_of_the_forward_pass(
    made: tuple[ModelDirectory, MemorySource], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, source = made
    windows = [*random_windows(source, 2, 40), random_windows(source, 1, 23, "short")[0]]
    # A small chunk and small blocks of the file make every loop take more than one turn.
    monkeypatch.setattr(quality, "_CHUNK_TOKENS", 16)
    monkeypatch.setattr("veriattn.spec.modelfile._CHUNK_BYTES", 4096)
    model = quality._CanonicalModel(directory, reference)
    whole, layers = LocalModel.open(directory.path), []
    states = model.hidden(windows, lambda: layers.append(1))
    assert len(layers) == directory.config.num_layers
    for window, state in zip(windows, states, strict=True):
        assert np.array_equal(model.logits(state), whole.run(window))


def test_figures_follow_their_definitions(made: tuple[ModelDirectory, MemorySource]) -> None:
    directory, source = made
    windows = random_windows(source, 3, 20)
    got = quality.evaluate(directory, source, windows, reference)
    whole = LocalModel.open(directory.path)
    nll, nll_reference, kl, agree, count = 0.0, 0.0, 0.0, 0, 0
    for window, expected in zip(windows, FloatReference(source).window_logits(windows), strict=True):
        canonical = whole.run(window)
        for t in range(len(window) - 1):
            p, q = (np.exp(np.longdouble(x[t]) - x[t].max()) for x in (expected, canonical))
            p, q = p / p.sum(), q / q.sum()
            nll_reference -= float(np.log(p[window[t + 1]]))
            nll -= float(np.log(q[window[t + 1]]))
            kl += float((p * np.log(p / q)).sum())
            agree += int(np.argmax(expected[t]) == np.argmax(canonical[t]))
            count += 1
    assert got.tokens == 60
    assert got.top1 == agree / count
    # These are informational floats, summed in float32 steps; the oracle is in extended precision.
    assert math.isclose(got.ppl, math.exp(nll / count), rel_tol=1e-5)
    assert math.isclose(got.ppl_reference, math.exp(nll_reference / count), rel_tol=1e-5)
    assert math.isclose(got.kl, kl / count, rel_tol=1e-3)
    assert got.to_json()["ppl_ratio"] == got.ppl / got.ppl_reference


def test_a_reference_too_large_to_hold_gives_the_same_figures(
    made: tuple[ModelDirectory, MemorySource], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, source = made
    windows = random_windows(source, 2, 30)
    held = quality.evaluate(directory, source, windows, reference)
    monkeypatch.setattr(quality, "_HELD_REFERENCE_BYTES", 0)
    streamed = quality.evaluate(directory, source, windows, reference)
    assert math.isclose(held.kl, streamed.kl, rel_tol=1e-4)
    assert held.top1 == streamed.top1


def test_progress_counts_to_its_total(made: tuple[ModelDirectory, MemorySource]) -> None:
    directory, source = made
    seen: list[tuple[int, int]] = []
    quality.evaluate(directory, source, random_windows(source, 3, 8), reference, lambda a, b: seen.append((a, b)))
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))
    assert {total for _, total in seen} == {directory.config.num_layers + 3 + 1}


def test_measure_reads_a_sample_that_calibration_does_not(made: tuple[ModelDirectory, MemorySource]) -> None:
    directory, source = made
    figures = quality.measure(directory, source, reference, tokens=300)
    assert figures.tokens == 300
    assert 0 < figures.kl < 0.1
    calibration = {line for line in default_calibration_text().splitlines() if line}
    sample = {line for line in quality.quality_text().splitlines() if line}
    assert len(sample) > 5
    assert not calibration & sample


def test_measure_puts_bos_in_front_where_the_model_wants_it(tmp_path: Path) -> None:
    source = float_model("llama")
    source.special = type(source.special)("!", 7, None, (2,), True)
    convert(source, tmp_path / "m", calibration_text=text_of(100), threads=1, kernels=reference)
    windows: list[list[int]] = []
    original = quality.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "evaluate", lambda d, s, w, *rest: (windows.extend(w), original(d, s, w, *rest))[1])
        quality.measure(ModelDirectory(tmp_path / "m"), source, reference, tokens=400)
    assert [w[0] for w in windows] == [7, 7]
    assert [len(w) for w in windows] == [256, 146]


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "nothing to predict"),
        ([[1]], "nothing to predict"),
        ([[1] * 1025], "context holds 1024"),
        ([[1, 271]], "outside the vocabulary of 271"),
        ([[1, -1]], "outside the vocabulary of 271"),
    ],
)
def test_windows_that_do_not_fit_are_refused(
    made: tuple[ModelDirectory, MemorySource], windows: list[list[int]], message: str
) -> None:
    directory, source = made
    with pytest.raises(UsageError, match=message):
        quality.evaluate(directory, source, windows, reference)


def test_a_flipped_bit_in_the_weights_stops_the_evaluation(
    made: tuple[ModelDirectory, MemorySource], tmp_path: Path
) -> None:
    directory, source = made
    for file in directory.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(raw)
    with pytest.raises(ModelError, match=r"does not match the manifest|outside the bounds"):
        quality.evaluate(ModelDirectory(tmp_path), source, random_windows(source, 1, 8), reference)


def test_windows_of_drops_a_last_token_that_predicts_nothing() -> None:
    assert quality.windows_of([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4]]
    assert quality.windows_of([1, 2, 3, 4, 5], 3) == [[1, 2, 3], [4, 5]]
    with pytest.raises(UsageError, match="too short"):
        quality.windows_of([1], 4)
