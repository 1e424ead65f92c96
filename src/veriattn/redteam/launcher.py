"""The verifier's side of a campaign: starts a zygote like any prover, then one lying prover per session."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any, Self

from veriattn.errors import InternalError, ProverUnavailable, VeriattnError
from veriattn.redteam.attack import Attack
from veriattn.verifier.isolation import Isolation, ProverProcess, spawn_prover
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Launcher
from veriattn.wire.channel import Channel, RingChannel, StreamChannel
from veriattn.wire.messages import printable
from veriattn.wire.ring import RingGeometry

#: Small, so that a session costs little and claims of tiny models wrap around.
GEOMETRY = RingGeometry(4096, 4, 64)
_START_S = 60.0


def parse_reports(text: str) -> list[dict[str, Any]]:
    """The JSON lines that a liar printed; anything else is skipped."""
    reports = []
    for line in text.split("\n"):
        if line.startswith('{"lie"'):
            reports.append(json.loads(line))
    return reports


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


class ForkedProver:
    """A lying prover made by the zygote, as a session sees it."""

    def __init__(
        self,
        pool: LiarPool,
        attack: Attack,
        geometry: RingGeometry | None,
        timeout_s: float,
        isolation: Isolation | None,
    ) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) if geometry else tcp_pair()
        self._pool = pool
        self._output = b""
        self.isolation = isolation
        self._report, write = os.pipe()
        try:
            self.pid: int | None = pool.fork(attack, theirs.fileno(), write)
            self.channel: Channel = (
                RingChannel.offer(ours, geometry, timeout_s) if geometry else StreamChannel.offer(ours, timeout_s)
            )
        except VeriattnError:
            ours.close()
            os.close(self._report)
            raise
        finally:
            theirs.close()
            os.close(write)
        self._ended = False

    def output_tail(self) -> str:
        """What it printed so far."""
        if not self._ended:
            self._drain(0.0)
        return "\n".join(printable(line, 400) for line in self._output.split(b"\n"))

    def reports(self) -> list[dict[str, Any]]:
        """What it says it did; complete once it has ended."""
        return parse_reports(self.output_tail())

    def _drain(self, patience_s: float) -> bool:
        """Read reports until the process has closed its end, at most this long; True if it has."""
        deadline = time.monotonic() + patience_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._report], [], [], left)[0]:
                return False
            chunk = os.read(self._report, 65536)
            if not chunk:
                return True
            self._output += chunk

    def terminate(self) -> None:
        """Close the link; kill what does not end by itself."""
        if self._ended:
            return
        self.channel.close()
        if not self._drain(0.05):
            self._pool.kill(self.pid)
            if not self._drain(10.0):
                raise InternalError(f"process {self.pid} cannot be killed")
        self._ended = True
        os.close(self._report)


class LiarPool:
    """A zygote and the provers that it forks. Raises: ProverUnavailable."""

    def __init__(self, model: VerifierModel) -> None:
        path = str(Path(model.path).resolve())
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.last: ForkedProver | None = None
        try:
            self._process: ProverProcess = spawn_prover(
                (sys.executable, "-m", "veriattn.redteam.zygote", path, model.digest), theirs.fileno(), readable=[path]
            )
        except VeriattnError:
            self._control.close()
            raise
        finally:
            theirs.close()
        self._control.settimeout(_START_S)
        try:
            self._answer()
        except VeriattnError:
            self.close()
            raise

    def _answer(self) -> bytes:
        try:
            answer = self._control.recv(64)
        except OSError as e:
            raise ProverUnavailable("the zygote does not answer", hint=self._process.output_tail()) from e
        if not answer:
            raise ProverUnavailable("the zygote died", hint=self._process.output_tail())
        return answer

    def fork(self, attack: Attack, sock_fd: int, report_fd: int) -> int:
        """A new prover; returns its pid."""
        socket.send_fds(self._control, [attack.to_json().encode()], [sock_fd, report_fd])
        return int(self._answer())

    def kill(self, pid: int | None) -> None:
        """SIGKILL by the zygote, whose child it is."""
        self._control.send(f"kill {pid}".encode())
        self._answer()

    def launcher(self, attack: Attack, geometry: RingGeometry | None = GEOMETRY, timeout_s: float = 60.0) -> Launcher:
        """A `Launcher` for one session; the prover is `last` afterwards. geometry: None for a link over TCP."""

        def launch(_: VerifierModel) -> ForkedProver:
            self.last = ForkedProver(self, attack, geometry, timeout_s, self._process.isolation)
            return self.last

        return launch

    def close(self) -> None:
        """End the zygote and all that it forked."""
        self._control.close()
        self._process.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
