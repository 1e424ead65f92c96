"""Memory that changes while it is read, a process whose floats flush to zero, empty and extreme shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from veriattn.errors import InternalError
from veriattn.native import _native, kernels
from veriattn.spec import field, reference
from veriattn.spec.field import P
from veriattn.spec.kv import PAGE


def while_changing(word: np.ndarray, wrong: int, body: Callable[[], int]) -> None:
    """Run `body` while another thread flips one word between its value and a wrong one.

    `body` returns its verdict on that word; it runs until it has met both, or for five seconds on a busy machine.
    """
    honest, stop, verdicts = int(word[0]), threading.Event(), set()

    def flip() -> None:
        while not stop.is_set():
            word[0] = wrong
            word[0] = honest

    thread, interval = threading.Thread(target=flip), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        end, rounds = time.monotonic() + 5.0, 0
        while (rounds < 200 or len(verdicts) < 2) and time.monotonic() < end:
            verdicts.add(body())
            rounds += 1
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
        word[0] = honest
    assert body() == 1
    word[0] = wrong
    assert body() == 0


def test_claims_that_change_while_they_are_checked(isa: str) -> None:
    # What was accepted is what was copied: a word is loaded once, checked and kept.
    rng = np.random.default_rng(1)
    a, w = rng.integers(-127, 128, (6, 64), dtype=np.int8), rng.integers(-127, 128, (4000, 64), dtype=np.int8)
    r = rng.integers(1, P, (2, 4000), dtype=np.uint64)
    u = np.zeros((2, 64), np.uint64)
    kernels.project_weights(w, r, u)
    honest = reference.gemm_i8(a, w)
    shared = honest.copy()

    def body() -> int:
        out = np.zeros_like(shared)
        ok = kernels.linear_check(shared, r, a, u, out)
        assert np.array_equal(ok, np.all(out == honest, axis=1).astype(np.uint8))
        return int(ok[3])

    while_changing(shared[3, 2000:2001], int(honest[3, 2000]) + 1, body)


def test_scores_that_change_while_they_are_checked(isa: str) -> None:
    rng = np.random.default_rng(2)
    keys, d = 1000, 16
    k = rng.integers(-127, 128, (keys, 1, d), dtype=np.int8)
    pages = -(-keys // PAGE)
    k_pages, scale = np.zeros((pages, 1, PAGE, d), np.int8), np.full((pages, 1, PAGE), 2.0**-9, np.float32)
    k_pages.reshape(-1, d)[:keys] = k[:, 0]
    table, g = np.arange(pages, dtype=np.int32), rng.integers(0, P, (pages, 1, PAGE, 2), dtype=np.uint64)
    q, q_scale = rng.integers(-127, 128, (1, 4, d), dtype=np.int8), np.full((1, 4), 0.01, np.float32)
    r, c = rng.integers(1, P, (2, keys), dtype=np.uint64), np.zeros((1, 2, d), np.uint64)
    kernels.key_projection(k[:-1], r, 0, c)
    shared = np.stack([reference.gemm_i8(q[:, h], k[:, 0]) for h in range(4)])
    row_sum, pg = field.attention_replay(q, q_scale, k_pages, scale, g, table, keys - 1)

    def body() -> int:
        ok, got_sum, got_pg = kernels.attention_transfer(shared, q, q_scale, k[-1:], c, r, scale, g, table, keys - 1)
        # An accepted row was used with the very scores that were accepted.
        good = ok.astype(bool)
        assert np.array_equal(got_sum[good], row_sum[good]) and np.array_equal(got_pg[good], pg[good])
        assert ok[0].tolist()[:2] == [1, 1] and ok[0, 3] == 1
        return int(ok[0, 2])

    # A score large enough to be the row's maximum, and so to change every weight.
    while_changing(shared[2, 0, 500:501], 2**30, body)


@pytest.mark.skipif(shutil.which("c++") is None or "VERIATTN_TEST_NATIVE_DIR" in os.environ, reason="needs a compiler")
def test_a_process_that_flushes_subnormals(tmp_path: Path) -> None:
    # Loading a library that was linked with -ffast-math sets FTZ and DAZ for the thread: a known accident.
    source, library = tmp_path / "fast.cpp", tmp_path / "libfast.so"
    source.write_text('extern "C" float half(float x) { return x * 0.5f; }\n')
    subprocess.run(["c++", "-shared", "-fPIC", "-O2", "-ffast-math", source, "-o", library], check=True)
    script = f"""
