"""`veriattn serve` on a made-up TDX platform: FOLDER (where its root goes), then the arguments of `serve`.

Only the source of quotes is replaced. That such a quote passes for nobody but a verifier with this root is tested too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.attest.synthetic_tdx import SyntheticTdx, SyntheticTdxProvider

import veriattn.server.run
from veriattn.cli import main


def run() -> int:
    platform = SyntheticTdx()
    Path(sys.argv[1], "root.der").write_bytes(platform.root_der)
    veriattn.server.run.open_provider = lambda name: SyntheticTdxProvider(platform)
    return main(["serve", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(run())
