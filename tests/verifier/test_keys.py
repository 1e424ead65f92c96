"""Challenges come from the system's generator, differ everywhere, stay secret and are destroyed."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from tests.helpers import tiny_config

from veriattn.errors import InternalError
from veriattn.spec.field import P
from veriattn.verifier import keys as keys_module
from veriattn.verifier.keys import REPETITIONS, SOUNDNESS_BITS, KeySet, random_field

CONFIG = tiny_config()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Everything that the system's generator hands out."""
    out: list[bytes] = []
    real = os.urandom

    def urandom(count: int) -> bytes:
        out.append(real(count))
        return out[-1]

    monkeypatch.setattr(keys_module.os, "urandom", urandom)
    return out


def all_arrays(keys: KeySet) -> list[np.ndarray]:
    return [*keys._r.values(), *keys._u.values(), keys._w, keys._positions]


def test_field_elements_are_the_generators_bits(drawn: list[bytes]) -> None:
    values = random_field(3, 5)
    assert values.shape == (3, 5) and values.dtype == np.uint64
    assert bool(np.all(values < P))
    words = np.frombuffer(drawn[0], "<u8") & np.uint64(2**50 - 1)
    assert len(drawn) > 1 or np.array_equal(values.reshape(-1), words)


def test_values_from_p_on_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """2**50 - 1 and p itself are rejected, p - 1 is kept; the high 14 bits of a word do not matter."""
    words = [[2**50 - 1, P, P - 1, 2**63 + 5], [2**64 - 1, 7], [8]]

    def urandom(count: int) -> bytes:
        raw = np.array(words.pop(0), "<u8").tobytes()
        assert len(raw) == count
        return raw

    monkeypatch.setattr(keys_module.os, "urandom", urandom)
    assert random_field(4).tolist() == [8, 7, P - 1, 5]
    assert words == []


def test_every_secret_is_drawn_from_the_system(drawn: list[bytes]) -> None:
    keys = KeySet(CONFIG)
    keys.positions(10)
    secrets = [*keys._r.values(), keys._w, keys._positions]
    assert sum(map(len, drawn)) >= 8 * sum(a.size for a in secrets)
    known = {int(v) & (2**50 - 1) for raw in drawn for v in np.frombuffer(raw, "<u8")}
    assert all(int(v) in known for a in secrets for v in a.reshape(-1))


def test_a_generator_of_constants_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the tests below: with a constant in place of randomness they would fail."""
    monkeypatch.setattr(keys_module.os, "urandom", lambda count: b"\1" * count)
    assert np.array_equal(random_field(2, 8)[0], random_field(2, 8)[1])


def test_repetitions_operations_layers_and_sets_differ() -> None:
    one, two = KeySet(CONFIG), KeySet(CONFIG)
    rows = [row.tobytes() for keys in (one, two) for name in CONFIG.linear_shapes() for row in keys.linear(name)[0]]
    rows += [
        row.tobytes()
        for keys in (one, two)
        for layer in range(CONFIG.num_layers)
        for head in keys.attention(layer)
        for row in head
    ]
    rows += [row[:1024].tobytes() for keys in (one, two) for row in keys.positions(1024)]
    assert len(set(rows)) == len(rows)
    assert all(keys.linear("lm_head")[0].shape == (REPETITIONS, CONFIG.vocab_size) for keys in (one, two))


def test_positions_grow_without_changing() -> None:
    keys = KeySet(CONFIG)
    first = keys.positions(3)
    before = first.copy()
    grown = keys.positions(5000)
    assert grown.shape[1] >= 5000
    assert np.array_equal(grown[:, : before.shape[1]], before)
    assert not first.any(), "the outgrown copy is still readable"
    assert keys.positions(4000) is grown
    with pytest.raises(ValueError, match="read-only"):
        grown[...] = 0
    keys.destroy()
    assert not grown.any()


def test_not_printed_not_copied_not_serialised() -> None:
    keys = KeySet(CONFIG)
    shown = f"{keys!r} {keys!s} {[keys]}"
    assert not any(str(int(v)) in shown for a in all_arrays(keys) for v in a.reshape(-1)[:50] if int(v) > 10_000)
    for serialise in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(InternalError):
            serialise(keys)


def test_destroyed_keys_are_overwritten_and_refused() -> None:
    keys = KeySet(CONFIG)
    keys.positions(100)
    arrays = all_arrays(keys)
    assert all(a.any() for a in [*keys._r.values(), keys._w, keys._positions])
    keys.destroy()
    keys.destroy()
    assert not any(a.any() for a in arrays)
    for use in (lambda: keys.linear("lm_head"), lambda: keys.attention(0), lambda: keys.positions(1)):
        with pytest.raises(InternalError, match="destroyed"):
            use()


def test_soundness_is_that_of_two_repetitions_in_the_field() -> None:
    assert SOUNDNESS_BITS == 99
    assert P == 2**50 - 27
    assert 2**99 <= P**REPETITIONS < 2**100


def test_p_is_prime() -> None:
    """Miller-Rabin with bases that decide every number below 3.3e24."""
    d, s = P - 1, 0
    while d % 2 == 0:
        d, s = d // 2, s + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41):
        x = pow(base, d, P)
        if x in (1, P - 1):
            continue
        for _ in range(s - 1):
            x = x * x % P
            if x == P - 1:
                break
        else:
            pytest.fail(f"{base} shows that p is composite")


def test_this_module_reads_no_other_generator() -> None:
    source = Path(keys_module.__file__).read_text()
    assert "np.random" not in source and "import random" not in source
