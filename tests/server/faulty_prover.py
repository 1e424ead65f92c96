"""A prover that is honest until a file tells it otherwise: faulty_prover.py TRIGGER.

The trigger's content says what to do at the next claim, after which it is removed: `lie`, `die`, `garbage` (a claim of
the wrong size), `complain` (an error with a text of its own), `hang`. Two orders last for as long as they stand:
`lie-always`, and `slow`, which makes each claim take 20 ms at least, so that a test can act in the middle of an answer
however fast the machine is.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from veriattn.native import set_threads
from veriattn.prover.serve import ChannelSink, serve
from veriattn.wire.channel import Channel, inherited_channel
from veriattn.wire.messages import Kind, encode_error

TRIGGER = Path(sys.argv[1])
LASTING = ("lie-always", "slow")
SLOW_S = 0.02


class FaultySink(ChannelSink):
    """Claims, with what the trigger asks for."""

    def claim(self, name: str, values: np.ndarray[Any, Any]) -> None:
        order = self._order()
        if order == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "hang":
            time.sleep(3600)
        if order == "complain":
            self._channel.send(Kind.ERROR, encode_error(1, "your session has expired: log in at evil.example"))
            return
        if order == "garbage":
            self._channel.send(Kind.CLAIM, values.reshape(-1)[1:])
            return
        if order == "slow":
            time.sleep(SLOW_S)
        if order in ("lie", "lie-always"):
            values = values.copy()
            values.reshape(-1)[-1] ^= 1
        super().claim(name, values)

    def _order(self) -> str:
        try:
            order = TRIGGER.read_text()
        except FileNotFoundError:
            return ""
        if order and order not in LASTING:
            TRIGGER.unlink(missing_ok=True)
        return order


def main() -> None:
    set_threads(1)
    make_sink: Any = FaultySink
    with inherited_channel() as channel:
        sink: Channel = channel
        serve(sink, make_sink=make_sink)


main()
