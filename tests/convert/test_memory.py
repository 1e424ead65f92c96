"""Conversion and its quality report stream the model: memory is a few matrices, whatever the number of layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from veriattn.convert.checkpoint import F32, SourceConfig

LLAMA_8B = {
    "hidden_size": 4096,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_positions": 131072,
    "rotary_dim": 128,
}
SMALL = {
    "hidden_size": 512,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 2048,
    "max_positions": 512,
    "rotary_dim": 8,
}
GIB = 1 << 30

BUILD = """
import json, resource, sys
from pathlib import Path
from tests.convert.test_memory import lazy_source
from tests.convert.models import text_of
from veriattn.convert import quality
from veriattn.convert.build import build_model
from veriattn.spec import reference
quality._HELD_REFERENCE_BYTES = 0  # So small a float model would be kept in memory on purpose.
kernels = reference
if sys.argv[3] == "native":
    from veriattn.native import kernels
build_model(lazy_source(json.loads(sys.argv[1])), Path(sys.argv[2]), calibration_text=text_of(1024), kernels=kernels)
# VmHWM, not ru_maxrss: the latter starts from what the parent process held when it forked.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) * 1024)
"""


def lazy_source(sizes: dict[str, int]):  # type: ignore[no-untyped-def]
    """A source that makes up each row when it is read, so that it takes no memory and no disk of its own."""
    import numpy as np
    from tests.convert.models import MemorySource, bell
    from tests.helpers import Bits

    pattern = bell(Bits("lazy"), 70001).astype(np.float32)

    class Lazy(MemorySource):
        def tensor(self, name: str) -> F32:
            shape = self.config.tensor_shapes()[name]
            return np.ones(shape, np.float32) if len(shape) == 1 else self.tensor_rows(name, 0, shape[0])

        def tensor_rows(self, name: str, start: int, stop: int) -> F32:
            width = self.config.tensor_shapes()[name][1]
            values = np.resize(np.roll(pattern, len(name) - 31 * start), (stop - start, width))
            values *= np.float32(1 / width**0.5)
            return values

        def digest(self) -> str:
            return "0" * 64

    config = SourceConfig(arch="llama", rms_eps=1e-5, rope_theta=500000.0, eos_ids=(2,), name="lazy", **sizes)
    return Lazy(config, {})


def peak_bytes(sizes: dict[str, int], out: Path, kernels: str) -> int:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(["src", "."]), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUILD, json.dumps(sizes), str(out), kernels]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """Eight layers more: 24 MB in int8, 97 MB in float32. The peak stays where it was (measured: 2 to 4 MB more)."""
    kernels = "reference" if find_spec("veriattn.native._native") is None else "native"
    few = peak_bytes(SMALL | {"num_layers": 2}, tmp_path / "few", kernels)
    many = peak_bytes(SMALL | {"num_layers": 10}, tmp_path / "many", kernels)
    weights = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("few", "many")]
    assert weights[1] - weights[0] > 24_000_000
    assert many - few < 12_000_000


@pytest.mark.accept
@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_an_8b_model_converts_in_less_than_6_gib(kernels: str, tmp_path: Path) -> None:
    """Two layers of Llama 3.1 8B's widths, its whole vocabulary and context; more layers take no more (see above)."""
    peak = peak_bytes(LLAMA_8B | {"num_layers": 2}, tmp_path / "model", kernels)
    print(f"\npeak resident memory, {kernels} kernels: {peak / GIB:.2f} GiB")
    assert peak < 6 * GIB
