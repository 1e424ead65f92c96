"""Copying out of shared memory: the same bytes wherever it is cut, nothing beside them, and never read again."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veriattn.errors import InternalError
from veriattn.native import kernels

KIB, MIB = 1 << 10, 1 << 20
#: Pieces of a thread, the least that is shared between threads, and the message from which caches are passed by.
PIECE, POOLED, UNCACHED = 128 * KIB, MIB, 32 * MIB
SOURCE = np.random.default_rng(1).integers(0, 256, 4 * MIB, np.uint8)
OUT = np.zeros(UNCACHED + 8 * MIB, np.uint8)

lengths = st.one_of(
    st.integers(0, 300),
    st.builds(lambda base, by: base + by, st.sampled_from([PIECE, POOLED, 3 * PIECE, 3 * MIB]), st.integers(-130, 130)),
)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = kernels.get_threads()
    kernels.set_threads(request.param)
    yield request.param
    kernels.set_threads(before)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=lengths, at=st.integers(0, 200), out_at=st.integers(0, 5000), large=st.booleans())
def test_what_is_copied_and_what_is_not(threads: int, length: int, at: int, out_at: int, large: bool) -> None:
    out = OUT[: UNCACHED + length] if large else OUT[: out_at + length + 100]
    around = slice(max(0, out_at - 100), out_at + length + 100)
    out[around] = 0xA5
    kernels.copy_in(out, out_at, SOURCE, at, length)
    assert np.array_equal(out[out_at : out_at + length], SOURCE[at : at + length])
    assert (out[around.start : out_at] == 0xA5).all() and (out[out_at + length : around.stop] == 0xA5).all()


def test_a_message_larger_than_the_caches(threads: int) -> None:
    source = np.arange(UNCACHED // 8 + 1003, dtype=np.uint64)
    out = np.zeros_like(source)
    kernels.copy_in(out.view(np.uint8)[3:], 0, source.view(np.uint8)[5:], 0, source.nbytes - 8)
    assert np.array_equal(out.view(np.uint8)[3:-5], source.view(np.uint8)[5:-3])


def test_several_callers_at_once() -> None:
    """Whoever finds the threads in use copies alone."""
    sources = [np.random.default_rng(i).integers(0, 256, 2 * MIB + 77 * i, np.uint8) for i in range(4)]
    wrong: list[int] = []

    def copy(i: int) -> None:
        for _ in range(10):
            out = np.zeros(sources[i].nbytes, np.uint8)
            kernels.copy_in(out, 0, sources[i], 0, out.nbytes)
            if not np.array_equal(out, sources[i]):
                wrong.append(i)

    running = [threading.Thread(target=copy, args=(i,)) for i in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("large", [False, True])
def test_a_writer_that_goes_on_changes_nothing_any_more(threads: int, large: bool) -> None:
    honest = np.full(2 * MIB // 8, 0x1111111111111111, np.uint64)
    shared, stop, met = honest.copy(), threading.Event(), set()
    out = np.zeros(UNCACHED // 8 if large else honest.size, np.uint64)

    def change() -> None:
        while not stop.is_set():
            shared.fill(0x2222222222222222)
            shared.fill(0x1111111111111111)

    writer = threading.Thread(target=change)
    writer.start()
    try:
        for _ in range(30):
            kernels.copy_in(out, 0, shared, 0, shared.nbytes)
            taken = out[: honest.size].copy()
            met |= set(np.unique(taken.view(np.uint8)).tolist())
            assert np.array_equal(out[: honest.size], taken)
    finally:
        stop.set()
        writer.join()
    assert met <= {0x11, 0x22}
    shared.fill(0x3333333333333333)
    assert np.array_equal(out[: honest.size], taken)


def test_misuse_is_refused() -> None:
    out: npt.NDArray[np.uint8] = np.zeros(100, np.uint8)
    for bad in [
        (out, 0, SOURCE, 0, 101),
        (out, 1, SOURCE, 0, 100),
        (out, 101, SOURCE, 0, 0),
        (out, 2**64 - 1, SOURCE, 0, 10),
        (out, 0, SOURCE, SOURCE.nbytes, 1),
        (out, 0, SOURCE, 2**64 - 1, 1),
        (out, -1, SOURCE, 0, 1),
        (out, 0, SOURCE, 0, -1),
        (bytes(100), 0, SOURCE, 0, 1),
        (out[::2], 0, SOURCE, 0, 1),
        (out, 0, out, 10, 20),
    ]:
        with pytest.raises(InternalError):
            kernels.copy_in(*bad)
    assert not out.any()
    out[:10] = 7
    kernels.copy_in(out, 10, out, 0, 10)
    assert out.tolist() == [7] * 20 + [0] * 80


@pytest.mark.parametrize("first", [0, 1, 300, 639])
@pytest.mark.parametrize("size", [0, 1, 4064, 4065, MIB, 2 * MIB + 5, 640 * 4096 - 32])
def test_messages_taken_out_of_a_ring(threads: int, first: int, size: int) -> None:
    """Wherever in a ring of 640 slots they begin; the other side's counter and the bytes stay, ours moves to the end."""
    page, slot, slots = np.zeros(1024, np.uint64), 4096, 640
    header, payload = bytes(range(32)), SOURCE[:size]
    message = np.concatenate([np.frombuffer(header, np.uint8), payload])
    ring = np.full(slot * slots, 0xEE, np.uint8)
    np.put(ring, np.arange(first * slot, first * slot + message.size), message, mode="wrap")
    before, end = ring.copy(), first + -(-message.size // slot)
    page[64] = end
    out = np.zeros(size, np.uint8)
    at = (page.view(np.uint8), 512, ring, slot, first * slot, first)
    assert kernels.ring_take(*at, bytes(32), [out]) == (first * slot, end, 0, False)  # type: ignore[arg-type]
    assert page[72] == 0 and not out.any()
    page[88] = 1  # the writer waits
    assert kernels.ring_take(*at, header, [out]) == (end * slot, end, 1, True)  # type: ignore[arg-type]
    assert np.array_equal(out, payload) and np.array_equal(ring, before)
    assert page[64] == end and page[72] == end and np.count_nonzero(page) == 3
