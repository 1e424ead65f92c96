"""The same tokens with the shield as without, for every architecture; all combinations: tests/accept/test_shield.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.shield.equality import ARCHITECTURES, answers, make, prompts, shielded

#: Strategy, shield, keys that the prover may keep of a sequence, sequences at a time.
COMBINATIONS = (
    ("veriattn", "static", None, 4),
    ("tsdp", "session", None, 1),
    ("veriattn", "session+1", 3, 1),
    ("tsdp", "static", 3, 4),
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_tokens(arch: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    model, ids = make(arch, tmp_path / "model"), prompts(arch)
    plain = answers(model, ids, 4)
    assert len({tuple(a) for a in plain}) > 1
    for strategy, shield, limit, batch in COMBINATIONS:
        assert answers(model, ids, batch, **shielded(strategy, shield, limit)) == plain, (
            strategy,
            shield,
            limit,
            batch,
        )
