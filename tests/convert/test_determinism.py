"""One source, one digest: whatever the processor, the BLAS, the number of threads and the kernels."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tests.convert.models import SIZES, float_model, text_of
from tests.helpers import Bits

from veriattn.convert.converter import convert
from veriattn.spec import reference

#: Written down on one machine (AVX-512, OpenBLAS); any other must find the same.
DIGESTS = {
    "llama": "4557bc8c5529055491d248c99bdf29529bd28d391a7255ffbce2f455cfd56d6a",
    "mistral": "dc6fac7b806b642a9fd65b13dd669f1c08f1d194f2df484d73b814bd695045c6",
    "qwen2": "655641ec457897f072c833995a61599b1e4194678e78c98fad94263d22f478d8",
    "qwen3": "2d59b353163e3a4f2c54d53e5c1c1aa7460b5c19cfba35693c690bd7faa48ef4",
    "phi3": "ecd04a67a778a3ecfcc484cf67c98c159e06091dae17c9d53cffe18abc129de1",
}
#: Every optional tensor at once, in a model that converts quickly.
SWITCHED_ON = {"tied": False, "qk_norm": True, "layers": 1, "head_dim": 8}
#: Names that NumPy 1.26 and 2.x have between them; those that this build lacks are left out below.
_WIDE = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR X86_V4"
_ALL = f"{_WIDE} AVX2 FMA3 F16C X86_V3"

CONVERT = """
import sys, tempfile
from pathlib import Path
from tests.convert.models import float_model, text_of
from veriattn.convert.converter import convert
from veriattn.spec import reference
kernels = reference
if sys.argv[1] == "native":
    from veriattn.native import kernels
for arch in sys.argv[3:]:
    with tempfile.TemporaryDirectory() as out:
        report = convert(
            float_model(arch), Path(out), calibration_text=text_of(300), threads=int(sys.argv[2]), kernels=kernels
        )
        print(arch, report.digest)
"""

DEQUANTISE = """
from tests.convert.test_determinism import dequantised_digests
import json
print(json.dumps(dequantised_digests()))
"""


def run(script: str, *arguments: str, **environment: str) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OPENBLAS", "OMP", "NPY"))}
    env |= {"PYTHONPATH": os.pathsep.join(["src", "."])} | environment
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=env, cwd=root, check=True, capture_output=True, text=True
    )
    return done.stdout


def disabled(names: str) -> str:
    """The features of `names` that this NumPy dispatches on: it warns about others."""
    try:
        from numpy._core._multiarray_umath import __cpu_dispatch__
    except ImportError:
        from numpy.core._multiarray_umath import __cpu_dispatch__
    return " ".join(name for name in names.split() if name in __cpu_dispatch__)


@pytest.mark.parametrize("arch", SIZES)
def test_digests_are_pinned(arch: str, tmp_path: Path) -> None:
    report = convert(float_model(arch), tmp_path, calibration_text=text_of(300), kernels=reference)
    assert report.digest == DIGESTS[arch]


@pytest.mark.parametrize(
    ("threads", "environment"),
    [
        ("1", {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Haswell"}),
        ("2", {"OPENBLAS_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "SkylakeX"}),
        ("5", {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Zen", "NPY_DISABLE_CPU_FEATURES": disabled(_WIDE)}),
        (
            "2",
            {"OPENBLAS_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "Nehalem", "NPY_DISABLE_CPU_FEATURES": disabled(_ALL)},
        ),
    ],
    ids=["haswell-1", "skylake-2", "zen-no-avx512", "nehalem-no-avx"],
)
def test_digest_does_not_depend_on_processor_blas_or_threads(threads: str, environment: dict[str, str]) -> None:
    got = run(CONVERT, "reference", threads, *SIZES, **environment)
    assert dict(line.split() for line in got.splitlines()) == DIGESTS


def test_digest_does_not_depend_on_the_kernels() -> None:
    pytest.importorskip("veriattn.native._native", reason="the native extension is not built")
    got = run(CONVERT, "native", "2", *SIZES)
    assert dict(line.split() for line in got.splitlines()) == DIGESTS


def test_digest_does_not_depend_on_the_size_of_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("veriattn.convert.matrices._PIECE_ELEMENTS", 700)
    monkeypatch.setattr("veriattn.convert.matrices._READ_ELEMENTS", 3000)
    monkeypatch.setattr("veriattn.convert.matrices._STREAM_BYTES", 5000)
    for arch in SIZES:
        report = convert(float_model(arch), tmp_path / arch, calibration_text=text_of(300), kernels=reference)
        assert report.digest == DIGESTS[arch]


def test_digest_depends_on_every_tensor(tmp_path: Path) -> None:
    """The digests above can differ: a change of one element of any source tensor makes another model."""
    source = float_model("qwen2", **SWITCHED_ON)
    base = convert(source, tmp_path, calibration_text=text_of(64), kernels=reference).digest
    seen = {base}
    for name in source.tensors:
        changed = float_model("qwen2", **SWITCHED_ON)
        changed.tensors[name].flat[1] += np.float32(0.125)
        manifest = convert(changed, tmp_path, calibration_text=text_of(64), kernels=reference)
        tensors = json.loads((tmp_path / "manifest.json").read_text())["tensors"]
        # Not by the source's own hash alone: some stored tensor differs too.
        seen.add(json.dumps({key: value["sha256"] for key, value in tensors.items()}, sort_keys=True))
        assert manifest.digest != base
    assert len(seen) == len(source.tensors) + 1


def dequantised_digests() -> dict[str, str]:
    """SHA-256 of what every tensor type that `gguf` can read gives for random blocks."""
    digests = {}
    for qtype in GGMLQuantizationType:
        block_bytes = GGML_QUANT_SIZES[qtype][1]
        data = Bits(f"gguf/{qtype.name}").integers(0, 255, 64, 4 * block_bytes).astype(np.uint8)
        try:
            with np.errstate(all="ignore"):
                values = dequantize(data, qtype)
        except NotImplementedError:
            continue
        values = np.where(np.isfinite(values), values, 0).astype("<f4")  # what is not finite is refused
        digests[qtype.name] = hashlib.sha256(values.tobytes()).hexdigest()
    return digests


@pytest.mark.parametrize("names", [_WIDE, _ALL], ids=["no-avx512", "no-avx"])
def test_dequantised_weights_do_not_depend_on_the_processor(names: str) -> None:
    here = dequantised_digests()
    assert {"F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"} <= set(here)
    assert json.loads(run(DEQUANTISE, NPY_DISABLE_CPU_FEATURES=disabled(names))) == here
