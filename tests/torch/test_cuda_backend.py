"""The CUDA backend on CPU tensors, through Triton's interpreter, against the CPU backend: every claim and every logit."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.conftest import TINY  # noqa: E402
from tests.gpu import backends  # noqa: E402
from tests.gpu.sessions import CASES, check_flows, check_prompt  # noqa: E402
from tests.helpers import tiny_config, tiny_tensors  # noqa: E402

from veriattn.errors import InternalError, NumericsError  # noqa: E402
from veriattn.prover.cuda import backend as backend_module  # noqa: E402
from veriattn.prover.cuda import exponential, memory  # noqa: E402
from veriattn.spec.forward import Batch, BatchEntry  # noqa: E402
from veriattn.wire.messages import AttentionCheck, BadRequest  # noqa: E402
from veriattn.wire.operations import AttendRequest, Reply, Run, WeightsRequest  # noqa: E402

Maker = Callable[..., Path]


@pytest.fixture(params=backends.MODELS)
def pair(request: pytest.FixtureRequest, make_model: Maker) -> backends.Pair:
    return backends.Pair(make_model(**backends.MODELS[request.param]), "cpu")


def test_run_ahead(pair: backends.Pair) -> None:
    backends.check_steps(pair, 240)


def test_more_layers_than_slots(make_model: Maker) -> None:
    """Slots are used again while earlier claims are on their way."""
    pair = backends.Pair(make_model(num_layers=5), "cpu")
    pair.step(AttentionCheck.REPLAY, BatchEntry(1, 0, (5, 6, 7), "all"))
    pair.step(AttentionCheck.TRANSFER, BatchEntry(1, 3, (8,), "last"))


class LateEngine(memory.CopyEngine):
    """Copies as late as they may be: when somebody waits for them, while kernels have run on all the time. What is used
    before it was waited for, or written over before it was copied, comes out wrong."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._queues: tuple[deque[tuple[torch.Tensor, torch.Tensor]], ...] = (deque(), deque())
        self._through = [0, 0]
        self.longest = 0
        self._marks = 0
        self._latest = [0, 0]
        #: For each piece: how many slots were filled after its own, whose kernels it had to wait for.
        self.held_up: list[int] = []

    def mark(self) -> Any:
        self._marks += 1
        return self._marks

    def copy(self, to: torch.Tensor, source: torch.Tensor, after: Any, *, piece: bool = False) -> Callable[[], None]:
        self._queues[piece].append((to, source))
        self._latest[piece] = max(self._latest[piece], after)
        if piece:
            self.held_up.append(self._latest[piece] - after)
        number = self._through[piece] + len(self._queues[piece])
        self.longest = max(self.longest, self.under_way)
        return lambda: self._run(piece, number)

    @property
    def under_way(self) -> int:
        return sum(map(len, self._queues))

    def _run(self, queue: bool, number: int) -> None:
        while self._through[queue] < number:
            to, source = self._queues[queue].popleft()
            to.copy_(source)
            self._through[queue] += 1

    def settle(self) -> None:
        for queue in (False, True):
            self._run(queue, self._through[queue] + len(self._queues[queue]))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LateEngine]:
    """Backends that are made from now on copy late."""
    made: list[LateEngine] = []

    def make(device: torch.device) -> LateEngine:
        made.append(LateEngine(device))
        return made[-1]

    monkeypatch.setattr(memory, "CopyEngine", make)
    return made


def test_chunks_known_ahead(make_model: Maker, late: list[LateEngine]) -> None:
    backends.check_ahead(backends.Pair(make_model(num_layers=4), "cpu"), 6, 2)
    assert late[0].longest == 3, "as many layers were on their way as there are slots"


def test_operations_whose_answers_leave_late(make_model: Maker, late: list[LateEngine]) -> None:
    backends.check_operations(backends.Pair(make_model(), "cpu"))
    assert late[0].longest == 3


@pytest.mark.parametrize("staged_bytes", [0, 8000])
def test_claims_written_into_the_ring(pair: backends.Pair, staged_bytes: int) -> None:
    """All of them, and only those of large layers."""
    backends.check_straight(pair, 70, staged_bytes)


def test_claims_written_into_the_ring_late(make_model: Maker, late: list[LateEngine]) -> None:
    backends.check_straight(backends.Pair(make_model(num_layers=5), "cpu"), 20)
    assert late[0].longest > 1
    assert late[0].held_up and not any(late[0].held_up), "a layer's claims leave while the next ones are computed"


def test_an_error_leaves_nothing_on_its_way(make_model: Maker, late: list[LateEngine]) -> None:
    pair = backends.Pair(make_model(num_layers=2), "cpu")

    class Broken(backends.Collected):
        def claim(self, name: str, values: np.ndarray[Any, Any]) -> None:
            raise InternalError("the link broke")

    pair.cuda.step(Batch((BatchEntry(1, 0, (5, 6), "none"),)), AttentionCheck.REPLAY, Broken())
    with pytest.raises(InternalError, match="link broke"):
        pair.cuda.finish()
    pair.cuda.finish()
    pair.cuda.free(1)
    assert pair.cuda.nonzero_bytes() == 0 and late[0].under_way == 0


def test_a_step_without_a_sink_leaves_what_is_on_its_way(make_model: Maker) -> None:
    """Slots that hold claims which have not left are not written to."""
    pair = backends.Pair(make_model(num_layers=2), "cpu")
    entry = Batch((BatchEntry(1, 0, (5, 6, 7), "none"),))
    expected, got = backends.Collected(), backends.Collected()
    pair.cpu.step(entry, AttentionCheck.REPLAY, expected)
    pair.cuda.step(entry, AttentionCheck.REPLAY, got)
    pair.cuda.step(Batch((BatchEntry(2, 0, (9, 9, 9, 9)),)), AttentionCheck.REPLAY, None)
    pair.cuda.finish()
    backends.same_claims(got.claims, expected.claims)


