"""`python -m veriattn.redteam.liar ATTACK`: a prover that lies, for `--prover-command` and for campaigns.

ATTACK is the JSON of `veriattn.redteam.attack.Attack`. What it did is printed to standard output, a line of JSON each.

Kinds, by what they touch (`step` and `claim` say where):
- computation (`veriattn.redteam.operations`): wrong_weight, wrong_input, other_token, other_model (`text`: its
  directory), ignore_load (of permuted rows), scores, and those of attention's operands (`LIES`);
- values: fault (see `FAULTS`), replay (the same claim of step `index`), splice (the claim named `text` of the same
  step), swap (two neighbouring claims);
- messages: skip, duplicate, hold (sent after the next), extra, header (`text`: the field), short, long, huge, half (then
  silence), half_die, silence, slow (`value` ms before each claim), die, hangup, error (`text`);
- READY: ready_garbage, ready_protocol, ready_spec, ready_padding, ready_name (`text`);
- the boundary: ring_head, ring_tail (`value` is added), ring_premature, ring_scribble, ring_mutate, ring_words, wakeups,
  resize, read_parent.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from veriattn.errors import VeriattnError
from veriattn.native import set_threads
from veriattn.prover.serve import serve
from veriattn.redteam.attack import Array, Attack, apply_fault
from veriattn.redteam.operations import Lie, LyingBackend
from veriattn.spec.constants import SPEC_VERSION
from veriattn.wire.channel import PROVER_FD_VARIABLE, Channel, accept_channel
from veriattn.wire.messages import (
    HEADER,
    MAGIC,
    PROTOCOL_VERSION,
    READY_BYTES,
    Buffer,
    Hello,
    Kind,
    Ready,
    byte_view,
    encode_error,
    encode_ready,
)
from veriattn.wire.ring import RingTransport

_FROM_PROVER, _TO_PROVER = 512, 256  # blocks of counters in the shared segment (docs/wire.md)
_HEAD, _TAIL, _READER_WAITS, _WRITER_WAITS = 0, 64, 128, 192
_FIELDS = ("magic", "kind", "flags", "session", "seq", "payload_bytes")
FOREVER_S = 3600.0
#: A consistent liar goes on with its lie as far as this: with 2**62 in an attention claim its own forward pass would be
#: undefined, and it would have to report an error. No int32 is this large.
_CARRIED = 2**36


class LyingSink:
    """Claims as messages, with lies in their values."""

    def __init__(self, channel: LyingChannel, lie: Lie) -> None:
        self._channel, self._lie = channel, lie
        self._kept: dict[str, Array] = {}
        self._held: tuple[str, Array] | None = None
        self._met = 0

    def claim(self, name: str, values: Array) -> None:
        """See `ClaimSink.claim`."""
        values = self._lied(name, np.ascontiguousarray(values))
        if self._lie.attack.kind == "swap" and self._lie.here(name):
            self._held = (name, values)
            return
        self._channel.claim(name, values)
        if self._held is not None:
            held, self._held = self._held, None
            self._lie.report_change(name, held[1], values)
            self._channel.claim(*held)

    def _lied(self, name: str, values: Array) -> Array:
        lie, attack = self._lie, self._lie.attack
        if attack.kind == "fault" and lie.here(name):
            self._met += 1
            if attack.nth not in (-1, self._met - 1):
                return values
            claimed = apply_fault(values, attack)
            lie.report_change(name, values, claimed)
            if attack.consistent:
                values[...] = np.clip(claimed, -_CARRIED, _CARRIED)
            return claimed
        if attack.kind in ("replay", "splice"):
            wanted = attack.claim if attack.kind == "replay" else attack.text
            if name == wanted and (attack.kind == "splice" or lie.step == attack.index):
                self._kept[name] = values.copy()
            elif lie.here(name):
                lie.report_change(name, values, self._kept[wanted])
                return self._kept[wanted]
        return values


class LyingChannel:
    """A channel whose messages go wrong where the attack says so. `serve` sees no difference."""

    def __init__(self, channel: Channel, lie: Lie) -> None:
        self._channel, self._lie = channel, lie
        self._name = ""
        self._held: list[tuple[Kind, tuple[Buffer, ...]]] = []
        self._done = False
        self._transport: Any = channel._transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def recv_any(self, *args: Any, **kwargs: Any) -> tuple[Kind, memoryview]:
        """As the channel's."""
        kind, payload = self._channel.recv_any(*args, **kwargs)
        if kind is Kind.HELLO:
            self._at("HELLO")
        return kind, payload

    def claim(self, name: str, values: Array) -> None:
        """A claim of this name."""
        self._name = name
        self.send(Kind.CLAIM, values)

    def send(self, kind: Kind, *payload: Buffer) -> None:
        """One message, or what the attack makes of it."""
        name = self._name if kind is Kind.CLAIM else kind.name
        lie, attack = self._lie, self._lie.attack
        if attack.kind == "slow" and kind is Kind.CLAIM:
            time.sleep(attack.value / 1000)
        here = not self._done and (lie.here(name) if kind is Kind.CLAIM else name == attack.claim)
        lying = MESSAGE_LIES.get(attack.kind) if here else None
        if lying is None:
            self._channel.send(kind, *payload)
        else:
            self._done = attack.kind not in ("ring_scribble", "ring_mutate")
            lie.claim = name
            lying(self, kind, payload)
        if self._held and lying is None:
            for held_kind, held in self._held:
                self._channel.send(held_kind, *held)
            self._held.clear()

    def _at(self, phase: str) -> None:
        if self._lie.attack.claim == phase and self._lie.attack.kind in ("die", "silence", "hangup"):
            self._lie.claim = phase
            MESSAGE_LIES[self._lie.attack.kind](self, Kind.READY, ())

    # -- raw messages ------------------------------------------------------------------------------------------

    def _raw(self, payload: tuple[Buffer, ...], keep: int | None = None, **fields: int) -> None:
        """A message whose header says what `fields` say; `keep` bytes of its payload follow."""
        data = b"".join(bytes(byte_view(p)) for p in payload)
        header = {
            "magic": MAGIC,
            "kind": Kind.CLAIM,
            "flags": 0,
            "session": self._channel.session or 0,
            "seq": self._channel._send_seq,
            "payload_bytes": len(data),
        } | fields
        raw = HEADER.pack(*(header[name] for name in _FIELDS))
        data = data if keep is None else data[:keep] + bytes(max(0, keep - len(data)))
        self._transport.write_message([memoryview(raw + data)], None)
        self._channel._send_seq += 1

    def _applied(self, **more: Any) -> None:
        self._lie.report(True, **more)

    def skip(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._applied()

    def duplicate(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._applied()
        self._channel.send(kind, *payload)
        self._channel.send(kind, *payload)

    def hold(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._applied()
        self._held.append((kind, tuple(bytes(byte_view(p)) for p in payload)))

    def extra(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._applied()
        self._channel.send(kind, *payload)
        self._channel.send(Kind.CLAIM, b"an answer that nobody asked for")

    def header(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        """One field off by `value`."""
        field, a = self._lie.attack.text, self._lie.attack
        size = sum(byte_view(p).nbytes for p in payload)
        honest = {
            "magic": MAGIC,
            "kind": int(kind),
            "flags": 0,
            "session": self._channel.session or 0,
            "seq": self._channel._send_seq,
            "payload_bytes": size,
        }
        bits = {"magic": 32, "kind": 16, "flags": 16}.get(field, 64)
        self._applied()
        self._raw(payload, size, **{"kind": int(kind), field: (honest[field] + a.value) % (1 << bits)})

    def short(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        size = sum(byte_view(p).nbytes for p in payload)
        self._applied()
        self._raw(payload, size - 4, kind=int(kind), payload_bytes=size - 4)

    def long(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        size = sum(byte_view(p).nbytes for p in payload)
        self._applied()
        self._raw(payload, size + 4096, kind=int(kind), payload_bytes=size + 4096)

    def huge(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._applied()
        self._raw(payload, 0, kind=int(kind), payload_bytes=2**64 - 1)

    def half(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        """All but the last slot (on a stream, the last byte) of a message, then silence."""
        self._all_but_the_end(kind, payload)
        time.sleep(FOREVER_S)

    def _all_but_the_end(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        size = sum(byte_view(p).nbytes for p in payload)
        slot = self._slot_bytes()
        whole = (HEADER.size + size - 1) // slot * slot
        self._applied()
        if whole:
            self._raw(payload, whole - HEADER.size, kind=int(kind), payload_bytes=size)

    def half_die(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._all_but_the_end(kind, payload)
        os.kill(os.getpid(), signal.SIGKILL)

    def silence(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._applied()
        time.sleep(FOREVER_S)

    def die(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._applied()
        os.kill(os.getpid(), signal.SIGKILL)

    def after_die(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        """Dies once the message is out."""
        self._channel.send(kind, *payload)
        self.die(kind, payload)

    def hangup(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._applied()
        self._transport.abort()
        time.sleep(FOREVER_S)

    def error(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._applied()
        self._channel.send(Kind.ERROR, encode_error(1, self._lie.attack.text))
        time.sleep(FOREVER_S)

    # -- READY -------------------------------------------------------------------------------------------------

    def ready_garbage(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._applied()
        self._channel.send(kind, np.random.default_rng(self._lie.attack.seed).bytes(READY_BYTES))

    def _ready(self, protocol: int = PROTOCOL_VERSION, spec: int = SPEC_VERSION, name: str = "liar") -> None:
        self._applied()
        self._channel.send(Kind.READY, encode_ready(Ready(1, protocol, spec, name)))

    def ready_protocol(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._ready(protocol=PROTOCOL_VERSION + 1)

    def ready_spec(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._ready(spec=SPEC_VERSION + 1)

    def ready_name(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._ready(name=self._lie.attack.text)

    def ready_padding(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        self._applied()
        raw = bytearray(bytes(byte_view(payload[0])))
        raw[12] = 1
        self._channel.send(kind, raw)

    # -- the shared segment ------------------------------------------------------------------------------------

    def _slot_bytes(self) -> int:
        """How much goes out by itself: a slot of a ring; on a stream any number of bytes."""
        return int(self._transport._producer._slot) if isinstance(self._transport, RingTransport) else 1

    def _until_taken(self) -> None:
        words = self._transport._words
        while words.load(_FROM_PROVER + _TAIL) < words.load(_FROM_PROVER + _HEAD):
            time.sleep(0.0005)

    def ring_head(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        """The counter of published slots jumps by `value`."""
        self._channel.send(kind, *payload)
        self._until_taken()
        self._applied()
        words = self._transport._words
        words.store(_FROM_PROVER + _HEAD, (words.load(_FROM_PROVER + _HEAD) + self._lie.attack.value) % 2**64)
        time.sleep(FOREVER_S)

    def ring_tail(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        """The counter of freed slots is off by `value` from here on; the verifier meets it when its ring is full."""
        self._applied()
        words, consumer = self._transport._words, self._transport._consumer
        words.store(_TO_PROVER + _TAIL, (words.load(_TO_PROVER + _TAIL) + self._lie.attack.value) % 2**64)
        consumer._freed = 2**63  # never writes the counter again
        self._channel.send(kind, *payload)

    def ring_premature(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        """Slots are published before they are filled."""
        self._applied()
        words = self._transport._words
        _, from_prover, _ = self._transport._views
        # What an earlier message left behind could pass for this one; so the slots are cleared.
        from_prover[:] = bytes(len(from_prover))
        words.store(_FROM_PROVER + _HEAD, words.load(_FROM_PROVER + _HEAD) + 1)
        self._transport._control.wake()
        time.sleep(0.05)
        self._channel.send(kind, *payload)

    def ring_scribble(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        """Every byte of the ring is overwritten as soon as a message has been taken."""
        self._applied()
        self._channel.send(kind, *payload)
        self._until_taken()
        _, from_prover, _ = self._transport._views
        from_prover[:] = b"\xa5" * len(from_prover)

    def ring_mutate(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        """A thread flips bytes of the ring to and fro while the verifier reads."""
        self._applied()
        _, from_prover, _ = self._transport._views
        rng = np.random.default_rng(self._lie.attack.seed)
        view = np.frombuffer(from_prover, np.uint8)

        def flip() -> None:
            while True:
                at = rng.integers(0, view.size, 64)
                view[at] ^= 0x40
                time.sleep(0)
                view[at] ^= 0x40

        threading.Thread(target=flip, daemon=True).start()
        self._done = True
        self._channel.send(kind, *payload)

    def ring_words(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        """Garbage in every word of the control page that the verifier has no reason to believe."""
        self._applied()
        words = self._transport._words
        for block in (_FROM_PROVER, _TO_PROVER):
            for word in (_READER_WAITS, _WRITER_WAITS):
                words.store(block + word, 2**64 - 1)
        for offset in range(0, 256, 8):
            words.store(offset, 0xDEAD_BEEF_DEAD_BEEF)
        self._channel.send(kind, *payload)

    def wakeups(self, kind: Kind, payload: tuple[Buffer, ...]) -> None:
        """Floods the socket."""
        self._applied()
        sock = self._transport._control._sock
        with_room = True
        while with_room:
            try:
                sock.send(b"\xff" * 65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                with_room = False
        self._channel.send(kind, *payload)


MESSAGE_LIES: dict[str, Callable[[LyingChannel, Kind, tuple[Buffer, ...]], None]] = {
    name: getattr(LyingChannel, name)
    for name in (
        "skip", "duplicate", "hold", "extra", "header", "short", "long", "huge", "half", "half_die", "silence", "die",
        "after_die", "hangup", "error", "ready_garbage", "ready_protocol", "ready_spec", "ready_name", "ready_padding",
        "ring_head", "ring_tail", "ring_premature", "ring_scribble", "ring_mutate", "ring_words", "wakeups",
    )
}  # fmt: skip


def try_resize(lie: Lie, fd: int) -> None:
    """Shrink, grow and unseal the shared segment; report what the system says."""
    size = os.fstat(fd).st_size
    outcome: dict[str, str] = {}
    for name, wanted in (("shrink", 0), ("shrink_by_one", size - 1), ("grow", size + 4096)):
        try:
            os.ftruncate(fd, wanted)
            outcome[name] = "done"
        except OSError as e:
            outcome[name] = errno.errorcode.get(e.errno or 0, "?")
    lie.report("done" in outcome.values() or os.fstat(fd).st_size != size, **outcome)


def try_to_read_parent(lie: Lie, sock: socket.socket) -> None:
    """Every way into the verifier's memory that a process has."""
    # Whoever made the pair of sockets: behind a zygote the parent is another liar.
    parent, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    outcome: dict[str, str] = {}
    libc = ctypes.CDLL(None, use_errno=True)

    def attempt(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            outcome[name] = "done"
        except OSError as e:
            outcome[name] = errno.errorcode.get(e.errno or 0, "?")

    def checked(result: int) -> None:
        if result < 0:
            raise OSError(ctypes.get_errno(), "refused")

    def vm_read() -> None:
        here = ctypes.create_string_buffer(64)
        local = struct.pack("QQ", ctypes.addressof(here), 64)
        remote = struct.pack("QQ", id(lie), 64)  # any address: permission is checked first
        checked(libc.process_vm_readv(parent, local, 1, remote, 1, 0))

    attempt("process_vm_readv", vm_read)
    for name in ("mem", "maps", "environ"):
        attempt(name, Path("/proc", str(parent), name).open)
    attempt("ptrace", lambda: checked(libc.ptrace(16, parent, None, None)))
    lie.report("done" in outcome.values(), **outcome)


def run(
    sock: socket.socket, attack: Attack, preloaded: Callable[[Hello], LyingBackend | None] = lambda _: None
) -> None:
    """Serve one verifier on `sock`. Ends when it goes away."""
    lie = Lie(attack)
    if attack.claim == "START":
        lie.claim = "START"
        lie.report(True)
        if attack.kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(FOREVER_S if attack.kind == "silence" else 0)
        return
    if attack.kind == "resize":
        # socket.recv_fds ignores its flags.
        _, [(_, _, raw)], _, _ = sock.recvmsg(16, socket.CMSG_LEN(4), socket.MSG_PEEK)
        fd = int.from_bytes(raw, sys.byteorder)
        try_resize(lie, fd)
        os.close(fd)
    if attack.kind == "read_parent":
        try_to_read_parent(lie, sock)

    def make_backend(hello: Hello) -> LyingBackend:
        backend = preloaded(hello)
        if backend is None:
            other = attack.kind == "other_model"
            path, digest = (attack.text, None) if other else (hello.model_path, hello.model_digest)
            backend = LyingBackend.load(Path(path), digest, hello.limits.kv_tokens, hello.limits.max_sequences)
            if other:
                lie.report(True)
        backend.lie = lie
        return backend

    with accept_channel(sock) as channel:
        lying: Any = LyingChannel(channel, lie)
        serve(lying, make_backend, lambda _: LyingSink(lying, lie))


def main(arguments: list[str]) -> int:
    """The attack as JSON is the only argument; none is an honest prover."""
    set_threads(1)
    try:
        attack = Attack.from_json(arguments[0] if arguments else "{}")
        run(socket.socket(fileno=int(os.environ[PROVER_FD_VARIABLE])), attack)
    except VeriattnError as e:
        print(f"veriattn liar: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
