"""docs/wire.md is enough: a prover written from it alone talks to the verifier's side over both transports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from veriattn.errors import ProverFault
from veriattn.wire.channel import Channel, RingChannel, StreamChannel
from veriattn.wire.messages import (
    AttentionCheck,
    Hello,
    Kind,
    Limits,
    LogitRows,
    Mode,
    Step,
    StepEntry,
    decode_ready,
    encode_free,
    encode_hello,
    encode_step,
)
from veriattn.wire.ring import RingGeometry

SCRIPT = Path(__file__).with_name("independent_prover.py")
LIMITS = Limits(40_000, 4, 50_000, 50_000, 500)


@pytest.mark.parametrize("transport", ["ring", "stream"])
def test_independent_prover(transport: str) -> None:
    ours, theirs = socket.socketpair()
    environment = {"VERIATTN_PROVER_FD": str(theirs.fileno()), "PATH": os.defpath}
    command = [sys.executable, "-I", "-S", str(SCRIPT)]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment) as process:
        theirs.close()
        verifier: Channel = (
            RingChannel.offer(ours, RingGeometry(4096, 3, 5), 20.0)
            if transport == "ring"
            else StreamChannel.offer(ours, 20.0)
        )
        with verifier:
            hello = Hello(1, verifier.session or 0, "", "00" * 32, Mode.CLAIMS, LIMITS)
            verifier.send(Kind.HELLO, encode_hello(hello))
            assert decode_ready(verifier.recv(Kind.READY, 64), spec=1).device == "independent"
            for step, count in enumerate([1, 3, 40_000, 1000, 7]):
                ids = np.random.default_rng(count).integers(0, 500, count, dtype=np.int32)
                entry = StepEntry(step, 0, count, LogitRows.LAST)
                verifier.send(Kind.STEP, encode_step(Step(step, Mode.CLAIMS, AttentionCheck.REPLAY, (entry,), ids)))
                assert np.array_equal(verifier.recv(Kind.CLAIM, 4 * count, np.empty_like(ids)), ids)
            verifier.send(Kind.FREE, encode_free([1]))
            verifier.send(Kind.SHUTDOWN)
            with pytest.raises(ProverFault, match="error 5: unsupported"):
                verifier.recv(Kind.CLAIM, 4)
        assert process.wait(10) == 0