def test_greedy_answers(pair: backends.Pair) -> None:
    assert len(set(backends.check_greedy(pair, 6, 5))) > 1


def test_single_operations(pair: backends.Pair) -> None:
    backends.check_operations(pair)


def test_a_failed_self_test_falls_back_to_the_table(make_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exponential that is wrong in one entry: the backend notices, reads the table and has the right bits."""
    real = exponential.launch

    def wrong(kernel: Any, grid: tuple[int, ...], entries: Any, *rest: Any, **constants: Any) -> None:
        real(kernel, grid, entries, *rest, **constants)
        entries[17] += 1

    monkeypatch.setattr(exponential, "launch", wrong)
    pair = backends.Pair(make_model(), "cpu")
    assert pair.cuda.attention.by_table
    pair.step(AttentionCheck.REPLAY, BatchEntry(1, 0, tuple(range(70)), "last"))
    pair.step(AttentionCheck.REPLAY, BatchEntry(1, 70, (3,), "last"))


@pytest.mark.parametrize("index", [0, 63, 64, 960])
def test_every_weight_is_part_of_the_self_test(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = exponential.launch

    def wrong(kernel: Any, grid: tuple[int, ...], entries: Any, weights: Any, *rest: Any, **constants: Any) -> None:
        real(kernel, grid, entries, weights, *rest, **constants)
        weights[index] += 1

    monkeypatch.setattr(exponential, "launch", wrong)
    assert not exponential.self_test(torch.device("cpu"))
    assert not exponential.self_test(torch.device("cpu"), by_table=True)


def test_wrong_weights_even_from_the_table_are_refused(make_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "self_test", lambda device, by_table=False: False)
    with pytest.raises(InternalError, match="even from the table"):
        backends.Pair(make_model(), "cpu")


def huge_model(make_model: Maker) -> Path:
    """A model whose second norm meets activations of 2**40 and more."""
    config = tiny_config(**TINY)
    tensors = tiny_tensors(config)
    for name in ("qkv.scale", "o.scale", "v_scale"):
        tensors[f"layers.0.{name}"] = np.full_like(tensors[f"layers.0.{name}"], 2.0**20)
    return make_model(seed=99, tensors=tensors)


def test_activations_out_of_range_end_the_step(make_model: Maker) -> None:
    pair = backends.Pair(huge_model(make_model), "cpu")
    batch = Batch((BatchEntry(1, 0, (5, 6), "last"),))
    for backend in (pair.cpu, pair.cuda):
        for sink in (None, backends.Collected()):
            with pytest.raises(NumericsError):
                backend.step(batch, AttentionCheck.REPLAY, sink)
                backend.finish()  # claims may be on their way until then
            backend.free(1)


def test_refuses_what_does_not_continue(make_model: Maker) -> None:
    pair = backends.Pair(make_model(), "cpu")
    c = pair.config
    with pytest.raises(InternalError, match="do not continue"):
        pair.cuda.step(Batch((BatchEntry(1, 4, (5,), "last"),)), AttentionCheck.REPLAY, None)
    q = np.zeros((1, c.num_heads, c.head_dim), np.int8)
    k, ones = np.zeros((1, c.num_kv_heads, c.head_dim), np.int8), np.ones((1, c.num_heads), np.float32)
    request = AttendRequest(
        0, 0, c.num_kv_heads, Reply.OUTPUTS, 1, (Run(1, 3, 1),), q, ones, k, ones[:, : c.num_kv_heads], k
    )
    with pytest.raises(BadRequest, match="does not continue"):
        pair.cuda.attend(request, backends.Collected())
    with pytest.raises(BadRequest, match="fewer keys"):
        pair.cuda.weights(WeightsRequest(0, 1, np.zeros((c.num_heads, 1, 1), np.uint16)), backends.Collected())


def test_a_full_cache_is_said(make_model: Maker) -> None:
    pair = backends.Pair(make_model(), "cpu", kv_tokens=256, max_sequences=1)
    for seq_id in (1, 2):
        pair.cuda.step(Batch((BatchEntry(seq_id, 0, (5,), "none"),)), AttentionCheck.REPLAY, None)
    with pytest.raises(InternalError, match="full"):
        pair.cuda.step(Batch((BatchEntry(3, 0, (5,), "none"),)), AttentionCheck.REPLAY, None)


@pytest.mark.parametrize(
    ("case", "staged_bytes"), [(0, None), (3, None), (4, None), (6, None), (8, None), (1, 0), (2, 0)]
)
def test_sessions(make_model: Maker, case: int, staged_bytes: int | None) -> None:
    """The verifier accepts every claim of the CUDA backend, in a process of its own; the logits are the canonical ones.

    `make test-gpu` runs all of CASES; these have every kind of message. With 0 staged bytes every claim is written straight
    into the ring.
    """
    seen = []
    command = (sys.executable, str(Path(__file__).with_name("interpreted_prover.py")))
    if staged_bytes is not None:
        command += (str(staged_bytes),)
    check_flows(make_model(), command, CASES[case : case + 1], look=lambda session: seen.append(session.ready.device))
    assert seen == ["cuda (interpreted)"]


def test_a_prompt_whose_chunks_are_known_ahead(make_model: Maker) -> None:
    """Through a real link: the next STEP lies there while claims of the last one are still on their way to the ring."""
    command = (sys.executable, str(Path(__file__).with_name("interpreted_prover.py")), "0")
    check_prompt(make_model(num_layers=4), command, 32, 9)
