"""Keeps the prover away from the verifier's memory: hardening of this process, and the start and end of the other.

A child of the same user may read its parent's memory (`process_vm_readv`, `/proc/PID/mem`, ptrace) unless the parent is
not dumpable and the child has no capability. So the verifier makes itself non-dumpable before it draws keys, and the
prover starts without capabilities, without the means to gain any, with a clean environment, with one descriptor, and,
where the verifier runs as root, under a user of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import pwd
import resource
import secrets
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import veriattn
from veriattn.errors import InternalError, ProverUnavailable
from veriattn.wire.channel import PROVER_FD_VARIABLE
from veriattn.wire.messages import printable

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_MADV_DONTDUMP = 16
_SHIM = Path(__file__).with_name("launch_shim.py")
_KEPT_VARIABLES = (
    "PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "MKL_NUM_THREADS",
    "VERIATTN_THREADS", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LD_LIBRARY_PATH",
)  # fmt: skip
_UID_FIRST, _UID_COUNT = 61184, 4336  # the range that systemd sets apart for dynamic users
_NOBODY = 65534
_STATUS_BYTES = 4096
_TAIL_BYTES = 8192
_START_S = 20.0
_GRACE_S = 2.0

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Isolation:
    """What stands between the prover and the verifier's memory. `reason` says why the prover has no user of its own."""

    verifier_non_dumpable: bool
    no_core_dumps: bool
    prover_own_user: bool
    prover_no_capabilities: bool
    prover_no_new_privs: bool
    prover_dies_with_parent: bool
    reason: str

    @property
    def level(self) -> str:
        """`own-user`; `same-user` (memory is closed to the prover, files of this user are not); `weak`."""
        closed = self.verifier_non_dumpable and self.prover_no_capabilities and self.prover_no_new_privs
        if not closed:
            return "weak"
        return "own-user" if self.prover_own_user else "same-user"

    def as_json(self) -> dict[str, object]:
        """For `doctor`."""
        return {"level": self.level, **asdict(self)}


def harden_self() -> bool:
    """Make this process non-dumpable and end core dumps; True if both are in force. To be called before keys exist."""
    zero = ctypes.c_ulong(0)
    _libc.prctl(_PR_SET_DUMPABLE, zero, zero, zero, zero)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return _non_dumpable() and resource.getrlimit(resource.RLIMIT_CORE)[0] == 0


def _non_dumpable() -> bool:
    zero = ctypes.c_ulong(0)
    return bool(_libc.prctl(_PR_GET_DUMPABLE, zero, zero, zero, zero) == 0)


def lock_memory(array: npt.NDArray[np.generic]) -> bool:
    """Best effort: keep the pages of `array` out of swap and core dumps; True if they are locked."""
    if array.nbytes == 0:
        return True
    page = os.sysconf("SC_PAGE_SIZE")
    address = array.__array_interface__["data"][0]
    first, last = address - address % page, address + array.nbytes
    start, length = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
    _libc.madvise(start, length, _MADV_DONTDUMP)
    return bool(_libc.mlock(start, length) == 0)


