"""Build the native extension in place (src/veriattn/native/_native*.so), for development and for the tests."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(sanitize: bool, emulate_amx: bool) -> Path:
    """Configure and compile with the running interpreter. Returns the folder of the extension.

    Raises: subprocess.CalledProcessError.
    """
    variant = "native" + ("-sanitize" if sanitize else "") + ("-amx" if emulate_amx else "")
    build_dir = ROOT / "build" / variant
    target = ROOT / "src" / "veriattn" / "native" if variant == "native" else build_dir
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", build_dir, f"-DPython_EXECUTABLE={sys.executable}",
         f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}", f"-DVERIATTN_SANITIZE={'ON' if sanitize else 'OFF'}",
         f"-DVERIATTN_EMULATE_AMX={'ON' if emulate_amx else 'OFF'}"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    subprocess.run(["cmake", "--build", build_dir, "--parallel", str(len(os.sched_getaffinity(0)))], check=True)
    return target


def test(target: Path, sanitize: bool) -> int:
    """Run tests/native against that build. Returns pytest's exit status."""
    env = {**os.environ, "VERIATTN_TEST_NATIVE_DIR": str(target), "PYTHONPATH": str(ROOT / "src")}
    if sanitize:
        # The interpreter itself is not instrumented: the runtimes must come first, and its own leaks are not ours.
        runtimes = [
            subprocess.run(
                ["c++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
            ).stdout.strip()
            for name in ("libasan.so", "libubsan.so", "libstdc++.so")
        ]
        env |= {
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
    native = ROOT / "tests" / "native"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(native)]
    if sanitize:
        # Instrumented, a benchmark of large shapes measures nothing, and emulated tiles take a minute for eight threads.
        command += ["--ignore", str(native / "test_bench.py")]
        command += ["--deselect", f"{native.relative_to(ROOT)}/test_integer.py::test_concurrent_callers[amx]"]
    return subprocess.run(command, env=env, cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="AddressSanitizer and UBSan, in a folder below build/")
    parser.add_argument(
        "--emulate-amx", action="store_true", help="AMX tiles in plain memory, in a folder below build/"
    )
    parser.add_argument("--test", action="store_true", help="also run tests/native against the build")
    args = parser.parse_args()
    target = build(args.sanitize, args.emulate_amx)
    return test(target, args.sanitize) if args.test else 0


if __name__ == "__main__":
    sys.exit(main())
