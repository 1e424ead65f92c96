"""Write tests/vectors/*.json: inputs and expected bits of every operation of the canonical function.

Run from the root of the repository: `python tools/make_vectors.py` writes, `--check` compares with what is there.
Inputs are SHAKE-256 streams and hand-picked edges; expected values come from `veriattn.spec.reference` and
`veriattn.spec.sampler`. The tests replay each file on every implementation, and on the plain-Python oracle.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import numpy as np  # noqa: E402
from tests.helpers import ARCHITECTURES, Bits, LocalModel, tiny_config, tiny_tensors  # noqa: E402

from veriattn.errors import NumericsError  # noqa: E402
from veriattn.spec import reference  # noqa: E402
from veriattn.spec.constants import MAX_IN_FEATURES, SPEC_VERSION  # noqa: E402
from veriattn.spec.sampler import SamplingParams, sample  # noqa: E402

DIRECTORY = ROOT / "tests" / "vectors"
Array = np.ndarray[Any, Any]
Case = dict[str, Any]

EDGE_BELOW_LIMIT = np.float32(2.0**40 * (1 - 2.0**-24))
INT32_TIES = [2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**25 + 2, 2**25 + 6, 2**31 - 1, -(2**31) + 1, 0, 1, -1]


def encode(x: Any) -> Any:
    """Arrays as dtype, shape and the hexadecimal digits of their little-endian bytes; `fill` where all are equal."""
    if not isinstance(x, np.ndarray):
        return x.item() if isinstance(x, np.generic) else x
    described: dict[str, Any] = {"dtype": x.dtype.newbyteorder("<").str, "shape": list(x.shape)}
    raw = x.astype(x.dtype.newbyteorder("<")).tobytes()
    if x.size > 64 and raw == raw[: x.itemsize] * x.size:
        return described | {"fill": raw[: x.itemsize].hex()}
    return described | {"hex": raw.hex()}


def case(name: str, function: Callable[..., Any], **inputs: Any) -> Case:
    """One call of `function`: its arguments by name and the list of its results, or the code of its error."""
    out: Case = {"name": name, "inputs": {k: encode(v) for k, v in inputs.items()}}
    try:
        result = function(**inputs)
    except NumericsError as e:
        return out | {"error": e.code}
    return out | {"outputs": [encode(v) for v in (result if isinstance(result, tuple) else (result,))]}


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def activations() -> dict[str, Array]:
    """Rows for operations that take the residual stream or a head."""
    b = Bits("vectors/activations")
    ties = f32(127, 0.5, 1.5, 2.5, 126.5, 63.5, -0.5, -1.5, -126.5, 64.5, 0, -0.0)
    exponents = b.integers(-40, 38, 3, 33).astype(np.int32)
    return {
        "random": b.uniform(-4, 4, 3, 37),
        "one element": f32(-3.25)[None],
        "longer than a vector register": b.uniform(-1, 1, 2, 131),
        "halves, absmax 127": np.stack([ties, ties * np.float32(2.0**-9)]),
        "halves, absmax 32767": f32(32767, 0.5, 1.5, 2.5, 32766.5, -0.5, -16383.5)[None],
        "zeros of both signs": f32(0, -0.0, 0)[None],
        "at and below the floor": np.stack(
            [f32(2.0**-20, 2.0**-21, -(2.0**-22)), f32(2.0**-21, 2.0**-30, -(2.0**-70))]
        ),
        "many sizes": np.ldexp(b.uniform(0.5, 1, 3, 33), exponents),
        "just inside the domain": np.stack(
            [f32(EDGE_BELOW_LIMIT, 1, -EDGE_BELOW_LIMIT), f32(EDGE_BELOW_LIMIT, 2.0**-70, 0)]
        ),
    }


def outside() -> dict[str, Array]:
    bad = {"NaN": np.nan, "infinity": np.inf, "-infinity": -np.inf, "2**40": 2.0**40, "-2**40": -(2.0**40)}
    return {f"outside the domain: {name}": np.stack([f32(1, 2, 3), f32(1, v, 3)]) for name, v in bad.items()}


def quantise() -> list[Case]:
    return [case(name, reference.quantise, x=x) for name, x in (activations() | outside()).items()]


def norm_quantise() -> list[Case]:
    eps = [np.float32(1e-5), np.float32(2.0**-60), np.float32(0.1)]
    rows = activations() | outside()
    return [case(name, reference.norm_quantise, x=x, eps=eps[i % 3]) for i, (name, x) in enumerate(rows.items())]


def gemm_i8() -> list[Case]:
    b = Bits("vectors/gemm")

    def ints(*shape: int) -> Array:
        return b.integers(-127, 127, *shape).astype(np.int8)

    longest = np.full((1, MAX_IN_FEATURES), 127, np.int8)
    return [
        case("one product", reference.gemm_i8, a_i8=ints(1, 1), w_i8=ints(1, 1)),
        case("odd sizes", reference.gemm_i8, a_i8=ints(3, 7), w_i8=ints(5, 7)),
        case("one row", reference.gemm_i8, a_i8=ints(1, 65), w_i8=ints(17, 65)),
        case("several rows", reference.gemm_i8, a_i8=ints(9, 130), w_i8=ints(33, 130)),
        case("signs", reference.gemm_i8, a_i8=b.integers(0, 1, 4, 64).astype(np.int8) * 127 - 0, w_i8=ints(3, 64)),
        case("longest, largest", reference.gemm_i8, a_i8=longest, w_i8=longest),
        case("longest, smallest", reference.gemm_i8, a_i8=longest, w_i8=-longest),
    ]


def residual_add() -> list[Case]:
    b = Bits("vectors/residual")
    f = reference.residual_add
    n = len(INT32_TIES)
    ties, ones = np.array([INT32_TIES, INT32_TIES[::-1]], np.int32), np.ones(n, np.float32)
    return [
        case(
            "random", f, x=b.uniform(-2, 2, 3, 21), y_i32=b.integers(-(2**20), 2**20, 3, 21).astype(np.int32),
            a_scale=b.uniform(0.001, 0.1, 3), w_scale=b.uniform(0.0001, 0.01, 21),
        ),
        case(
            "with bias", f, x=b.uniform(-2, 2, 2, 9), y_i32=b.integers(-(2**31) + 1, 2**31 - 1, 2, 9).astype(np.int32),
            a_scale=b.uniform(0.001, 0.1, 2), w_scale=b.uniform(0.0001, 0.01, 9), bias=b.uniform(-3, 3, 9),
        ),
        case("integers that round", f, x=np.zeros((2, n), np.float32), y_i32=ties, a_scale=f32(1, 1), w_scale=ones),
        case("a sum that ties", f, x=f32(1, 1, 1, -1)[None], y_i32=np.array([[1, 3, -1, 1]], np.int32),
             a_scale=f32(2.0**-12), w_scale=f32(*[2.0**-12] * 4)),
        case("largest and smallest scales", f, x=np.zeros((2, 2), np.float32),
             y_i32=np.array([[2**31 - 1, 1], [1, 0]], np.int32),
             a_scale=f32(2.0**34, 2.0**-27), w_scale=f32(2.0**20, 2.0**-20)),
        case("zeros of both signs", f, x=f32(-0.0, 0.0)[None], y_i32=np.zeros((1, 2), np.int32),
             a_scale=f32(1), w_scale=f32(1, 1)),
    ]  # fmt: skip


def logits() -> list[Case]:
    b = Bits("vectors/logits")
    y = b.integers(-(2**31) + 1, 2**31 - 1, 2, 23).astype(np.int32)
    return [
        case("random", reference.logits, y_i32=y, a_scale=b.uniform(0.001, 0.1, 2), w_scale=b.uniform(1e-4, 1e-2, 23))
    ]


def qkv_epilogue() -> list[Case]:
    out = []
    shapes = [(1, 1, 2, 2), (3, 1, 12, 12), (3, 3, 12, 6), (4, 2, 16, 16), (2, 2, 5, 4), (2, 1, 64, 64)]
    for i, (heads, kv_heads, d, rotary) in enumerate(shapes):
        b = Bits(f"vectors/qkv/{i}")
        rows, tokens = (heads + 2 * kv_heads) * d, 2
        switches = {
            "bias": b.uniform(-2, 2, rows) if i % 2 else None,
            "k_center": b.uniform(-2, 2, kv_heads, d) if i in (2, 4) else None,
            "q_norm": b.uniform(0.5, 1.5, d) if i in (2, 3) else None,
            "k_norm": b.uniform(-1.5, -0.5, d) if i in (2, 3) else None,
        }
        turn = b.uniform(-1, 1, tokens, rotary // 2).astype(np.float64)
        inputs = {
            "y_i32": b.integers(-(2**20), 2**20, tokens, rows).astype(np.int32),
            "a_scale": b.uniform(0.001, 0.01, tokens),
            "w_scale": b.uniform(0.0001, 0.001, rows),
            "cos": ((1 - turn**2) / (1 + turn**2)).astype(np.float32),
            "sin": (2 * turn / (1 + turn**2)).astype(np.float32),
            "v_scale": b.uniform(0.001, 0.02, kv_heads),
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": d,
            "eps": np.float32(1e-6),
        } | switches
        used = [name for name, value in switches.items() if value is not None]
        title = f"{heads} and {kv_heads} heads of {d}, {rotary} rotated"
        out.append(case(", ".join([title, *used]), reference.qkv_epilogue, **inputs))
        if i == 1:
            zero = inputs | {"y_i32": np.zeros_like(inputs["y_i32"]), "bias": None}
            out.append(case("zeros", reference.qkv_epilogue, **zero))
            large = inputs | {"a_scale": f32(1, 2.0**34)}
            out.append(case("outside the domain", reference.qkv_epilogue, **large))
    return out


def attention_weights() -> list[Case]:
    b = Bits("vectors/weights")
    f = reference.attention_weights
    every = np.ones((1, 40), np.bool_)
    scores = b.integers(-(127**2) * 64, 127**2 * 64, 3, 40).astype(np.int32)
    steps = -np.arange(40, dtype=np.int32)[None]
    return [
        case("random", f, scores_i32=scores, q_scale=b.uniform(0.001, 0.01, 3), k_scale=b.uniform(0.001, 0.01, 40),
             visible=np.arange(40)[None, :] <= np.array([[3], [20], [39]])),
        case("exponents that tie", f, scores_i32=steps, q_scale=f32(0.5), k_scale=np.ones(40, np.float32), visible=every),
        case("every shift", f, scores_i32=steps, q_scale=f32(32), k_scale=np.ones(40, np.float32), visible=every),
        case("equal scores", f, scores_i32=np.zeros((1, 40), np.int32), q_scale=f32(1),
             k_scale=b.uniform(1, 2, 40), visible=every),
        case("the largest score is hidden", f, scores_i32=np.array([[1, 9, 1, 0]], np.int32), q_scale=f32(10),
             k_scale=np.ones(4, np.float32), visible=np.array([[True, False, True, True]])),
        case("far apart", f, scores_i32=np.array([[127**2 * 256, -(127**2) * 256, 0]], np.int32), q_scale=f32(2.0**60),
             k_scale=f32(2.0**33, 2.0**33, 2.0**-27), visible=np.ones((1, 3), np.bool_)),
    ]  # fmt: skip


def attention() -> list[Case]:
    out = []
    for i, (heads, kv_heads, d, start, tokens) in enumerate(
        [(1, 1, 1, 0, 1), (3, 1, 12, 0, 5), (4, 2, 16, 7, 3), (2, 2, 5, 254, 4)]
    ):
        b = Bits(f"vectors/attention/{i}")
        keys = start + tokens
        inputs = {
            "q_i8": b.integers(-127, 127, tokens, heads, d).astype(np.int8),
            "q_scale": b.uniform(0.01, 0.1, tokens, heads),
            "k_i8": b.integers(-127, 127, keys, kv_heads, d).astype(np.int8),
            "k_scale": b.uniform(0.01, 0.1, keys, kv_heads),
            "v_i8": b.integers(-127, 127, keys, kv_heads, d).astype(np.int8),
            "start": start,
        }
        title = f"{heads} and {kv_heads} heads of {d}, {tokens} tokens at {start}"
        out.append(case(title, reference.attention_contiguous, **inputs))
    keys = 131_072
    full = {"q_i8": np.full((1, 1, 2), 127, np.int8), "k_i8": np.full((keys, 1, 2), 127, np.int8)}
    return [
        *out,
        case("every position, one score", reference.attention_contiguous, **full, q_scale=f32(1)[None],
             k_scale=f32(1)[None].repeat(keys, 0), v_i8=np.full((keys, 1, 2), -127, np.int8), start=keys - 1),
    ]  # fmt: skip


def attention_epilogue() -> list[Case]:
    b = Bits("vectors/attention_epilogue")
    f = reference.attention_epilogue
    row_sum = b.integers(16336, 10**6, 3, 4).astype(np.int32)
    o = b.integers(-127, 127, 3, 4, 5) * row_sum[:, :, None]
    extreme = np.array([[[127 * 16336 * 131072, -127 * 16336 * 131072]]], np.int64)
    return [
        case("random", f, o_i64=o, l_i32=row_sum, v_scale=b.uniform(0.01, 0.05, 2)),
        case("largest", f, o_i64=extreme, l_i32=np.array([[16336 * 131072]], np.int32), v_scale=f32(2.0**20)),
        case("integers that round", f, o_i64=np.array([[[2**24 + 1, 2**37 + 2**13, 2**37 + 3 * 2**13]]], np.int64),
             l_i32=np.array([[2**31 - 129]], np.int32), v_scale=f32(1)),
        case("zeros", f, o_i64=np.zeros((1, 1, 2), np.int64), l_i32=np.array([[16336]], np.int32), v_scale=f32(2.0**-20)),
    ]  # fmt: skip


def exp2() -> list[Case]:
    b = Bits("vectors/exp2")
    edges = [
        0.0,
        -0.0,
        0.5,
        -0.5,
        1.5,
        2.5,
        124.5,
        125.0,
        125.5,
        -125.0,
        -130.0,
        2.0**-20,
        -(2.0**-20),
        47.999996,
        1e30,
        -1e30,
    ]
    return [
        case("edges and halves", reference.exp2, z=f32(*edges)),
        case("every integer", reference.exp2, z=np.arange(-125, 126, dtype=np.float32)),
        case("random", reference.exp2, z=b.uniform(-64, 64, 200)),
    ]


def mlp_epilogue() -> list[Case]:
    f = reference.mlp_epilogue
    out = []
    for i, n in enumerate([1, 2, 12, 21, 64]):
        b = Bits(f"vectors/mlp/{i}")
        y = b.integers(-(2**20), 2**20, 2, 2 * n).astype(np.int32)
        out.append(
            case(
                f"random, width {n}",
                f,
                y_i32=y,
                a_scale=b.uniform(0.001, 0.01, 2),
                w_scale=b.uniform(1e-4, 1e-3, 2 * n),
            )
        )
    gates = [0, 1, -1, 33, -33, 34, -34, 100, -100, 10**6, -(10**6), 5]
    y = np.array([gates + [1000] * 12], np.int32)
    return [
        *out,
        case("the sigmoid's clamp", f, y_i32=y, a_scale=f32(1), w_scale=np.ones(24, np.float32)),
        case("zeros", f, y_i32=np.zeros((1, 4), np.int32), a_scale=f32(1), w_scale=np.ones(4, np.float32)),
        case("outside the domain", f, y_i32=np.array([[2**30, 2**30]], np.int32), a_scale=f32(1), w_scale=f32(1, 1)),
    ]


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "seed": 2**64 - 1},
    {"temperature": 1.0, "seed": -1},
    {"temperature": 2.0**-10},
    {"temperature": 100.0},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.5, "top_p": 0.95, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.0, "min_p": 0.5},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"logit_bias": ((5, 100.0), (3, -1.5))},
    {"temperature": 0.9, "repetition_penalty": 1.1, "frequency_penalty": -0.5, "logit_bias": ((0, 3.0),), "top_p": 0.8},
]


def sampler() -> list[Case]:
    b = Bits("vectors/sampler")
    rows = {
        "random": b.uniform(-8, 8, 50),
        "ties": (b.integers(-3, 3, 40) / 2).astype(np.float32),
        "one id": f32(-2),
        "equal": np.zeros(16, np.float32),
        "zeros of both signs": f32(-1, -0.0, 0, -0.0, -1, -1),
        "large": b.uniform(-(2.0**60), 2.0**60, 12),
    }
    out: list[Case] = []
    for i, changes in enumerate(SAMPLING):
        for name, row in rows.items():
            if any(t >= len(row) for t, _ in changes.get("logit_bias", ())):
                continue
            params, n = SamplingParams(**changes), len(row)
            prompt, output = [int(t) for t in b.integers(0, n - 1, 3)], [int(t) for t in b.integers(0, n - 1, 4)]
            tokens = [sample(row, params, prompt, output, p, i % 3) for p in range(7, 11)]
            described = {**asdict(params), "logit_bias": [list(pair) for pair in params.logit_bias]}
            out.append(
                {"name": f"{name}, {i}", "logits": encode(row), "params": described, "prompt_ids": prompt, "output_ids": output,
                 "positions": [7, 8, 9, 10], "choice": i % 3, "token_ids": tokens}
            )  # fmt: skip
    return out


def tensors_sha256(tensors: dict[str, Array]) -> str:
    """SHA-256 over the bytes of all tensors in file order."""
    digest = hashlib.sha256()
    for values in tensors.values():
        digest.update(values.tobytes())
    return digest.hexdigest()


def forward() -> list[Case]:
    out: list[Case] = []
    for name, changes in ARCHITECTURES.items():
        for seed in (0, 1):
            config = tiny_config(**changes)
            tensors = tiny_tensors(config, seed)
            model = LocalModel(config, tensors)
            ids = [int(t) for t in Bits(f"vectors/forward/{name}/{seed}").integers(0, config.vocab_size - 1, 40)]
            rows = model.run(ids)
            out.append(
                {
                    "name": f"{name}, seed {seed}",
                    "config": config.to_json(),
                    "tensors": f"tests/helpers.py: tiny_tensors(config, seed={seed})",
                    "seed": seed,
                    "tensors_sha256": tensors_sha256(tensors),
                    "token_ids": ids,
                    "logits_sha256": hashlib.sha256(rows.tobytes()).hexdigest(),
                    "first_row": encode(rows[0, :8]),
                    "last_row": encode(rows[-1, :8]),
                    "greedy": model.greedy(ids[:5], 16),
                }
            )
    return out


FILES: dict[str, tuple[Callable[[], list[Case]], str]] = {
    "gemm_i8": (gemm_i8, "section 3"),
    "residual_add": (residual_add, "sections 3 and 8"),
    "logits": (logits, "section 8"),
    "quantise": (quantise, "section 4"),
    "norm_quantise": (norm_quantise, "section 4"),
    "qkv_epilogue": (qkv_epilogue, "section 5"),
    "attention_weights": (attention_weights, "section 6"),
    "attention": (attention, "section 6"),
    "attention_epilogue": (attention_epilogue, "section 6"),
    "exp2": (exp2, "section 7"),
    "mlp_epilogue": (mlp_epilogue, "section 7"),
    "sampler": (sampler, "section 10"),
    "forward": (forward, "section 9"),
}


def contents(name: str) -> str:
    """The text of one file."""
    make, section = FILES[name]
    header = {
        "format": "veriattn-vectors",
        "spec_version": SPEC_VERSION,
        "operation": name,
        "source": f"docs/spec.md {section}",
        "generator": "tools/make_vectors.py over veriattn.spec",
        "encoding": "arrays: NumPy dtype, shape, little-endian bytes in hexadecimal, or `fill` for one element throughout",
    }
    lines = [json.dumps(c, separators=(",", ":"), allow_nan=False) for c in make()]
    head = json.dumps(header, indent=1)[:-2]
    return head + ',\n "cases": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    arguments = parser.parse_args()
    different = []
    for name in FILES:
        path, text = DIRECTORY / f"{name}.json", contents(name)
        if path.is_file() and path.read_text() == text:
            continue
        different.append(name)
        if not arguments.check:
            DIRECTORY.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    print(
        f"{len(FILES)} files, {len(different)} {'differ' if arguments.check else 'written'}: {', '.join(different) or '-'}"
    )
    return 1 if arguments.check and different else 0


if __name__ == "__main__":
    sys.exit(main())
