"""`python -m veriattn.floatmode.prover`: the untrusted side, a process of its own, in NumPy or torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from veriattn.convert.checkpoint import Source, SourceConfig
from veriattn.convert.sources import open_source
from veriattn.errors import EXIT_PROVER, VeriattnError
from veriattn.floatmode.arithmetic import Arithmetic, Tensor, open_arithmetic
from veriattn.floatmode.formats import Array
from veriattn.floatmode.link import FloatLink, Frame
from veriattn.floatmode.requests import DEVICE_BYTES, LINEARS, Attend, Hello, Linear, Values, tile_mask
from veriattn.wire.messages import BadRequest, VerifierGone


class FloatProver:
    """Weights and caches of one sequence in the format, and the claims computed from them."""

    def __init__(self, source: Source, hello: Hello, arithmetic: Arithmetic | None = None) -> None:
        self.config: SourceConfig = source.config
        self.hello = hello
        self.arithmetic = arithmetic or open_arithmetic(hello.backend, hello.device, hello.format)
        put = self.arithmetic.put
        self._weights: dict[tuple[int, str], Tensor] = {
            (layer, name): self.arithmetic.transposed(put(source.tensor(f"layers.{layer}.{name}")))
            for layer in range(self.config.num_layers)
            for name in LINEARS[:-1]
        }
        self._weights[self.config.num_layers, "lm_head"] = self.arithmetic.transposed(put(source.tensor("lm_head")))
        self._caches: dict[int, list[Tensor]] = {}
        self._last_values: Tensor = None

    def reset(self) -> None:
        """Forget the sequence."""
        self._caches.clear()

    def linear(self, request: Linear) -> Tensor:
        """y = x @ W.T in the format."""
        return self.arithmetic.product(self.arithmetic.put(request.x), self._weights[request.layer, request.name])

    def shares(self, request: Attend) -> tuple[Tensor, Tensor]:
        """Keys and values of the prover's share, (kv, keys, d); takes the new ones that fit into its caches."""
        arithmetic, start = self.arithmetic, request.start
        room = max(0, min(request.tokens, self.hello.kv_tokens - start))
        stop = min(start + request.tokens, self.hello.kv_tokens)
        heads = slice(request.first, request.first + request.kv)
        stores = self._caches.setdefault(request.layer, [])
        out = []
        for i, (new, far) in enumerate(((request.k, request.far_k), (request.v, request.far_v))):
            if i == len(stores):
                stores.append(arithmetic.zeros((self.config.num_kv_heads, stop, self.config.head_dim)))
            elif stores[i].shape[1] < stop:
                grown = arithmetic.zeros((self.config.num_kv_heads, 2 * stop, self.config.head_dim))
                grown[:, :start] = stores[i][:, :start]
                stores[i] = grown
            if room:
                stores[i][heads, start:stop] = arithmetic.put(new[:, :room])
            near = stores[i][heads, :stop]
            out.append(arithmetic.concat([near, arithmetic.put(far)]) if request.streamed else near)
        k, v = out
        return k, v

    def scores(self, request: Attend) -> Tensor:
        """S = K Q.T / sqrt(d), (kv, keys, rows), nothing masked."""
        k, self._last_values = self.shares(request)
        return self.arithmetic.scores(k, self.arithmetic.put(request.q), self.config.head_dim**-0.5)

    def values(self, p: Array) -> Tensor:
        """O = P.T V for the values of the last scores."""
        return self.arithmetic.product(self.arithmetic.transposed(self.arithmetic.put(p)), self._last_values)

    def attend(self, request: Attend) -> Any:
        """Per tile ("tile", shift, E), and at last ("outputs", U): generated, so that a tile leaves when it is done."""
        a, group = self.arithmetic, self.config.num_heads // self.config.num_kv_heads
        k, v = self.shares(request)
        q = a.put(request.q)
        resident = min(request.start + request.tokens, self.hello.kv_tokens)
        # Where nothing is left out, the share is in the order of positions, and rows see a prefix of it.
        causal = resident + request.streamed == request.start + request.tokens
        outputs = []
        for lo in range(0, request.tokens, request.tile):
            hi = min(lo + request.tile, request.tokens)
            keys = request.start + hi if causal else resident + request.streamed
            mask = tile_mask(request.start, lo, hi, keys, group) if causal and hi - lo > 1 else None
            s = a.scores(k[:, :keys], q[:, lo * group : hi * group], self.config.head_dim**-0.5)
            shift, e = a.exponentials(s, mask, self.hello.shift == "max")
            yield "tile", shift, e
            used = a.round_to(e, self.hello.exp_format)
            outputs.append(a.product(a.transposed(used), v[:, :keys]))
        yield "outputs", a.concat(outputs)


def answers(prover: FloatProver, kind: Frame, payload: bytes) -> Iterator[Array]:
    """The claims that a request asks for, one after the other. Raises: BadRequest."""
    hello, config, claim = prover.hello, prover.config, prover.arithmetic.claim
    if kind is Frame.RESET:
        prover.reset()
    elif kind is Frame.LINEAR:
        yield claim(prover.linear(Linear.decode(payload)), hello.format)
    elif kind is Frame.ATTEND:
        for what, *values in prover.attend(Attend.decode(payload, config)):
            if what == "tile":
                yield np.ascontiguousarray(values[0], np.float32)
                yield claim(values[1], hello.exp_format)
            else:
                yield claim(values[0], hello.format)
    elif kind is Frame.SCORES:
        yield claim(prover.scores(Attend.decode(payload, config)), hello.format)
    elif kind is Frame.VALUES:
        request = Values.decode(payload, config.num_kv_heads, config.num_heads // config.num_kv_heads)
        yield claim(prover.values(request.p), hello.format)
    else:
        raise BadRequest(f"{kind.name} is no request")


def serve(link: FloatLink, make: Callable[[Source, Hello], FloatProver] = FloatProver) -> None:
    """Answer requests until the trusted side goes away. Raises: VeriattnError, BadRequest."""
    kind, payload = link.request()
    if kind is not Frame.HELLO:
        raise BadRequest("the first frame is no HELLO")
    hello = Hello.decode(payload)
    prover = make(open_source(Path(hello.path)), hello)
    link.send(Frame.READY, prover.arithmetic.device.encode()[:DEVICE_BYTES].ljust(DEVICE_BYTES, b"\0"))
    while True:
        kind, payload = link.request()
        for claim in answers(prover, kind, payload):
            link.send(Frame.CLAIM, claim)


def main() -> int:
    """Exit code."""
    try:
        serve(FloatLink.inherited())
    except VerifierGone:
        return 0
    except VeriattnError as error:
        print(f"veriattn prover: {error}", file=sys.stderr)
        return error.exit_code
    except ImportError as error:
        print(f"veriattn prover: --backend torch needs the package {error.name} (pip install torch)", file=sys.stderr)
        return EXIT_PROVER
    except (MemoryError, RuntimeError, ValueError) as error:
        print(f"veriattn prover: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
