"""Replay tests/vectors on every implementation, and on the plain-Python oracle, so that the files stand on their own."""

from __future__ import annotations

import hashlib
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.helpers import LocalModel, tiny_tensors
from tests.spec import oracle
from tests.spec.test_reference import attend

from veriattn.errors import NumericsError
from veriattn.spec import reference
from veriattn.spec.constants import SPEC_VERSION
from veriattn.spec.forward import BatchEntry
from veriattn.spec.model import ModelConfig
from veriattn.spec.sampler import SamplingParams, sample

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "tests" / "vectors"
NAMES = sorted(p.stem for p in DIRECTORY.glob("*.json"))
OPERATIONS = [n for n in NAMES if n not in ("sampler", "forward")]


def decode(x: Any) -> Any:
    if not isinstance(x, dict):
        return x
    dtype, shape = np.dtype(x["dtype"]), x["shape"]
    raw = bytes.fromhex(x["hex"]) if "hex" in x else bytes.fromhex(x["fill"]) * int(np.prod(shape))
    return np.frombuffer(raw, dtype).reshape(shape).copy()


def cases(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((DIRECTORY / f"{name}.json").read_text())["cases"]
    assert found
    return found


def call(function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """Results as (dtype, shape, bytes), or the error's code."""
    try:
        result = function(**inputs)
    except NumericsError as e:
        return e.code
    return [(r.dtype.str, r.shape, r.tobytes()) for r in (result if isinstance(result, tuple) else (result,))]


def expected(case: dict[str, Any]) -> Any:
    if "error" in case:
        return case["error"]
    return [(r.dtype.str, r.shape, r.tobytes()) for r in map(decode, case["outputs"])]


def implementation(kernels: ModuleType, operation: str) -> Callable[..., Any] | None:
    """The function that `operation` names; None where it is a part of a larger kernel outside of the reference."""
    if operation == "attention":
        return lambda q_i8, q_scale, k_i8, k_scale, v_i8, start: attend(
            kernels, q_i8, q_scale, k_i8, k_scale, v_i8, start
        )
    if operation in ("attention_weights", "exp2"):
        return getattr(reference, operation) if kernels is reference else None
    function: Callable[..., Any] = getattr(kernels, operation)
    return function


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(kernels: ModuleType, operation: str) -> None:
    function = implementation(kernels, operation)
    for case in cases(operation):
        inputs = {name: decode(v) for name, v in case["inputs"].items()}
        if operation in ("qkv_epilogue", "norm_quantise"):
            inputs["eps"] = np.float32(inputs["eps"])
        if function is not None:
            assert call(function, inputs) == expected(case), case["name"]
        if operation == "gemm_i8":
            packed = kernels.pack(inputs["w_i8"])
            assert call(kernels.gemm_packed, {"packed": packed, "a_i8": inputs["a_i8"]}) == expected(case), case["name"]


# --- the oracle ---------------------------------------------------------------------------------------------------------


def rows(function: Callable[..., tuple[Any, ...]], count: int, *per_row: Any) -> tuple[Any, ...]:
    """Apply to each row and collect each result."""
    results = [function(*(v[i] for v in per_row)) for i in range(count)]
    return tuple(list(column) for column in zip(*results, strict=True))


def oracle_attention(q: Any, q_scale: Any, k: Any, k_scale: Any, v: Any, start: int) -> tuple[Any, Any]:
    heads, kv_heads = len(q[0]), len(k[0])
    cache = [
        oracle.Head([key[h] for key in k], [s[h] for s in k_scale], [value[h] for value in v]) for h in range(kv_heads)
    ]
    found = [
        [
            oracle.attention_row(q[i][h], q_scale[i][h], cache[h // (heads // kv_heads)], start + i + 1)
            for h in range(heads)
        ]
        for i in range(len(q))
    ]
    return [[r[0] for r in row] for row in found], [[r[1] for r in row] for row in found]


def oracle_weights(scores: Any, q_scale: Any, k_scale: Any, visible: Any) -> tuple[Any, Any]:
    """Scores as one-dimensional keys: q = 1, k = score, hidden keys left out."""
    all_p, sums = [], []
    for row, scale, seen in zip(scores, q_scale, visible, strict=True):
        at = [j for j, s in enumerate(seen) if s]
        head = oracle.Head([[row[j]] for j in at], [k_scale[j] for j in at], [[0]] * len(at))
        _, total, weights = oracle.attention_row([1], scale, head, len(at))
        p = [0] * len(row)
        for j, w in zip(at, weights, strict=True):
            p[j] = w
        all_p.append(p)
        sums.append(total)
    return all_p, sums


def on_oracle(operation: str, i: dict[str, Any]) -> tuple[Any, ...]:
    n = len(next(iter(i.values())))
    match operation:
        case "gemm_i8":
            return ([oracle.linear(a, i["w_i8"]) for a in i["a_i8"]],)
        case "quantise":
            return rows(oracle.quantise, n, i["x"])
        case "norm_quantise":
            return rows(lambda x: oracle.norm_quantise(x, i["eps"]), n, i["x"])
        case "logits":
            return rows(lambda y, s: (oracle.dequantise(y, i["w_scale"], s),), n, i["y_i32"], i["a_scale"])
        case "residual_add":

            def add(x: Any, y: Any, s: Any) -> tuple[Any]:
                v = oracle.dequantise(y, i["w_scale"], s, i.get("bias"))
                return ([oracle.fl(p + q) for p, q in zip(x, v, strict=True)],)

            return rows(add, n, i["x"], i["y_i32"], i["a_scale"])
        case "qkv_epilogue":
            return rows(
                lambda y, s, cos, sin: oracle.qkv(
                    y, s, i["w_scale"], i["bias"], cos, sin, i["v_scale"], i["num_heads"], i["num_kv_heads"], i["head_dim"],
                    i["k_center"], i["q_norm"], i["k_norm"], i["eps"],
                ),
                n, i["y_i32"], i["a_scale"], i["cos"], i["sin"],
            )  # fmt: skip
        case "attention_weights":
            return oracle_weights(i["scores_i32"], i["q_scale"], i["k_scale"], i["visible"])
        case "attention":
            return oracle_attention(i["q_i8"], i["q_scale"], i["k_i8"], i["k_scale"], i["v_i8"], i["start"])
        case "attention_epilogue":
            return rows(lambda o, s: oracle.attention_output(o, s, i["v_scale"]), n, i["o_i64"], i["l_i32"])
        case "mlp_epilogue":
            return rows(lambda y, s: oracle.mlp(y, s, i["w_scale"]), n, i["y_i32"], i["a_scale"])
        case "exp2":
            return ([oracle.exp2(z) for z in i["z"]],)
    raise AssertionError(f"no oracle for {operation}")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_in_plain_python(operation: str) -> None:
    for case in cases(operation):
        inputs = {name: decode(v) for name, v in case["inputs"].items()}
        plain = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in inputs.items()}
        if "error" in case:
            with pytest.raises(oracle.OutsideDomain):
                on_oracle(operation, plain)
            continue
        outputs = [decode(v) for v in case["outputs"]]
        for found, want in zip(on_oracle(operation, plain), outputs, strict=True):
            # Through bytes: -0 and 0 differ.
            assert np.array(found, want.dtype).reshape(want.shape).tobytes() == want.tobytes(), case["name"]


# --- sampler and forward pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw", [sample, lambda row, *rest: oracle.sample(row.tolist(), *rest)], ids=["numpy", "oracle"]
)
def test_sampler(draw: Callable[..., int]) -> None:
    for case in cases("sampler"):
        bias = tuple((t, b) for t, b in case["params"].pop("logit_bias"))
        params = SamplingParams(**case["params"], logit_bias=bias)
        row = decode(case["logits"])
        drawn = [
            draw(row, params, case["prompt_ids"], case["output_ids"], p, case["choice"]) for p in case["positions"]
        ]
        assert drawn == case["token_ids"], case["name"]


def test_forward(kernels: ModuleType) -> None:
    for case in cases("forward"):
        config = ModelConfig.from_json(case["config"])
        tensors = tiny_tensors(config, case["seed"])
        digest = hashlib.sha256(b"".join(t.tobytes() for t in tensors.values())).hexdigest()
        assert digest == case["tensors_sha256"], "the inputs differ, not the implementation"
        model = LocalModel(config, tensors, kernels)
        logits = model.run(case["token_ids"])
        assert logits[0, :8].tobytes() == decode(case["first_row"]).tobytes(), case["name"]
        assert logits[-1, :8].tobytes() == decode(case["last_row"]).tobytes(), case["name"]
        assert hashlib.sha256(logits.tobytes()).hexdigest() == case["logits_sha256"], case["name"]
        assert model.greedy(case["token_ids"][:5], 16) == case["greedy"], case["name"]


def test_forward_in_plain_python() -> None:
    """The first row of each: the oracle is slow."""
    for case in cases("forward"):
        config = ModelConfig.from_json(case["config"])
        tensors = {
            n: t.astype(np.float64 if t.dtype.kind == "f" else int).tolist()
            for n, t in tiny_tensors(config, case["seed"]).items()
        }
        first = oracle.Model(config, tensors).token(case["token_ids"][0])
        assert np.array(first[:8], np.float32).tobytes() == decode(case["first_row"]).tobytes(), case["name"]


# --- the files ------------------------------------------------------------------------------------------------------------


def test_files_are_what_the_generator_writes() -> None:
    generator = runpy.run_path(str(ROOT / "tools" / "make_vectors.py"))
    assert sorted(generator["FILES"]) == NAMES
    for name in NAMES:
        assert (DIRECTORY / f"{name}.json").read_text() == generator["contents"](name), name
    assert sum((DIRECTORY / f"{name}.json").stat().st_size for name in NAMES) < 300_000


def test_files_say_where_they_come_from() -> None:
    for name in NAMES:
        data = json.loads((DIRECTORY / f"{name}.json").read_text())
        assert data["format"] == "veriattn-vectors" and data["operation"] == name
        assert data["spec_version"] == SPEC_VERSION and data["generator"] and data["source"].startswith("docs/spec.md")
        names = [c["name"] for c in data["cases"]]
        assert len(names) == len(set(names))


def test_a_wrong_bit_is_noticed(kernels: ModuleType) -> None:
    case = next(c for c in cases("quantise") if c["name"] == "random")
    inputs = {name: decode(v) for name, v in case["inputs"].items()}
    assert call(kernels.quantise, inputs) == expected(case)
    for output in case["outputs"]:
        good = output["hex"]
        output["hex"] = good[:-2] + f"{int(good[-2:], 16) ^ 1:02x}"
        assert call(kernels.quantise, inputs) != expected(case)
        output["hex"] = good


def test_chunks_reach_the_same_row(kernels: ModuleType) -> None:
    case = cases("forward")[0]
    config = ModelConfig.from_json(case["config"])
    model = LocalModel(config, tiny_tensors(config, case["seed"]), kernels)
    ids = tuple(case["token_ids"])
    model.step(BatchEntry(0, 0, ids[:17], "none"))
    last = model.step(BatchEntry(0, 17, ids[17:]))
    assert last[0, :8].tobytes() == decode(case["last_row"]).tobytes()
