"""What a hostile prover can reach: tried for real, from a child of the verifier, beside a twin where it works."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import veriattn
from veriattn.errors import ProverUnavailable
from veriattn.verifier import isolation
from veriattn.verifier.isolation import ProverProcess, harden_self, lock_memory, probe, spawn_prover
from veriattn.wire.channel import RingChannel
from veriattn.wire.messages import Kind, Ready, decode_ready, encode_ready
from veriattn.wire.ring import RingGeometry

ROOT = os.geteuid() == 0
# A Python that a user of its own can run; the virtual environment may lie in a closed home directory.
OPEN_PYTHON = next(
    (
        p
        for p in (sys.executable, shutil.which("python3", path="/usr/bin"))
        if p and not isolation._closed_to_others(Path(p))
    ),
    sys.executable,
)
PYTHONPATH = os.pathsep.join(str(Path(module.__file__).parents[1]) for module in (veriattn, np))
SECRET = b"challenge of this session"

ATTACK = r"""
import ctypes, errno, json, os, sys
target, address, size = map(int, sys.argv[1:4])
libc = ctypes.CDLL(None, use_errno=True)
class Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
result = {}
def attempt(name, call):
    try:
        result[name] = call()
    except OSError as error:
        result[name] = errno.errorcode[error.errno]
def checked(value):
    if value < 0:
        raise OSError(ctypes.get_errno(), "")
    return value
def vm_read():
    here = ctypes.create_string_buffer(size)
    local, remote = Piece(ctypes.addressof(here), size), Piece(address, size)
    checked(libc.process_vm_readv(target, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0))
    return here.raw.decode()
def mem():
    with open(f"/proc/{target}/mem", "rb", buffering=0) as file:
        file.seek(address)
        return file.read(size).decode()
def read(name):
    with open(f"/proc/{target}/{name}", "rb") as file:
        return "read" if file.read(10) else "empty"
def ptrace():
    checked(libc.ptrace(16, target, None, None))  # PTRACE_ATTACH
    os.waitpid(target, 0x40000000)
    checked(libc.ptrace(17, target, None, None))  # PTRACE_DETACH
    return "attached"
