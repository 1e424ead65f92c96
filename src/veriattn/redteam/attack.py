"""What a lying prover is told to do, and how values are altered: shared by both processes, rests on NumPy alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from veriattn.errors import UsageError
from veriattn.spec.field import P

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Attack:
    """One lie.

    kind: see `veriattn.redteam.liar`. step, claim: where; claims carry the names that the backend gives them,
    `layers.0.qkv`, `layers.0.scores.SEQUENCE`, `layers.0.attention`, ..., `lm_head`; before them `START`, `HELLO`, `READY`.
    nth: which claim of that name, where it travels in tiles (-1: all). fault, index, value, seed: how values change.
    consistent: the liar goes on computing with its lie, so that everything downstream agrees with it. text: a path, a
    message, a header field.
    """

    kind: str = "honest"
    step: int = 0
    claim: str = ""
    nth: int = -1
    fault: str = ""
    index: int = 0
    value: int = 0
    seed: int = 0
    consistent: bool = False
    text: str = ""

    def to_json(self) -> str:
        """Fields that are not at their defaults."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({k: v for k, v in fields.items() if v != Attack.__dataclass_fields__[k].default})

    @classmethod
    def from_json(cls, text: str) -> Attack:
        """Raises: UsageError."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as e:
            raise UsageError(f"not an attack: {text[:200]!r}") from e


def wrapped(value: int, dtype: np.dtype[Any]) -> int:
    """Two's complement: what is left of an integer in a signed type."""
    bits = 8 * dtype.itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _bit(x: Array, a: Attack, _: np.random.Generator) -> None:
    flat = x.reshape(-1)
    flat[a.index % flat.size] = wrapped(int(flat[a.index % flat.size]) ^ (1 << (a.value % (8 * x.itemsize))), x.dtype)


def _add(x: Array, a: Attack, _: np.random.Generator) -> None:
    flat = x.reshape(-1)
    flat[a.index % flat.size] = wrapped(int(flat[a.index % flat.size]) + a.value, x.dtype)


def _add_p(x: Array, a: Attack, r: np.random.Generator) -> None:
    _add(x, dataclasses.replace(a, value=a.value * P), r)


def _set(x: Array, a: Attack, _: np.random.Generator) -> None:
    flat = x.reshape(-1)
    flat[a.index % flat.size] = wrapped(a.value, x.dtype)


def _element(x: Array, a: Attack, r: np.random.Generator) -> None:
    info, flat = np.iinfo(x.dtype), x.reshape(-1)
    old = flat[a.index % flat.size]
    while flat[a.index % flat.size] == old:
        flat[a.index % flat.size] = r.integers(info.min, info.max, endpoint=True, dtype=x.dtype)


def _every(x: Array, a: Attack, _: np.random.Generator) -> None:
    x += np.array(wrapped(a.value, x.dtype), x.dtype)


def _zero(x: Array, _a: Attack, _r: np.random.Generator) -> None:
    x[...] = 0


def _negate(x: Array, _a: Attack, _r: np.random.Generator) -> None:
    np.negative(x, out=x)


def _scale(x: Array, a: Attack, _: np.random.Generator) -> None:
    x *= np.array(wrapped(a.value, x.dtype), x.dtype)


def _random(x: Array, _a: Attack, r: np.random.Generator) -> None:
    scale = max(1, int(np.abs(x).max()))
    x[...] = r.integers(-scale, scale, x.shape, x.dtype, endpoint=True)


def _row(x: Array, a: Attack, _: np.random.Generator) -> None:
    rows = x.reshape(-1, x.shape[-1])
    rows[a.index % rows.shape[0]] += np.array(wrapped(a.value, x.dtype), x.dtype)


def _row_scaled(x: Array, a: Attack, _: np.random.Generator) -> None:
    rows = x.reshape(-1, x.shape[-1])
    rows[a.index % rows.shape[0]] *= np.array(wrapped(a.value, x.dtype), x.dtype)


def _pair(x: Array, a: Attack, _: np.random.Generator) -> None:
    """Two changes in one row that cancel in its plain sum."""
    rows = x.reshape(-1, x.shape[-1])
    row = rows[a.index % rows.shape[0]]
    row[0] = wrapped(int(row[0]) + a.value, x.dtype)
    row[1] = wrapped(int(row[1]) - a.value, x.dtype)


def _column_pair(x: Array, a: Attack, _: np.random.Generator) -> None:
    """The same element of two rows, changes that cancel over the batch."""
    rows = x.reshape(x.shape[0], -1)
    at = a.index % rows.shape[1]
    rows[0, at] = wrapped(int(rows[0, at]) + a.value, x.dtype)
    rows[1, at] = wrapped(int(rows[1, at]) - a.value, x.dtype)


def _swap_rows(x: Array, a: Attack, _: np.random.Generator) -> None:
    i, j = a.index % x.shape[0], a.value % x.shape[0]
    x[[i, j]] = x[[j, i]]


def _swap_heads(x: Array, a: Attack, _: np.random.Generator) -> None:
    """Axis 1 of attention sums (tokens, heads, d), axis 0 of scores (heads, tokens, keys) by `value` < 0."""
    if a.value < 0:
        x[[0, 1]] = x[[1, 0]]
    else:
        x[:, [a.index, a.value]] = x[:, [a.value, a.index]]


def _swap_elements(x: Array, a: Attack, r: np.random.Generator) -> None:
    flat = x.reshape(-1)
    i = a.index % flat.size
    for j in range(flat.size):
        if flat[j] != flat[i]:
            flat[[i, j]] = flat[[j, i]]
            return


def _roll(x: Array, _a: Attack, _r: np.random.Generator) -> None:
    flat = x.reshape(-1)
    flat[...] = np.roll(flat, 1)


def _bump_to_top(x: Array, a: Attack, _: np.random.Generator) -> None:
    """Make id `value` the largest entry of the last row: the smallest lie that changes a greedy answer."""
    x[-1, a.value % x.shape[-1]] = min(int(x[-1].max()) * 4 + 1000, 2**31 - 1)


FAULTS: dict[str, Callable[[Array, Attack, np.random.Generator], None]] = {
    "bit": _bit,
    "add": _add,
    "add_p": _add_p,
    "set": _set,
    "element": _element,
    "every": _every,
    "zero": _zero,
    "negate": _negate,
    "scale": _scale,
    "random": _random,
    "row": _row,
    "row_scaled": _row_scaled,
    "pair": _pair,
    "column_pair": _column_pair,
    "swap_rows": _swap_rows,
    "swap_heads": _swap_heads,
    "swap_elements": _swap_elements,
    "roll": _roll,
    "bump_to_top": _bump_to_top,
}


def apply_fault(values: Array, attack: Attack) -> Array:
    """A changed copy. Raises: UsageError for an unknown fault."""
    if attack.fault not in FAULTS:
        raise UsageError(f"unknown fault {attack.fault!r}", hint=f"one of {', '.join(FAULTS)}")
    changed = np.array(values, order="C")
    with np.errstate(over="ignore"):
        FAULTS[attack.fault](changed, attack, np.random.default_rng(attack.seed))
    return changed
