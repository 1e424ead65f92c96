"""`python -m veriattn.redteam.zygote MODEL DIGEST`: a warm process that forks one lying prover per session.

Each prover is a real process with its own socket, ring and verifier; only the start of Python and the reading of weights
are shared. On the inherited descriptor (SOCK_SEQPACKET) come requests: the attack as JSON, with two descriptors, the
session's socket and a pipe for reports; or `kill PID`. Each is answered by a pid.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from veriattn.native import set_threads
from veriattn.redteam.attack import Attack
from veriattn.redteam.liar import run
from veriattn.redteam.operations import LyingBackend
from veriattn.wire.channel import PROVER_FD_VARIABLE
from veriattn.wire.messages import Hello

MAX_REQUEST_BYTES = 65536
_PR_SET_PDEATHSIG = 1


def _become(sock_fd: int, report_fd: int, request: bytes, backend: LyingBackend, path: str, parent: int) -> int:
    """The forked process: lie to one verifier, then end without touching what belongs to the parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return 1
    os.dup2(report_fd, 1)
    os.dup2(report_fd, 2)
    os.close(report_fd)

    def preloaded(hello: Hello) -> LyingBackend | None:
        return backend if hello.model_path == path and attack.kind != "other_model" else None

    attack = Attack.from_json(request.decode())
    run(socket.socket(fileno=sock_fd), attack, preloaded)
    return 0


def main(arguments: list[str]) -> int:
    """Serve requests until the other end goes away."""
    path, digest = arguments
    set_threads(1)
    backend = LyingBackend.load(Path(path), digest, 1 << 16, 64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps
    with socket.socket(fileno=int(os.environ[PROVER_FD_VARIABLE])) as control:
        control.send(b"ready")
        while True:
            request, fds, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 2)
            if not request:
                return 0
            if request.startswith(b"kill "):
                try:
                    os.kill(int(request[5:]), signal.SIGKILL)
                except ProcessLookupError:
                    control.send(b"gone")
                else:
                    control.send(b"killed")
                continue
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    control.close()
                    status = _become(fds[0], fds[1], request, backend, path, parent)
                except BaseException:  # what escapes here must not run the parent's loop
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            for fd in fds:
                os.close(fd)
            control.send(str(pid).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