attempt("process_vm_readv", vm_read)
attempt("mem", mem)
attempt("environ", lambda: read("environ"))
attempt("maps", lambda: read("maps"))
attempt("fd", lambda: os.open(f"/proc/{target}/fd/0", os.O_RDONLY) and "opened")
attempt("fd_link", lambda: os.readlink(f"/proc/{target}/fd/0"))
attempt("pidfd_getfd", lambda: checked(libc.syscall(438, os.pidfd_open(target), 0, 0)) and "read")
attempt("ptrace", ptrace)
print(json.dumps(result), flush=True)
"""
INSPECT = r"""
import json, os, resource, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
names = [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]
fds = {int(name): os.readlink(f"/proc/self/fd/{name}") for name in names}
print("INSPECT", json.dumps({
    "fds": fds, "environment": dict(os.environ), "uid": os.getresuid(), "gid": os.getresgid(), "groups": os.getgroups(),
    "caps": [status[n].strip() for n in ("CapInh", "CapPrm", "CapEff", "CapAmb")], "nnp": status["NoNewPrivs"].strip(),
    "core": resource.getrlimit(resource.RLIMIT_CORE), "session": os.getsid(0) == os.getpid(), "stdin": sys.stdin.read(),
}), flush=True)
"""


@pytest.fixture
def control() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield theirs


def run_to_end(
    command: Sequence[str], control: socket.socket, *, drop_user: bool = True
) -> tuple[ProverProcess, bytes]:
    process = spawn_prover(command, control.fileno(), drop_user=drop_user)
    try:
        assert process.wait(20.0) is not None
    finally:
        process.terminate()
    return process, bytes(process._tail)


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def eventually_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return gone(pid)


@pytest.mark.parametrize("drop_user", [True, False])
def test_a_prover_cannot_read_the_verifier(control: socket.socket, drop_user: bool) -> None:
    assert harden_self()
    secret = np.frombuffer(SECRET, np.uint8).copy()
    address = secret.__array_interface__["data"][0]
    command = [OPEN_PYTHON, "-c", ATTACK, str(os.getpid()), str(address), str(len(SECRET))]
    process, output = run_to_end(command, control, drop_user=drop_user)
    results = json.loads(output)
    assert set(results) == {"process_vm_readv", "mem", "environ", "maps", "fd", "fd_link", "pidfd_getfd", "ptrace"}
    assert set(results.values()) <= {"EPERM", "EACCES"}, results
    assert process.isolation.level == ("own-user" if drop_user and not process.isolation.reason else "same-user")


def test_without_hardening_the_attack_works() -> None:
    """The twin: a plain child of a plain process reads its parent, so the test above can fail."""
    victim = (
        "import subprocess, sys, numpy\n"
        f"secret = numpy.frombuffer({SECRET!r}, numpy.uint8).copy()\n"
        "import os\n"
        "arguments = [str(os.getpid()), str(secret.__array_interface__['data'][0]), str(secret.size)]\n"
        "subprocess.run([sys.executable, '-c', sys.argv[1], *arguments])\n"
    )
    done = subprocess.run([sys.executable, "-c", victim, ATTACK], capture_output=True, check=True)
    results = json.loads(done.stdout)
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if not ROOT and scope.exists() and scope.read_text().strip() != "0":
        pytest.skip("this kernel's ptrace_scope keeps children from their parents already")
    assert results["process_vm_readv"] == results["mem"] == SECRET.decode()
    assert results["environ"] == "read"


@pytest.mark.parametrize("drop_user", [True, False])
def test_what_a_prover_starts_with(
    control: socket.socket, drop_user: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "VERIATTN_HOME", "HOME", "LD_PRELOAD"):
        monkeypatch.setenv(name, "" if name == "LD_PRELOAD" else "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with open(tmp_path / "private", "w") as leaked:
        os.set_inheritable(leaked.fileno(), True)
        process, output = run_to_end([OPEN_PYTHON, "-c", INSPECT], control, drop_user=drop_user)
    seen = json.loads(output.removeprefix(b"INSPECT "))
    assert set(seen["fds"]) == {"0", "1", "2", str(control.fileno())}
    assert seen["fds"]["0"] == "/dev/null" and seen["fds"][str(control.fileno())].startswith("socket:")
    assert seen["stdin"] == ""
    environment = seen["environment"]
    assert environment.pop("VERIATTN_PROVER_FD") == str(control.fileno())
    assert environment.pop("OMP_NUM_THREADS") == "2"
    assert set(environment) <= {*isolation._KEPT_VARIABLES, "PYTHONPATH", "LC_CTYPE"}  # the last is Python's own doing
    assert "secret" not in environment.values()
    assert seen["caps"] == ["0" * 16] * 4 and seen["nnp"] == "1"
    assert seen["core"] == [0, 0] and seen["session"]
    if process.isolation.prover_own_user:
        assert len(set(seen["uid"] + seen["gid"])) == 1 and seen["uid"][0] >= isolation._UID_FIRST
        assert seen["groups"] == []
    else:
        assert seen["uid"] == list(os.getresuid())


@pytest.mark.skipif(not ROOT, reason="only root can give a prover a user of its own")
def test_root_gives_the_prover_its_own_user(control: socket.socket, tmp_path: Path) -> None:
    if isolation.why_not_own_user([OPEN_PYTHON], []):
        pytest.skip("no Python here that other users may run")
    process, _ = run_to_end([OPEN_PYTHON, "-c", "pass"], control)
    assert process.isolation.level == "own-user" and process.isolation.reason == ""
    # Not where that user could not read the model.
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    model = closed / "model"
    model.mkdir(mode=0o755)
    process = spawn_prover([OPEN_PYTHON, "-c", "pass"], control.fileno(), readable=[model])
    process.wait(20.0)
    assert process.isolation.level == "same-user"
    assert "is not readable by other users" in process.isolation.reason


def test_paths_closed_to_others(tmp_path: Path) -> None:
    top = Path("/usr/share")
    if isolation._closed_to_others(top) is None:
        assert isolation._closed_to_others(Path("/usr/share/")) is None
    for part in (tmp_path, *tmp_path.parents):
        if not part.stat().st_mode & 0o001:
            assert isolation._closed_to_others(tmp_path) is not None
    secret = tmp_path / "file"
    secret.touch(0o600)
    assert isolation._closed_to_others(secret) is not None


def test_probe_for_doctor() -> None:
    harden_self()
    found = probe([sys.executable])
    assert found.level in ("own-user", "same-user")
    assert found.verifier_non_dumpable and found.no_core_dumps and found.prover_dies_with_parent
    assert found.as_json()["level"] == found.level
    assert bool(found.reason) != found.prover_own_user


def test_levels_are_not_flattering() -> None:
    best = isolation.Isolation(True, True, True, True, True, True, "")
    assert best.level == "own-user"
    for field in ("verifier_non_dumpable", "prover_no_capabilities", "prover_no_new_privs"):
        values = {name: getattr(best, name) for name in best.__slots__} | {field: False}
        assert isolation.Isolation(**values).level == "weak"


def test_core_dumps_are_off() -> None:
    harden_self()
    assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)


def test_locked_memory_is_what_it_says() -> None:
    array = np.zeros(3 * 4096, np.uint8)
    locked = lock_memory(array)
    kib = int(re.search(r"VmLck:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    assert locked == (kib >= 12)
    assert lock_memory(np.empty(0, np.uint8))


def test_no_such_program(control: socket.socket) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for command in (["/nonexistent/prover"], ["/etc/passwd"]):
        with pytest.raises(ProverUnavailable) as caught:
            spawn_prover(command, control.fileno())
        assert caught.value.hint
    assert len(os.listdir("/proc/self/fd")) == before


def test_output_is_bounded_and_printable(control: socket.socket) -> None:
    script = "import sys\nfor i in range(50000): print(i, '\\x1b[2Jnoise')\nprint('the end', file=sys.stderr)"
    process, output = run_to_end([OPEN_PYTHON, "-u", "-c", script], control)
    assert len(output) <= 8192
    text = process.output_tail()
    assert text.endswith("the end") and "\x1b" not in text


@pytest.mark.parametrize("stubborn", [False, True])
def test_terminate_ends_the_whole_group(control: socket.socket, stubborn: bool) -> None:
    script = (
        "import os, signal, sys, time\n"
        + ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else "")
        + "child = os.fork()\nif child: print(child, flush=True)\ntime.sleep(100)"
    )
    before = len(os.listdir("/proc/self/fd"))
    process = spawn_prover([OPEN_PYTHON, "-c", script], control.fileno())
    deadline = time.monotonic() + 10
    while not process._tail.endswith(b"\n") and time.monotonic() < deadline:
        time.sleep(0.01)
    child = int(process._tail)
    assert not gone(child)
    process.terminate(grace_s=0.2)
    assert process.wait(0) == (-signal.SIGKILL if stubborn else -signal.SIGTERM)
    assert eventually_gone(child) and not Path(f"/proc/{process.pid}").exists()
    assert not process.alive()
    process.terminate()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("drop_user", [True, False])
def test_prover_dies_with_the_verifier(drop_user: bool) -> None:
    verifier = (
        "import socket, sys, time\n"
        "from veriattn.verifier.isolation import spawn_prover\n"
        "ours, theirs = socket.socketpair()\n"
        "command = [sys.argv[1], '-c', 'import time; time.sleep(100)']\n"
        f"prover = spawn_prover(command, theirs.fileno(), drop_user={drop_user})\n"
        "print(prover.pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-c", verifier, OPEN_PYTHON]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert not gone(pid)
        process.kill()
    assert eventually_gone(pid)


def test_started_from_a_thread_that_ends(control: socket.socket) -> None:
    """PR_SET_PDEATHSIG looks at threads: a prover must outlive the one that asked for it."""
    import threading

    started: list[ProverProcess] = []
    command = [OPEN_PYTHON, "-c", "import time; time.sleep(100)"]
    thread = threading.Thread(target=lambda: started.append(spawn_prover(command, control.fileno())))
    thread.start()
    thread.join()
    try:
        assert started[0].wait(0.3) is None
    finally:
        started[0].terminate()


def test_a_prover_over_a_ring() -> None:
    script = (
        "from veriattn.wire.channel import inherited_channel\n"
        "from veriattn.wire.messages import Kind, Limits\n"
        "channel = inherited_channel()\n"
        "kind, payload = channel.recv_any(None)\n"
        "channel.send(Kind.READY, payload)\n"
        "channel.recv_any(Limits(1, 1, 1, 1, 1))\n"
    )
    ours, theirs = socket.socketpair()
    environment = {"PYTHONPATH": PYTHONPATH}
    process = spawn_prover([sys.executable, "-c", script], theirs.fileno(), extra_environment=environment)
    theirs.close()
    try:
        with RingChannel.offer(ours, RingGeometry(4096, 2, 2), 20.0) as channel:
            ready = Ready(process.pid, 1, 1, "test")
            channel.send(Kind.HELLO, encode_ready(ready))
            assert decode_ready(channel.recv(Kind.READY, 64), spec=1) == ready
            channel.send(Kind.SHUTDOWN)
            assert process.wait(10.0) == 0
            with pytest.raises(ProverUnavailable):
                channel.recv(Kind.CLAIM, 4)
    finally:
        process.terminate()
