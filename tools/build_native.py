"""Build the native extension in place (src/veriattn/native/_native*.so), for development and for the tests."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(sanitize: bool) -> None:
    """Configure and compile with the running interpreter. Raises: subprocess.CalledProcessError."""
    build_dir = ROOT / "build" / ("native-sanitize" if sanitize else "native")
    target = ROOT / "src" / "veriattn" / "native" if not sanitize else build_dir
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", build_dir, f"-DPython_EXECUTABLE={sys.executable}",
         f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}", f"-DVERIATTN_SANITIZE={'ON' if sanitize else 'OFF'}"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    subprocess.run(["cmake", "--build", build_dir, "--parallel", "2"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sanitize", action="store_true", help="AddressSanitizer and UBSan build, kept apart in build/native-sanitize"
    )
    build(parser.parse_args().sanitize)
    return 0


if __name__ == "__main__":
    sys.exit(main())
