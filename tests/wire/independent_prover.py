"""A prover's side of the wire from docs/wire.md alone, without this package. Echoes token ids as claims."""

import array
import contextlib
import mmap
import os
import socket
import struct
import time

sock = socket.socket(fileno=int(os.environ["VERIATTN_PROVER_FD"]))
greeting, fds, _, _ = socket.recv_fds(sock, 16, 1)
magic, transport = struct.unpack("<II8x", greeting)
assert magic == 0x31474156 and transport in (1, 2)

if transport == 1:
    shared = mmap.mmap(fds[0], 0)
    magic, version, slot, to_slots, from_slots = struct.unpack_from("<IIQQQ", shared, 0)
    assert magic == 0x31524156 and version == 1
    words = memoryview(shared)[:4096].cast("Q")
    slots_in = memoryview(shared)[4096 : 4096 + slot * to_slots]
    slots_out = memoryview(shared)[4096 + slot * to_slots :][: slot * from_slots]
    sock.setblocking(False)
    position = {"in": 0, "out": 0}

    def until(ready):
        while not ready():
            try:
                if sock.recv(64) == b"":
                    os._exit(0)
            except BlockingIOError:
                time.sleep(0.0002)

    def nudge(flag):
        if words[flag // 8]:
            with contextlib.suppress(BlockingIOError):
                sock.send(b"!")

    def read(size):
        out = b""
        while size:
            until(lambda: words[256 // 8] * slot > position["in"])
            at = position["in"] % len(slots_in)
            count = min(size, words[256 // 8] * slot - position["in"], len(slots_in) - at)
            out += bytes(slots_in[at : at + count])
            position["in"] += count
            size -= count
            free()
        return out

    def end_read():
        position["in"] = -(-position["in"] // slot) * slot
        free()

    def free():
        words[(256 + 64) // 8] = position["in"] // slot
        nudge(256 + 192)

    def write(data):
        while data:
            until(lambda: position["out"] < (words[(512 + 64) // 8] + from_slots) * slot)
            at = position["out"] % len(slots_out)
            count = min(len(data), slot - at % slot)
            slots_out[at : at + count] = data[:count]
            data = data[count:]
            position["out"] += count
            if position["out"] % slot == 0 or not data:
                position["out"] = -(-position["out"] // slot) * slot
                words[512 // 8] = position["out"] // slot
                nudge(512 + 128)

else:

    def read(size):
        out = b""
        while len(out) < size:
            piece = sock.recv(size - len(out))
            if not piece:
                os._exit(0)
            out += piece
        return out

    def end_read():
        pass

    write = sock.sendall

sent = 0
while True:
    magic, kind, flags, session, seq, size = struct.unpack("<IHHQQQ", read(32))
    payload = read(size)
    end_read()
    if kind == 1:
        answer = 257, struct.pack("<IIII48s", os.getpid(), 1, 1, 0, b"independent")
    elif kind == 2:
        _, _, _, entries, tokens = struct.unpack_from("<QIIII", payload)
        answer = 258, array.array("i", payload[24 + 24 * entries :]).tobytes()
        assert len(answer[1]) == 4 * tokens
    elif kind == 4:
        break
    else:
        answer = 260, struct.pack("<I252s", 5, b"unsupported")
    write(struct.pack("<IHHQQQ", 0x31544156, answer[0], 0, session, sent, len(answer[1])) + answer[1])
    sent += 1
