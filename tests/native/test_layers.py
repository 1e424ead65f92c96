"""Whole layers in one call: the bits of the reference, every lie in a claim met and named as operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tests.helpers import ARCHITECTURES, LocalModel, public_tensors, tiny_config, tiny_tensors

from veriattn.errors import AttentionMismatch, FreivaldsMismatch, InternalError, NumericsError, VeriattnError
from veriattn.native import kernels, project_weights, set_threads
from veriattn.native.layers import CheckedLayer, Claims, Finding, LocalLayer, claim_buffers
from veriattn.spec import reference
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry, StepContext, forward, run_layer, start_step
from veriattn.spec.local import LocalOperations
from veriattn.spec.model import LayerTensors, ModelConfig, ModelTensors
from veriattn.verifier.checks import CheckCounts, ClaimChecker, RunAheadOperations
from veriattn.verifier.keys import KeySet
from veriattn.wire.messages import AttentionCheck

Array = np.ndarray[Any, Any]
CLAIMS = ("qkv", "attention", "o", "gate_up", "down")


def entries(seq_id: int, start: int, count: int) -> BatchEntry:
    return BatchEntry(seq_id, start, tuple((7 * (start + i) + seq_id) % 30 + 3 for i in range(count)), "all")


#: Runs of one and of many tokens, over the ends of pages, with sequences that come and go.
STEPS = [
    (entries(0, 0, 40), entries(5, 0, 1)),
    (entries(5, 1, 1), entries(0, 40, 1), entries(9, 0, 20)),
    (entries(0, 41, 64),),
    (entries(0, 105, 150),),  # too long for one call
    (entries(0, 255, 3), entries(9, 20, 1)),
    (entries(0, 258, 1), entries(5, 2, 1), entries(9, 21, 1), entries(7, 0, 1)),
]


class Recording:
    """The reference's operations, keeping what a prover would claim, layer by layer."""

    def __init__(self, local: LocalOperations) -> None:
        self._local, self.claims = local, []  # type: ignore[var-annotated]

    def linear(self, name: str, a_i8: Array) -> Array:
        y = self._local.linear(name, a_i8)
        self.claims.append(y)
        return y

    def attention(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[Array, Array]:
        o, row_sum = self._local.attention(layer, batch, x)
        self.claims.append(o)
        return o, row_sum


class SingleOperations(RunAheadOperations):
    """Run-ahead without whole layers."""

    fused_layer = None  # type: ignore[assignment]


class FakeChannel:
    """Claims that are there already."""

    def __init__(self, claims: list[Array]) -> None:
        self.claims = list(claims)

    def recv(self, kind: object, payload_bytes: int, out: Array) -> None:
        out[...] = self.claims.pop(0)

    def recv_all(self, kind: object, outs: Claims, **_: object) -> None:
        for out in outs:
            out[...] = self.claims.pop(0)


def make_keys(config: ModelConfig, tensors: dict[str, Array]) -> KeySet:
    keys = KeySet(config)
    for name in config.linear_shapes():
        project_weights(tensors[f"{name}.weight"], *keys.linear(name))
    return keys


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = kernels.get_threads()
    set_threads(request.param)
    yield request.param
    set_threads(before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_computed_layers_have_the_bits_of_the_reference(name: str, isa: str, threads: int) -> None:
    config = tiny_config(**ARCHITECTURES[name])
    tensors = tiny_tensors(config)
    ours, theirs = LocalModel(config, tensors, kernels), LocalModel(config, tensors)
    recording, fused = Recording(theirs.ops), 0
    for step in STEPS:
        batch = Batch(step)
        recording.claims.clear()
        theirs_logits = forward(theirs.tensors, batch, recording, reference)
        assert np.array_equal(ours.step(*step), theirs_logits)
        fused += batch.num_tokens <= 64
        for cache, other in zip(ours.ops._caches, theirs.ops._caches, strict=True):
            for e in step:
                for field in ("k", "k_scale", "v"):
                    assert np.array_equal(cache.gather(e.seq_id, field), other.gather(e.seq_id, field))
    assert fused == len(STEPS) - 1 and set(ours.ops._fused) == set(range(config.num_layers))


@pytest.mark.parametrize("name", ["llama", "odd_everything"])
def test_claims_are_those_of_single_operations(name: str, isa: str) -> None:
    config = tiny_config(**ARCHITECTURES[name])
    tensors = tiny_tensors(config)
    ours, theirs = LocalModel(config, tensors, kernels), LocalModel(config, tensors)
    batch = Batch((entries(0, 0, 5), entries(3, 0, 1)))
    recording = Recording(theirs.ops)
    ctx, x = start_step(ours.tensors, batch, ours.ops, kernels)
    reference_ctx, _ = start_step(theirs.tensors, batch, recording, reference)
    claims = claim_buffers(config, batch.num_tokens)
    for i, layer in enumerate(ours.tensors.layers):
        recording.claims.clear()
        expected = run_layer(reference_ctx, i, layer, x)
        out = ours.ops.fused_layer(ctx, i, layer, x, claims)
        assert out is not None and np.array_equal(out, expected)
        assert all(np.array_equal(a, b) for a, b in zip(claims, recording.claims, strict=True))
        x = expected


class Verified:
    """Two steps of a model: claims of the reference, and checkers that have taken the first step."""

    def __init__(self, name: str) -> None:
        self.config = tiny_config(**ARCHITECTURES[name])
        tensors = tiny_tensors(self.config)
        local = LocalModel(self.config, tensors)
        self.tensors: ModelTensors = public_tensors(self.config, tensors)
        self.keys = make_keys(self.config, tensors)
        self.steps = [
            Batch((entries(0, 0, 6), entries(4, 0, 3))),
            Batch((entries(4, 3, 2), entries(0, 6, 1), entries(1, 0, 3))),
        ]
        self.claims: list[list[Array]] = []
        self.logits = []
        for batch in self.steps:
            recording = Recording(local.ops)
            self.logits.append(forward(self.tensors, batch, recording, reference))
            self.claims.append(recording.claims)

    def replay(
        self, kind: Callable[..., RunAheadOperations], lie: Callable[[list[Array]], None] = lambda claims: None
    ) -> tuple[list[Array] | VeriattnError, ClaimChecker]:
        """The logits of both steps, or what was raised in the second."""
        checker = ClaimChecker(self.config, self.keys, False, CheckCounts())
        channel = FakeChannel([])
        ops = kind(checker, channel, AttentionCheck.REPLAY)
        channel.claims = [c.copy() for c in self.claims[0]]
        first = forward(self.tensors, self.steps[0], ops, kernels)
        second = [c.copy() for c in self.claims[1]]
        lie(second)
        channel.claims = second
        try:
            return [first, forward(self.tensors, self.steps[1], ops, kernels)], checker
        except VeriattnError as e:
            return e, checker


@pytest.fixture(scope="module", params=["llama", "odd_everything"])
def verified(request: pytest.FixtureRequest) -> Verified:
    return Verified(request.param)


def test_honest_claims_pass_with_the_same_state_and_counts(verified: Verified, isa: str, threads: int) -> None:
    whole, ours = verified.replay(RunAheadOperations)
    single, theirs = verified.replay(SingleOperations)
    assert isinstance(whole, list) and isinstance(single, list)
    for a, b, c in zip(whole, single, verified.logits, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)
    assert vars(ours.counts) | {"receive_s": 0} == vars(theirs.counts) | {"receive_s": 0}
    assert set(ours._checked) == set(range(verified.config.num_layers)) and not theirs._checked
    for i in range(verified.config.num_layers):
        for seq_id in (0, 1, 4):
            for field in ("k", "k_scale", "g"):
                mine, other = ours.cache.layer(i).gather(seq_id, field), theirs.cache.layer(i).gather(seq_id, field)
                assert np.array_equal(mine, other)


@pytest.mark.parametrize("claim", range(len(CLAIMS)), ids=CLAIMS)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_lie_is_met_and_named_as_in_single_operations(verified: Verified, isa: str, layer: int, claim: int) -> None:
    rng = np.random.default_rng(claim)
    at = layer * len(CLAIMS) + claim
    shape = verified.claims[1][at].shape
    corners = [tuple(np.zeros(len(shape), int)), tuple(n - 1 for n in shape)]
    for where in [*corners, *(tuple(rng.integers(0, n) for n in shape) for _ in range(4))]:
        for delta in (1, -1, 1 << 30):

            def lie(claims: list[Array], where: tuple[int, ...] = where, delta: int = delta) -> None:
                claims[at][where] += claims[at].dtype.type(delta)

            error, _ = verified.replay(RunAheadOperations, lie)
            single, _ = verified.replay(SingleOperations, lie)
            assert isinstance(error, AttentionMismatch if CLAIMS[claim] == "attention" else FreivaldsMismatch)
            assert type(error) is type(single) and str(error) == str(single) and vars(error) == vars(single)


@pytest.mark.parametrize("value", [1 << 39, -(1 << 39), (1 << 50) - 27, -(1 << 62)])
def test_an_output_beyond_its_range_is_refused_by_name(verified: Verified, isa: str, value: int) -> None:
    def lie(claims: list[Array]) -> None:
        claims[1][2, 0, -1] = value  # of the second run

    error, _ = verified.replay(RunAheadOperations, lie)
    single, _ = verified.replay(SingleOperations, lie)
    assert isinstance(error, AttentionMismatch) and "2**39" in str(error) and "sequence 0" in str(error)
    assert str(error) == str(single)


def test_the_first_of_several_lies_is_named(verified: Verified, isa: str) -> None:
    def lie(claims: list[Array]) -> None:
        claims[4][0, 0] ^= 1
        claims[2][3, 1] ^= 1

    error, _ = verified.replay(RunAheadOperations, lie)
    assert isinstance(error, FreivaldsMismatch) and "layers.0.o:" in str(error) and "row 3" in str(error)


def test_destroyed_keys_check_nothing(verified: Verified) -> None:
    """Zeros for challenges would make every claim right."""
    tensors = tiny_tensors(verified.config)
    keys = make_keys(verified.config, tensors)
    checker = ClaimChecker(verified.config, keys, False, CheckCounts())
    ops = RunAheadOperations(checker, FakeChannel(verified.claims[0]), AttentionCheck.REPLAY)  # type: ignore[arg-type]
    forward(verified.tensors, verified.steps[0], ops, kernels)
    keys.destroy()
    ops = RunAheadOperations(checker, FakeChannel(verified.claims[1]), AttentionCheck.REPLAY)  # type: ignore[arg-type]
    with pytest.raises(InternalError, match="destroyed"):
        forward(verified.tensors, verified.steps[1], ops, kernels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**40])
def test_outside_the_domain_is_the_same_error(isa: str, bad: float) -> None:
    config = tiny_config()
    model = LocalModel(config, tiny_tensors(config), kernels)
    batch = Batch((entries(0, 0, 2),))
    ctx, x = start_step(model.tensors, batch, model.ops, kernels)
    x[1, 3] = bad
    claims = claim_buffers(config, 2)
    with pytest.raises(NumericsError):
        run_layer(ctx, 0, model.tensors.layers[0], x)
    model.ops.free(0)
    with pytest.raises(NumericsError):
        model.ops.fused_layer(ctx, 0, model.tensors.layers[0], x, claims)
    keys = make_keys(config, tiny_tensors(config))
    checker = ClaimChecker(config, keys, False, CheckCounts())
    with pytest.raises(NumericsError):
        checker.layer(ctx, 0, model.tensors.layers[0], x, claims)


# --- what the extension refuses --------------------------------------------------------------------------------------


class Arguments:
    """A good call of a layer, to be made bad one by one."""

    def __init__(self) -> None:
        self.config = c = tiny_config()
        self.tensors = tiny_tensors(c)
        self.public = public_tensors(c, self.tensors)
        pages = (3, c.num_kv_heads, 256)
        self.x = np.zeros((2, c.hidden_size), np.float32)
        self.cos = self.sin = np.zeros((2, c.rotary_dim // 2), np.float32)
        self.runs = np.array([[255, 1], [0, 1]], np.int64)
        self.tables = [np.array([2], np.int32), np.array([0], np.int32)]
        self.k = np.zeros((*pages, c.head_dim), np.int8)
        self.k_scale = np.zeros(pages, np.float32)
        self.v = np.zeros((*pages, c.head_dim), np.int8)
        self.g = np.zeros((*pages, 2), np.uint64)
        self.claims = claim_buffers(c, 2)
        self.ok = np.ones(2, np.uint8)

    def linear(self, part: str) -> Array:
        return self.tensors[f"layers.0.{part}.weight"]

    def local(self) -> object:
        layer = LocalLayer(self.config, self.public.layers[0], [kernels.pack(self.linear(p)) for p in PARTS])
        return layer.run(self.x, self.cos, self.sin, self.runs, self.tables, self.k, self.k_scale, self.v, self.claims)

    def checked(self) -> tuple[Array, Finding, int, int]:
        keys = make_keys(self.config, self.tensors)
        linears = [keys.linear(f"layers.0.{p}") for p in PARTS]
        layer = CheckedLayer(self.config, self.public.layers[0], linears, keys.attention(0))
        return layer.run(
            self.x, self.cos, self.sin, self.runs, self.tables, self.k, self.k_scale, self.g, self.claims, self.ok
        )


PARTS = ("qkv", "o", "gate_up", "down")
BAD: dict[str, tuple[str, Any]] = {
    "rows": ("x", np.zeros((3, 64), np.float32)),
    "no rows": ("x", np.zeros((0, 64), np.float32)),
    "width": ("x", np.zeros((2, 63), np.float32)),
    "type": ("x", np.zeros((2, 64), np.float64)),
    "rotary table": ("cos", np.zeros((2, 9), np.float32)),
    "rotary rows": ("sin", np.zeros((1, 8), np.float32)),
    "table short": ("tables", [np.zeros(0, np.int32), np.zeros(1, np.int32)]),
    "table outside": ("tables", [np.array([3], np.int32), np.zeros(1, np.int32)]),
    "table negative": ("tables", [np.array([-1], np.int32), np.zeros(1, np.int32)]),
    "tables few": ("tables", [np.zeros(1, np.int32)]),
    "start negative": ("runs", np.array([[-1, 1], [0, 1]], np.int64)),
    "start far": ("runs", np.array([[2**62, 1], [0, 1]], np.int64)),
    "no tokens": ("runs", np.array([[0, 2], [0, 0]], np.int64)),
    "too few tokens": ("runs", np.array([[0, 1]], np.int64)),
    "too many tokens": ("runs", np.array([[0, 1], [0, 2**62]], np.int64)),
    "runs of three": ("runs", np.array([[0, 1, 1], [0, 1, 1]], np.int64)),
    "pages": ("k", np.zeros((3, 2, 255, 16), np.int8)),
    "heads": ("k", np.zeros((3, 1, 256, 16), np.int8)),
    "scales": ("k_scale", np.zeros((2, 2, 256), np.float32)),
    "claims few": ("claims", claim_buffers(tiny_config(), 2)[:4]),
    "claims short": ("claims", claim_buffers(tiny_config(), 1)),
}


def test_a_good_call_is_taken() -> None:
    a = Arguments()
    a.local()
    assert a.checked()[1] is Finding.RIGHT  # the zeros that the local layer has claimed
    a.claims[4][1, 0] += 1
    assert a.checked()[1:] == (Finding.WRONG_DOWN, 1, 0)


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused(what: str) -> None:
    a = Arguments()
    setattr(a, *BAD[what])
    with pytest.raises(InternalError):
        a.local()
    with pytest.raises(InternalError):
        a.checked()


def test_pages_of_values_and_projections_are_checked_too() -> None:
    a = Arguments()
    a.v = a.v[:2]
    with pytest.raises(InternalError):
        a.local()
    a.ok = a.ok[:1]
    with pytest.raises(InternalError):
        a.checked()
    a.ok, a.g = np.ones(2, np.uint8), a.g[:, :, :, :1]
    with pytest.raises(InternalError):
        a.checked()


def test_wrong_challenges_and_tensors_are_refused() -> None:
    a = Arguments()
    keys = make_keys(a.config, a.tensors)
    linears = [keys.linear(f"layers.0.{p}") for p in PARTS]
    layer = a.public.layers[0]
    for other in (linears[:3], [*linears[1:], linears[0]], [*linears[:3], linears[3][::-1]]):
        with pytest.raises(InternalError):
            CheckedLayer(a.config, layer, other, keys.attention(0))
    with pytest.raises(InternalError):
        CheckedLayer(a.config, layer, linears, keys.attention(0)[:1])
    short = LayerTensors(layer.qkv_scale[:-1], *list(vars(layer).values())[1:])
    with pytest.raises(InternalError):
        CheckedLayer(a.config, short, linears, keys.attention(0))
    weights = [kernels.pack(a.linear(p)) for p in PARTS]
    with pytest.raises(InternalError):
        LocalLayer(a.config, layer, [*weights[1:], weights[0]])


def test_weights_of_another_instruction_set_are_refused() -> None:
    a = Arguments()
    layer = LocalLayer(a.config, a.public.layers[0], [kernels.pack(a.linear(p)) for p in PARTS])
    isas, before = kernels.available_isas(), kernels.active_isa()
    if len(isas) < 3:
        pytest.skip("one layout only")
    try:
        kernels.set_isa(isas[0])
        with pytest.raises(InternalError, match="another instruction set"):
            layer.run(a.x, a.cos, a.sin, a.runs, a.tables, a.k, a.k_scale, a.v)
    finally:
        kernels.set_isa(before)


def test_single_operations_where_a_step_is_not_for_whole_layers(verified: Verified) -> None:
    checker = ClaimChecker(verified.config, verified.keys, False, CheckCounts())
    tracking = ClaimChecker(verified.config, verified.keys, True, CheckCounts())
    channel: Any = FakeChannel([])
    ctx, x = start_step(verified.tensors, verified.steps[0], None, kernels)  # type: ignore[arg-type]
    plain = StepContext(verified.tensors, verified.steps[0], ctx.cos, ctx.sin, ctx.ops, reference)
    layer = verified.tensors.layers[0]
    assert RunAheadOperations(checker, channel, AttentionCheck.TRANSFER).fused_layer(ctx, 0, layer, x) is None
    assert RunAheadOperations(tracking, channel, AttentionCheck.REPLAY).fused_layer(ctx, 0, layer, x) is None
    assert RunAheadOperations(checker, channel, AttentionCheck.REPLAY).fused_layer(plain, 0, layer, x) is None
