"""A session's life: what ends it, what is left of it, what it refuses, what it never lets out."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers import LocalModel

from veriattn.errors import (
    FreivaldsMismatch,
    InternalError,
    ProverFault,
    ProverUnavailable,
    UsageError,
    VeriattnError,
    VerificationError,
)
from veriattn.redteam.attack import Attack
from veriattn.redteam.launcher import LiarPool
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.verifier import checks as checks_module
from veriattn.verifier import launch as launch_module
from veriattn.verifier.keys import KeySet
from veriattn.verifier.launch import ChildProver, Prover
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig
from veriattn.wire.channel import Channel, RingChannel
from veriattn.wire.messages import AttentionCheck, Kind

PROMPT = (5, 9, 2, 77, 30, 4)
HONEST = Attack()
STEP = Batch((BatchEntry(0, 0, PROMPT),))
NEXT = Batch((BatchEntry(0, len(PROMPT), (8,)),))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> VerifierModel:
    return VerifierModel(tiny_model)


@pytest.fixture(scope="module")
def pool(model: VerifierModel) -> Iterator[LiarPool]:
    with LiarPool(model) as pool:
        yield pool


def open_session(model: VerifierModel, pool: LiarPool, attack: Attack = HONEST, **settings: Any) -> Session:
    flow = settings.pop("flow", Flow.RUN_AHEAD)
    return Session(model, pool.launcher(attack), SessionConfig(**settings), flow)


def segments() -> int:
    """Shared segments that this process maps."""
    return Path("/proc/self/maps").read_text().count("veriattn-ring")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def alive(pid: int | None) -> bool:
    try:
        os.kill(pid or -1, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def assert_gone(pid: int | None) -> None:
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is left"
        time.sleep(0.01)


def secrets_of(keys: KeySet) -> list[np.ndarray]:
    return [*keys._r.values(), *keys._u.values(), keys._w, keys._positions]


# -- the end of a session ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", AttentionCheck)
def test_a_reject_burns_everything(check: AttentionCheck, model: VerifierModel, pool: LiarPool) -> None:
    before = segments(), descriptors()
    session = open_session(
        model, pool, Attack("fault", step=1, claim="layers.1.down", fault="bit"), attention_check=check
    )
    keys, checker = session._keys, session._checker
    assert keys is not None and checker is not None
    session.run(STEP)
    arrays = secrets_of(keys)
    caches = [a for layer in checker.cache._layers for a in layer.arrays.values()]
    sums = [s for layer in checker.cache._sums for s in layer.values()]
    assert any(a.any() for a in caches) and len(sums) == (2 if check is AttentionCheck.TRANSFER else 0)
    with pytest.raises(FreivaldsMismatch, match=r"layers\.1\.down"):
        session.run(NEXT)
    assert session.closed
    assert not any(a.any() for a in [*arrays, *caches, *sums])
    assert_gone(session.prover.pid)
    assert (segments(), descriptors()) == before
    for again in (STEP, NEXT):
        with pytest.raises(ProverUnavailable, match="closed"):
            session.run(again)
    session.free(0)
    session.close()


def test_close_burns_everything_and_may_be_repeated(model: VerifierModel, pool: LiarPool) -> None:
    before = segments(), descriptors()
    with open_session(model, pool) as session:
        session.run(STEP)
        keys = session._keys
        assert keys is not None
    assert not any(a.any() for a in secrets_of(keys))
    assert_gone(session.prover.pid)
    assert (segments(), descriptors()) == before
    session.close()
    with pytest.raises(ProverUnavailable):
        session.run(NEXT)


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which pytest keeps to itself."""