def clean_environment(control_fd: int | None = None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The prover's environment: a short list of names, plus `extra`. Nothing else of this process's is passed on."""
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment.setdefault("PATH", os.defpath)
    # Only the entries that this process's own imports came from, so that it also works from a source tree.
    entries = {Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    sources = dict.fromkeys(Path(module.__file__ or "").resolve().parents[1] for module in (veriattn, np))
    if used := [str(source) for source in sources if source in entries]:
        environment["PYTHONPATH"] = os.pathsep.join(used)
    if control_fd is not None:
        environment[PROVER_FD_VARIABLE] = str(control_fd)
    return environment | dict(extra or {})


def why_not_own_user(command: Sequence[str], readable: Sequence[Path | str]) -> str:
    """Empty if a user of its own could run `command` and read the paths; else the reason, for people."""
    if os.geteuid() != 0:
        return "not started as root"
    program = shutil.which(command[0])
    needed = [Path(program)] if program else []
    if program and Path(program).resolve() == Path(sys.executable).resolve():
        needed += [Path(sys.prefix), Path(sys.base_prefix), Path(veriattn.__file__), Path(np.__file__)]
    for path in [*needed, *map(Path, readable)]:
        closed = _closed_to_others(path)
        if closed is not None:
            return f"{closed} is not readable by other users"
    return ""


def _closed_to_others(path: Path) -> Path | None:
    """The first file or directory on the way to `path` (links followed too) that others may not read or enter."""
    forms: tuple[Path, Path] = (Path(os.path.abspath(path)), path.resolve())
    for form in forms:
        for part in reversed(form.parents):
            if part.exists() and not part.stat().st_mode & stat.S_IXOTH:
                return part
        for part in (form, *(form.iterdir() if form.is_dir() else ())):
            wanted = stat.S_IROTH | (stat.S_IXOTH if part.is_dir() else 0)
            if part.exists() and part.stat().st_mode & wanted != wanted:
                return Path(part)
    return None


def probe(command: Sequence[str], readable: Sequence[Path | str] = ()) -> Isolation:
    """What a prover started now would be given, found by starting `true` in its place. For `doctor`."""
    program = shutil.which("true") or sys.executable
    reason = why_not_own_user(command, readable)
    process = _Child([program], None, not reason, {})
    process.terminate()
    return _isolation(process.report, reason)


def _isolation(report: Mapping[str, bool], reason: str) -> Isolation:
    if not reason and not report["own_user"]:
        reason = "the system refuses a change of user"
    return Isolation(
        verifier_non_dumpable=_non_dumpable(),
        no_core_dumps=resource.getrlimit(resource.RLIMIT_CORE)[0] == 0,
        prover_own_user=report["own_user"],
        prover_no_capabilities=report["no_capabilities"],
        prover_no_new_privs=report["no_new_privs"],
        prover_dies_with_parent=report["dies_with_parent"],
        reason=reason,
    )


def spawn_prover(
    command: Sequence[str],
    control_fd: int,
    *,
    drop_user: bool = True,
    readable: Sequence[Path | str] = (),
    extra_environment: Mapping[str, str] | None = None,
) -> ProverProcess:
    """Harden this process, then start the prover with `control_fd` (which stays the caller's to close).

    readable: what the prover must read (the model); if another user could not, it runs as this one, and `isolation`
    says so.
    Raises: ProverUnavailable (no such program, not executable, start took too long).
    """
    if not command:
        raise InternalError("an empty prover command")
    harden_self()
    reason = why_not_own_user(command, readable) if drop_user else "switched off"
    process = ProverProcess(command, control_fd, not reason, clean_environment(control_fd, extra_environment))
    process.isolation = _isolation(process.report, reason)
    return process


class _Child:
    """A process started through the shim, with a thread that reads its output, reaps it and kills what it leaves.

    The thread also starts it: PR_SET_PDEATHSIG fires when the *thread* that forked ends.
    """

    def __init__(self, command: Sequence[str], fd: int | None, own_user: bool, environment: Mapping[str, str]) -> None:
        self._tail = bytearray()
        self._lock = threading.Lock()  # held while a signal is sent or the process is reaped
        self._started, self._ended = threading.Event(), threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        self.report: dict[str, bool] = {}
        status_read, status_write = os.pipe()
        try:
            shim = [sys.executable, "-I", "-S", str(_SHIM), str(os.getpid()), _candidates(own_user), str(status_write)]
            descriptors = (status_write,) if fd is None else (fd, status_write)
            thread = threading.Thread(
                target=self._run,
                args=([*shim, *command], descriptors, dict(environment)),
                name="veriattn-prover",
                daemon=True,
            )
            thread.start()
            self._started.wait()
            os.close(status_write)
            status_write = -1
            status = b"" if self._failure else _read_status(status_read)
        finally:
            os.close(status_read)
            if status_write >= 0:
                os.close(status_write)
        self._thread = thread
        lines = status.split(b"\n")
        if self._failure or len(lines) != 2:  # one whole line: the command runs
            self.terminate()
            why = self._failure.strerror if self._failure else printable(b"".join(lines[1:])) or "no start in time"
            raise ProverUnavailable(
                f"cannot start the prover {command[0]!r}: {why}", hint="check --prover-command or the installation"
            )
        # From our own shim, before the untrusted command runs.
        self.report = {str(name): bool(value) for name, value in json.loads(lines[0]).items()}

    def _run(self, command: list[str], descriptors: tuple[int, ...], environment: dict[str, str]) -> None:
        try:
            process = self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                close_fds=True,
                pass_fds=descriptors,
                env=environment,
                start_new_session=True,
            )
            pidfd = os.pidfd_open(process.pid)
        except OSError as error:
            self._failure = error
            self._ended.set()
            return
        finally:
            self._started.set()
        if process.stdout is None:
            raise InternalError("no pipe from the prover")
        output = process.stdout.fileno()
        os.set_blocking(output, False)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.register(output, select.POLLIN)
        alive, open_ = True, True
        while alive:
            alive = pidfd not in [fd for fd, _ in poller.poll()]
            if open_ and not self._drain(output):
                open_ = False
                poller.unregister(output)
        with self._lock:
            self._signal(signal.SIGKILL)  # the rest of its group; the unreaped leader keeps the number from reuse
            process.wait()
            self._ended.set()
        process.stdout.close()
        os.close(pidfd)

    def _drain(self, output: int) -> bool:
        try:
            chunk = os.read(output, 65536)
        except BlockingIOError:
            return True
        self._tail += chunk
        del self._tail[:-_TAIL_BYTES]
        return bool(chunk)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and not self._ended.is_set():
            try:
                os.killpg(self._process.pid, number)
            except (ProcessLookupError, PermissionError):
                return

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid if self._process else -1

    def alive(self) -> bool:
        """Whether it has not been reaped yet."""
        return not self._ended.is_set()

    def output_tail(self) -> str:
        """The last it wrote to standard output and error, as printable lines. For people only."""
        return "\n".join(filter(None, (printable(line, 400) for line in bytes(self._tail).split(b"\n"))))

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Exit status once it has ended, None at the time-out."""
        if not self._ended.wait(timeout_s) or self._process is None:
            return None
        return self._process.returncode

    def terminate(self, grace_s: float = _GRACE_S) -> None:
        """SIGTERM to its group, SIGKILL after the grace time, reap. May be called twice."""
        for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
            with self._lock:
                self._signal(number)
            if self._ended.wait(patience_s):
                self._thread.join(1.0)
                return
        raise InternalError(f"process {self.pid} cannot be killed")


class ProverProcess(_Child):
    """A running prover. `isolation` is what is in force between it and this process."""

    isolation: Isolation


def _candidates(own_user: bool) -> str:
    if not own_user:
        return "-"
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    free = [uid for uid in range(_UID_FIRST, _UID_FIRST + _UID_COUNT) if uid not in taken]
    return f"{secrets.choice(free)},{_NOBODY}"


def _read_status(fd: int) -> bytes:
    """All that the shim writes; the write end closes when the command is executed."""
    status, deadline = b"", time.monotonic() + _START_S
    while len(status) < _STATUS_BYTES:
        timeout_s = deadline - time.monotonic()
        if timeout_s <= 0 or not select.select([fd], [], [], timeout_s)[0]:
            return b""
        chunk = os.read(fd, _STATUS_BYTES - len(status))
        if not chunk:
            break
        status += chunk
    return status
