"""The torch prover of the floating-point system: same tokens in float32, half formats within their own calibration."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch.nn")

from tests.convert.conftest import HfFiles, Tiny

from veriattn.convert.float_reference import FloatReference
from veriattn.convert.sources import open_source
from veriattn.floatmode.arithmetic import NumpyArithmetic, open_arithmetic
from veriattn.floatmode.calibrate import calibrate
from veriattn.floatmode.engine import FloatConfig, FloatModel, open_checked, reference_greedy
from veriattn.floatmode.formats import decode, encode, rounded
from veriattn.floatmode.params import FORMATS, CheckParams, Format

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FloatModel:
    base = tmp_path_factory.mktemp("float")
    for parent in (base, base.parent, base.parent.parent):
        parent.chmod(0o755)
    tiny = Tiny("llama", kv_heads=2)
    HfFiles(tiny.hf_config(), tiny.hf_tensors()).write(base / "model")
    return FloatModel(open_source(base / "model"))


@pytest.mark.parametrize("strategy", ["veriattn", "tsdp"])
def test_float32_gives_the_tokens_of_the_reference(strategy: str, model: FloatModel) -> None:
    prompts = [[int(t) for t in np.random.default_rng(7).integers(3, 260, n)] for n in (4, 37)]
    config = FloatConfig(strategy, backend="torch", params=CheckParams(factor=32.0))  # type: ignore[arg-type]
    found = calibrate(model, config, prompts, 6)
    reference = FloatReference(model.source)
    with open_checked(model, config, found) as session:
        assert [list(session.generate(p, 6)) for p in prompts] == [reference_greedy(reference, p, 6) for p in prompts]
        assert session.device is not None and session.device.startswith("torch")


@pytest.mark.parametrize("fmt", ["bfloat16", "float16"])
def test_half_formats_run(fmt: Format, model: FloatModel) -> None:
    config = FloatConfig(backend="torch", format=fmt, params=CheckParams(factor=32.0))
    found = calibrate(model, config, [[5, 6, 7, 8]], 3)
    with open_checked(model, config, found) as session:
        assert len(list(session.generate([5, 6, 7, 8], 3))) == 3


@pytest.mark.parametrize("fmt", FORMATS)
def test_torch_rounds_as_numpy_does(fmt: Format) -> None:
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * np.float32(1e-3)
    ours, theirs = NumpyArithmetic(fmt), open_arithmetic("torch", "cpu", fmt)
    assert np.array_equal(theirs.claim(theirs.put(x), fmt), encode(x, fmt))
    assert np.array_equal(decode(theirs.claim(theirs.put(x), fmt), fmt), rounded(x, fmt))
    assert np.array_equal(ours.put(x), rounded(x, fmt))