import ctypes, numpy as np
from veriattn.native import kernels
kernels.set_threads(1)
fast = ctypes.CDLL({str(library)!r})
fast.half.restype, fast.half.argtypes = ctypes.c_float, [ctypes.c_float]
tiny = np.full((1, 64), 1e-40, np.float32)
zero, one = np.zeros((1, 64), np.int32), np.ones(64, np.float32)
for isa in kernels.available_isas():
    kernels.set_isa(isa)
    out = kernels.residual_add(tiny, zero, one[:1], one)
    print(fast.half(ctypes.c_float(1e-40)) == 0.0, out.tobytes() == tiny.tobytes())
print("flushes still:", fast.half(ctypes.c_float(1e-40)) == 0.0)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True)
    lines = done.stdout.split("\n")
    if "flushes still: True" not in lines:
        pytest.skip("this toolchain does not set FTZ at load")
    assert lines[: len(kernels.available_isas())] == ["True True"] * len(kernels.available_isas())


def test_empty(isa: str) -> None:
    none = np.empty((0, 64), np.int8)
    packed = kernels.pack(np.ones((5, 64), np.int8))
    assert kernels.gemm_packed(packed, none).shape == (0, 5)
    assert kernels.gemm_i8(np.ones((2, 64), np.int8), none).shape == (2, 0)
    assert np.all(kernels.gemm_i8(np.empty((2, 0), np.int8), np.empty((3, 0), np.int8)) == 0)
    r, u = np.ones((2, 5), np.uint64), np.ones((2, 64), np.uint64)
    assert kernels.linear_check(np.empty((0, 5), np.int32), r, none, u).shape == (0,)
    kernels.project_weights(none, np.empty((4, 0), np.uint64), np.zeros((4, 64), np.uint64))
    pages = np.zeros((1, 2, PAGE, 8), np.int8)
    scale, g, table = np.ones((1, 2, PAGE), np.float32), np.zeros((1, 2, PAGE, 2), np.uint64), np.zeros(1, np.int32)
    q, q_scale = np.empty((0, 4, 8), np.int8), np.empty((0, 4), np.float32)
    assert kernels.attention(q, q_scale, pages, scale, pages, table, 7)[0].shape == (0, 4, 8)
    assert kernels.attention_replay(q, q_scale, pages, scale, g, table, 0)[1].shape == (0, 4, 2)
    assert kernels.value_projection(np.empty((0, 2, 8), np.int8), np.ones((2, 2, 8), np.uint64)).shape == (0, 2, 2)
    assert kernels.project_outputs(np.empty((0, 4, 8), np.int64), np.ones((2, 2, 8), np.uint64))[1] is True


def test_unaligned_rows(isa: str) -> None:
    # Arrays need their elements aligned, not their rows: views that begin anywhere in a buffer are used by the wire.
    rng = np.random.default_rng(3)
    a, w = rng.integers(-127, 128, (5, 67), dtype=np.int8), rng.integers(-127, 128, (33, 67), dtype=np.int8)
    r = rng.integers(0, P, (2, 33), dtype=np.uint64)
    u = np.zeros((2, 67), np.uint64)
    kernels.project_weights(w, r, u)
    y = reference.gemm_i8(a, w)
    for shift in range(0, 64, 4):
        raw = np.zeros(y.nbytes + 128, np.uint8)
        view = raw[shift : shift + y.nbytes].view(np.int32).reshape(y.shape)
        view[...] = y
        assert np.all(kernels.linear_check(view, r, a, u) == 1)
    for shift in range(1, 9):
        raw_i8 = np.zeros(a.size + 64, np.int8)
        view_i8 = raw_i8[shift : shift + a.size].reshape(a.shape)
        view_i8[...] = a
        assert np.array_equal(kernels.gemm_packed(kernels.pack(w), view_i8), y)


def test_a_kernel_that_the_cpu_lacks_is_never_offered() -> None:
    features = set(kernels.cpu_features())
    offered = kernels.available_isas()
    assert offered == [n for n in ("portable", "avx2", "avx512", "amx") if n in offered]
    if "avx2" in offered:
        assert "avx2" in features
    if "avx512" in offered:
        assert {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_ifma"} <= features
    if "amx" in offered and "VERIATTN_TEST_NATIVE_DIR" not in os.environ:
        assert {"amx_tile", "amx_int8"} <= features
    before = kernels.active_isa()
    packed = {}
    for name in offered:
        kernels.set_isa(name)
        packed[name] = kernels.pack(np.ones((3, 8), np.int8))
    kernels.set_isa("portable")
    if "avx512" in offered:
        with pytest.raises(InternalError):
            kernels.gemm_packed(packed["avx512"], np.ones((1, 8), np.int8))
    kernels.set_isa(before)
    assert _native.active_isa() == before
