"""A link that lies on command: the canary that must be caught before the server is ready, and the page's switch.

One bit of one claim is flipped between the prover and the verifier. To the verifier that is a lying prover, whatever the
prover is (CPU, GPU, another machine), so the canary passes through the very checks that later requests rely on.
"""

from __future__ import annotations

import secrets
import threading
from typing import Any, cast

import numpy as np

from veriattn.verifier.launch import Launcher, Prover
from veriattn.verifier.model import VerifierModel
from veriattn.wire.channel import Channel
from veriattn.wire.messages import Kind


class TamperSwitch:
    """Armed, it flips one bit of the `after`-th claim (0 is the next) of the current session; then it is off again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claims_left: int | None = None

    def arm(self, after: int) -> None:
        """Alter one claim; `after` claims pass before it."""
        with self._lock:
            self._claims_left = after

    def disarm(self) -> None:
        """Leave claims alone again."""
        with self._lock:
            self._claims_left = None

    @property
    def armed(self) -> bool:
        return self._claims_left is not None

    def touch(self, claim: np.ndarray[Any, Any]) -> None:
        """Called with each claim, in private memory and unchecked."""
        with self._lock:
            if self._claims_left is None:
                return
            if self._claims_left > 0:
                self._claims_left -= 1
                return
            self._claims_left = None
        raw = claim.reshape(-1).view(np.uint8)
        # The lowest bits of the first or last element: so small that only an exact check notices, and never a masked score.
        at = secrets.choice((0, raw.size - claim.dtype.itemsize))
        raw[at] ^= np.uint8(1 << secrets.randbelow(3))

    def wrap(self, launch: Launcher) -> Launcher:
        """A launcher whose provers' links pass through this switch."""

        def wrapped(model: VerifierModel) -> Prover:
            prover = launch(model)
            prover.channel = cast(Channel, TamperedChannel(prover.channel, self))
            return prover

        return wrapped


class TamperedChannel:
    """A channel as the session sees it; everything but claims passes through unchanged."""

    _OWN = frozenset({"_channel", "_switch"})

    def __init__(self, channel: Channel, switch: TamperSwitch) -> None:
        self._channel, self._switch = channel, switch

    def recv(self, kind: Kind, payload_bytes: int, out: Any = None, *args: Any, **kwargs: Any) -> Any:
        """See `Channel.recv`."""
        got = self._channel.recv(kind, payload_bytes, out, *args, **kwargs)
        if kind is Kind.CLAIM:
            self._switch.touch(got if out is None else out)
        return got

    def recv_all(self, kind: Kind, outs: Any, *args: Any, **kwargs: Any) -> None:
        """See `Channel.recv_all`."""
        self._channel.recv_all(kind, outs, *args, **kwargs)
        if kind is Kind.CLAIM:
            for out in outs:
                self._switch.touch(out)

    def recv_into(self, out: Any, timeout_s: float | None = None) -> None:
        """See `Channel.recv_into`."""
        self._channel.recv_into(out, timeout_s)
        self._switch.touch(out)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._channel, name, value)
