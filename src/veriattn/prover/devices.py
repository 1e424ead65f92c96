"""Which backend a device name stands for; the GPU libraries are loaded only when a GPU is asked for."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from veriattn.errors import ProverUnavailable
from veriattn.prover.backend import Backend
from veriattn.prover.finder import ModelFinder
from veriattn.prover.serve import BackendFactory, cpu_backend, model_directory
from veriattn.wire.messages import Hello

DEVICES = ("cpu", "cuda")
_HINT = "veriattn doctor shows the GPU; else use --device cpu"


def backend_factory(device: str, finder: ModelFinder | None) -> BackendFactory:
    """A factory for `serve`; `device` is one of `DEVICES`."""
    chosen = {"cpu": cpu_backend, "cuda": cuda_backend}[device]
    return lambda hello: chosen(hello, finder)


def cuda_backend(hello: Hello, finder: ModelFinder | None = None) -> Backend:
    """The model on the first visible GPU. Raises: ProverUnavailable (no GPU, or no torch and Triton); ModelError;
    MemoryError."""
    path = model_directory(hello, finder)
    _give_compiler_a_place()
    try:
        import triton  # noqa: F401, PLC0415

        import torch  # noqa: PLC0415 - gigabytes of libraries that nothing else needs
    except ImportError as e:
        raise ProverUnavailable(
            f"--device cuda needs torch and triton, and there is no {e.name}",
            hint="pip install 'veriattn[cuda]', or use --device cpu",
        ) from e
    if not torch.cuda.is_available():
        why = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no CUDA GPU"
        raise ProverUnavailable(f"--device cuda: {why}", hint=_HINT)
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise ProverUnavailable(f"--device cuda needs compute capability 8.0, this GPU has {major}.{minor}", hint=_HINT)
    from veriattn.prover.cuda.backend import CudaBackend  # noqa: PLC0415

    return CudaBackend(
        path,
        expected_digest=hello.model_digest,
        kv_tokens=hello.limits.kv_tokens,
        max_sequences=hello.limits.max_sequences,
    )


def _give_compiler_a_place() -> None:
    """A prover with a user of its own has no home to keep compiled kernels in."""
    if "TRITON_CACHE_DIR" in os.environ:
        return
    home = Path("~").expanduser()
    if not (home.is_dir() and os.access(home, os.W_OK)):
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="veriattn-kernels-")
