"""Secret challenges, what they make of the weights, and how they are destroyed.

Soundness. Challenges are uniform in F_p, p = 2**50 - 27, drawn from the operating system's generator, in two independent
repetitions. A wrong row y' != y of a linear passes one repetition iff (y' - y).r = 0 mod p with y' - y != 0 mod p (every
entry is below p in size), so with probability 1/p, and both with 1/p**2 < 2**-99. Honest claims always pass, so accepts
tell the prover nothing about the challenges; the first reject ends the session. So the chance that anything wrong is
accepted in a session is at most that of the *first* wrong claim: 1/p**2, whatever the number of checks.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from veriattn.errors import InternalError
from veriattn.spec.field import P
from veriattn.spec.model import ModelConfig

U64 = npt.NDArray[np.uint64]

REPETITIONS = 2
#: -log2 of the probability that a session accepts anything wrong.
SOUNDNESS_BITS = math.floor(REPETITIONS * math.log2(P))


def random_field(*shape: int) -> U64:
    """Uniform elements of F_p from the OS CSPRNG, by rejection (50 random bits, again where they reach p)."""
    count = math.prod(shape)
    mask = np.uint64((1 << P.bit_length()) - 1)
    out = np.frombuffer(os.urandom(8 * count), dtype="<u8") & mask
    while bool(np.any(bad := out >= P)):
        out[bad] = np.frombuffer(os.urandom(8 * int(bad.sum())), dtype="<u8") & mask
    return out.reshape(shape)


class KeySet:
    """All secrets of one session. Never printed, never sent; `destroy` overwrites them.

    r[name]: (2, out), u[name] = W^T r: (2, in); w: (layers, kv_heads, 2, d) for attention outputs; position r for
    transferred scores: (2, positions), drawn as positions are reached.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._r: dict[str, U64] = {n: random_field(REPETITIONS, out) for n, (out, _) in config.linear_shapes().items()}
        self._u: dict[str, U64] = {
            n: np.zeros((REPETITIONS, inp), np.uint64) for n, (_, inp) in config.linear_shapes().items()
        }
        self._w = random_field(config.num_layers, config.num_kv_heads, REPETITIONS, config.head_dim)
        self._positions = self._shown = random_field(REPETITIONS, 0)
        self._alive = True

    def __repr__(self) -> str:
        return f"KeySet(alive={self._alive})"

    def __reduce__(self) -> Any:
        raise InternalError("secrets are not serialised")

    def linear(self, name: str) -> tuple[U64, U64]:
        """(r, u) of a linear. Raises: InternalError after `destroy`."""
        self._check_alive()
        return self._r[name], self._u[name]

    def attention(self, layer: int) -> U64:
        """w of a layer, (kv_heads, 2, d)."""
        self._check_alive()
        w: U64 = self._w[layer]
        return w

    def positions(self, count: int) -> U64:
        """Challenges of the first `count` key positions at least, (2, >= count), not to be written to."""
        self._check_alive()
        have = self._positions.shape[1]
        if have < count:
            more = random_field(REPETITIONS, max(count, 2 * have, 1024) - have)
            grown = np.concatenate([self._positions, more], axis=1)
            self._positions[...] = 0
            more[...] = 0
            self._positions = grown
            # Others hold on to parts of it: what they overwrite when they are done must not be this.
            self._shown = grown.view()
            self._shown.flags.writeable = False
        return self._shown

    def _check_alive(self) -> None:
        if not self._alive:
            raise InternalError("the session's secrets have been destroyed")

    def destroy(self) -> None:
        """Overwrite all secrets; using them afterwards raises."""
        self._alive = False
        for array in (*self._r.values(), *self._u.values(), self._w, self._positions):
            array[...] = 0

    @property
    def nbytes(self) -> int:
        arrays = (*self._r.values(), *self._u.values(), self._w, self._positions)
        return sum(a.nbytes for a in arrays)

    def secret_arrays(self) -> list[U64]:
        """The arrays to lock in memory."""
        return [*self._r.values(), *self._u.values(), self._w]
