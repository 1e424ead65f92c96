"""Ways to a running prover: a child process linked by shared memory, or one that listens elsewhere."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from veriattn.errors import ProverFault
from veriattn.verifier.isolation import Isolation, ProverProcess, spawn_prover
from veriattn.verifier.model import VerifierModel
from veriattn.wire.channel import Channel, RingChannel, StreamChannel
from veriattn.wire.emulate import Throttle


class Prover(Protocol):
    """A running prover as a session sees it: a link, and something that can be ended.

    `pid` is None where the prover is no child of ours: it then shares no file system, and finds the model by digest.
    """

    channel: Channel
    pid: int | None
    isolation: Isolation | None

    def output_tail(self) -> str:
        """The last that it printed, for people."""
        ...

    def terminate(self) -> None:
        """End it, or the link to it; nothing of ours is left."""
        ...


Launcher = Callable[[VerifierModel], Prover]


def builtin_prover(device: str = "cpu") -> tuple[str, ...]:
    """The command that starts the prover that comes with this package, on a device."""
    return (sys.executable, "-m", "veriattn.prover", "--device", device)


def quote_output(error: BaseException, output_tail: str) -> None:
    """Let a fault of the prover say what the prover printed last, on one line: its lines must not pass for ours."""
    if isinstance(error, ProverFault):
        tail = " | ".join(output_tail.split("\n"))
        if tail:
            error.hint = f"the prover's last output: {tail[-400:]}"


class ChildProver:
    """A prover started as a child process, linked by rings in a sealed memfd."""

    def __init__(
        self,
        model: VerifierModel,
        command: Sequence[str] | None = None,
        threads: int | None = None,
        timeout_s: float = 300.0,
        throttle: Throttle | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Raises: ProverUnavailable."""
        command = command or builtin_prover()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        extra = dict(environment or {})
        if threads is not None:
            extra["VERIATTN_THREADS"] = str(threads)
        try:
            self._process: ProverProcess = spawn_prover(
                command, theirs.fileno(), readable=[model.path], extra_environment=extra
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.isolation: Isolation | None = self._process.isolation
        self.pid: int | None = self._process.pid
        try:
            self.channel: Channel = RingChannel.offer(ours, timeout_s=timeout_s, throttle=throttle)
        except BaseException as e:
            ours.close()
            self._process.terminate(0.0)
            quote_output(e, self.output_tail())
            raise

    def output_tail(self) -> str:
        return self._process.output_tail()

    def terminate(self) -> None:
        try:
            self.channel.close()
        finally:
            self._process.terminate()


class RemoteProver:
    """A prover that listens at an address (`python -m veriattn.prover --listen`): connected to, never started or ended.

    Trust: as little as a child. Whoever answers is a prover; whoever can read the link reads tokens and activations
    (docs/links.md).
    """

    pid: int | None = None
    isolation: Isolation | None = None

    def __init__(self, address: str, timeout_s: float = 300.0, throttle: Throttle | None = None) -> None:
        """Raises: UsageError (address); ProverUnavailable (nobody answers)."""
        self.address = address
        self.channel: Channel = StreamChannel.connect(address, timeout_s=timeout_s, throttle=throttle)

    def output_tail(self) -> str:
        """Nothing: its output is on its own side."""
        return ""

    def terminate(self) -> None:
        self.channel.close()
