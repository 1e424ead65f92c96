"""The switch sees every claim, by whatever way the verifier takes it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from veriattn.server.tamper import TamperedChannel, TamperSwitch
from veriattn.wire.channel import Channel
from veriattn.wire.messages import Kind


class Zeros:
    """A channel that receives zeros."""

    def recv(self, kind: Kind, payload_bytes: int, out: Any = None) -> Any:
        return np.zeros(payload_bytes, np.uint8) if out is None else out

    def recv_into(self, out: Any, timeout_s: float | None = None) -> None:
        pass

    def recv_all(self, kind: Kind, outs: Any) -> None:
        pass


def test_no_way_of_receiving_passes_the_switch_by() -> None:
    ways = {name for name in dir(Channel) if name.startswith("recv")} - {"recv_any"}  # that one is the prover's
    assert ways <= set(vars(TamperedChannel))


@pytest.mark.parametrize("after", range(6))
def test_the_claim_that_was_named_is_altered_and_no_other(after: int) -> None:
    switch = TamperSwitch()
    channel = TamperedChannel(cast(Channel, Zeros()), switch)
    claims = [np.zeros(8, np.int32) for _ in range(6)]
    switch.arm(after)
    channel.recv_all(Kind.CLAIM, claims[:3])
    channel.recv(Kind.LOGITS, 32, np.zeros(8, np.int32))
    channel.recv(Kind.CLAIM, 32, claims[3])
    channel.recv_into(claims[4])
    channel.recv_all(Kind.CLAIM, claims[5:])
    assert [i for i, claim in enumerate(claims) if claim.any()] == [after]
    assert not switch.armed