def interrupt(channel: type[Channel], method: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise in the `at`-th call of a method of the channel."""
    real, calls = getattr(channel, method), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise Interrupted
        return real(*args, **kwargs)

    monkeypatch.setattr(channel, method, call)


@pytest.mark.parametrize(("method", "at"), [("recv", 1), ("recv", 2), ("recv_all", 1), ("recv_all", 2)])
def test_an_interrupt_ends_the_session(
    method: str, at: int, tiny_model: Path, model: VerifierModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the prover starts (its READY is the first message), at some later claim, at the first layer, at the next."""
    made: list[ChildProver] = []
    taken: list[KeySet] = []
    take = model.take_keys
    monkeypatch.setattr(model, "take_keys", lambda: taken.append(take()) or taken[-1])
    interrupt(RingChannel, method, at, monkeypatch)

    def start(model: VerifierModel) -> Prover:
        made.append(ChildProver(model))
        return made[-1]

    before = segments()
    with pytest.raises(Interrupted):
        Session(model, start).run(STEP)
    assert_gone(made[0].pid)
    assert segments() == before
    assert not any(a.any() for a in secrets_of(taken[0]))


@pytest.mark.parametrize("flow", [Flow.RUN_AHEAD, Flow.VERIATTN, Flow.TSDP])
def test_a_kernel_that_fails_ends_the_session(
    flow: Flow, model: VerifierModel, pool: LiarPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a step is in the caches by then, and claims that nobody has checked lie in the link."""
    session = open_session(model, pool, flow=flow)
    session.run(STEP)
    keys = session._keys
    assert keys is not None

    def fail(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(checks_module.CheckedLayer, "run", fail)
    monkeypatch.setattr(checks_module, "linear_check", fail)
    with pytest.raises(MemoryError):
        session.run(NEXT)
    assert session.closed
    assert not any(a.any() for a in secrets_of(keys))
    with pytest.raises(ProverUnavailable, match="MemoryError"):
        session.run(NEXT)


@pytest.mark.parametrize("attack", [HONEST, Attack("fault", step=0, claim="lm_head", fault="bit")])
def test_what_was_checked_while_the_session_was_closed_is_not_released(
    attack: Attack, model: VerifierModel, pool: LiarPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread closes between the fetching of a key and its use: overwritten keys find every claim right."""
    session = open_session(model, pool, attack)
    real, verdicts = checks_module.linear_check, []

    def closed_meanwhile(claimed: Any, *args: Any) -> Any:
        closing = threading.Thread(target=session.close)
        closing.start()
        closing.join()
        verdicts.append(bool(np.all(real(claimed, *args))))
        return real(claimed, *args)

    monkeypatch.setattr(checks_module, "linear_check", closed_meanwhile)  # by itself only lm_head is checked
    with pytest.raises(ProverUnavailable, match="the session is closed"):
        session.run(STEP)
    assert verdicts == [True]
    assert session.length(0) == 0


def test_an_interrupt_while_a_sequence_is_freed_ends_the_session(
    model: VerifierModel, pool: LiarPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(model, pool)
    session.run(STEP)
    interrupt(RingChannel, "send", 1, monkeypatch)
    with pytest.raises(Interrupted):
        session.free(0)
    assert session.closed
    assert_gone(session.prover.pid)


@pytest.mark.parametrize("error", [ProverUnavailable("no"), OSError("no"), Interrupted()])
def test_no_keys_are_left_where_no_prover_starts(
    error: BaseException, model: VerifierModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[KeySet] = []
    take = model.take_keys
    monkeypatch.setattr(model, "take_keys", lambda: taken.append(take()) or taken[-1])

    def launch(_: VerifierModel) -> Prover:
        raise error

    with pytest.raises(type(error)):
        Session(model, launch)
    assert not any(a.any() for a in secrets_of(taken[0]))


def test_no_process_is_left_where_the_link_cannot_be_made(
    model: VerifierModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    spawn = launch_module.spawn_prover
    monkeypatch.setattr(launch_module, "spawn_prover", lambda *a, **k: started.append(spawn(*a, **k)) or started[-1])
    monkeypatch.setattr(RingChannel, "offer", classmethod(lambda *a, **k: (_ for _ in ()).throw(Interrupted())))
    before = descriptors()
    with pytest.raises(Interrupted):
        Session(model, ChildProver)
    assert not started[0].alive()
    assert descriptors() == before


def test_the_process_ends_even_if_the_link_cannot_be_closed(
    model: VerifierModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(model, ChildProver)

    def refuse(self: Channel) -> None:
        raise InternalError("a view is in use")

    with monkeypatch.context() as patched:
        patched.setattr(RingChannel, "close", refuse)
        with pytest.raises(InternalError, match="view"):
            session.close()
    assert_gone(session.prover.pid)
    session.channel.close()


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_bad_batches_are_refused_and_harm_nothing(model: VerifierModel, pool: LiarPool, tiny_model: Path) -> None:
    vocab, most = model.tensors.config.vocab_size, model.tensors.config.max_positions
    with open_session(model, pool, max_tokens_per_step=8, max_sequences=2) as session:
        for entries in (
            [BatchEntry(0, 1, (1,))],
            [BatchEntry(0, 0, (vocab,))],
            [BatchEntry(0, 0, (-1,))],
            [BatchEntry(0, 0, (1,) * 9)],
            [BatchEntry(i, 0, (1,)) for i in range(3)],
            [BatchEntry(0, most, (1,))],
        ):
            with pytest.raises(InternalError):
                session.run(Batch(tuple(entries)))
        for entries in ([], [BatchEntry(0, 0, (1,)), BatchEntry(0, 1, (1,))], [BatchEntry(0, 0, ())]):
            with pytest.raises(InternalError):
                Batch(tuple(entries))
        first = session.run(STEP)
        with pytest.raises(InternalError, match="continue"):
            session.run(STEP)
        session.run(Batch((BatchEntry(1, 0, (3,)),)))
        with pytest.raises(UsageError, match="sequences"):
            session.run(Batch((BatchEntry(2, 0, (3,)),)))
        assert not session.closed
        local = LocalModel.open(tiny_model)
        assert first.tobytes() == local.step(*STEP.entries).tobytes()
        assert session.run(NEXT).tobytes() == local.step(*NEXT.entries).tobytes()


@pytest.mark.parametrize("flow", [Flow.RUN_AHEAD, Flow.VERIATTN, Flow.TSDP])
@pytest.mark.parametrize("check", AttentionCheck)
def test_a_freed_id_starts_over(
    check: AttentionCheck, flow: Flow, model: VerifierModel, pool: LiarPool, tiny_model: Path
) -> None:
    local = LocalModel.open(tiny_model)
    other = Batch((BatchEntry(0, 0, (70, 1, 4)), BatchEntry(7, 0, PROMPT)))
    with open_session(model, pool, attention_check=check, flow=flow) as session:
        session.run(STEP)
        session.run(NEXT)
        session.free(0)
        session.free(0)
        session.free(99)
        assert session.length(0) == 0
        assert session.run(other).tobytes() == local.step(*other.entries).tobytes()
        with pytest.raises(InternalError, match="continue"):
            session.run(NEXT)
        assert session.length(0) == 3


def test_sequences_of_a_step_that_failed_are_not_counted(model: VerifierModel, pool: LiarPool) -> None:
    session = open_session(model, pool, Attack("fault", claim="lm_head", fault="bit"))
    with pytest.raises(FreivaldsMismatch):
        session.run(STEP)
    assert (session.length(0), session.stats.steps) == (0, 0)


@pytest.mark.parametrize("flow", [Flow.RUN_AHEAD, Flow.VERIATTN, Flow.TSDP])
@pytest.mark.parametrize(
    ("claim", "index", "concerned"),
    [
        ("layers.1.qkv", 0, {3}),
        ("layers.1.down", -1, {9}),
        ("layers.0.attention", 0, {3}),
        ("layers.0.attention", -1, {9}),
        ("lm_head", 0, {5}),  # the first row of logits is the second sequence's: the first asks for none
        ("lm_head", -1, {9}),
    ],
)
def test_a_rejection_names_the_sequences_concerned(
    claim: str, index: int, concerned: set[int], flow: Flow, model: VerifierModel, pool: LiarPool
) -> None:
    batch = Batch((BatchEntry(3, 0, PROMPT, "none"), BatchEntry(5, 0, (7, 8, 9)), BatchEntry(9, 0, (4,))))
    session = open_session(model, pool, Attack("fault", claim=claim, fault="bit", index=index), flow=flow)
    with pytest.raises(VerificationError) as caught:
        session.run(batch)
    if claim.endswith("attention") and flow is not Flow.RUN_AHEAD:
        concerned = {3}  # each sequence's outputs are a claim of their own, all of them altered
    assert caught.value.sequences == concerned


@pytest.mark.parametrize(("nth", "index", "concerned"), [(0, 0, {3}), (0, -1, {3}), (1, 0, {3}), (1, -1, {5})])
def test_a_rejection_in_a_later_tile_names_the_sequences_of_its_rows(
    nth: int, index: int, concerned: set[int], model: VerifierModel, pool: LiarPool
) -> None:
    """Rows of a long linear travel 128 at a time; a lie must not be laid at the door of whoever has the first ones."""
    batch = Batch((BatchEntry(3, 0, PROMPT * 25), BatchEntry(5, 0, PROMPT)))
    attack = Attack("fault", claim="layers.0.qkv", nth=nth, fault="bit", index=index)
    with pytest.raises(FreivaldsMismatch) as caught:
        open_session(model, pool, attack, flow=Flow.VERIATTN).run(batch)
    assert caught.value.sequences == concerned


def test_counts_are_those_of_the_work(model: VerifierModel, pool: LiarPool) -> None:
    c = model.tensors.config
    with open_session(model, pool) as session:
        session.run(STEP)
        checks = session.stats.checks
        assert checks.linear_rows == 4 * c.num_layers * len(PROMPT) + 1
        assert checks.attention_rows == c.num_layers * c.num_heads * len(PROMPT)
        assert session.soundness_bits == 99 and session.verified


def test_unverified_claims_nothing(model: VerifierModel, pool: LiarPool) -> None:
    with open_session(model, pool, flow=Flow.UNVERIFIED) as session:
        session.run(STEP)
        assert not session.verified and session.soundness_bits is None
        assert session.stats.checks.linear_rows == session.stats.checks.attention_rows == 0


# -- what it never lets out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", [Flow.RUN_AHEAD, Flow.VERIATTN, Flow.TSDP])
def test_no_challenge_crosses_or_is_printed(
    flow: Flow, model: VerifierModel, pool: LiarPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything sent, logged and said by an error is searched for every secret word; the session's number is the control."""
    caplog.set_level(logging.DEBUG)
    sent: list[bytes] = []
    send = Channel.send

    def record(self: Channel, kind: Kind, *payload: Any, **kwargs: Any) -> None:
        sent.extend(bytes(memoryview(p).cast("B")) for p in payload if memoryview(p).nbytes)
        sent.append((self.session or 0).to_bytes(8, "little"))
        send(self, kind, *payload, **kwargs)

    monkeypatch.setattr(Channel, "send", record)
    attack = Attack("fault", step=1, claim="lm_head", fault="bit")
    session = open_session(model, pool, attack, attention_check=AttentionCheck.TRANSFER, flow=flow)
    keys, checker = session._keys, session._checker
    assert keys is not None and checker is not None
    session.run(STEP)
    words = {int(v) for a in secrets_of(keys) for v in a.reshape(-1)}
    words |= {int(v) for layer in checker.cache._layers for v in layer.gather(0, "g").reshape(-1)}
    words |= {int(v) for layer in checker.cache._sums for s in layer.values() for v in s.reshape(-1)}
    words = {w for w in words if w > 1 << 32}
    assert len(words) > 5000
    with pytest.raises(VeriattnError) as caught:
        session.run(NEXT)
    crossed = b"".join(sent)

    def found(word: int) -> bool:
        return word.to_bytes(8, "little") in crossed or word.to_bytes(8, "big") in crossed

    assert found(session.channel.session or 0)
    assert not any(map(found, words))
    said = (
        f"{caught.value!r} {caught.value} {caught.value.hint} {caplog.text} {session!r} {keys!r} {checker!r} {model!r}"
    )
    assert not any(str(w) in said or f"{w:x}" in said for w in words)


def test_sessions_never_share_challenges(model: VerifierModel, pool: LiarPool) -> None:
    seen: set[bytes] = set()
    for _ in range(3):
        with open_session(model, pool) as session:
            assert session._keys is not None
            rows = {row.tobytes() for name in ("lm_head", "layers.0.qkv") for row in session._keys.linear(name)[0]}
            assert len(rows) == 4 and not rows & seen
            seen |= rows


def test_what_the_prover_prints_stays_one_line(model: VerifierModel) -> None:
    """A hint quotes the prover; lines of its own could pass for lines of ours."""
    script = "import sys; print('x\\nveriattn: verified\\n\\x1b[2Jhint: all is well', flush=True); sys.exit(3)"

    def launch(model: VerifierModel) -> Prover:
        return ChildProver(model, ("/bin/sh", "-c", f'exec "{sys.executable}" -c "$0"', script))

    with pytest.raises(ProverFault) as caught:
        Session(model, launch)
    assert caught.value.hint is not None
    assert "veriattn: verified" in caught.value.hint
    assert caught.value.hint.isprintable()


def test_a_session_needs_a_numbered_channel(model: VerifierModel, pool: LiarPool) -> None:
    launcher: Callable[[VerifierModel], Prover] = pool.launcher(Attack())

    def launch(model: VerifierModel) -> Prover:
        prover = launcher(model)
        prover.channel.session = None
        return prover

    with pytest.raises(InternalError, match="session id"):
        Session(model, launch)


def test_session_numbers_are_drawn() -> None:
    numbers = set()
    for _ in range(8):
        ours, theirs = socket.socketpair()
        with RingChannel.offer(ours) as channel:
            numbers.add(channel.session)
        theirs.close()
    assert len(numbers) == 8
