"""Runs between fork and the prover: gives up every privilege, reports what is in force, then executes the command.

A program of its own (`python -I -S launch_shim.py ...`) because code between fork and exec of a process with threads
is unsafe. Standard library only. Arguments: parent's pid, comma-separated user ids to try (or "-"), status descriptor,
command.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys

PR_SET_PDEATHSIG = 1
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
CAPABILITY_VERSION_3 = 0x20080522


def drop_privileges(candidates: list[int]) -> dict[str, bool]:
    """Apply everything that this process may apply to itself; the result says what worked."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(option: int, argument: int = 0) -> bool:
        zero = ctypes.c_ulong(0)
        return bool(libc.prctl(option, ctypes.c_ulong(argument), zero, zero, zero) == 0)

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    capability = 0
    while capability < 64 and prctl(PR_CAPBSET_DROP, capability):  # ends at the last one that the kernel knows
        capability += 1
    own_user = False
    for uid in candidates:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        except OSError:
            continue
        own_user = True
        break
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = ctypes.create_string_buffer(struct.pack("=Ii", CAPABILITY_VERSION_3, 0), 8)
    no_capabilities = libc.capset(header, ctypes.create_string_buffer(24)) == 0
    # Without new privileges an exec by root restores no capability either.
    no_new_privs = prctl(PR_SET_NO_NEW_PRIVS, 1)
    # Last: a change of user clears it.
    dies_with_parent = prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return {
        "own_user": own_user,
        "no_capabilities": no_capabilities,
        "no_new_privs": no_new_privs,
        "dies_with_parent": dies_with_parent,
    }


def main(arguments: list[str]) -> int:
    """Returns only if the command could not be executed."""
    parent, candidates, status = int(arguments[0]), arguments[1], int(arguments[2])
    os.set_inheritable(status, False)
    report = drop_privileges([] if candidates == "-" else [int(uid) for uid in candidates.split(",")])
    if os.getppid() != parent:  # it died before PR_SET_PDEATHSIG took hold
        return 1
    os.write(status, json.dumps(report).encode() + b"\n")
    command = arguments[3:]
    try:
        os.execvp(command[0], command)  # noqa: S606 - the prover that the user named
    except OSError as error:
        os.write(status, f"{error.strerror}\n".encode())
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
