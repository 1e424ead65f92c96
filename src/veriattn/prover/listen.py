"""A prover that waits for verifiers at an address and gives each one a process of its own."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from veriattn.wire.channel import PROVER_FD_VARIABLE
from veriattn.wire.stream import listen

_TICK_MS = 200.0


def bound_address(server: socket.socket, address: str) -> str:
    """The address with the port that was really taken (port 0 asks for any)."""
    if not address.startswith("tcp://"):
        return address
    host, port = server.getsockname()[:2]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class Listener:
    """Accepts verifiers; at most `sessions` at a time, the others wait in the backlog.

    Each session runs in a fresh process: what one verifier does to it, or a crash, touches no other session, and the
    memory of a session is gone with it.

    Raises: UsageError for an address that cannot be taken.
    """

    def __init__(self, address: str, model_dirs: Sequence[Path], sessions: int = 1, device: str = "cpu") -> None:
        self._server = listen(address)
        self.address = bound_address(self._server, address)
        self._unix_path = Path(address.removeprefix("unix://")) if address.startswith("unix://") else None
        self._command = [sys.executable, "-m", "veriattn.prover", "--device", device]
        for directory in model_dirs:
            self._command += ["--model-dir", str(directory.resolve())]
        self._sessions = sessions
        self._children: list[subprocess.Popen[bytes]] = []
        self._stopping = False

    def run(self) -> None:
        """Serve until `stop`, then end the sessions that are left."""
        poller = select.poll()
        poller.register(self._server, select.POLLIN)
        try:
            while not self._stopping:
                self._children = [c for c in self._children if c.poll() is None]
                if len(self._children) >= self._sessions:
                    self._wait_for_a_child()
                elif poller.poll(_TICK_MS):
                    self._accept()
        finally:
            self._end()

    def stop(self, *_: object) -> None:
        """Make `run` return; may be a signal handler."""
        self._stopping = True

    def _wait_for_a_child(self) -> None:
        try:
            self._children[0].wait(_TICK_MS / 1000)
        except subprocess.TimeoutExpired:
            return

    def _accept(self) -> None:
        try:
            sock, _ = self._server.accept()
        except OSError:  # gone before it was taken
            return
        with sock:
            environment = {**os.environ, PROVER_FD_VARIABLE: str(sock.fileno())}
            child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, pass_fds=[sock.fileno()], env=environment)
        print(f"veriattn prover: session in process {child.pid}", file=sys.stderr, flush=True)
        self._children.append(child)

    def _end(self) -> None:
        self._server.close()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
        for child in self._children:
            child.send_signal(signal.SIGTERM)
        for child in self._children:
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
